"""tools/plot.py: what it reads from log.jsonl, and that it draws it."""

import json
import math

import pytest
from conftest import TINY

import train
from tools import plot

SETTINGS = {"iter": 0, "settings": {}}


@pytest.fixture(autouse=True)
def against_steps(monkeypatch):
    monkeypatch.setattr(plot, "x", "steps")


def write(folder, *entries):
    folder.mkdir()
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    return folder


def made(step, loss=1.0, ms=500.0):
    return {"iter": step, "loss": loss, "ms": ms, "tokens_per_second": 100.0}


def test_a_run_is_read_with_its_resumes_gaps_and_what_was_not_finite(tmp_path):
    steps = [made(step) for step in (0, 1, 2, 3, 20, 21, 22, 30, 40, 50)]  # the interval changed
    steps[1]["loss"] = None
    again = {"iter": 21, "settings": {}}
    run = plot.Run(write(tmp_path / "a", SETTINGS, *steps[:5], again, *steps[5:]))
    places, values = run.curve("loss")
    assert places == [0, 1, 2, 3, 3, 20, 21, 22, 30, 40, 50] and run.resumed == [21]
    assert [at for at, value in enumerate(values) if math.isnan(value)] == [1, 4]


def test_steps_tokens_and_seconds_add_up_whatever_the_interval(tmp_path, monkeypatch):
    entries = SETTINGS, made(0), made(10, ms=200.0), {"iter": 10, "val/loss": 2.0}
    folder = write(tmp_path / "a", *entries)
    for axis, expected in ("steps", [0, 10]), ("seconds", [0.5, 2.5]), ("tokens", [50, 250]):
        monkeypatch.setattr(plot, "x", axis)
        run = plot.Run(folder)
        assert run.curve("loss")[0] == pytest.approx(expected)
        assert run.curve("val/loss")[0] == pytest.approx(expected[-1:])


def test_a_last_line_may_be_half_written_and_no_other(tmp_path):
    path = write(tmp_path / "a", SETTINGS, made(0)) / "log.jsonl"
    path.write_text(path.read_text() + '{"iter": 1, "lo')
    assert len(plot.Run(path).entries) == 2
    path.write_text(path.read_text() + "\n{}")
    with pytest.raises(ValueError, match="log.jsonl, line 3: no line of a log"):
        plot.Run(path)


def test_runs_are_drawn_over_one_another_with_health_where_it_was_logged(launch, tiny):
    pytest.importorskip("matplotlib")
    options = [*TINY, "--eval_interval=2", "--health_interval=2"]
    launch(train, *options, "--max_iters=4", "--out_dir=a")
    launch(train, "--init_from=resume", "--out_dir=a", "--max_iters=8")
    launch(train, *TINY, "--max_iters=1", "--out_dir=b")
    assert launch(plot, "--runs=a", "--picture=a.png") == "a.png: a\n"
    assert launch(plot, "--runs=a/log.jsonl,b", "--x=tokens", "--picture=b.svg") == "b.svg: a, b\n"
    assert (tiny / "a.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tiny / "b.svg").read_text()
    assert "a, best " in drawn.replace("<!-- ", "") and "tokens per second" in drawn
    assert "h.1" in drawn and "update / weight" in drawn


def test_a_terminal_gets_text(launch, tiny):
    pytest.importorskip("uniplot")
    for name in ("a", "b"):
        launch(train, *TINY, "--max_iters=4", "--eval_interval=2", f"--out_dir={name}")
    shown = launch(plot, "--runs=a,b", "--terminal=True")
    assert "loss against steps" in shown and " a " in shown and " b" in shown
    launch(train, *TINY, "--max_iters=1", "--out_dir=c")
    assert "loss against steps" in launch(plot, "--runs=c", "--terminal=True")


def test_a_run_that_went_bad_is_drawn(launch, tiny):
    pytest.importorskip("matplotlib")
    bad = {"iter": 2, "weight_norm/h.0": 1.0, "update_ratio/h.0": None, "grad_norm/h.0": None}
    write(tiny / "a", SETTINGS, made(0), made(1), made(2, loss=None), bad)
    launch(plot, "--runs=a , a", "--picture=a.png")


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--runs=nowhere"], "{}/nowhere: No such file or directory"),
        (["--runs=bad", "--terminal=True"], "a run has no finite losses to draw yet"),
        (["--runs=a", "--x=time"], "x=time: choose steps, tokens or seconds"),
        (["--runs=empty"], "{}/empty/log.jsonl holds no losses yet"),
        (["--runs=a", "--picture=a.xyz"], "a.xyz: Format 'xyz' is not supported"),
        (["--runs=a", "--picture=no/a.png"], "no/a.png: No such file or directory"),
    ],
)
def test_a_mistake_gets_its_line(launch, tiny, arguments, line):
    pytest.importorskip("matplotlib")
    write(tiny / "a", SETTINGS, made(0))
    write(tiny / "empty", SETTINGS)
    write(tiny / "bad", SETTINGS, made(0, loss=None))
    with pytest.raises(SystemExit) as fault:
        launch(plot, *arguments)
    assert str(fault.value).startswith(f"error: {line.replace('{}', str(tiny))}")
