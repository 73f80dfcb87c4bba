"""Train a GPT, on one CPU, one GPU, or many.

    python train.py config/train_shakespeare_char.py
    python train.py --init_from=resume --out_dir=out-shakespeare-char
    torchrun --nproc_per_node=8 train.py config/train_gpt2.py

Every loss is a mean cross-entropy in nats per token.
"""

import math
from pathlib import Path

import torch

from configurator import configure, range_faults, take_over
from data.batches import Batches
from data.tokenizer import check_tokenizer
from data.tokens import check_vocabulary, open_dataset, send
from engine.checkpoint import State, check_shape, checkpoint_to_resume, crop, model_config
from engine.fast import recompute_activations, use_fast_parts
from engine.folder import take_folder
from engine.health import Health
from engine.huggingface import load_pretrained
from engine.log import finish
from engine.parallel import make_mesh, make_model, unshard, wrap
from engine.process import UserError, one_line_errors, user_error, user_path
from engine.runtime import compile_model, start_runtime
from engine.size import note_memory
from model import GPT, GPTConfig

# --- settings ------------------------------------------------------------------------------------

# Output
out_dir = "out"                     # folder for checkpoints and log.jsonl
eval_interval = 2000                # steps between evaluations, each followed by a save
log_interval = 1                    # steps between log lines
eval_iters = 200                    # evaluate at most this many batches per split
health_interval = 0                 # steps between lines on each layer in log.jsonl; 0: none
eval_only = False                   # evaluate once, write nothing, stop
patience = 0                        # stop after so many without a better model; 0: never
always_save_checkpoint = True       # ckpt.pt is the newest model; False: the best one
save_interval = 0.0                 # minutes after which to save between evaluations; 0: never
sharded_save = False                # a checkpoint is a folder that all ranks write
init_from = "scratch"               # scratch, resume, gpt2, gpt2-xl, OWNER/NAME, a folder
auto_resume = False                 # resume where out_dir holds a checkpoint, else use init_from
checkpoint_file: str | None = None  # resume from this file in out_dir; None: from the newest
new_data = False                    # resume although the dataset has changed
# Weights & Biases
wandb_log = False                   # send losses and speeds there too
wandb_project = "owt"               # project that the run belongs to
wandb_run_name = "gpt2"             # name of the run
# Data
dataset = "openwebtext"             # name of a folder in data/
gradient_accumulation_steps = 5 * 8 # micro-batches per step, over all processes
batch_size = 12                     # sequences per micro-batch
block_size = 1024                   # tokens of context
sampling = "random"                 # windows: random, or each once per epoch: epochs
# Model
n_layer = 12                        # transformer blocks
n_head = 12                         # attention heads per block
n_embd = 768                        # channels; a multiple of n_head
dropout = 0.0                       # 0 for pretraining; try 0.1 and more when data are few
bias = False                        # biases in linear and normalisation layers
position = "learned"                # how the order of tokens is known: learned, rotary, alibi
rms_norm = False                    # RMSNorm, also of embeddings, queries and keys; no LayerNorm
tied = True                         # one matrix is token table and head
# Optimizer
optimizer = "adamw"                 # adamw, or muon for the matrices of the blocks
learning_rate = 6e-4                # at its highest, after the warm-up
max_iters = 600000                  # steps, each one update
weight_decay = 1e-1                 # of matrices only
beta1 = 0.9                         # AdamW: decay of the mean gradient
beta2 = 0.95                        # AdamW: decay of the mean squared gradient
eps = 1e-8                          # AdamW: added to the root of that mean
grad_clip = 1.0                     # scale longer gradients down to this norm; 0: never
max_bad_steps = 5                   # stop after so many in a row without a finite gradient
rollbacks = 0                       # times to undo a lasting rise of the loss, on other batches
# Schedule
decay_lr = True                     # warm up, then decay; False: learning_rate throughout
warmup_iters = 2000                 # steps of linear warm-up
lr_schedule = "cosine"              # shape of the decay: cosine, linear
constant_share = 0.0                # share of the steps after the warm-up before the decay begins
lr_decay_iters: int | None = None   # step at which min_lr is reached; None: max_iters
min_lr: float | None = None         # after the decay; None: a tenth of learning_rate, linear: 0
batch_ramp_iters = 0                # steps over which a step's sequences grow to their number
batch_ramp_start = 0.25             # the share of them that it starts with
# System
seed = 1337                         # of the initial weights, the batches and dropout
backend = "nccl"                    # of the process group on GPUs; CPUs use gloo
fsdp: bool | str = False            # shard weights and optimizer; hybrid: within a machine only
activation_checkpointing = False    # keep less for the backward pass, compute blocks twice
fast_parts = True                   # compute with engine/fast.py; False: as PyTorch does
timeout = 600.0                     # seconds that processes wait for one another
device = "auto"                     # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                      # auto, float32, bfloat16, float16 (scales the loss)
compile: bool | str = "auto"        # auto, True, False: torch.compile, where it works

