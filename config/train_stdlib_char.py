# Trains a 0.8M character-level GPT on the source of Python's standard library: about two minutes on
# 2 CPU cores, to a validation loss of about 1.64 (Python 3.11). It writes recognisable Python.
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
dropout = 0.0  # less than one pass over the data: it cannot overfit

learning_rate = 3e-3
max_iters = 1500
warmup_iters = 100
beta2 = 0.99
