"""The lines of a run on the console, in log.jsonl and in Weights & Biases."""

import json
import math
import os
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch

from engine.process import atomic, user_error


class Log:
    """Prints and records the figures of a run on rank 0, and measures the time of its steps."""

    def __init__(self, model, config, runtime):
        self.model = model
        self.config = config
        self.runtime = runtime
        self.path = None  # of log.jsonl
        self.wandb = None
        self.unwritten = []  # lines for which the disk had no room yet
        self.total_tokens = 0
        self.timed_from = runtime.now()  # the time, step and tokens at the last line
        self.timed_step = 0
        self.timed_tokens = 0

    def open(self, path, state, tokens, total_tokens):
        """Record to log.jsonl at `path` from now on, without lines of steps that are repeated.

        `tokens` were read before this step; the complete run reads `total_tokens`.
        """
        self.total_tokens = total_tokens
        self.timed_step = state.step
        self.timed_tokens = tokens
        if self.runtime.rank > 0:
            return
        lines = []
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # cut off by a kill
                if json.loads(line)["iter"] < state.step:
                    lines.append(line + b"\n")
        with atomic(path) as file:
            file.writelines(lines)
        self.path = path
        if self.config["wandb_log"]:
            state.wandb_id = self.open_wandb(path.parent, state.wandb_id)
        machine = {"about": self.runtime.about, "threads": torch.get_num_threads()}
        self.record({"iter": state.step, "settings": {**self.config, **machine}})
        self.timed_from = self.runtime.now()

    def open_wandb(self, folder, run_id):
        """Log to the wandb run `run_id`, or to a new one if it is empty, and return its id."""
        import wandb

        with user_error("wandb cannot be used, try WANDB_MODE=offline", wandb.Error):
            self.wandb = wandb.init(
                project=self.config["wandb_project"],
                name=self.config["wandb_run_name"],
                config=dict(self.config),
                id=run_id or None,
                resume="allow",
                dir=folder,
                settings={"init_timeout": 10},  # seconds
            )
        return self.wandb.id

    def record(self, entry):
        """Append a dict to log.jsonl; numbers that are not finite become null."""
        if self.path is None:
            return
        bad = [key for key, v in entry.items() if isinstance(v, float) and not math.isfinite(v)]
        self.unwritten.append(json.dumps({**entry, **dict.fromkeys(bad)}) + "\n")
        if self.wandb and "settings" not in entry:
            self.wandb.log(entry, step=entry["iter"])
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(self.unwritten)
            self.unwritten = []
        except OSError as fault:
            self.runtime.say(f"{self.path}: {fault.strerror}; it will be tried again")
            with suppress(OSError):
                os.truncate(self.path, size)  # no half of a line

    @contextmanager
    def paused(self):
        """Leave the time of the block out of the time of the steps."""
        began = self.runtime.now()
        yield
        self.timed_from += self.runtime.now() - began

    def evaluation(self, state, losses):
        """Print and record the mean loss of each split, in nats per token.

        Perplexity is e to the power of the loss: the model is as uncertain as if it chose among
        that many equally likely tokens.
        """
        train, val = losses["train"], losses["val"]
        self.runtime.say(
            f"step {state.step}: train loss {train:.4f}, val loss {val:.4f}, "
            f"perplexity {math.exp(min(val, 99)):.2f}"
        )
        if val > state.best_val_loss + 0.5:
            self.runtime.say(f"the loss has risen; best.pt keeps step {state.best_step}")
        self.record({"iter": state.step, "train/loss": train, "val/loss": val})

    def step(self, step, loss, grad_norm, lr, tokens):
        """Print and record a step and the speed since the last line. Collective.

        `loss` is this rank's loss. `tokens` counts the tokens of all ranks up to this step.
        """
        runtime = self.runtime
        loss = runtime.reduce("sum", loss) / runtime.world_size
        now = runtime.now()
        seconds = now - self.timed_from
        rate = (tokens - self.timed_tokens) / seconds  # tokens per second
        ms = 1000 * seconds / (step + 1 - self.timed_step)
        entry = {"iter": step, "loss": loss, "grad_norm": grad_norm, "ms": ms, "lr": lr}
        entry |= {"tokens": tokens, "tokens_per_second": rate}
        text = f"iter {step}: loss {loss:.4f}, time {ms:.2f}ms"
        text += f", {rate:,.0f} tok/s"
        if peak := runtime.peak_flops():
            flops = self.model.flops_per_token() * rate / runtime.world_size
            entry["mfu"] = flops / peak
            text += f", mfu {flops / peak:.2%}"
        left = timedelta(seconds=min(1e9, round((self.total_tokens - tokens) / rate)))
        if memory := runtime.peak_memory():
            entry["peak_bytes"] = memory
            text += f", {memory / 2**30:.2f} GiB"
        runtime.say(f"{text}, norm {grad_norm:.2f}, {left} left")
        self.record(entry)
        self.timed_from = now
        self.timed_step = step + 1
        self.timed_tokens = tokens
