"""Train a GPT, on one CPU, one GPU, or many.

    python train.py config/train_shakespeare_char.py
    python train.py --init_from=resume --out_dir=out-shakespeare-char
    torchrun --nproc_per_node=8 train.py config/train_gpt2.py

Every loss is a mean cross-entropy in nats per token.
"""

import json
import math
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch

import runtime
from configurator import configure, restore
from data.tokens import GPT2, Batches, TokenFile, atomic, read_meta, send
from model import GPT, GPTConfig, read_checkpoint

# --- settings ------------------------------------------------------------------------------------

# Output
out_dir = "out"                     # folder for checkpoints and log.jsonl
eval_interval = 2000                # steps between evaluations, each followed by a save
log_interval = 1                    # steps between log lines
eval_iters = 200                    # evaluate at most this many batches per split
eval_only = False                   # evaluate once, write nothing, stop
always_save_checkpoint = True       # False: ckpt.pt is the best model and last.pt the newest
init_from = "scratch"               # scratch, resume, auto (either), gpt2, gpt2-xl, a folder
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
max_bad_steps = 5                   # stop after so many in a row without a finite gradient
# Schedule
decay_lr = True                     # warm up, then decay; False: learning_rate throughout
warmup_iters = 2000                 # steps of linear warm-up
lr_decay_iters: int | None = None   # step at which min_lr is reached; None: max_iters
min_lr: float | None = None         # the lowest; None: a tenth of learning_rate (Chinchilla)
# System
seed = 1337                         # of the initial weights, the batches and dropout
backend = "nccl"                    # of the process group on GPUs; CPUs use gloo
fsdp = False                        # shard weights and optimizer over the processes
activation_checkpointing = False    # keep less for the backward pass, compute blocks twice
timeout = 600.0                     # seconds that processes wait for one another
device = "auto"                     # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                      # auto, float32, bfloat16, float16 (scales the loss)
compile: bool | str = "auto"        # auto, True, False: torch.compile, where it works

ROOT = Path(__file__).resolve().parent
GO_ON = "--init_from=resume --out_dir="


def check_settings(world_size):
    """Raise ValueError with one line for each setting that cannot work."""
    from_1 = "batch_size gradient_accumulation_steps block_size n_layer n_head n_embd timeout"
    from_1 += " eval_interval log_interval eval_iters max_bad_steps"
    from_0 = "learning_rate min_lr weight_decay grad_clip warmup_iters lr_decay_iters max_iters"
    ranges = [(key, 1, 2**31) for key in from_1.split()]
    ranges += [(key, 0, 2**31) for key in from_0.split()]
    ranges += [("seed", 0, 2**63), *((key, 0, 1) for key in ("dropout", "beta1", "beta2"))]
    faults = []
    for key, least, limit in ranges:
        value = globals()[key]
        if value is not None and not least <= value < limit:  # as is NaN
            rest = "" if value < least else f" and below {limit}"
            faults.append(f"{key}={value} must be at least {least}{rest}")
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
    folder = Path(out_dir).absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not (eval_only or place.is_dir() and os.access(place, os.W_OK)):
        faults.append(f"out_dir={out_dir}: {place} is not a folder that can be written to")
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
    if checkpoint:
        if checkpoint.get("tokenizer", meta) != meta:
            raise ValueError(f"dataset {dataset} is encoded unlike the checkpoint's data")
        config = GPTConfig.restored(checkpoint["model_args"], dropout)
        check_vocabulary(meta, config.vocab_size)
        for name in ("n_layer", "n_head", "n_embd", "bias"):
            if globals()[name] != getattr(config, name):
                raise ValueError(f"the checkpoint has {name}={getattr(config, name)} and keeps it")
        model = GPT.from_state(config, checkpoint["model"], run.device)
    elif init_from in ("scratch", "auto"):
        torch.manual_seed(seed)
        fields = (block_size, meta["vocab_size"], n_layer, n_head, n_embd, dropout, bias)
        return GPT(GPTConfig(*fields)).to(run.device)
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
    if activation_checkpointing:
        if dropout and run.device.type == "mps":  # whose generator is not set back
            raise ValueError("activation_checkpointing on mps needs --dropout=0")
        runtime.recompute(model.transformer.h)
    if fsdp and run.world_size > 1:
        runtime.shard(model, run)
    rates = weight_decay, learning_rate, (beta1, beta2)
    optimizer = model.configure_optimizers(*rates, run.device.type)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    state = State(model, optimizer, scaler, meta, torch.zeros((), device=run.device))
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"], run)
        if checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
        state.step, state.wandb_id = checkpoint["iter_num"], checkpoint.get("wandb_id")
        if always_save_checkpoint or not checkpoint["config"].get("always_save_checkpoint", True):
            state.best_val_loss = float(checkpoint.get("best_val_loss", math.inf))  # ckpt.pt's
    if run.reduce("min", state.step) != run.reduce("max", state.step):
        raise ValueError(f"machines resume from different steps: they must share out_dir={out_dir}")
    return state