MOST = 2**31
RANGES = {  # setting -> the least, and what it must stay below
    **dict.fromkeys(("eval_interval", "log_interval", "eval_iters", "max_bad_steps"), (1, MOST)),
    **dict.fromkeys(("gradient_accumulation_steps", "batch_size", "block_size"), (1, MOST)),
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "timeout"), (1, MOST)),
    **dict.fromkeys(("learning_rate", "min_lr", "weight_decay", "grad_clip"), (0, MOST)),
    **dict.fromkeys(("max_iters", "warmup_iters", "lr_decay_iters"), (0, MOST)),
    **dict.fromkeys(("batch_ramp_iters", "health_interval", "patience"), (0, MOST)),
    **dict.fromkeys(("save_interval", "rollbacks", "eps"), (0, MOST)),
    **dict.fromkeys(("dropout", "beta1", "beta2", "constant_share", "batch_ramp_start"), (0, 1)),
    "seed": (0, 2**63),
}
CHOICES = {
    "sampling": ("random", "epochs"),
    "position": ("learned", "rotary", "alibi"),
    "optimizer": ("adamw", "muon"),
    "lr_schedule": ("cosine", "linear"),
}
# A resumed run takes these from its command, all others from the checkpoint.
OF_THE_COMMAND = "out_dir", "init_from", "eval_only", "auto_resume", "checkpoint_file", "new_data"
ROOT = Path(__file__).resolve().parent


def check_settings(config):
    """Raise UserError with a line for each setting that cannot work, or not with the others."""
    faults = range_faults(config)
    faults += [
        f"{name}={config[name]}: choose {', '.join(choices[:-1])} or {choices[-1]}"
        for name, choices in CHOICES.items()
        if config[name] not in choices
    ]
    if not faults and n_embd % n_head:
        faults.append(f"n_embd={n_embd} is no multiple of n_head={n_head}")
    if not faults and position == "rotary" and n_embd // n_head % 2:
        faults.append(f"position=rotary needs an even n_embd / n_head, not {n_embd // n_head}")
    if decay_lr and last_decay_step() <= warmup_iters:
        faults.append(
            f"warmup_iters={warmup_iters} leaves no step to decay in before "
            f"lr_decay_iters={last_decay_step()}; lower --warmup_iters"
        )
    if decay_lr and lowest_rate() > learning_rate:
        faults.append(f"min_lr={min_lr} exceeds learning_rate={learning_rate}; lower --min_lr")
    if faults:
        raise UserError("\n".join(faults))


# --- data ----------------------------------------------------------------------------------------


def load_data(config, runtime):
    """Return the two splits, the batches of the first, and what tells how they were encoded."""
    data = open_dataset(ROOT / "data" / dataset, block_size)
    return data, Batches(data["train"], config, runtime), data["train"].meta


# --- model and optimizer -------------------------------------------------------------------------


