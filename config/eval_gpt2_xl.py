# Evaluates OpenAI's GPT-2 XL (1558M parameters) on OpenWebText, without training. nanoGPT
# published a validation loss of 2.54.
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = "gpt2-xl"
