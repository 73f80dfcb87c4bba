"""What a run says, on the console, in log.jsonl and to Weights & Biases."""

import json
import math
import os
import signal
import sys
from contextlib import suppress
from datetime import timedelta

from engine.disk import existing
from engine.process import UserError, atomic, user_error
from engine.timing import StepTimer, peak_memory


class Log:
    """The console lines of a run, its log.jsonl and its wandb run. Rank 0 prints and writes."""

    def __init__(self, model, config, runtime):
        self.model, self.config, self.runtime = model, config, runtime
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

    def begin(self, changes, data, step, sizes, last_rate):
        """Print which settings have changed, and what will run from `step` on.

        data: its splits. sizes: the StepSizes of its steps, whose time counts from here. last_rate:
        the learning rate that they end at.
        """
        model, config, say = self.model, self.config, self.runtime.say
        max_iters, decay_iters = config["max_iters"], config["lr_decay_iters"]
        counts = ", ".join(f"{split} {len(tokens.ids):,}" for split, tokens in data.items())
        millions, megaflops = model.get_num_params() / 1e6, model.flops_per_token() / 1e6
        if self.runtime.rank == 0:
            self.bytes_per_token = data["val"].bytes_per_token()
        say("\n".join(changes))
        say(f"hardware: {self.runtime.about}")
        say(f"data: {config['dataset']}, {counts} tokens, vocabulary {model.config.vocab_size:,}")
        say(f"model: {millions:.2f}M parameters, {megaflops:,.0f} MFLOPs per token")
        self.tokens_per_epoch = len(data["train"].ids)
        first, last = sizes.tokens_at(step), sizes.tokens_at(max_iters)
        each = f"{first:,} to {last:,}" if first < last else f"{last:,}"
        epochs = sizes.tokens_until(max_iters) / self.tokens_per_epoch
        say(f"steps: {step} to {max_iters}, of {each} tokens each, {epochs:,.2f} epochs")
        if config["decay_lr"] and (decay_iters or 0) > max_iters:
            say(
                f"schedule: it ends at {last_rate:.2g}, not at min_lr, because "
                f"lr_decay_iters={decay_iters} lies beyond max_iters={max_iters}"
            )
        self.tokens_until, self.timer = sizes.tokens_until, StepTimer(step, self.runtime)

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

    def step(self, step, loss, grad_norm, lr):
        """Print and record the figures of `step`, and how fast those since the last line were.

        That is at each log_interval-th step, and syncs the device; at others only a terminal shows
        the progress. Every rank must call it: the loss is the mean over all of them.
        """
        if step % self.config["log_interval"]:
            self.progress(step)
            return
        begun, world_size = self.timer.step, self.runtime.world_size
        seconds = self.timer.lap(step + 1)
        seen = self.tokens_until(step + 1)
        tokens = (seen - self.tokens_until(begun)) / (step + 1 - begun)  # per step
        loss = self.runtime.reduce("sum", loss.item()) / world_size
        grad_norm = grad_norm.item()
        peak_flops, rate = self.runtime.peak_flops(), tokens / seconds
        mfu = self.model.estimate_mfu(tokens / world_size, seconds, peak_flops)
        speed = f"{rate:,.0f} tok/s, mfu {mfu:.2%}" if mfu else f"{rate:,.0f} tok/s"
        left = timedelta(seconds=round((self.tokens_until(self.config["max_iters"]) - seen) / rate))
        memory = peak_memory(self.runtime)
        self.runtime.say(
            f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, {speed}, "
            f"norm {grad_norm:.2f}, {seen:,} tokens, {memory / 2**30:.2f} GiB, {left} left"
        )
        entry = {"iter": step, "loss": loss, "grad_norm": grad_norm, "ms": seconds * 1000, "lr": lr}
        entry |= {"tokens": seen, "epoch": seen / self.tokens_per_epoch}
        entry |= {"tokens_per_second": rate, "mfu": mfu, "peak_bytes": memory}
        self.record(entry)

    def progress(self, step):
        """Show on a terminal that a step without a line of its own was made."""
        if sys.stdout.isatty():
            last = self.config["max_iters"]
            self.runtime.say(f"step {step} of {last}", end="\r")  # till the next line

    def go_back(self, step, why):
        """Go on from `step`, earlier than the last: its lines from there on are dropped.

        Where the disk has no room for that, they stay, and that is said.
        """
        self.waiting = [line for line in self.waiting if json.loads(line)["iter"] < step]
        try:
            if self.path:
                self.open(self.path, step, self.config)
        except UserError as fault:
            self.runtime.say(f"{fault}; the steps that were undone stay in it")
        self.record({"iter": step, **why})
        self.timer = StepTimer(step, self.runtime)


def finish(stopped, saved, keeper, log):
    """Say what a run leaves behind; end with another status than 0 where it was cut short.

    `stopped` is the signal that ended it, or 0; `saved` whether its last state is on the disk.
    """
    folder, say = keeper.folder, log.runtime.say
    if stopped:
        go_on = f"go on with --init_from=resume --out_dir={folder}"
        say(f"{signal.Signals(stopped).name}: {keeper.what_is_kept()}; {go_on}")
    elif keeper.best_val_loss < math.inf:
        if keeper.gave_up:
            say(f"stopped: no better model since step {keeper.best_step}; --patience=0 goes on")
        say(f"best model: {existing(folder / keeper.best)}, val loss {keeper.best_val_loss:.4f}")
    log.write_waiting()
    if log.waiting or not saved:
        raise SystemExit(1)  # it was said why
    if stopped:
        raise SystemExit(128 + stopped)