def build_model(saved, meta, config, device, mesh=None):
    """Return the bare model on `device`: that of the checkpoint `saved`, or as init_from says.

    It is sharded over the ranks of `mesh`, if there is one.
    """
    if saved:
        shape = model_config(GPTConfig, saved, config)
        weights = saved["model"]
    elif init_from == "scratch":
        fields = {name: config[name] for name in vars(GPTConfig()) if name in config}
        shape = GPTConfig(**fields, vocab_size=meta["vocab_size"])
        weights = None
    else:
        if init_from.startswith("gpt2"):  # before anything is downloaded
            check_shape(init_from, GPTConfig(), config)
            check_vocabulary(dataset, meta, 50257)
        check_tokenizer(user_path(init_from), dataset, meta)
        fields, weights = load_pretrained(init_from)
        shape = GPTConfig(**fields, dropout=dropout)
        check_shape(init_from, shape, config)
    check_vocabulary(dataset, meta, shape.vocab_size)
    shape = crop(shape, weights, block_size)
    return make_model(GPT, shape, weights, seed, device, mesh)


def build_state(saved, meta, data, config, runtime):
    """Return the State that training starts from: a new one, or that of the checkpoint `saved`."""
    mesh = make_mesh(fsdp, timeout, runtime)
    model = build_model(saved, meta, config, runtime.device, mesh)
    for tokens in data.values():
        tokens.limit(model.config.vocab_size)
    if fast_parts:
        use_fast_parts(model, runtime.device)
    if activation_checkpointing:
        recompute_activations(model.transformer.h, dropout, runtime.device)
    updater = model.configure_optimizers(
        weight_decay, learning_rate, (beta1, beta2), runtime.device.type, optimizer, eps
    )
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    state = State(model, updater, scaler, meta, {name: data[name].digest() for name in data})
    state.restore(saved, config, runtime)
    note_memory(model, config, runtime)
    return state


def prepare_model(state, batches, runtime):
    """Return state.model ready to train: averaging over ranks, compiled where that works."""
    model = wrap(state.model, runtime)

    def try_out(average):
        """Run a forward and backward pass that change nothing; `average` the gradients or not."""
        tokens = send(batches(state.step)[0], runtime.device)
        model.require_backward_grad_sync = average
        model(tokens[:, :-1], tokens[:, 1:], loss_only=True).backward()
        model.zero_grad(set_to_none=True)

    # The compiler works at the first pass, and may fail on one rank: the others must not wait.
    compile_model(state.model, runtime, lambda: try_out(average=False))
    if model is not state.model and not eval_only:  # DDP orders its sums at the first of them
        with runtime.autocast():
            try_out(average=True)  # so that a resume sums as the run that never stopped
    return model


# --- schedule ------------------------------------------------------------------------------------


def last_decay_step():
    return max_iters if lr_decay_iters is None else lr_decay_iters


def lowest_rate():
    if min_lr is not None:
        return min_lr
    return learning_rate / 10 if lr_schedule == "cosine" else 0.0  # Chinchilla, arXiv:2203.15556


def learning_rate_at(step):
    """Return the learning rate of `step`: linear warm-up, constant, decay to min_lr, constant."""
    if not decay_lr:
        return learning_rate
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    lowest, last = lowest_rate(), last_decay_step()
    begin = warmup_iters + constant_share * (last - warmup_iters)
    progress = min(1, max(0, step - begin) / (last - begin))
    left = (1 + math.cos(math.pi * progress)) / 2 if lr_schedule == "cosine" else 1 - progress
    return lowest + (learning_rate - lowest) * left


# --- one step ------------------------------------------------------------------------------------


