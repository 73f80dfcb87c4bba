# Trains a small character-level GPT on the source of Python's standard library.
out_dir = "out-stdlib-char"
eval_interval = 250
eval_iters = 20
log_interval = 50
always_save_checkpoint = False

dataset = "stdlib_char"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 2e-3
max_iters = 1500
beta2 = 0.99
warmup_iters = 100
