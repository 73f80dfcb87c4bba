"""Train a GPT, on one CPU, one GPU, or many.

    python train.py config/train_shakespeare_char.py
    python train.py --init_from=resume --out_dir=out-shakespeare-char
    torchrun --nproc_per_node=8 train.py config/train_gpt2.py

Every loss is a mean cross-entropy in nats per token.
"""

import json
import math
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

import runtime
from configurator import configure, restore
from data.tokens import GPT2, Batches, TokenFile, atomic, read_meta
from model import GPT, GPTConfig, read_checkpoint

# --- settings ------------------------------------------------------------------------------------

# Output
out_dir = "out"                     # folder for checkpoints and log.jsonl
eval_interval = 2000                # steps between evaluations, each followed by a save
log_interval = 1                    # steps between log lines
eval_iters = 200                    # evaluate at most this many batches per split
eval_only = False                   # evaluate once, write nothing, stop
always_save_checkpoint = True       # False: ckpt.pt is the best model and last.pt the newest
init_from = "scratch"               # scratch, resume, gpt2, gpt2-medium, -large, -xl, a folder
# Weights & Biases
wandb_log = False                   # send the log there too
wandb_project = "owt"               # its project
wandb_run_name = "gpt2"             # its name for this run
# Data
dataset = "openwebtext"             # a folder in data/
gradient_accumulation_steps = 5 * 8 # micro-batches per step, over all processes
batch_size = 12                     # sequences per micro-batch
block_size = 1024                   # tokens of context
# Model
n_layer = 12                        # blocks
n_head = 12                         # attention heads per block
n_embd = 768                        # channels; a multiple of n_head
dropout = 0.0                       # 0 for pretraining; try 0.1 and more when data are few
bias = False                        # biases in linear and normalisation layers
# Optimizer
learning_rate = 6e-4                # the highest
max_iters = 600000                  # steps, each one update
weight_decay = 1e-1                 # on matrices
beta1 = 0.9                         # AdamW: decay of the mean gradient
beta2 = 0.95                        # AdamW: decay of the mean squared gradient
grad_clip = 1.0                     # longest gradient; 0: no limit
# Schedule
decay_lr = True                     # warm up, then decay; False: learning_rate throughout
warmup_iters = 2000                 # steps of linear warm-up
lr_decay_iters: int | None = None   # step at which min_lr is reached; None: max_iters
min_lr: float | None = None         # the lowest; None: a tenth of learning_rate (Chinchilla)
# System
seed = 1337                         # of the initial weights, the batches and dropout
backend = "nccl"                    # of the process group on GPUs; CPUs use gloo
device = "auto"                     # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                      # auto, float32, bfloat16, float16 (scales the loss)
compile: bool | str = "auto"        # auto, True, False: torch.compile, where it works

ROOT = Path(__file__).resolve().parent


def check_settings(world_size):
    """Raise ValueError with one line for each setting that cannot work."""
    from_1 = "batch_size gradient_accumulation_steps block_size n_layer n_head n_embd"
    from_1 = f"{from_1} eval_interval log_interval eval_iters".split()
    from_0 = "learning_rate weight_decay grad_clip warmup_iters max_iters seed".split()
    faults = [f"{k}={globals()[k]} must be at least 1" for k in from_1 if globals()[k] < 1]
    faults += [f"{k}={globals()[k]} must be at least 0" for k in from_0 if globals()[k] < 0]
    for key in ("dropout", "beta1", "beta2"):
        if not 0 <= globals()[key] < 1:
            faults.append(f"{key}={globals()[key]} must be at least 0 and below 1")
    if n_head > 0 and n_embd % n_head:
        faults.append(f"n_embd={n_embd} is no multiple of n_head={n_head}")
    sequences = batch_size * gradient_accumulation_steps
    if sequences % world_size:
        fits = ", ".join(str(n) for n in range(1, 2 * world_size) if sequences % n == 0)
        step = f"batch_size * gradient_accumulation_steps = {sequences} sequences per step"
        faults.append(f"{step} divide among {fits} processes, not among {world_size}")
    last = max_iters if lr_decay_iters is None else lr_decay_iters
    if decay_lr and last <= warmup_iters:
        late = f"warmup_iters={warmup_iters} leaves no step to decay in"
        faults.append(f"{late} before lr_decay_iters={last}; lower --warmup_iters")
    if faults:
        raise ValueError("\n".join(faults))


