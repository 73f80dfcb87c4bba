"""The lines of a run in log.jsonl, on the console and in wandb."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import TINY, at_step, log, losses

import train


def test_the_log_of_a_resumed_run_repeats_and_loses_nothing(launch, tiny):
    options = *TINY, "--lr_decay_iters=7", "--eval_interval=3"
    launch(train, *options, "--max_iters=7", "--out_dir=straight")
    launch(train, *options, "--max_iters=4")
    with open("out/log.jsonl", "a") as file:  # steps after the last save, and a line cut off
        file.write('{"iter": 4, "loss": 9.0}\n{"iter": 5, "loss": 9.0}\n[]\n{"iter": 6, "lo')
    launch(train, "--init_from=resume", "--max_iters=7")
    assert losses("out") == losses("straight")
    assert [entry["iter"] for entry in log("out") if "loss" in entry] == list(range(7))
    assert [entry["iter"] for entry in log("out") if "settings" in entry] == [0, 4]


def test_a_line_knows_tokens_and_the_machine(launch, tiny):
    out = launch(train, *TINY, "--max_iters=6", "--log_interval=2")
    lines = [entry for entry in log("out") if "loss" in entry]
    assert [entry["tokens"] for entry in lines] == [64 * (step + 1) for step in (0, 2, 4)]
    settings = log("out")[0]["settings"]
    assert (settings["threads"], settings["n_embd"]) == (torch.get_num_threads(), 32)
    assert f"hardware: {settings['about']}" in out.splitlines()


def test_a_figure_that_is_not_finite_is_null_in_the_log(launch, tiny, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *args: {"train": 1.0, "val": float("nan")})
    with pytest.raises(SystemExit):
        launch(train, *TINY, "--max_iters=2")
    text = Path("out/log.jsonl").read_text()
    assert "NaN" not in text and json.loads(text.splitlines()[-1])["val/loss"] is None


def test_lines_without_room_on_the_disk_are_added_later(launch, tiny, monkeypatch, file_limit):
    def fill():
        file_limit(Path("out/log.jsonl").stat().st_size + 20)

    at_step(monkeypatch, {3: fill, 6: lambda: file_limit(None)})
    out = launch(train, *TINY, "--max_iters=8", "--eval_interval=8")
    assert out.count("out/log.jsonl: File too large; it will be tried again") == 3
    assert list(losses("out")) == list(range(8))


def test_output_without_room_does_not_end_a_run(start, tiny):
    with open("/dev/full", "w") as full:
        process = start(*TINY, "--max_iters=3", stdout=full)
        process.communicate(timeout=60)
    assert process.returncode == 0 and list(losses("out")) == [0, 1, 2]


def test_wandb_continues_its_run(launch, tiny, monkeypatch):
    calls, logged = [], []

    def init(**options):
        calls.append(options)
        return types.SimpleNamespace(
            id=options["id"] or "new", log=lambda e, step: logged.append(e)
        )

    fake = types.SimpleNamespace(init=init, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    launch(train, *TINY, "--wandb_log=True", "--max_iters=2")
    launch(train, "--init_from=resume", "--max_iters=3", "--wandb_log=True")
    launch(train, "--init_from=resume", "--max_iters=4")  # no checkpoint switches it on
    assert [call["id"] for call in calls] == [None, "new"]
    assert [entry["iter"] for entry in logged if "loss" in entry] == [0, 1, 2]


def test_a_missing_wandb_gets_a_line(launch, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="error: this needs the package wandb: pip install wandb"):
        launch(train, *TINY, "--wandb_log=True", "--max_iters=2")
