"""Measure this project on a GPU in about ten minutes, and print the figures as a table.

    python data/shakespeare_char/prepare.py
    python tools/gpu_check.py
    python tools/gpu_check.py --dry    # tiny and on a CPU: tries the check itself in a minute

Runs bench.py, train.py and sample.py as a user would: speed and memory of the GPT-2 124M step,
compiled and not; Muon; sampling; whether a resume gives the same bits, with and without
--deterministic=True; and the time until the Shakespeare model reaches nanoGPT's loss.
"""

import math
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import configure
from engine.checkpoint import read_checkpoint
from engine.process import one_line_errors, user_path
from tools.plot import Run

dry = False                       # tiny models on the CPU, to try this script
goal = 1.47                       # validation loss of Shakespeare, nanoGPT's result
out_dir = "out-gpu-check"         # folder for the runs

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--device=cpu --dtype=float32 --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 "
    "--batch_size=4 --gradient_accumulation_steps=1 --seconds=1 --new_tokens=8 --eval_iters=1"
)
SPEED = {  # measurement -> flags of bench.py
    "step, compiled": "--compile=True",
    "step, eager": "--compile=False",
    "step with the recipe, compiled": "config/modern.py --compile=True",
    "sampling, 1 sample": "--new_tokens=256 --compile=False --seconds=10",
    "sampling, 10 samples": "--new_tokens=256 --compile=False --seconds=10 --num_samples=10",
}
FIGURES = {  # heading -> pattern in the output of bench.py
    "tokens/s": r"([\d,]+) tokens/s",
    "mfu": r"mfu ([\d.]+%)",
    "peak": r"peak memory: ([\d.]+ GiB)",
    "first call": r"first call: ([\d.]+ s)",
}


def tiny_flags(script, flags):
    """Return the flags of a tiny model that the script knows; sampling only if it is measured."""
    command = [sys.executable, ROOT / script, "--help"]
    known = subprocess.run(command, capture_output=True, text=True)
    lines = known.stdout.splitlines()
    settings = {line.split(" ")[0].rstrip(":") for line in lines}
    if "new_tokens" not in flags:
        settings.discard("new_tokens")
    tiny = []
    for flag in TINY.split():
        name, _, _ = flag.partition("=")
        if name[2:] in settings:
            tiny.append(flag)
    return tiny


def run(script, flags):
    """Run a script and return its output, or the end of its error."""
    command = [sys.executable, ROOT / script, *flags.split()]
    if dry:
        command += tiny_flags(script, flags)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"failed: {done.stderr.strip()[-200:]}"
    return done.stdout


def print_row(*cells):
    print("|", " | ".join(cells), "|", flush=True)


def measure_speed():
    print_row("", *FIGURES)
    print_row("---", *["---" for _ in FIGURES])
    for name, flags in SPEED.items():
        shown = run("bench.py", flags)
        if shown.startswith("failed"):
            print(shown)
        cells = []
        for pattern in FIGURES.values():
            matches = re.findall(pattern, shown)
            cells.append("".join(matches))
        print_row(name, *cells)


def is_resume_exact(deterministic):
    """Return whether 8 steps, and 4 steps and 4 more, give the same bits."""
    flags = f"config/train_shakespeare_char.py --deterministic={deterministic} --dropout=0.1"
    flags += " --max_iters=8 --lr_decay_iters=8 --eval_interval=1000 --eval_iters=2"
    first = f"{out_dir}/straight"
    second = f"{out_dir}/resumed"
    run("train.py", f"{flags} --out_dir={first}")
    run("train.py", f"{flags} --out_dir={second} --max_iters=4")
    run("train.py", f"--init_from=resume --out_dir={second} --max_iters=8")
    left = read_checkpoint(user_path(f"{first}/ckpt.pt"))
    right = read_checkpoint(user_path(f"{second}/ckpt.pt"))
    names = left["model"].keys()
    return all(torch.equal(left["model"][name], right["model"][name]) for name in names)


def time_to_goal():
    """Return in one sentence when the Shakespeare model reached the goal."""
    folder = f"{out_dir}/shakespeare"
    steps = 5000
    if dry:
        steps = 8
    flags = f"config/train_shakespeare_char.py --patience=4 --max_iters={steps}"
    shown = run("train.py", f"{flags} --out_dir={folder}")
    if shown.startswith("failed"):
        return shown
    for line in Run(folder).lines:
        seconds = round(line["seconds"])
        loss = line.get("val/loss", math.inf)
        if loss <= goal:
            return f"val loss {loss} at step {line['iter']}, after {seconds} s"
    return f"the loss {goal} was not reached in {seconds} s"


@one_line_errors()
def main(config):
    name = "no GPU"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    print(f"{name}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    measure_speed()
    for deterministic in (False, True):
        is_exact = is_resume_exact(deterministic)
        print(f"exact resume with --deterministic={deterministic}: {is_exact}", flush=True)
    sentence = time_to_goal()
    print(f"Shakespeare: {sentence}")


if __name__ == "__main__":
    main(configure(globals()))