def load_optimizer(optimizer, saved, run):
    """Fill `optimizer` with the moments of `saved`, its state_dict(); the settings stay ours."""
    try:
        for ours, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            theirs |= {key: value for key, value in ours.items() if key != "params"}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(saved["state"]) in (0, len(parameters)), len(saved["state"])
        for index, moments in saved["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):  # only a cropped position table is shorter
                moment = moments[name][: len(parameters[index])].to(run.device, copy=True)
                assert moment.shape == parameters[index].shape, (moment.shape, index)
                moments[name] = runtime.like(parameters[index], moment)
            moments["step"] = moments["step"].clone()  # nothing keeps the file mapped
        optimizer.load_state_dict(saved)
    except (LookupError, TypeError, AttributeError, AssertionError, ValueError) as fault:
        raise ValueError(f"the checkpoint's optimizer fits another model: {fault}") from None


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


def train_step(model, state, batches, step, run):
    """Make update `step`; return this rank's mean loss and the gradient norm, left on the device.

    The batches are a function of (seed, step), dropout is one of (seed, step, rank). Without a
    finite gradient there is no update; state.bad_steps counts such steps in a row.
    """
    run.seed(seed, step, run.rank)
    optimizer, scaler = state.optimizer, state.scaler
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step)
    micro_batches, mean_loss = batches(step), 0.0
    share = sum(map(len, micro_batches))  # sequences of this rank
    for count, tokens in enumerate(micro_batches, start=1):
        model.require_backward_grad_sync = count == len(micro_batches)  # DDP averages only then
        tokens = send(tokens, run.device)
        with run.autocast():
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
        loss = loss * (len(tokens) / share)
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    grad_norm = runtime.joined(grad_norm)
    # float16 overflows now and then, which is well while the loss is finite and its scale can fall.
    scale = scaler.scale(torch.ones_like(mean_loss))  # 1 in other types
    bad = ~(grad_norm.isfinite() | mean_loss.isfinite() & (scale > 1))
    enough = state.bad_steps >= max_bad_steps  # stays until it is looked at
    state.bad_steps = torch.where(enough, state.bad_steps, (state.bad_steps + 1) * bad)
    optimizer.found_inf = (~grad_norm.isfinite()).float()  # at 1 the fused kernel does nothing
    if run.device.type in ("cpu", "cuda") or not optimizer.found_inf:  # syncs the device
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, grad_norm


def try_step(model, state, batches, run):
    """Run a forward and backward that change nothing, so that a compiler shows what it can do."""
    tokens = send(batches(state.step)[0], run.device)
    model.require_backward_grad_sync = False  # the compiler of one rank may fail
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
        starts = np.arange(count) * windows // count * block_size
        sums = []
        for first in range(0, count, batch_size * run.world_size):
            mine = starts[first :][: batch_size * run.world_size][run.rank :: run.world_size]
            # A rank whose share has run out keeps step with the rest: a sharded model needs it.
            ids = tokens.windows(mine if len(mine) else starts[:1], block_size + 1)
            ids = send(ids, run.device)
            with run.autocast():
                sums.append(model(ids[:, :-1], ids[:, 1:])[1] * len(mine))
        losses[split] = run.reduce("sum", sum(loss.item() for loss in sums)) / count
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
    bad_steps: torch.Tensor  # in a row without a finite gradient, up to now; not saved
    step: int = 0  # updates made
    best_val_loss: float = math.inf
    wandb_id: str | None = None


def open_checkpoint(config):
    """Return what to go on from, its settings now this run's, and lines on what changed.

    The newest checkpoint in out_dir, or None where `init_from` is neither resume nor auto.
    """
    paths = [path for path in (Path(out_dir, "last.pt"), Path(out_dir, "ckpt.pt")) if path.exists()]
    if init_from == "resume" and not paths:
        raise ValueError(f"no ckpt.pt in {out_dir} to resume; name its folder with --out_dir")
    if init_from not in ("resume", "auto") or not paths:
        return None, []
    checkpoint = max(map(read_checkpoint, paths), key=lambda found: found["iter_num"])
    if "optimizer" not in checkpoint:
        raise ValueError(f"the checkpoint in {out_dir} holds no optimizer state to resume with")
    saved = {**checkpoint["config"], **checkpoint["model_args"]}
    return checkpoint, restore(globals(), saved, config, ("out_dir", "init_from", "eval_only"))


