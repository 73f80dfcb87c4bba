# Trains a 0.8M character-level GPT on the source of Python's standard library with the recipe of
# config/modern.py: about 90 seconds on 2 CPU cores, to a validation loss of about 1.39 (Python
# 3.11). It writes recognisable Python.
out_dir = "out-stdlib-char"
eval_interval = 160
eval_iters = 13
log_interval = 20
always_save_checkpoint = False

dataset = "stdlib_char"
gradient_accumulation_steps = 1
batch_size = 24
block_size = 128
batch_ramp_iters = 300  # a step has 8 sequences at first
batch_ramp_start = 0.33

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # less than one pass over the data: it cannot overfit
position = "rotary"
rms_norm = True
tied = False

optimizer = "muon"
learning_rate = 1.6e-2
max_iters = 640
lr_schedule = "linear"
constant_share = 0.3
min_lr = 0.0
warmup_iters = 10
