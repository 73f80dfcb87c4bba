"""Draw curves.png: the losses of a run that was left alone, and of one that was killed five times.

    python data/stdlib_char/prepare.py && python docs/curves.py

Runs config/train_stdlib_char.py twice. The second run gets `kill -9` at five random
moments and is started again with --auto_resume each time; all losses must be equal.
"""

import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools.plot import Run  # noqa: E402

OPTIONS = "--eval_interval=50 --log_interval=5 --eval_iters=4 --auto_resume=True".split()
KILLS = 5


def command(folder):
    script = ROOT / "train.py"
    config = ROOT / "config" / "train_stdlib_char.py"
    return [sys.executable, script, config, *OPTIONS, f"--out_dir={folder}", *sys.argv[1:]]


def train_and_kill(folder, steps):
    """Train in `folder`, killed once in each sixth of the run; return the steps it had reached."""
    kills = []
    moments = random.Random(1)
    for index in range(KILLS):
        wanted = steps * (index + moments.uniform(0.3, 1)) / (KILLS + 1)
        run = subprocess.Popen(command(folder), stdout=subprocess.PIPE, text=True)
        for line in run.stdout:
            match = re.match(r"iter (\d+):", line)
            if match and int(match[1]) >= wanted:
                kills.append(int(match[1]))
                run.kill()
                break
        run.wait()
    subprocess.run(command(folder), check=True)
    return kills


def draw_losses(left_alone, killed, kills):
    """Draw the two curves over one another, with a line at each kill."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    axes.plot(*left_alone, color="0.8", linewidth=6, label="left alone")
    axes.plot(*killed, color="tab:blue", linewidth=1, label="killed and resumed")
    for step in kills:
        axes.axvline(step, color="tab:red", linewidth=1, linestyle="--")
    axes.axvline(kills[0], color="tab:red", linewidth=1, linestyle="--", label="kill -9")
    axes.set(xlabel="step", ylabel="training loss", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig("curves.png", dpi=110)


def main():
    if not (ROOT / "data" / "stdlib_char" / "train.bin").exists():
        raise SystemExit("error: first: python data/stdlib_char/prepare.py")
    folder = Path(tempfile.mkdtemp())
    subprocess.run(command(folder / "alone"), check=True)
    left_alone = Run(folder / "alone").curve("loss")
    kills = train_and_kill(folder / "killed", left_alone[0][-1])
    killed = Run(folder / "killed").curve("loss")
    print(f"killed at steps {kills}")
    draw_losses(left_alone, killed, kills)
    shutil.rmtree(folder)
    if left_alone != killed:
        raise SystemExit("error: the losses differ")


if __name__ == "__main__":
    main()
