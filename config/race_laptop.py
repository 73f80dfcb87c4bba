# nanoGPT's laptop result, a loss of 1.90 on Tiny Shakespeare's complete validation split, in 12
# seconds on 2 CPU cores instead of 74: README.md. With --max_iters=900 it takes nanoGPT's time, and
# reaches 1.58.
out_dir = "out-race-laptop"
eval_interval = 1000000  # before and after
eval_iters = 37  # 37 x 48 windows: the complete validation split
log_interval = 20
always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 48
block_size = 64
batch_ramp_iters = 560  # a step has 10 sequences at first, 24 at the end
batch_ramp_start = 0.2

n_layer = 2
n_head = 2
n_embd = 128
position = "rotary"
rms_norm = True
tied = False

optimizer = "muon"
learning_rate = 2e-2
max_iters = 200
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10

device = "cpu"
compile = False  # it would take longer than the run
