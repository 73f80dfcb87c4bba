"""Crashes: runs that are killed, stopped, left without a disk or fed bad gradients."""

import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_equal, load, log, losses

import train

KILLS = 30
SLOW_SAVES = """
import io, os, time
import torch, train
from configurator import configure

def slow(function, seconds):
    def call(*arguments):
        time.sleep(seconds)
        result = function(*arguments)
        time.sleep(seconds)
        return result
    return call

def save(checkpoint, file, plain=torch.save):
    plain(checkpoint, buffer := io.BytesIO())
    content = buffer.getvalue()
    for at in range(0, len(content), 40_000):
        file.write(content[at : at + 40_000])
        file.flush()
        time.sleep(0.01)

os.fsync, os.replace, torch.save = slow(os.fsync, 0.01), slow(os.replace, 0.02), save
train.main(configure(vars(train)))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_costs_nothing(start, finish, tiny):
    """Kill at 30 random moments, most of them in a save; the end is that of a run never killed."""
    (tiny / "slow_saves.py").write_text(SLOW_SAVES)
    options = [*TINY, "--dropout=0.2", "--max_iters=400", "--eval_interval=4", "--eval_iters=2"]
    options += ["--always_save_checkpoint=False", "--learning_rate=1e-2"]
    finish(*options, "--out_dir=straight")
    moments, in_save = random.Random(1), 0
    for _ in range(KILLS):
        process = start(*options, "--init_from=auto", script="slow_saves.py")
        process.stdout.readline()  # it is about to train
        time.sleep(moments.uniform(0, 1.5))
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        files = {path.name for path in (tiny / "out").iterdir()} if (tiny / "out").exists() else ()
        in_save += any(name in files for name in ("ckpt.pt.tmp", "last.pt.tmp"))
        for name in {"ckpt.pt", "last.pt"} & set(files):
            load(tiny / "out" / name)
    finish(*options, "--init_from=auto")
    print(f"{in_save} of {KILLS} kills in a save")
    assert in_save >= KILLS // 4
    for name in ("ckpt.pt", "last.pt"):
        assert_equal(load(f"straight/{name}"), load(f"out/{name}"))
    assert losses("straight") == losses("out")
    names = sorted(path.name for path in (tiny / "out").iterdir())
    assert names == ["ckpt.pt", "last.pt", "log.jsonl"]


# --- signals -------------------------------------------------------------------------------------


def at_step(monkeypatch, wanted, action):
    """Let `action()` happen within training step `wanted`."""
    step = train.train_step

    def watched(model, state, batches, number, run):
        if number == wanted:
            action()
        return step(model, state, batches, number, run)

    monkeypatch.setattr(train, "train_step", watched)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    launch, tiny, monkeypatch, capsys, name
):
    number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))
    options = *TINY, "--max_iters=6", "--eval_interval=4", "--dropout=0.2"
    launch(train, *options, "--out_dir=straight")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            launch(train, *options)
    assert stop.value.code == 128 + number and signal.getsignal(number) is before
    said = f"{name}: step 3 is saved; go on with python train.py --init_from=resume --out_dir=out"
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert load("out/ckpt.pt")["iter_num"] == 3
    launch(train, "--init_from=resume")
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"))
    assert log("straight")[-1]["val/loss"] == log("out")[-1]["val/loss"]
    assert load("straight/ckpt.pt")["best_val_loss"] == load("out/ckpt.pt")["best_val_loss"]


def test_a_signal_before_an_evaluation_loses_no_best_model(launch, tiny, monkeypatch):
    values = iter([3.0, 2.0, 1.0, 2.0])
    monkeypatch.setattr(train, "evaluate", lambda *a: {"train": 1.0, "val": next(values)})
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            launch(train, *TINY, "--eval_interval=2", "--max_iters=6")
    assert load("out/ckpt.pt")["best_val_loss"] == 2.0
    launch(train, "--init_from=resume", "--always_save_checkpoint=False")
    best, newest = load("out/ckpt.pt"), load("out/last.pt")
    assert (best["iter_num"], newest["iter_num"], newest["best_val_loss"]) == (4, 6, 1.0)


def test_a_second_interrupt_stops_at_once(start, tiny):
    endless = "--max_iters=100000", "--eval_interval=50", "--eval_iters=100000", "--batch_size=1"
    process = start(*TINY, *endless, "--block_size=4", "--log_interval=1000")
    while not process.stdout.readline().startswith("iter 0"):
        pass
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(timeout=20) in (-signal.SIGINT, 128 + signal.SIGINT)
    if (tiny / "out" / "ckpt.pt").exists():
        load("out/ckpt.pt")


# --- saves that fail -----------------------------------------------------------------------------


@pytest.fixture
def file_limit():
    """Return a function that bounds the size of files, in bytes; None lifts the bound."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_without_room_keeps_the_older_and_is_tried_again(
    launch, tiny, monkeypatch, file_limit
):
    step = train.train_step

    def watched(model, state, batches, number, run):
        if number == 3:
            file_limit(100_000)  # a checkpoint has 330,000 bytes
        if number == 4:
            assert load("out/ckpt.pt")["iter_num"] == 2
            file_limit(None)
        return step(model, state, batches, number, run)

    monkeypatch.setattr(train, "train_step", watched)
    out = launch(train, *TINY, "--max_iters=6", "--eval_interval=2")
    why = "[Errno 27] File too large; out keeps the checkpoint of step 2"
    assert out.count(f"step 4 is not saved: {why}") == 1 and out.count("is not saved") == 1
    assert load("out/ckpt.pt")["iter_num"] == 6
    assert sorted(path.name for path in Path("out").iterdir()) == ["ckpt.pt", "log.jsonl"]


