"""Measure how a step and sampling grow with the settings; draw growth.png and print the table.

    python data/stdlib_char/prepare.py && python docs/growth.py
    python docs/growth.py --device=cuda --dtype=bfloat16

Each point is a run of bench.py in a process of its own, with the settings on the command line.
"""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
BASE = "--dataset=stdlib_char --n_layer=4 --n_head=4 --n_embd=256 --batch_size=2 --block_size=512"
STEP = {
    "batch_size": [1, 2, 4, 8, 16],
    "block_size": [512, 1024, 2048, 4096, 8192],
    "n_embd": [128, 256, 512, 1024],
    "n_layer": [2, 4, 8, 16, 32],
}
SAMPLING = [250, 500, 1000, 2000, 4000]  # new tokens


def measure(*options):
    """Return seconds per step, or of all new tokens, and the peak memory in GiB of bench.py."""
    command = [sys.executable, ROOT / "bench.py", *BASE.split(), "--seconds=6", *options]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    [memory] = re.findall(r"peak memory: (.*) GiB", shown)
    [median] = re.findall(r"median (.*) ms", shown)
    return float(median) / 1000, float(memory)


def draw(points):
    """Draw time above and memory below, a column per setting, with a straight line to compare."""
    figure, axes = plt.subplots(2, len(points), figsize=(15, 5.5), layout="constrained")
    for column, (name, rows) in enumerate(points.items()):
        values = [value for value, _, _ in rows]
        for row, label in enumerate(("seconds per step", "peak memory, GiB")):
            panel, measured = axes[row, column], [point[row + 1] for point in rows]
            panel.plot(values[:: len(values) - 1], measured[:: len(values) - 1], color="0.75")
            panel.plot(values, measured, "o-")
            panel.set(xlabel=name, xticks=values[-3:], xlim=(0, None), ylim=(0, None))
            panel.set_ylabel("seconds in all" if (row, name) == (0, "new tokens") else label)
            panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "assets" / "growth.png", dpi=100)


def main():
    if not (ROOT / "data" / "stdlib_char" / "train.bin").exists():
        raise SystemExit("error: first: python data/stdlib_char/prepare.py")
    points = {
        name: [(value, *measure(*sys.argv[1:], f"--{name}={value}")) for value in values]
        for name, values in STEP.items()
    }
    more = *sys.argv[1:], "--block_size=8192"
    points["new tokens"] = [(n, *measure(*more, f"--new_tokens={n}")) for n in SAMPLING]
    print("| setting | value: seconds, GiB |\n| --- | --- |")
    for name, rows in points.items():
        cells = (f"{value}: {time:.3g}, {memory:.2f}" for value, time, memory in rows)
        print(f"| {name} | {'; '.join(cells)} |")
    draw(points)


if __name__ == "__main__":
    main()
