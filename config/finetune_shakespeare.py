# Finetunes GPT-2 XL on Tiny Shakespeare in 20 steps: minutes on a GPU with 40 GB; with
# --init_from=gpt2 or gpt2-medium on smaller ones. The loss to expect has not been measured here.
out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "finetune-shakespeare"

dataset = "shakespeare"
init_from = "gpt2-xl"
always_save_checkpoint = False  # it overfits soon: keep the best

# 1 x 32 sequences of 1,024 tokens: 32,768 tokens per step, 9.2 steps per epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
