# nanoGPT's result on an A100, a loss of 1.4697 on Tiny Shakespeare, on 2 CPU cores in 4.5 minutes:
# 1.463 on the complete validation split, in windows of 256 characters. See README.md.
out_dir = "out-race-a100"
eval_interval = 1000000  # before and after
eval_iters = 28  # 28 x 16 windows: the complete validation split
log_interval = 20
always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256
batch_ramp_iters = 400  # a step has 4 sequences at first
batch_ramp_start = 0.25

n_layer = 4
n_head = 3
n_embd = 192
position = "rotary"
rms_norm = True
tied = False

optimizer = "muon"
learning_rate = 1e-2
weight_decay = 0.3  # 2.3 passes over the text; with 0.1, longer runs overfit
max_iters = 720
lr_schedule = "linear"
constant_share = 0.3
min_lr = 0.0
warmup_iters = 10

device = "cpu"
compile = False  # costs a minute, and needs a compiler