# --- data ----------------------------------------------------------------------------------------


def load_data():
    """Return the two splits, and what tells how they were encoded."""
    folder = ROOT / "data" / dataset
    meta = read_meta(folder)
    return {s: TokenFile(folder / f"{s}.bin", meta, block_size) for s in ("train", "val")}, meta


def check_vocabulary(meta, vocab_size):
    """Raise ValueError unless a model of `vocab_size` can be trained on data encoded as `meta`."""
    if meta["vocab_size"] != vocab_size and not (meta == GPT2 and vocab_size >= 50257):
        what = f"dataset {dataset} has a vocabulary of {meta['vocab_size']}, the model {vocab_size}"
        raise ValueError(f"{what}; prepare the dataset with the model's tokenizer")


# --- model and optimizer -------------------------------------------------------------------------


def build_model(checkpoint, meta, run):
    """Return the bare model on the device of `run`, as `init_from` says."""
    if init_from == "scratch":
        torch.manual_seed(seed)
        fields = (block_size, meta["vocab_size"], n_layer, n_head, n_embd, dropout, bias)
        return GPT(GPTConfig(*fields)).to(run.device)
    if init_from == "resume":
        if checkpoint.get("tokenizer", meta) != meta:
            raise ValueError(f"dataset {dataset} is encoded unlike the checkpoint's data")
        config = GPTConfig.restored(checkpoint["model_args"], dropout)
        check_vocabulary(meta, config.vocab_size)
        for name in ("n_layer", "n_head", "n_embd", "bias"):
            if globals()[name] != getattr(config, name):
                raise ValueError(f"the checkpoint has {name}={getattr(config, name)} and keeps it")
        model = GPT.from_state(config, checkpoint["model"], run.device)
    else:
        if init_from.startswith("gpt2"):
            check_vocabulary(meta, 50257)  # before anything is downloaded
        model = GPT.from_pretrained(init_from, dropout, run.device)
        check_vocabulary(meta, model.config.vocab_size)
    if block_size > model.config.block_size:
        most = model.config.block_size
        raise ValueError(f"block_size={block_size} exceeds the model's {most}; lower --block_size")
    model.crop_block_size(block_size)
    return model


def build_state(checkpoint, meta, run):
    """Return the State that training starts from: a new one, or that of `checkpoint`."""
    model = build_model(checkpoint, meta, run)
    rates = weight_decay, learning_rate, (beta1, beta2)
    optimizer = model.configure_optimizers(*rates, run.device.type)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    if not checkpoint:
        return State(model, optimizer, scaler, meta, 0, math.inf)
    saved = checkpoint["optimizer"]
    for ours, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        theirs |= {key: value for key, value in ours.items() if key != "params"}  # settings rule
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    for index, moments in saved["state"].items():  # only a cropped position table is shorter
        moments |= {k: v[: shapes[index][0]] for k, v in moments.items() if v.dim()}
    optimizer.load_state_dict(saved)
    if checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    step, best = checkpoint["iter_num"], float(checkpoint.get("best_val_loss", math.inf))
    return State(model, optimizer, scaler, meta, step, best)


# --- schedule ------------------------------------------------------------------------------------


def learning_rate_at(step):
    """Return the learning rate of `step`: linear warm-up, half a cosine to min_lr, constant."""
    if not decay_lr:
        return learning_rate
    lowest = learning_rate / 10 if min_lr is None else min_lr
    last = max_iters if lr_decay_iters is None else lr_decay_iters
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    progress = min(1, (step - warmup_iters) / (last - warmup_iters))
    return lowest + (learning_rate - lowest) * (1 + math.cos(math.pi * progress)) / 2


# --- one step ------------------------------------------------------------------------------------


