"""tools/plot.py: the curves that it reads from log.jsonl, and the pictures that it draws."""

import json

import pytest
from conftest import TINY

import train
from tools import plot

pytest.importorskip("matplotlib")
START = {"iter": 0, "settings": {}}
EVALUATION = {"iter": 0, "train/loss": 3.0, "val/loss": 3.5}


def step(number, **figures):
    return {"iter": number, "loss": 2.0, "ms": 500.0, "tokens": 100 * (number + 1), **figures}


def write(folder, *lines):
    """Write lines as the log of a run; return its folder."""
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "axis, places, place_of_evaluation",
    [("steps", [0, 10], 11), ("tokens", [100, 1100], 1100), ("seconds", [0.5, 2.5], 2.5)],
)
def test_the_axis_counts_training_only(tmp_path, monkeypatch, axis, places, place_of_evaluation):
    monkeypatch.setattr(plot, "x", axis)
    later = {**EVALUATION, "iter": 11}
    run = plot.Run(write(tmp_path / "a", START, EVALUATION, step(0), step(10, ms=200.0), later))
    assert run.curve("loss") == (places, [2.0, 2.0])
    assert run.curve("val/loss") == ([0, place_of_evaluation], [3.5, 3.5])


def test_a_resume_is_marked_and_a_last_line_may_be_incomplete(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "x", "steps")
    lines = START, EVALUATION, step(0), {**START, "iter": 1}, step(1, loss=None)
    with open(write(tmp_path / "a", *lines) / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"iter": 2, "lo')
    run = plot.Run(tmp_path / "a")
    assert run.resumes == [1]
    assert run.curve("loss") == ([0, 1], [2.0, None])


def test_runs_are_drawn_in_one_picture(launch, tiny):
    """The second has no finite numbers."""
    launch(train, *TINY, "--max_iters=4", "--out_dir=a")
    write(tiny / "b", START, {**EVALUATION, "val/loss": None}, step(0, loss=None))
    assert launch(plot, "--runs=a,b", "--picture=ab.svg", "--x=tokens") == "ab.svg: a,b\n"
    drawn = (tiny / "ab.svg").read_text(encoding="utf-8")
    labels = "loss in nats per token", "gradient norm", "learning rate"
    assert [label for label in labels if label not in drawn] == []


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--runs=nowhere"], "nowhere/log.jsonl: No such file or directory"),
        (["--runs=damaged"], "damaged/log.jsonl: Expecting value: line 1 column 1"),
        (["--runs=empty"], "empty/log.jsonl holds no evaluation yet"),
        (["--runs=a", "--x=time"], "x='time': choose one of .'steps', 'tokens', 'seconds'."),
        (["--runs=a", "--picture=a.xyz"], "a.xyz: Format 'xyz' is not supported"),
        (["--runs=a", "--picture=no/a.png"], ".*/no/a.png: No such file or directory"),
    ],
)
def test_a_mistake_gets_its_line(launch, tiny, arguments, line):
    write(tiny / "a", START, EVALUATION)
    write(tiny / "empty", START)
    (write(tiny / "damaged") / "log.jsonl").write_text("?\n")
    with pytest.raises(SystemExit, match=f"^error: {line}"):
        launch(plot, *arguments)