def train_step(model, state, batches, step, runtime):
    """Make update `step`; return the loss and the gradient norm, left on the device.

    The mean of the ranks' losses is that over all sequences. The batches are a function of (seed,
    step), dropout is one of (seed, step, rank). Without a finite gradient there is no update.
    """
    runtime.seed(seed, step, runtime.rank)
    optimizer, scaler = state.optimizer, state.scaler
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step)
    place = step + state.watch.skipped  # among the batches
    micro_batches, mean_loss = batches(place), 0.0
    sequences = batches.sequences_at(place) / runtime.world_size  # of a rank, on average
    for count, tokens in enumerate(micro_batches, start=1):
        model.require_backward_grad_sync = count == len(micro_batches)  # DDP averages only then
        tokens = send(tokens, runtime.device)
        with runtime.autocast():
            loss = model(tokens[:, :-1], tokens[:, 1:], loss_only=True)
        loss = loss * (len(tokens) / sequences)
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = unshard(
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    )
    # On CPU and CUDA the fused AdamW itself does nothing where found_inf is 1; else read it here.
    optimizer.found_inf = (~grad_norm.isfinite()).float()
    if runtime.device.type in ("cpu", "cuda") or not optimizer.found_inf:  # mps: syncs the device
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, grad_norm


# --- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, data, runtime):
    """Return the mean loss per token of each split; every rank must call it and takes a share.

    All non-overlapping windows count, or eval_iters * batch_size of them, evenly spaced.
    """
    model.eval()
    losses = {}
    for split, tokens in data.items():
        starts = tokens.evenly_spaced(block_size, most=eval_iters * batch_size)
        together = batch_size * runtime.world_size  # windows that all ranks take at once
        sums = []
        for first in range(0, len(starts), together):
            mine = starts[first + runtime.rank : first + together : runtime.world_size]
            # A rank with no window left runs one that counts 0 times: a sharded model needs all.
            windows = tokens.windows(mine if len(mine) else starts[:1], block_size + 1)
            ids = send(windows, runtime.device)
            with runtime.autocast():
                loss = model(ids[:, :-1], ids[:, 1:], loss_only=True)
            sums.append(loss * len(mine))
        losses[split] = runtime.reduce("sum", sum(loss.item() for loss in sums)) / len(starts)
    model.train()
    return losses


# --- checkpoint and log --------------------------------------------------------------------------


def load_checkpoint(config):
    """Return the checkpoint to resume from, None for a new run, and lines on changed settings.

    `config` becomes that of the resumed run.
    """
    saved = checkpoint_to_resume(config)
    settings = {**saved["config"], **saved["model_args"]} if saved else {}
    with user_error("the checkpoint's settings", ValueError):
        return saved, take_over(config, settings, OF_THE_COMMAND)


# --- main ----------------------------------------------------------------------------------------


@one_line_errors
def main(config):
    saved, changes = load_checkpoint(config)
    globals().update(config)  # on resume, the checkpoint's settings
    check_settings(config)
    runtime = start_runtime(
        device, dtype, compile, backend, timeout,
        lenient={"device", "dtype"} - config.flags if saved else (),  # perhaps another machine's
    )  # fmt: skip
    data, batches, meta = load_data(config, runtime)
    state = build_state(saved, meta, data, config, runtime)
    model = prepare_model(state, batches, runtime)
    keeper, log = take_folder(saved, state, config, runtime)
    del saved  # and with it the mapping of its file
    log.begin(changes, data, state.step, batches, learning_rate_at(max_iters))
    health = Health(state, config, runtime)

    step = state.step
    while True:
        stopped = runtime.stop_requested()
        done = stopped or eval_only or step >= max_iters
        evaluates = not stopped and (done or step % eval_interval == 0)

        if done or evaluates or keeper.is_due():
            with log.timer.paused():
                losses = evaluate(state.model, data, runtime) if evaluates else {}
                log.evaluation(step, losses)
                is_saved = keeper.save(state, step, losses)
            stopped = stopped or runtime.stop_requested()  # while it evaluated
        if done or stopped or keeper.gave_up:
            break

        loss, grad_norm = train_step(model, state, batches, step, runtime)
        health.add(step, loss, grad_norm, log)
        log.step(step, loss, grad_norm, learning_rate_at(step))
        step = health.check(step + 1, keeper, log)  # an earlier one, where a rise is undone

    finish(stopped, is_saved, keeper, log)


if __name__ == "__main__":
    main(configure(globals()))
