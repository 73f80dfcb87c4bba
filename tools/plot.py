"""Draw the losses, speed and health of one run, or of several over one another.

    python tools/plot.py --runs=out-shakespeare-char
    python tools/plot.py --runs=out-a,out-b --x=seconds --picture=compare.png
    python tools/plot.py --runs=out-a,out-b --terminal=True

Reads log.jsonl, also while the run goes on. Where a run stopped and was resumed stands a dotted
line; what was not finite, or was never written, is a gap.
"""

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configurator import configure  # noqa: E402
from engine.process import (  # noqa: E402
    UserError,
    import_extra,
    one_line_errors,
    user_error,
    user_path,
)

# What to draw
runs = "out"              # folders of runs, or their log.jsonl, with commas between them
x = "steps"               # what to draw against: steps, tokens, seconds
# Output
picture = "run.png"       # .png, .svg or .pdf
terminal = False          # draw the losses as text instead

PANELS = {  # name in log.jsonl -> label; drawn below the losses
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
}
HEALTH = {  # beginning of a name in log.jsonl -> label
    "grad_norm": "gradient norm",
    "weight_norm": "weight norm",
    "update_ratio": "update / weight",
    "attention_score": "largest attention score",
}


# --- reading -------------------------------------------------------------------------------------


class Run:
    """What log.jsonl holds: the lines of steps and evaluations, and where it was resumed."""

    def __init__(self, name):
        self.path = user_path(str(name).strip()).resolve()
        if self.path.is_dir():
            self.path /= "log.jsonl"
        self.name = self.path.parent.name if self.path.name == "log.jsonl" else self.path.stem
        with user_error(self.path, OSError, UnicodeError):
            lines = self.path.read_text(encoding="utf-8").splitlines()
        self.entries = []  # dicts; NaN for what was not finite
        for number, line in enumerate(lines, start=1):
            try:
                figures = {k: math.nan if v is None else v for k, v in json.loads(line).items()}
                self.entries.append(figures | {"steps": int(figures["iter"])})
            except (ValueError, TypeError, KeyError, AttributeError):
                if number < len(lines):  # the last one may be on its way to the disk
                    raise UserError(f"{self.path}, line {number}: no line of a log") from None
        self.place()
        self.resumed = [entry[x] for entry in self.entries if "settings" in entry][1:]
        if not any("loss" in entry or "val/loss" in entry for entry in self.entries):
            raise UserError(f"{self.path} holds no losses yet")

    def place(self):
        """Give each entry the tokens and seconds of training up to it, from the lines of steps."""
        step = tokens = seconds = 0
        for entry in self.entries:
            if "ms" in entry:
                passed = (entry["steps"] + 1 - step) * entry["ms"] / 1000
                step, seconds = entry["steps"] + 1, seconds + passed
                tokens += passed * entry["tokens_per_second"]
            entry |= {"tokens": tokens, "seconds": seconds}

    def curve(self, name):
        """Return the places and values of a figure; NaN where it was not finite, or lines lack."""
        found = [entry for entry in self.entries if name in entry]
        places, values = [e[x] for e in found], [e[name] for e in found]
        pairs = zip(found, found[1:], strict=False)
        apart = [after["steps"] - before["steps"] for before, after in pairs]
        for at in range(len(apart) - 2, 0, -1):  # from the end: an insertion moves what follows
            if apart[at] > 2 * max(apart[at - 1], apart[at + 1]):
                places.insert(at + 1, places[at])
                values.insert(at + 1, math.nan)
        return places, values

    def layers(self, beginning):
        """Return the steps and {layer: values} of the health figures that begin so."""
        lines = [e for e in self.entries if any(key.startswith(f"{beginning}/") for key in e)]
        names = dict.fromkeys(k for e in lines for k in e if k.startswith(f"{beginning}/"))
        rows = {n.partition("/")[2]: [e.get(n, math.nan) for e in lines] for n in names}
        return [entry[x] for entry in lines], rows


# --- drawing -------------------------------------------------------------------------------------


def draw(found, plt):
    """Return a figure: losses on top, PANELS below, then the health of each run that logged it."""
    watched = [run for run in found if run.layers("weight_norm")[1]]
    heights = [2, 1, *[1.2] * len(watched)]
    figure = plt.figure(figsize=(13, 2.6 * sum(heights)), layout="constrained")
    rows = figure.subfigures(len(heights), height_ratios=heights)
    losses, panels = rows[0].subplots(), rows[1].subplots(1, len(PANELS))
    for number, run in enumerate(found):
        color = f"C{number % 10}"
        draw_losses(run, losses, color)
        for panel, name in zip(panels, PANELS, strict=True):
            panel.plot(*run.curve(name), color=color, linewidth=1)
    for panel, label in zip((losses, *panels), ("loss", *PANELS.values()), strict=True):
        panel.set(xlabel=x, ylabel=label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    losses.set_title("solid: validation, dashed: training set, pale: steps; nats per token")
    losses.legend(frameon=False)
    for row, run in zip(rows[2:], watched, strict=True):
        draw_health(run, row)
    return figure


def draw_losses(run, panel, color):
    """Draw the three losses of a run, with its best one as label, and where it was resumed."""
    panel.plot(*run.curve("loss"), color=color, alpha=0.35, linewidth=1)
    panel.plot(*run.curve("train/loss"), "--", color=color, linewidth=1)
    places, values = run.curve("val/loss")
    best = min(filter(math.isfinite, values), default=math.nan)
    label = f"{run.name}, best {best:.4f}"
    panel.plot(places, values, "o-", color=color, markersize=3, label=label)
    for place in run.resumed:
        panel.axvline(place, color=color, linestyle=":")


def draw_health(run, row):
    """Draw a heat map for each figure of HEALTH, a line per layer, in a row of the picture."""
    for panel, (beginning, label) in zip(row.subplots(1, len(HEALTH)), HEALTH.items(), strict=True):
        places, layers = run.layers(beginning)
        panel.set_title(f"{run.name}: {label}", fontsize="small")
        panel.set_xlabel(x)
        if layers:
            positive = any(value > 0 for values in layers.values() for value in values)
            norm = "log" if positive and beginning != "attention_score" else "linear"
            options = {"shading": "nearest", "norm": norm}
            mesh = panel.pcolormesh(places, list(layers), list(layers.values()), **options)
            row.colorbar(mesh, ax=panel)


def draw_text(found):
    """Print the losses of all runs as text: their evaluations, or steps where one has too few."""
    curves = [run.curve("val/loss") for run in found]
    if min(len(places) for places, _ in curves) < 2:
        curves = [run.curve("loss") for run in found]
    places, values = zip(*curves, strict=True)
    if not all(any(map(math.isfinite, each)) for each in values):
        raise UserError("a run has no finite losses to draw yet")
    plot = import_extra("uniplot", "plot").plot
    look = {"title": f"loss against {x}", "lines": True, "width": 70, "color": sys.stdout.isatty()}
    plot(values, places, legend_labels=[run.name for run in found], **look)


@one_line_errors
def main(config):
    if x not in ("steps", "tokens", "seconds"):
        raise UserError(f"x={x}: choose steps, tokens or seconds")
    found, path = [Run(name) for name in runs.split(",")], user_path(picture)
    if terminal:
        draw_text(found)
        return
    plt = import_extra("matplotlib.pyplot", "plot")
    figure = draw(found, plt)
    with user_error(path, OSError, ValueError):  # no such folder; an unknown kind of picture
        figure.savefig(path, dpi=110)
    print(f"{path}: {', '.join(run.name for run in found)}")


if __name__ == "__main__":
    main(configure(globals()))
