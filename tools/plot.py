"""Draw the losses, gradient norms and speed of one run, or of several in one picture.

    python tools/plot.py --runs=out-shakespeare-char
    python tools/plot.py --runs=out-a,out-b --x=seconds --picture=compare.png

Reads log.jsonl, also while the run writes it. A dotted line marks a resume, and a gap marks numbers
that were not finite.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from configurator import configure
from engine.process import UserError, atomic, one_line_errors, user_error, user_path

runs = "out"              # folders of runs, with commas between them
x = "steps"               # horizontal axis: steps, tokens or seconds
picture = "run.png"       # file to write: .png, .svg or .pdf

ALLOWED = {"x": ["steps", "tokens", "seconds"]}
PANELS = {  # name in log.jsonl -> label
    "loss": "loss in nats per token",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
}


# --- read ----------------------------------------------------------------------------------------


class Run:
    """The lines of a run's log.jsonl, and the places on the horizontal axis of its resumes.

    Each line is a dict, to which this class adds the steps, tokens and seconds of training so far.
    """

    def __init__(self, name):
        self.name = name
        path = user_path(name) / "log.jsonl"
        if path.exists() and not path.is_file():  # a named pipe would wait for ever
            raise UserError(f"{path} is not a regular file")
        with user_error(path, Exception):  # someone else may have written it
            complete = path.read_text(encoding="utf-8").rpartition("\n")[0]  # without half a line
            self.lines = [json.loads(line) for line in complete.splitlines()]
            steps = tokens = seconds = 0
            for line in self.lines:
                if "ms" in line:
                    seconds += (line["iter"] + 1 - steps) * line["ms"] / 1000
                    steps = line["iter"] + 1
                    tokens = line["tokens"]
                line |= {"steps": line["iter"], "tokens": tokens, "seconds": seconds}
        self.resumes = self.curve("settings")[0][1:]
        if not self.curve("val/loss")[0]:
            raise UserError(f"{path} holds no evaluation yet")

    def curve(self, name):
        """Return the places and the values of a figure, two lists. None: it was not finite."""
        lines = [line for line in self.lines if name in line]
        return [line[x] for line in lines], [line[name] for line in lines]


# --- draw ----------------------------------------------------------------------------------------


def draw_panels(all_runs):
    """Return a picture of all PANELS."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    for panel, name in zip(panels.flat, PANELS, strict=True):
        panel.set(xlabel=x, ylabel=PANELS[name])
        for run in all_runs:
            panel.plot(*run.curve(name), alpha=0.5, linewidth=1)
    panels[0, 1].set_yscale("log")
    draw_evaluations(all_runs, panels[0, 0])
    return figure


def draw_evaluations(all_runs, panel):
    """Draw the losses at evaluations, and a dotted line at each resume."""
    panel.set_title("line: validation, dashed: training set, pale: training steps")
    for number, run in enumerate(all_runs):
        color = f"C{number % 10}"  # as matplotlib chose for the steps
        panel.plot(*run.curve("train/loss"), "--", color=color)
        panel.plot(*run.curve("val/loss"), color=color, marker=".", label=run.name)
        for resume in run.resumes:
            panel.axvline(resume, color=color, linestyle=":")
    panel.legend(frameon=False)


@one_line_errors()
def main(config):
    all_runs = [Run(name) for name in runs.split(",")]
    path = user_path(picture)
    with atomic(path.resolve()) as file, user_error(picture, ValueError):  # an unknown format
        draw_panels(all_runs).savefig(file, format=path.suffix[1:], dpi=110)
    print(f"{picture}: {runs}")


if __name__ == "__main__":
    main(configure(globals()))
