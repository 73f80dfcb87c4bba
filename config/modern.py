# A modern recipe instead of GPT-2's, given after any other config file:
#   python train.py config/train_shakespeare_char.py config/modern.py
#   torchrun --nproc_per_node=8 train.py config/train_gpt2.py config/modern.py
# docs/recipe.md measures its parts at 0.8M and 10M parameters, docs/speed.md a step at 124M. A
# published run at 124M (modded-nanogpt's train_gpt_simple.py, also with squared ReLU and capped
# logits) reaches 3.28 on FineWeb after 3,250 steps of 524,288 tokens.
optimizer = "muon"
learning_rate = 5e-3  # small models on few tokens prefer 1e-2
lr_schedule = "linear"
constant_share = 0.3
min_lr = 0.0
warmup_iters = 10

position = "rotary"
rms_norm = True
tied = False