def set_aside():
    """Move what an older run left in out_dir to out_dir/previous, its own `previous` included."""
    names = "ckpt.pt", "last.pt", "log.jsonl", "previous"
    old = [Path(out_dir, name) for name in names if Path(out_dir, name).exists()]
    aside = Path(out_dir, "previous.new")
    if any(path.suffix for path in old) or aside.exists():  # after a kill right here
        aside.mkdir(exist_ok=True)
        for path in old:
            path.rename(aside / path.name)
        aside.rename(Path(out_dir, "previous"))
        print(f"moved the older run in {out_dir} to {Path(out_dir, 'previous')}")


def save(state, step, losses, config, run):
    """Write the state at `step`, on rank 0; return whether it lies on the disk. All ranks call it.

    `losses` are those of an evaluation, or empty. Raises ValueError rather than save a broken
    model. The best goes to ckpt.pt first: last.pt has its loss too, so a kill in between costs
    nothing.
    """
    size = torch.nn.utils.get_total_norm(state.model.parameters())
    if not math.isfinite(sum(losses.values()) + runtime.joined(size).item()):
        raise ValueError(f"step {step}: the loss or a weight is not finite; {way_back(state)}")
    best = min(losses.get("val", math.inf), state.best_val_loss)
    same = losses and state.step == step < max_iters and (step == 0 or best == state.best_val_loss)
    if eval_only or same:
        return True
    newest = ["ckpt.pt"] if always_save_checkpoint else ["last.pt"]
    names = ["ckpt.pt"] * (best < state.best_val_loss) + newest
    weights = state.model.state_dict()
    del weights["lm_head.weight"]  # the same as the token table; put together once
    checkpoint = {
        "model": runtime.whole(weights, run),
        "optimizer": runtime.whole(state.optimizer.state_dict(), run),
        "scaler": state.scaler.state_dict(),
        "model_args": state.model.config.saved(),
        "iter_num": step,
        "best_val_loss": best,
        "config": config,
        "tokenizer": state.meta,
        "wandb_id": state.wandb_id,
    }
    checkpoint["model"]["lm_head.weight"] = checkpoint["model"]["transformer.wte.weight"]
    saved = bool(run.reduce("min", run.rank > 0 or write(checkpoint, names, state, run)))
    if saved:
        state.step, state.best_val_loss = step, best
    return saved


def write(checkpoint, names, state, run):
    """Write a checkpoint under each of `names`; return False, once it is said, if one fails."""
    for name in dict.fromkeys(names):
        try:
            Path(out_dir).mkdir(parents=True, exist_ok=True)
            with atomic(Path(out_dir, name)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as fault:
            why = fault if isinstance(fault, OSError) else fault.__context__  # torch hides it
            if not isinstance(why, OSError):
                raise
            run.say(f"step {checkpoint['iter_num']} is not saved: {why}; {way_back(state)}")
            return False
        state.step, state.best_val_loss = checkpoint["iter_num"], checkpoint["best_val_loss"]
    return True


def way_back(state):
    """Return what is left to resume from."""
    kept = any(Path(out_dir, name).exists() for name in ("ckpt.pt", "last.pt"))
    return f"{out_dir} keeps the checkpoint of step {state.step}" if kept else "none was saved yet"


# --- log -----------------------------------------------------------------------------------------


def open_log(config, state, run):
    """Return a function that appends a dict to log.jsonl, and to wandb if asked for; on rank 0.

    A resumed run drops the lines that it will write again. A line that finds no room waits; the
    function returns whether none does.
    """
    if run.rank > 0 or eval_only:
        return lambda *entries: True
    path, waiting = Path(out_dir, "log.jsonl"), []
    path.parent.mkdir(parents=True, exist_ok=True)
    wandb = open_wandb(config, state) if wandb_log else None
    if init_from not in ("resume", "auto"):
        set_aside()
    trim(path, state.step)

    def append(*entries):
        for entry in entries:
            bad = [k for k, v in entry.items() if isinstance(v, float) and not math.isfinite(v)]
            waiting.append(json.dumps({**entry, **dict.fromkeys(bad)}) + "\n")  # JSON has no NaN
            if wandb and "settings" not in entry:
                wandb.log(entry, step=entry["iter"])
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(waiting)
            waiting.clear()
        except OSError as fault:
            with suppress(OSError):
                os.truncate(path, size)  # no half a line
            if len(waiting) == 1:
                run.say(f"{path} waits: {fault.strerror}")
        return not waiting

    chosen = {"device": str(run.device), "dtype": str(run.dtype)[6:], "compile": run.compile}
    chosen["world_size"] = run.world_size
    append({"iter": state.step, "settings": {**config, **chosen}})
    return append


def trim(path, step):
    """Drop from the log what comes from `step` on, or was cut off by a crash."""
    kept = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError, KeyError):
            kept += [line + b"\n"] * (json.loads(line)["iter"] < step)
    with atomic(path) as file:
        file.writelines(kept)
    for name in ("ckpt.pt.tmp", "last.pt.tmp"):  # of a process that was killed in a save
        path.with_name(name).unlink(missing_ok=True)