def test_a_last_save_that_fails_shows_in_the_exit_status(launch, tiny, monkeypatch, file_limit):
    at_step(monkeypatch, 3, lambda: file_limit(100_000))
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--max_iters=4", "--eval_interval=2")
    assert stop.value.code == 1 and load("out/ckpt.pt")["iter_num"] == 2


def test_a_folder_that_is_gone_is_made_again(launch, tiny, monkeypatch):
    at_step(monkeypatch, 3, lambda: shutil.rmtree("out"))
    out = launch(train, *TINY, "--max_iters=4", "--eval_interval=2")
    assert out.count("log.jsonl waits: No such file or directory") == 1
    assert load("out/ckpt.pt")["iter_num"] == 4
    at_step(monkeypatch, 5, lambda: (shutil.rmtree("out"), Path("out").touch()))
    with pytest.raises(SystemExit) as stop:
        launch(train, "--init_from=resume", "--max_iters=6")
    assert stop.value.code == 1


def test_lines_of_the_log_that_find_no_room_wait(launch, tiny, monkeypatch, file_limit):
    step = train.train_step

    def watched(model, state, batches, number, run):
        if number == 3:
            file_limit(Path("out", "log.jsonl").stat().st_size + 20)
        if number == 6:
            file_limit(None)
        return step(model, state, batches, number, run)

    monkeypatch.setattr(train, "train_step", watched)
    out = launch(train, *TINY, "--max_iters=8", "--eval_interval=8")
    assert out.count("log.jsonl waits: File too large") == 1
    assert list(losses("out")) == list(range(8))


# --- bad gradients -------------------------------------------------------------------------------


def poison(monkeypatch, bad):
    """Make the gradients of these steps NaN."""
    step = train.train_step

    def poisoned(model, state, batches, number, run):
        if number not in bad:
            return step(model, state, batches, number, run)
        hook = state.model.lm_head.weight.register_hook(lambda gradient: gradient * torch.nan)
        result = step(model, state, batches, number, run)
        hook.remove()
        return result

    monkeypatch.setattr(train, "train_step", poisoned)


def test_a_gradient_that_is_not_finite_changes_nothing(launch, tiny, monkeypatch):
    launch(train, *TINY, "--max_iters=3", "--lr_decay_iters=9", "--out_dir=before")
    poison(monkeypatch, {3, 4})
    launch(train, *TINY, "--max_iters=5", "--lr_decay_iters=9", "--max_bad_steps=3")
    assert_equal(load("before/ckpt.pt"), load("out/ckpt.pt"))
    launch(train, "--init_from=resume", "--max_iters=6")
    assert load("out/ckpt.pt")["optimizer"]["state"][0]["step"] == 4
    assert [e["grad_norm"] for e in log("out") if e.get("iter") == 3 and "loss" in e] == [None]


def test_bad_steps_in_a_row_end_the_run(launch, tiny, monkeypatch):
    poison(monkeypatch, {1, 2, 4, 5, 6, 7})
    with pytest.raises(SystemExit) as stop:
        options = "--max_iters=20", "--eval_interval=4", "--max_bad_steps=3", "--log_interval=1"
        launch(train, *TINY, *options)
    entries = [entry for entry in log("out") if "loss" in entry]
    what = "step 6 is number 3 in a row without an update"
    figures = f"loss {entries[-1]['loss']:.4f}, gradient norm nan"
    way_back = "out keeps the checkpoint of step 4; lower --learning_rate"
    assert stop.value.code == f"error: {what}: {figures}; {way_back}"
    assert load("out/ckpt.pt")["iter_num"] == 4


def test_a_weight_that_is_not_finite_is_never_saved(launch, tiny, monkeypatch):
    step = train.train_step

    def broken(model, state, batches, number, run):
        result = step(model, state, batches, number, run)
        if number == 5:
            state.model.lm_head.weight.data[3, 3] = torch.inf
        return result

    monkeypatch.setattr(train, "train_step", broken)
    monkeypatch.setattr(train, "evaluate", lambda *a: {"train": 1.0, "val": 1.0})
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--max_iters=9", "--eval_interval=3")
    what = "step 6: the loss or a weight is not finite"
    assert stop.value.code == f"error: {what}; out keeps the checkpoint of step 3"
    assert load("out/ckpt.pt")["iter_num"] == 3
