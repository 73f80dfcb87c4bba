# Evaluates OpenAI's GPT-2 (124M parameters) on OpenWebText, without training. nanoGPT published a
# validation loss of 3.12.
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = "gpt2"
