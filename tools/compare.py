"""Find out whether a difference between two training commands is real, or noise of the seeds.

    python tools/compare.py "config/race_laptop.py" "config/race_laptop.py --tied=True" --seeds=5
    python tools/compare.py ARGUMENTS_A ARGUMENTS_B --repository=../changed  # B runs this checkout

Trains A and B with each seed and measures the final models on the complete validation split. With
the same seed both read the same sequences, so their difference has less noise than that of separate
runs. The verdict is the mean difference with its 95 % confidence interval (Student's t). A line is
added to results.tsv, and compare.png shows the curves. If interrupted, the same command continues.
"""

import json
import math
import shlex
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import configure
from engine.process import UserError, atomic, one_line_errors, user_path
from tools import plot

seeds = 5                         # runs of each variant, with seeds 1, 2, ...
smallest = 0.005                  # difference in nats that would matter to you
repository = ""                   # folder of another checkout that runs B; empty: this one
out_dir = "out-compare"           # folder for the runs

ALLOWED = {"seeds": (2, 1000), "smallest": (1e-6, 100)}
ROOT = Path(__file__).resolve().parents[1]
# Flags of every run: it continues after an interruption, and evaluates little by itself.
FLAGS = "--auto_resume=True --eval_interval=1000000000 --eval_iters=1".split()
# Student's t for 95 % and 1, 2, ... degrees of freedom; beyond, an expansion is exact to 0.001.
T_VALUES = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]


# --- run -----------------------------------------------------------------------------------------


def measure(arguments, root, seed):
    """Train with these arguments and a seed; return the loss and the folder of the run."""
    key = zlib.crc32(f"{arguments} {root}".encode())
    folder = user_path(out_dir) / f"{key:08x}-{seed}"
    result = folder / "result.json"
    if not result.exists():
        flags = [*shlex.split(arguments), *FLAGS, f"--seed={seed}", f"--out_dir={folder}"]
        run(root / "train.py", *flags)
        last = [f"--out_dir={folder}", "--checkpoint_file=ckpt.pt"]
        figures = run(root / "tools" / "evaluate.py", *last)
        with atomic(result) as file:
            file.write(figures.encode())
    return json.loads(result.read_text())["loss"], folder


def run(script, *arguments):
    """Run a script of a repository and return what it printed. UserError if it fails."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"this command failed: {shlex.join(command)}")
    return done.stdout


# --- judge ---------------------------------------------------------------------------------------


def interval(differences):
    """Return the mean of the differences and half the width of its 95 % confidence interval."""
    freedom = len(differences) - 1
    z = 1.959964
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    if freedom <= len(T_VALUES):
        t = T_VALUES[freedom - 1]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), t * error


def verdict(differences):
    """Return in one sentence what the differences, losses of B minus losses of A, show."""
    mean, half = interval(differences)
    count = len(differences)
    if abs(mean) > half:
        better = "B" if mean < 0 else "A"
        return f"{better} is better by {abs(mean):.4f} +- {half:.4f} with {count} seeds"
    # With 80 % probability, a difference of 2.8 standard errors is seen.
    needed = math.ceil((2.8 * statistics.stdev(differences) / smallest) ** 2)
    text = f"no difference can be seen with {count} seeds ({mean:+.4f} +- {half:.4f})"
    if needed > count:
        text += f"; {needed - count} more would show one of {smallest}"
    return text


@one_line_errors()
def main(config, *variants):
    losses = {name: [] for name in "AB"}
    folders = {name: [] for name in "AB"}
    for seed in range(1, seeds + 1):
        for name in "AB" if seed % 2 else "BA":  # in turn, so that both meet a slow machine
            root = user_path(repository) if name == "B" and repository else ROOT
            loss, folder = measure(variants["AB".index(name)], root, seed)
            losses[name].append(loss)
            folders[name].append(folder)
        print(f"seed {seed}: A {losses['A'][-1]:.4f}, B {losses['B'][-1]:.4f}", flush=True)
    differences = [b - a for a, b in zip(losses["A"], losses["B"], strict=True)]
    all_runs = {name: [plot.Run(folder) for folder in folders[name]] for name in "AB"}
    seconds = {name: sum(run.lines[-1]["seconds"] for run in all_runs[name]) for name in "AB"}
    text = f"{verdict(differences)}; B takes {seconds['B'] / seconds['A']:.2f} of the time of A"
    print(text)
    with open("results.tsv", "a", encoding="utf-8") as file:
        print(time.strftime("%Y-%m-%d"), *variants, repository, text, sep="\t", file=file)
    plot.draw(all_runs["A"] + all_runs["B"]).savefig("compare.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3 or "--help" in sys.argv:
        sys.argv[1:] = ["--help"]
    variants = [sys.argv.pop(1) for _ in range(2)] if len(sys.argv) > 2 else []
    main(configure(globals()), *variants)
