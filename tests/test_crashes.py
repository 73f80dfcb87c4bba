"""Crashes: runs that are killed, stopped, left without a disk or fed bad gradients."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_equal, load, log, losses

import train

resource = pytest.importorskip("resource")  # POSIX: so are the signals
KILLS = 30
RUN = "train.main(configure(vars(train)))\n"
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
    options = [*TINY, "--dropout=0.2", "--max_iters=800", "--eval_interval=4", "--eval_iters=2"]
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
    go_on = "go on with --init_from=resume --out_dir=out"
    said = f"{name}: out keeps the checkpoint of step 3; {go_on}"
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
    script = "import time, train\nfrom configurator import configure\nstep = train.train_step\n"
    script += "def slow(model, state, batches, number, run):\n"
    script += "    time.sleep(60 * (number == 3))\n"
    script += "    return step(model, state, batches, number, run)\n"
    (tiny / "slow.py").write_text(script + "train.train_step = slow\n" + RUN)
    process = start(*TINY, "--eval_interval=2", script="slow.py")
    while not process.stdout.readline().startswith("iter 2"):
        pass
    for _ in range(2):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT
    assert load("out/ckpt.pt")["iter_num"] == 2


# --- saves that fail -----------------------------------------------------------------------------


def file_limit(size):
    """Bound the size of files, in bytes; None lifts the bound."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or most, most))


@pytest.fixture
def launch(launch):
    """Lift the bound after each run: pytest's own output may be a longer file."""

    def run(*arguments):
        try:
            return launch(*arguments)
        finally:
            file_limit(None)

    return run


def test_a_save_without_room_keeps_the_older_and_is_tried_again(launch, tiny, monkeypatch):
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


def test_a_last_save_that_fails_shows_in_the_exit_status(launch, tiny, monkeypatch):
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


def test_lines_of_the_log_that_find_no_room_wait(launch, tiny, monkeypatch):
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


def test_a_disk_that_fills_between_the_two_files_loses_no_best_model(launch, tiny, monkeypatch):
    values, real, step = iter([9.0, 5.0, 1.0, 3.0, 4.0]), train.atomic, [0]

    def full(path):
        if path.name == "last.pt" and step[0] == 4:
            raise OSError(28, "No space left on device")
        return real(path)

    def evaluate(*arguments):
        step[0] += 2
        return {"train": 1.0, "val": next(values)}

    step[0] = -2
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "atomic", full)
    options = "--max_iters=8", "--eval_interval=2", "--always_save_checkpoint=False"
    out = launch(train, *TINY, *options)
    why = "[Errno 28] No space left on device; out keeps the checkpoint of step 4"
    assert f"step 4 is not saved: {why}" in out
    best, newest = load("out/ckpt.pt"), load("out/last.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (4, 1.0)
    assert (newest["iter_num"], newest["best_val_loss"]) == (8, 1.0)


def test_the_best_model_is_kept_from_where_that_is_asked_for(launch, tiny, monkeypatch):
    values = iter([9.0, 1.0, 5.0, 5.0, 4.0, 6.0])
    monkeypatch.setattr(train, "evaluate", lambda *a: {"train": 1.0, "val": next(values)})
    launch(train, *TINY, "--max_iters=4", "--eval_interval=2")
    launch(train, "--init_from=resume", "--max_iters=8", "--always_save_checkpoint=False")
    best = load("out/ckpt.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (6, 4.0)


def test_a_kill_while_an_older_run_moves_aside_loses_no_run(launch, tiny, monkeypatch):
    launch(train, *TINY, "--max_iters=1")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            launch(train, *TINY, "--max_iters=2")
    Path("out/ckpt.pt").rename("out/previous.new/ckpt.pt")  # as far as it may have come
    for steps in (3, 4):
        launch(train, *TINY, f"--max_iters={steps}")
    folders = "out", "out/previous", "out/previous/previous"
    assert [load(f"{folder}/ckpt.pt")["iter_num"] for folder in folders] == [4, 3, 1]


def test_lines_of_the_log_that_never_found_room_show_in_the_exit_status(launch, tiny, monkeypatch):
    def short():
        file_limit(Path("out", "log.jsonl").stat().st_size + 20)
        monkeypatch.setattr(train, "save", lambda *a: True)

    at_step(monkeypatch, 3, short)
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--max_iters=5", "--eval_interval=5")
    assert stop.value.code == 1


def test_output_that_finds_no_room_does_not_end_a_run(start, tiny):
    with open("/dev/full", "w") as full:
        process = start(*TINY, "--max_iters=3", stdout=full)
        process.communicate(timeout=60)
    assert load("out/ckpt.pt")["iter_num"] == 3


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
    what = "3 steps in a row had no finite gradient, seen at step 6"
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


def test_bad_steps_between_two_log_lines_are_seen(launch, tiny, monkeypatch):
    poison(monkeypatch, {1, 2, 3, 5, 6})
    options = "--max_iters=20", "--eval_interval=20", "--max_bad_steps=3", "--log_interval=8"
    with pytest.raises(SystemExit, match="3 steps in a row had no finite gradient, seen at step 8"):
        launch(train, *TINY, *options)
    with pytest.raises(SystemExit, match="seen at step 20: .* none was saved yet"):
        launch(train, *TINY, *options[:3], "--log_interval=100")


def test_a_float16_run_whose_gradients_stay_bad_ends(launch, tiny, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler("cpu"))
    poison(monkeypatch, set(range(1, 100)))
    with pytest.raises(SystemExit, match="5 steps in a row had no finite gradient"):
        launch(train, *TINY, "--max_iters=100")