def train_step(model, optimizer, scaler, batches, step, run):
    """Make update `step`; return this rank's mean loss and the gradient norm, left on the device.

    The batches are a function of (seed, step), dropout is one of (seed, step, rank).
    """
    key = np.random.SeedSequence([seed, step, run.rank])
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step)
    micro_batches, mean_loss = batches(step), 0.0
    share = sum(map(len, micro_batches))  # sequences of this rank
    for count, tokens in enumerate(micro_batches, start=1):
        model.require_backward_grad_sync = count == len(micro_batches)  # DDP averages only then
        tokens = tokens.to(run.device, non_blocking=True)
        with run.autocast():
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
        loss = loss * (len(tokens) / share)
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, grad_norm


def try_step(model, batches, step, run):
    """Run a forward and backward that change nothing, so that a compiler shows what it can do."""
    tokens = batches(step)[0].to(run.device)
    model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    model.zero_grad(set_to_none=True)


# --- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, data, run):
    """Return the mean loss per token of each split; every rank must call it and takes a share.

    All non-overlapping windows count, or eval_iters * batch_size of them, evenly spaced.
    """
    model.eval()
    losses = {}
    for split, tokens in data.items():
        windows = (len(tokens.ids) - 1) // block_size
        count = min(windows, eval_iters * batch_size)
        starts = (np.arange(count) * windows // count * block_size)[run.rank :: run.world_size]
        sums = []
        for first in range(0, len(starts), batch_size):
            ids = tokens.windows(starts[first :][:batch_size], block_size + 1).to(run.device)
            with run.autocast():
                sums.append(model(ids[:, :-1], ids[:, 1:])[1] * len(ids))
        losses[split] = run.sum(sum(loss.item() for loss in sums)) / count
    model.train()
    return losses


# --- checkpoint ----------------------------------------------------------------------------------


@dataclass
class State:
    """All that a run is at a step, beside its settings: what a checkpoint saves and restores."""

    model: GPT  # the bare one: neither compiled nor wrapped names reach the file
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meta: dict  # of the dataset, so that sample.py needs no dataset
    step: int  # updates made
    best_val_loss: float


def open_checkpoint(config):
    """Return the newest checkpoint in out_dir, its settings now this run's; and what changed."""
    paths = [path for path in (Path(out_dir, "last.pt"), Path(out_dir, "ckpt.pt")) if path.exists()]
    if not paths:
        raise ValueError(f"no ckpt.pt in {out_dir} to resume; name its folder with --out_dir")
    checkpoint = max(map(read_checkpoint, paths), key=lambda found: found["iter_num"])
    if "optimizer" not in checkpoint:
        raise ValueError(f"the checkpoint in {out_dir} holds no optimizer state to resume with")
    saved = {**checkpoint["config"], **checkpoint["model_args"]}
    return checkpoint, restore(globals(), saved, config, ("out_dir", "init_from", "eval_only"))


def set_aside():
    """Move what an older run left in out_dir to out_dir/previous, its own `previous` included."""
    names = "ckpt.pt", "last.pt", "log.jsonl", "previous"
    old = [Path(out_dir, name) for name in names if Path(out_dir, name).exists()]
    if any(path.suffix for path in old):
        aside = Path(out_dir, "previous.new")
        aside.mkdir(exist_ok=True)
        for path in old:
            path.rename(aside / path.name)
        aside.rename(Path(out_dir, "previous"))
        print(f"moved the older run in {out_dir} to {Path(out_dir, 'previous')}")


def save(state, step, losses, config, run):
    """Write the state at `step`, on rank 0; ValueError rather than save a broken model.

    The best goes to ckpt.pt first: last.pt has its loss too, so a kill in between costs nothing.
    """
    if not math.isfinite(losses["train"] + losses["val"]):
        raise ValueError(f"step {step}: the loss is not finite; the last checkpoint is kept")
    improved, began = losses["val"] < state.best_val_loss, state.step == step < max_iters
    if run.rank > 0 or eval_only or began:  # what is not saved does not count as the best
        return
    state.step, state.best_val_loss = step, min(losses["val"], state.best_val_loss)
    names = ["ckpt.pt"] if always_save_checkpoint else ["ckpt.pt"] * improved + ["last.pt"]
    checkpoint = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "model_args": state.model.config.saved(),
        "iter_num": state.step,
        "best_val_loss": state.best_val_loss,
        "config": config,
        "tokenizer": state.meta,
    }
    for name in names:
        with atomic(Path(out_dir, name)) as file:
            torch.save(checkpoint, file)


