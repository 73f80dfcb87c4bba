# Trains GPT-2 124M on OpenWebText to a loss of about 2.85. nanoGPT published 4 days on 8 A100 40GB:
#   torchrun --nproc_per_node=8 train.py config/train_gpt2.py
wandb_log = False  # nanoGPT's file has True; it needs an account
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 x 1024 tokens x 40 micro-batches = 491,520 tokens per step, on however many GPUs share them
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 295 billion tokens in all
max_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