def open_wandb(config, state):
    """Return wandb, logging to the run that a checkpoint names, or to a new one."""
    try:
        import wandb
    except ImportError:
        raise ValueError("wandb_log=True needs wandb: pip install -e '.[wandb]'") from None
    place = {"project": wandb_project, "name": wandb_run_name, "dir": out_dir}
    try:
        run = wandb.init(config=config, id=state.wandb_id, resume="allow", **place)
    except wandb.Error as fault:
        raise ValueError(f"wandb: {fault}; or set WANDB_MODE=offline") from None
    state.wandb_id = run.id
    return wandb


def log_step(step, loss, grad_norm, seconds, state, run, log):
    """Print and record the figures of a step, `seconds` long. Every rank must call it."""
    loss, grad_norm = run.reduce("sum", loss.item()) / run.world_size, grad_norm.item()
    tokens = batch_size * gradient_accumulation_steps * block_size
    mfu = state.model.estimate_mfu(tokens / run.world_size, seconds, run.peak_flops())
    speed = f"{tokens / seconds:,.0f} tok/s" + (f", mfu {mfu:.2%}" if mfu else "")
    left = timedelta(seconds=round((max_iters - step - 1) * seconds))
    head = f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms"
    run.say(f"{head}, {speed}, norm {grad_norm:.2f}, {left} left")
    rates = {"lr": learning_rate_at(step), "tokens_per_second": tokens / seconds, "mfu": mfu}
    log({"iter": step, "loss": loss, "grad_norm": grad_norm, "ms": seconds * 1000, **rates})
    check_gradients(step, loss, grad_norm, state, run)


def check_gradients(step, loss, grad_norm, state, run):
    """Raise ValueError after too many steps without a finite gradient. Every rank must call it."""
    if run.reduce("max", state.bad_steps.item()) >= max_bad_steps:
        what = f"{max_bad_steps} steps in a row had no finite gradient, seen at step {step}"
        figures = f"loss {float(loss):.4f}, gradient norm {float(grad_norm):.4f}"
        raise ValueError(f"{what}: {figures}; {way_back(state)}; lower --learning_rate")


def log_losses(step, losses, run, log):
    """Print and record the result of an evaluation, if there was one."""
    if losses:
        run.say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        log({"iter": step, "train/loss": losses["train"], "val/loss": losses["val"]})


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
    checkpoint, changes = open_checkpoint(config)
    run = runtime.start(device, dtype, compile, backend, timeout)
    run.say(*changes, sep="\n", end="\n" * bool(changes))
    check_settings(run.world_size)
    data, meta = load_data()
    state = build_state(checkpoint, meta, run)
    del checkpoint  # and with it the mapping of its file
    for split in data.values():
        split.limit(state.model.config.vocab_size)
    batches = Batches(data["train"], gradient_accumulation_steps, batch_size, block_size, seed, run)
    model = runtime.wrap(state.model, run)
    run = runtime.compile_model(state.model, run, partial(try_step, model, state, batches, run))
    log = open_log(config, state, run)
    describe(run, state, data)
    if not eval_only:
        runtime.catch_signals()
    began, since, loss, grad_norm = run.now(), state.step, math.nan, math.nan
    for step in range(state.step, max(state.step, max_iters) + 1):
        stopped = run.stop_requested()
        done = step >= max_iters or eval_only
        if stopped or done or step % eval_interval == 0:
            paused = run.now()
            check_gradients(step, loss, grad_norm, state, run)
            losses = {} if stopped else evaluate(state.model, data, run)
            log_losses(step, losses, run, log)
            stopped = stopped or run.stop_requested()  # while it evaluated
            saved = save(state, step, losses, config, run)
            began += run.now() - paused  # the time of a step leaves evaluations and saves out
        if stopped or done:
            break
        loss, grad_norm = train_step(model, state, batches, step, run)
        if step % log_interval == 0:
            seconds = (run.now() - began) / (step + 1 - since)  # the one sync of the loop
            log_step(step, loss, grad_norm, seconds, state, run, log)
            began, since = run.now(), step + 1
        elif run.rank == 0 and sys.stdout.isatty():
            print(f"step {step} of {max_iters}", end="\r", flush=True)  # till the next line
    if stopped:
        run.say(f"{signal.Signals(stopped).name}: {way_back(state)}; go on with {GO_ON}{out_dir}")
    if not (log() and saved):
        raise SystemExit(1)  # it was said why
    if stopped:
        raise SystemExit(128 + stopped)


if __name__ == "__main__":
    main(configure(globals()))
