"""What a run says, on the console, in log.jsonl and to Weights & Biases; and what it measures."""

import json
import math
import os
import signal
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch

from engine.process import UserError, atomic, user_error


class Log:
    """The console lines of a run, its log.jsonl and its wandb run. Rank 0 prints and writes."""

    def __init__(self, model, max_iters, runtime):
        self.model, self.max_iters, self.runtime = model, max_iters, runtime
        self.path = self.wandb = None  # until they are opened
        self.bytes_per_token = None  # of the text to evaluate on, where it is known
        self.tokens_per_epoch = math.inf  # of the text to train on
        self.waiting = []  # lines that found no room on the disk yet

    def open(self, path, step, config):
        """Write to `path` from now on, without what it has from `step` on or a crash cut off."""
        if self.runtime.rank > 0:
            return
        kept = []
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["iter"] < step:
                    kept.append(line + b"\n")
        with user_error(path, OSError), atomic(path) as file:
            file.writelines(kept)
        self.path, runtime = path, self.runtime
        chosen = {"device": str(runtime.device), "dtype": str(runtime.dtype).removeprefix("torch.")}
        chosen |= {"compile": runtime.compile, "world_size": runtime.world_size}
        self.record({"iter": step, "settings": {**config, **chosen}})

    def open_wandb(self, folder, run_id, config):
        """Log to the wandb run called `run_id`, or to a new one if that is None; return its id."""
        if self.runtime.rank > 0:
            return run_id
        try:
            import wandb

            init = wandb.init  # a folder ./wandb of earlier runs can be imported, but has none
        except (ImportError, AttributeError):
            raise UserError("wandb_log=True needs wandb: pip install -e '.[wandb]'") from None
        place = {"project": config["wandb_project"], "name": config["wandb_run_name"]}
        try:
            self.wandb = init(config=dict(config), id=run_id, resume="allow", dir=folder, **place)
        except wandb.Error as fault:
            raise UserError(f"wandb: {fault}; or set WANDB_MODE=offline") from None
        return self.wandb.id

    def record(self, entry):
        """Append a dict to log.jsonl, where numbers that are not finite become null."""
        if self.path is None:
            return
        bad = [k for k, v in entry.items() if isinstance(v, float) and not math.isfinite(v)]
        self.waiting.append(json.dumps({**entry, **dict.fromkeys(bad)}) + "\n")  # JSON has no NaN
        if self.wandb and "settings" not in entry:  # which it got when it was opened
            self.wandb.log(entry, step=entry["iter"])
        self.write_waiting()

    def write_waiting(self):
        """Write the lines that wait, all or none; say so where the disk has no room."""
        if not self.waiting:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(self.waiting)
            self.waiting.clear()
        except OSError as fault:
            with suppress(OSError):
                os.truncate(self.path, size)  # no half a line
            if len(self.waiting) == 1:
                self.runtime.say(f"{self.path} waits: {fault.strerror}; its lines are kept")

    def describe(self, dataset, data, step, tokens_until):
        """Print what will run from `step` on: on which dataset, whose splits are `data`.

        tokens_until(step) is the number of tokens of all steps before `step`, over all ranks.
        """
        model, say = self.model, self.runtime.say
        sizes = ", ".join(f"{split} {len(tokens.ids):,}" for split, tokens in data.items())
        millions, megaflops = model.get_num_params() / 1e6, model.flops_per_token() / 1e6
        if self.runtime.rank == 0:
            self.bytes_per_token = data["val"].bytes_per_token()
        say(f"hardware: {self.runtime.about}")
        say(f"data: {dataset}, {sizes} tokens, vocabulary {model.config.vocab_size:,}")
        say(f"model: {millions:.2f}M parameters, {megaflops:,.0f} MFLOPs per token")
        self.tokens_per_epoch = len(data["train"].ids)
        first, last = (tokens_until(n + 1) - tokens_until(n) for n in (step, self.max_iters))
        each = f"{first:,} to {last:,}" if first < last else f"{last:,}"
        epochs = tokens_until(self.max_iters) / self.tokens_per_epoch
        say(f"steps: {step} to {self.max_iters}, of {each} tokens each, {epochs:,.2f} epochs")

    def evaluation(self, step, losses):
        """Print and record the mean loss of each split, if there was an evaluation.

        Perplexity is e to the loss: among how many equally likely tokens the model is undecided.
        Bits per byte do not depend on how long tokens are.
        """
        if not losses:
            return
        train, val = losses["train"], losses["val"]
        undecided = f"perplexity {math.exp(min(val, 99)):.2f}"
        entry = {"iter": step, "train/loss": train, "val/loss": val}
        if self.bytes_per_token:
            bits = val / math.log(2) / self.bytes_per_token
            undecided += f", {bits:.3f} bits per byte"
            entry["val/bits_per_byte"] = bits
        self.runtime.say(f"step {step}: train loss {train:.4f}, val loss {val:.4f}, {undecided}")
        self.record(entry)

    def step(self, step, loss, grad_norm, lr, tokens_until, timer):
        """Print and record the figures of `step`, and how fast those since the last call were.

        tokens_until as above. Every rank must call it: the loss is the mean over all of them. Syncs
        the device.
        """
        begun, world_size = timer.step, self.runtime.world_size
        seconds = timer.lap(step + 1)
        tokens = (tokens_until(step + 1) - tokens_until(begun)) / (step + 1 - begun)  # per step
        loss = self.runtime.reduce("sum", loss.item()) / world_size
        grad_norm = grad_norm.item()
        peak_flops, rate = self.runtime.peak_flops(), tokens / seconds
        mfu = self.model.estimate_mfu(tokens / world_size, seconds, peak_flops)
        speed = f"{rate:,.0f} tok/s, mfu {mfu:.2%}" if mfu else f"{rate:,.0f} tok/s"
        to_come = tokens_until(self.max_iters) - tokens_until(step + 1)
        left = timedelta(seconds=round(to_come / rate))
        self.runtime.say(
            f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, {speed}, "
            f"norm {grad_norm:.2f}, {left} left"
        )
        entry = {"iter": step, "loss": loss, "grad_norm": grad_norm, "ms": seconds * 1000, "lr": lr}
        seen = tokens_until(step + 1)
        entry |= {"tokens": seen, "epoch": seen / self.tokens_per_epoch}
        entry |= {"tokens_per_second": rate, "mfu": mfu, "peak_bytes": peak_memory(self.runtime)}
        self.record(entry)

    def progress(self, step):
        """Show on a terminal that a step without a line of its own was made."""
        if sys.stdout.isatty():
            self.runtime.say(f"step {step} of {self.max_iters}", end="\r")  # till the next line


