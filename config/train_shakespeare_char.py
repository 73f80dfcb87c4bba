# Trains a 10.7M character-level GPT on Tiny Shakespeare: minutes on a GPU. nanoGPT published a best
# validation loss of 1.4697. The model overfits after that; best.pt keeps the best.
out_dir = "out-shakespeare-char"
eval_interval = 250
eval_iters = 10  # all of val and a sixth of train; nanoGPT's 200, all of both, takes 7 % of a run
log_interval = 10
always_save_checkpoint = False

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small models bear higher rates
max_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens per step: average over more steps
warmup_iters = 100
