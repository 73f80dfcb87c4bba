"""Find out whether a difference between two training commands is real, or noise of the seeds.

    python tools/compare.py "config/race_laptop.py" "config/race_laptop.py --tied=True" --seeds=5
    python tools/compare.py ARGUMENTS_A ARGUMENTS_B --repository=../changed  # B uses that checkout

Trains A and B with each seed and measures the final models on the complete validation split. With
the same seed both read the same sequences, so their difference has less noise than with separate
seeds. The verdict is the mean difference with its 95 % confidence interval (Student's t). A line is
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
import tools.plot as plot
from configurator import configure
from engine.process import UserError, atomic, one_line_errors, user_path

seeds = 5                         # runs of each variant, with seeds 1, 2, ...
smallest = 0.005                  # difference in nats that would matter to you
repository = ""                   # folder of another checkout that runs B; empty: this one
out_dir = "out-compare"           # folder for the runs

ALLOWED = {"seeds": (2, 1000), "smallest": (1e-6, 100)}
ROOT = Path(__file__).resolve().parents[1]
# Flags of every run: it continues after an interruption, and evaluates little by itself.
FLAGS = "--auto_resume=True --eval_interval=1000000000 --eval_iters=1".split()
# Student's t for 95 % and 1, 2, ... 10 degrees of freedom.
T_VALUES = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]


# --- run -----------------------------------------------------------------------------------------


def measure(arguments, root, seed):
    """Train with these arguments and a seed, or find the finished run; return the Run and its loss.

    A finished run counts only if code and config files have not changed since.
    """
    key = zlib.crc32(f"{arguments} {root}".encode())
    for pattern in ("*.py", "engine/*.py", "data/*.py", "config/*.py"):
        for path in sorted(root.glob(pattern)):
            key = zlib.crc32(path.read_bytes(), key)
    folder = user_path(out_dir) / f"{key:08x}-{seed}"
    result = folder / "result.json"
    if not result.exists():
        train_and_evaluate(arguments, root, seed, folder)
    figures = json.loads(result.read_text())
    return plot.Run(folder), figures["loss"]


def train_and_evaluate(arguments, root, seed, folder):
    """Train in `folder`, and write the figures of the final model to result.json there."""
    out = f"--out_dir={folder}"
    run(root / "train.py", *shlex.split(arguments), *FLAGS, f"--seed={seed}", out)
    figures = run(root / "tools" / "evaluate.py", out, "--checkpoint_file=ckpt.pt")
    with atomic(folder / "result.json") as file:
        file.write(figures.encode())


def run(script, *arguments):
    """Run a script of a repository and return its output. UserError if it fails."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"this command failed: {shlex.join(command)}")
    return done.stdout


# --- judge ---------------------------------------------------------------------------------------


def interval(differences):
    """Return the mean of the differences and half the width of its 95 % confidence interval."""
    count = len(differences)
    freedom = count - 1
    t = 1.96 + 2.5 / freedom  # right to 0.02 from 11 on
    if freedom <= len(T_VALUES):
        t = T_VALUES[freedom - 1]
    mean = statistics.mean(differences)
    spread = statistics.stdev(differences)
    return mean, t * spread / math.sqrt(count)


def verdict(differences):
    """Return a sentence about the differences, each a loss of B minus the loss of A."""
    mean, half = interval(differences)
    count = len(differences)
    if abs(mean) > half:
        better = "A"
        if mean < 0:
            better = "B"
        return f"{better} is better by {abs(mean):.4f} +- {half:.4f} with {count} seeds"
    text = f"no difference can be seen with {count} seeds (B - A = {mean:+.4f} +- {half:.4f} nats)"
    spread = statistics.stdev(differences)
    needed = (2.8 * spread / smallest) ** 2  # then it is seen with a probability of 80 %
    more = math.ceil(needed) - count
    if more > 0:
        text += f"; {more} more seeds would be needed to see a difference of {smallest}"
    return text


# --- report --------------------------------------------------------------------------------------


def seconds_of(runs):
    """Return the time of training in seconds, without evaluation and saving."""
    last_lines = [run.lines[-1] for run in runs]
    return sum(line["seconds"] for line in last_lines)


def record(*cells):
    date = time.strftime("%Y-%m-%d")
    with open("results.tsv", "a", encoding="utf-8") as file:
        print(date, *cells, sep="\t", file=file)


@one_line_errors()
def main(config, first, second):
    arguments = {"A": first, "B": second}
    runs = {"A": [], "B": []}
    differences = []
    for seed in range(1, seeds + 1):
        losses = {}
        for name in "AB" if seed % 2 else "BA":  # in turn, so that both meet a slow machine
            root = ROOT
            if name == "B" and repository:
                root = user_path(repository)
            result, losses[name] = measure(arguments[name], root, seed)
            result.name = f"{name}, seed {seed}"
            runs[name].append(result)
        print(f"seed {seed}: A {losses['A']:.4f}, B {losses['B']:.4f}", flush=True)
        differences.append(losses["B"] - losses["A"])
    ratio = seconds_of(runs["B"]) / seconds_of(runs["A"])
    text = f"{verdict(differences)}; B takes {ratio:.2f} of the time of A"
    print(text)
    record(first, second, repository, text)
    figure = plot.draw_panels(runs["A"] + runs["B"])
    figure.savefig("compare.png", dpi=110)


if __name__ == "__main__":
    commands = [word for word in sys.argv[1:3] if word != "--help"]
    sys.argv[1:3] = [] if len(commands) == 2 else ["--help"]
    main(configure(globals()), *commands)