def finish(stopped, saved, keeper, log):
    """Say what a run leaves behind; end with another status than 0 where it was cut short.

    `stopped` is the signal that ended it, or 0; `saved` whether its last state is on the disk.
    """
    folder, say = keeper.folder, log.runtime.say
    if stopped:
        go_on = f"go on with --init_from=resume --out_dir={folder}"
        say(f"{signal.Signals(stopped).name}: {keeper.what_is_kept()}; {go_on}")
    elif keeper.best_val_loss < math.inf:
        say(f"best model: {folder / keeper.best}, val loss {keeper.best_val_loss:.4f}")
    log.write_waiting()
    if log.waiting or not saved:
        raise SystemExit(1)  # it was said why
    if stopped:
        raise SystemExit(128 + stopped)


class StepTimer:
    """Seconds per step, between points where the device was waited for; pauses do not count."""

    def __init__(self, step, runtime):
        self.runtime, self.step, self.began = runtime, step, runtime.now()

    @contextmanager
    def paused(self):
        began = self.runtime.now()
        yield
        self.began += self.runtime.now() - began

    def lap(self, step):
        """Return seconds per step since the last call, at `step` steps made. Syncs the device."""
        now = self.runtime.now()
        mean = (now - self.began) / (step - self.step)
        self.step, self.began = step, now
        return mean


def time_laps(work, most, limit, runtime):
    """Return seconds per call of work(1), work(2), ..., for `most` calls or `limit` seconds.

    Each is the mean of a lap of up to 10 calls, as between log lines: waiting for the device costs
    little then.
    """
    began, times, index, lap = runtime.now(), [], 1, 1
    # Ranks have clocks of their own and must agree when to stop: the slowest counts.
    while index <= most and runtime.reduce("max", runtime.now() - began) < limit:
        lap_began = runtime.now()
        for _ in range(lap):
            work(index)
            index += 1
        times.append(runtime.reduce("max", runtime.now() - lap_began) / lap)
        lap = max(1, min(10, round(0.1 / times[-1])))
    return times


def peak_memory(runtime):
    """Return the most memory used so far in bytes, of the GPU or else of this process.

    Not a number where the system does not say: Windows.
    """
    if runtime.device.type not in ("cpu", "mps"):
        return torch.accelerator.max_memory_allocated(runtime.device)
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