# --- log -----------------------------------------------------------------------------------------


def open_log(config, run):
    """Return a function that appends a dict to log.jsonl, and to wandb if asked for; on rank 0."""
    if run.rank > 0 or eval_only:
        return lambda entry: None
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    if wandb_log:
        try:
            import wandb
        except ImportError:
            raise ValueError("wandb_log=True needs wandb: pip install -e '.[wandb]'") from None
        wandb.init(project=wandb_project, name=wandb_run_name, config=config, dir=out_dir)
    if init_from != "resume":
        set_aside()

    def write(entry):
        with open(Path(out_dir, "log.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if wandb_log:
            wandb.log(entry)

    chosen = {"device": str(run.device), "dtype": str(run.dtype)[6:], "compile": run.compile}
    write({"settings": {**config, **chosen, "world_size": run.world_size}})
    return write


def log_step(step, loss, grad_norm, seconds, model, run, log):
    """Print and record the figures of a step, `seconds` long. Every rank must call it."""
    loss, grad_norm = run.sum(loss.item()) / run.world_size, grad_norm.item()
    tokens = batch_size * gradient_accumulation_steps * block_size
    mfu = model.estimate_mfu(tokens / run.world_size, seconds, run.peak_flops())
    speed = f"{tokens / seconds:,.0f} tok/s" + (f", mfu {mfu:.2%}" if mfu else "")
    left = timedelta(seconds=round((max_iters - step - 1) * seconds))
    head = f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms"
    run.say(f"{head}, {speed}, norm {grad_norm:.2f}, {left} left")
    rates = {"lr": learning_rate_at(step), "tokens_per_second": tokens / seconds, "mfu": mfu}
    log({"iter": step, "loss": loss, "grad_norm": grad_norm, "ms": seconds * 1000, **rates})


def describe(run, state, data):
    """Print what will run: hardware, data, model and steps."""
    model, sizes = state.model, [f"{name} {len(split.ids):,}" for name, split in data.items()]
    tokens = batch_size * gradient_accumulation_steps * block_size
    run.say(f"hardware: {run.about}")
    run.say(f"data: {dataset}, {', '.join(sizes)} tokens, vocabulary {model.config.vocab_size:,}")
    millions, megaflops = model.get_num_params() / 1e6, model.flops_per_token() / 1e6
    run.say(f"model: {millions:.2f}M parameters, {megaflops:,.0f} MFLOPs per token")
    run.say(f"steps: {state.step} to {max_iters}, of {tokens:,} tokens each")


# --- main ----------------------------------------------------------------------------------------


@runtime.one_line_errors()
def main(config):
    checkpoint, changes = open_checkpoint(config) if init_from == "resume" else (None, [])
    run = runtime.start(device, dtype, compile, backend)
    for line in changes:
        run.say(line)
    check_settings(run.world_size)
    data, meta = load_data()
    state = build_state(checkpoint, meta, run)
    batches = Batches(data["train"], gradient_accumulation_steps, batch_size, block_size, seed, run)
    runtime.compile_model(state.model, run, lambda: try_step(state.model, batches, state.step, run))
    model = runtime.wrap(state.model, run)
    log = open_log(config, run)
    describe(run, state, data)
    began, since = run.now(), state.step
    for step in range(state.step, max(state.step, max_iters) + 1):
        done = step >= max_iters or eval_only
        if step % eval_interval == 0 or done:
            paused = run.now()
            losses = evaluate(state.model, data, run)
            run.say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
            log({"iter": step, "train/loss": losses["train"], "val/loss": losses["val"]})
            save(state, step, losses, config, run)
            began += run.now() - paused  # the time of a step leaves evaluations and saves out
        if done:
            break
        loss, grad_norm = train_step(model, state.optimizer, state.scaler, batches, step, run)
        if step % log_interval == 0:
            seconds = (run.now() - began) / (step + 1 - since)  # the one sync of the loop
            log_step(step, loss, grad_norm, seconds, state.model, run, log)
            began, since = run.now(), step + 1
        elif run.rank == 0 and sys.stdout.isatty():
            print(f"step {step} of {max_iters}", end="\r", flush=True)  # till the next line


if __name__ == "__main__":
    main(configure(globals()))
