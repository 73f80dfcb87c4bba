# Evaluates OpenAI's GPT-2 large (774M parameters) on OpenWebText, without training. nanoGPT
# published a validation loss of 2.67.
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = "gpt2-large"
