"""What a run says: the lines of log.jsonl, wandb's run, the last line, and steps without update."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import TINY, at_step, log, losses

import train
from engine.folder import Keeper
from engine.health import BadSteps
from engine.process import UserError
from engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32, False, 0, 1, "cpu", "")


# --- log.jsonl -----------------------------------------------------------------------------------


def evaluations(folder):
    return {entry["iter"]: entry["val/loss"] for entry in log(folder) if "val/loss" in entry}


def test_the_log_of_a_resumed_run_repeats_and_loses_nothing(launch, tiny):
    steps = "--lr_decay_iters=7", "--eval_interval=3"
    launch(train, *TINY, *steps, "--max_iters=7", "--out_dir=straight")
    launch(train, *TINY, *steps, "--max_iters=4")
    path = tiny / "out" / "log.jsonl"
    with open(path, "a") as file:  # steps after the last save, and a line cut by a crash
        file.write('{"iter": 4, "loss": 9.0}\n{"iter": 5, "loss": 9.0}\n[]\n{"iter": 6, "lo')
    launch(train, "--init_from=resume", "--max_iters=7")
    assert losses("out") == losses("straight") and evaluations("out") == evaluations("straight")
    assert [e["iter"] for e in log("out") if "loss" in e] == list(range(7))
    assert [e["iter"] for e in log("out") if "settings" in e] == [0, 4]


def test_a_line_knows_tokens_epochs_and_memory(launch, tiny):
    launch(train, *TINY, "--max_iters=6", "--log_interval=2")
    size = (tiny / "data" / "tiny" / "train.bin").stat().st_size // 2
    lines = [entry for entry in log("out") if "loss" in entry]
    assert [entry["tokens"] for entry in lines] == [64 * (step + 1) for step in (0, 2, 4)]
    assert [entry["epoch"] for entry in lines] == [entry["tokens"] / size for entry in lines]
    assert all(10**7 < entry["peak_bytes"] < 10**11 for entry in lines)


def test_a_bad_figure_is_null_in_the_log(launch, tiny, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *a: {"train": 1.0, "val": float("nan")})
    with pytest.raises(SystemExit):
        launch(train, *TINY, "--max_iters=2")
    text = Path("out", "log.jsonl").read_text()
    assert "NaN" not in text and json.loads(text.splitlines()[-1])["val/loss"] is None


def test_lines_that_find_no_room_wait(launch, tiny, monkeypatch, file_limit):
    def fill():
        file_limit(Path("out", "log.jsonl").stat().st_size + 20)

    at_step(monkeypatch, {3: fill, 6: lambda: file_limit(None)})
    out = launch(train, *TINY, "--max_iters=8", "--eval_interval=8")
    assert out.count("log.jsonl waits: File too large") == 1
    assert list(losses("out")) == list(range(8))


def test_lines_that_never_found_room_show_in_the_exit_status(
    launch, tiny, monkeypatch, file_limit
):
    def fill():
        file_limit(Path("out", "log.jsonl").stat().st_size + 20)
        monkeypatch.setattr(Keeper, "write", lambda *a: True)  # the checkpoint found room

    at_step(monkeypatch, {3: fill})
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--max_iters=5", "--eval_interval=5")
    assert stop.value.code == 1
    assert list(losses("out")) == [0, 1, 2]


def test_output_that_finds_no_room_does_not_end_a_run(start, tiny):
    with open("/dev/full", "w") as full:
        process = start(*TINY, "--max_iters=3", stdout=full)
        process.communicate(timeout=60)
    assert process.returncode == 0 and list(losses("out")) == [0, 1, 2]


# --- wandb ---------------------------------------------------------------------------------------


def test_wandb_goes_on_with_its_run(launch, tiny, monkeypatch):
    calls, logged = [], []

    def init(**options):
        calls.append(options)
        return types.SimpleNamespace(id=options["id"] or "made-by-wandb", log=write)

    def write(entry, step):
        logged.append(entry)

    fake = types.SimpleNamespace(init=init, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    launch(train, *TINY, "--wandb_log=True", "--max_iters=2")
    launch(train, "--init_from=resume", "--max_iters=3")
    assert [call["id"] for call in calls] == [None, "made-by-wandb"]
    assert [e["iter"] for e in logged if "loss" in e] == [0, 1, 2]
    assert not any("settings" in entry for entry in logged)


def test_wandb_that_will_not_start_gets_one_line(launch, tiny, monkeypatch):
    def init(**options):
        raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=RuntimeError))
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--wandb_log=True")
    assert stop.value.code == "error: wandb: not logged in; or set WANDB_MODE=offline"


def test_a_folder_wandb_of_earlier_runs_is_not_taken_for_the_package(launch, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # as it is imported
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--wandb_log=True")
    assert stop.value.code == "error: wandb_log=True needs wandb: pip install -e '.[wandb]'"


# --- steps without an update ---------------------------------------------------------------------

FINE, NAN, INF = 1.0, float("nan"), float("inf")


@pytest.mark.parametrize(
    "scale, steps, most",
    [
        (None, [(FINE, NAN), (FINE, INF), (FINE, FINE), (FINE, NAN)], 2),  # not scaled at all
        (None, [(NAN, NAN), (INF, NAN), (NAN, INF)], 3),
        (1.0, [(FINE, INF), (FINE, NAN)], 2),
        (2.0, [(FINE, INF), (FINE, NAN), (FINE, FINE)], 0),  # overflows while the scale may fall
        (2.0, [(NAN, NAN), (FINE, INF), (INF, NAN), (NAN, NAN)], 2),
    ],
)
def test_steps_count_as_bad_unless_a_loss_scale_may_fall(scale, steps, most):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    keeper = types.SimpleNamespace(what_is_kept=lambda: "all is kept")
    bad = BadSteps(most + 1, CPU)
    for loss, grad_norm in steps:
        bad.add(torch.tensor(loss), torch.tensor(grad_norm), scaler)
    assert bad.most == most
    bad.check(9, keeper)
    bad.limit = most
    if most:
        loss, grad_norm = steps[-1]
        what = f"{most} steps in a row had no finite gradient, seen at step 9: "
        figures = f"loss {loss:.4f}, gradient norm {grad_norm:.4f}; all is kept; "
        with pytest.raises(UserError) as fault:
            bad.check(9, keeper)
        assert str(fault.value) == what + figures + "lower --learning_rate"
