"""The folder of a run: kills, signals, disks that fill, the best model, an older run."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_equal, at_step, load, log, losses

import sample
import train
from engine import folder

pytest.importorskip("resource")  # POSIX: so are the signals
KILLS = 30
NEWEST_AND_BEST = [(True, "ckpt.pt", "best.pt"), (False, "last.pt", "ckpt.pt")]
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


def files(path):
    return sorted(name for name in os.listdir(path) if name != ".lock")


def evaluates(monkeypatch, *values):
    """Let the evaluations of a run find these losses, one after the other."""
    found = iter(values)
    monkeypatch.setattr(train, "evaluate", lambda *a: {"train": 1.0, "val": next(found)})


@pytest.mark.slow
def test_kill_9_at_any_moment_costs_nothing(start, finish, tiny):
    """Kill at 30 random moments, most of them in a save; the end is that of a run never killed."""
    (tiny / "slow_saves.py").write_text(SLOW_SAVES)
    options = [*TINY, "--dropout=0.2", "--max_iters=800", "--eval_interval=4", "--eval_iters=2"]
    options += ["--always_save_checkpoint=False", "--learning_rate=1e-2"]
    finish(*options, "--out_dir=straight")
    moments, in_save = random.Random(1), 0
    for _ in range(KILLS):
        process = start(*options, "--auto_resume=True", script="slow_saves.py")
        process.stdout.readline()  # it is about to train
        time.sleep(moments.uniform(0, 1.5))
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = set(files("out"))
        in_save += bool(found & {"ckpt.pt.tmp", "last.pt.tmp"})
        for name in found & {"ckpt.pt", "last.pt"}:
            load(tiny / "out" / name)
    finish(*options, "--auto_resume=True")
    print(f"{in_save} of {KILLS} kills in a save")
    assert in_save >= KILLS // 4
    for name in ("ckpt.pt", "last.pt"):
        assert_equal(load(f"straight/{name}"), load(f"out/{name}"))
    assert losses("straight") == losses("out")
    assert files("out") == ["ckpt.pt", "last.pt", "log.jsonl"]


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    launch, tiny, monkeypatch, capsys, name
):
    number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))
    if before == signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as under nohup")
    options = *TINY, "--max_iters=6", "--eval_interval=4", "--dropout=0.2"
    launch(train, *options, "--out_dir=straight")
    with monkeypatch.context() as patch:
        at_step(patch, {2: lambda: os.kill(os.getpid(), number)})
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
    evaluates(monkeypatch, 3.0, 2.0, 1.0, 2.0)
    with monkeypatch.context() as patch:
        at_step(patch, {3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        with pytest.raises(SystemExit):
            launch(train, *TINY, "--eval_interval=2", "--max_iters=6")
    newest, best = load("out/ckpt.pt"), load("out/best.pt")
    assert (newest["iter_num"], newest["best_val_loss"], best["iter_num"]) == (4, 2.0, 2)
    launch(train, "--init_from=resume")
    newest, best = load("out/ckpt.pt"), load("out/best.pt")
    assert (best["iter_num"], newest["iter_num"], newest["best_val_loss"]) == (4, 6, 1.0)


SLOW_STEP = """
import time
import train
from configurator import configure

step = train.train_step

def slow(model, state, batches, number, runtime):
    if number == 3:
        time.sleep(60)
    return step(model, state, batches, number, runtime)

train.train_step = slow
train.main(configure(vars(train)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("nohup", [False, True])
def test_a_run_whose_terminal_goes_saves_and_under_nohup_goes_on(start, tiny, nohup):
    import fcntl
    import termios

    def own_the_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    ours, terminal = os.openpty()
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    session = {"start_new_session": True, "preexec_fn": own_the_terminal}
    process = start(*TINY, "--max_iters=300", **streams, **session)
    os.close(terminal)
    shown = b""
    while b"iter 2:" not in shown:
        shown += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(timeout=60) == (0 if nohup else 128 + signal.SIGHUP)
    assert (load("out/ckpt.pt")["iter_num"] == 300) == nohup


def test_a_second_interrupt_stops_at_once(start, tiny):
    (tiny / "slow.py").write_text(SLOW_STEP)
    process = start(*TINY, "--eval_interval=2", script="slow.py")
    while not process.stdout.readline().startswith("iter 2"):
        pass
    for _ in range(2):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT
    assert load("out/ckpt.pt")["iter_num"] == 2


# --- saves that fail -----------------------------------------------------------------------------


def test_a_save_without_room_keeps_the_older_and_is_tried_again(
    launch, tiny, monkeypatch, file_limit
):
    def make_room():
        assert load("out/ckpt.pt")["iter_num"] == 2
        file_limit(None)

    at_step(monkeypatch, {3: lambda: file_limit(100_000), 4: make_room})  # it has 330,000 bytes
    out = launch(train, *TINY, "--max_iters=6", "--eval_interval=2")
    why = "[Errno 27] File too large; out keeps the checkpoint of step 2"
    assert out.count(f"step 4 is not saved: {why}") == 1 and out.count("is not saved") == 1
    assert load("out/ckpt.pt")["iter_num"] == 6
    assert files("out") == ["best.pt", "ckpt.pt", "log.jsonl"]


def test_a_last_save_that_fails_shows_in_the_exit_status(launch, tiny, monkeypatch, file_limit):
    at_step(monkeypatch, {3: lambda: file_limit(100_000)})
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--max_iters=4", "--eval_interval=2")
    assert stop.value.code == 1 and load("out/ckpt.pt")["iter_num"] == 2


def test_a_folder_that_is_gone_shows_in_the_exit_status(launch, tiny, monkeypatch):
    at_step(monkeypatch, {3: lambda: (shutil.rmtree("out"), Path("out").touch())})
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--max_iters=4", "--eval_interval=2")
    assert stop.value.code == 1


def test_a_disk_that_fills_between_the_two_files_loses_no_best_model(launch, tiny, monkeypatch):
    """The newest is a link to the best, and has no room; nor has a copy of it."""
    evaluates(monkeypatch, 9.0, 5.0, 1.0, 3.0, 4.0)
    link = folder.link

    def full(path, name):
        if load(path)["iter_num"] == 4:
            raise OSError(28, "No space left on device")
        link(path, name)

    monkeypatch.setattr(folder, "link", full)
    options = "--max_iters=8", "--eval_interval=2", "--always_save_checkpoint=False"
    out = launch(train, *TINY, *options)
    why = "[Errno 28] No space left on device; out keeps the checkpoint of step 2"
    assert out.count(f"step 4 is not saved: {why}") == 1
    best, newest = load("out/ckpt.pt"), load("out/last.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (4, 1.0)
    assert (newest["iter_num"], newest["best_val_loss"]) == (8, 1.0)


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_a_model_that_is_not_finite_is_never_saved(launch, tiny, monkeypatch, what):
    def spoil():
        gain = model.transformer.ln_f.weight
        gain.data[3] = torch.inf

    model, build = None, train.build_state

    def watched(*arguments):
        nonlocal model
        state = build(*arguments)
        model = state.model
        return state

    monkeypatch.setattr(train, "build_state", watched)
    evaluates(monkeypatch, 3.0, 2.0, float("nan") if what == "loss" else 1.0)
    at_step(monkeypatch, {5: spoil} if what == "weight" else {})
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--max_iters=9", "--eval_interval=3")
    told = "step 6: the loss or a weight is not finite; out keeps the checkpoint of step 3"
    assert stop.value.code == f"error: {told}"
    assert load("out/ckpt.pt")["iter_num"] == 3


# --- the newest and the best ---------------------------------------------------------------------


@pytest.mark.parametrize("always, newest, best", NEWEST_AND_BEST)
def test_the_newest_and_the_best_are_kept_apart(
    launch, tiny, monkeypatch, always, newest, best
):
    evaluates(monkeypatch, 3.0, 2.0, 1.0, 2.5, 2.6)
    steps = "--max_iters=4", "--eval_interval=1", f"--always_save_checkpoint={always}"
    out = launch(train, *TINY, *steps)
    assert out.splitlines()[-1] == f"best model: out/{best}, val loss 1.0000"
    assert files("out") == sorted([newest, best, "log.jsonl"])
    kept = load(f"out/{best}"), load(f"out/{newest}")
    assert [one["iter_num"] for one in kept] == [2, 4]
    assert [one["best_val_loss"] for one in kept] == [1.0, 1.0]
    evaluates(monkeypatch, 2.7, 2.8)
    changed = f"--always_save_checkpoint={not always}"  # the names in the folder stay
    out = launch(train, "--init_from=resume", "--max_iters=5", changed)
    assert "max_iters: 4 -> 5" in out and "iter 4:" in out
    assert files("out") == sorted([newest, best, "log.jsonl"])
    assert [load(f"out/{name}")["iter_num"] for name in (best, newest)] == [2, 5]
    assert out.splitlines()[-1] == f"best model: out/{best}, val loss 1.0000"


@pytest.mark.parametrize("always, newest, best", NEWEST_AND_BEST)
def test_one_file_has_both_names_while_the_newest_is_the_best(
    launch, tiny, monkeypatch, always, newest, best
):
    evaluates(monkeypatch, 3.0, 2.0)
    launch(train, *TINY, "--max_iters=1", f"--always_save_checkpoint={always}")
    assert os.path.samefile(f"out/{newest}", f"out/{best}")
    assert load(f"out/{best}")["iter_num"] == 1
    evaluates(monkeypatch, 2.0, 2.5)
    launch(train, "--init_from=resume", "--max_iters=2")
    assert not os.path.samefile(f"out/{newest}", f"out/{best}")
    assert [load(f"out/{name}")["iter_num"] for name in (best, newest)] == [1, 2]


def test_a_model_that_diverges_with_finite_losses_never_costs_the_best(launch, tiny):
    launch(train, *TINY, "--max_iters=20", "--eval_interval=10", "--learning_rate=1e-2")
    out = launch(train, "--init_from=resume", "--max_iters=24", "--learning_rate=3")
    found = {e["iter"]: e["val/loss"] for e in log("out") if "val/loss" in e}
    step = min(found, key=found.get)
    assert found[24] > found[0] > found[step]
    best = load("out/best.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (step, found[step])
    assert load("out/ckpt.pt")["iter_num"] == 24
    assert out.splitlines()[-1] == f"best model: out/best.pt, val loss {found[step]:.4f}"


def test_a_kill_between_the_two_names_leaves_the_best_model(launch, tiny, monkeypatch):
    def killed(path, name):
        raise KeyboardInterrupt

    evaluates(monkeypatch, 3.0, 2.0)
    with monkeypatch.context() as patch:
        at_step(patch, {1: lambda: patch.setattr(folder, "link", killed)})
        with pytest.raises(SystemExit):
            launch(train, *TINY, "--max_iters=2", "--eval_interval=2")
    assert [load(f"out/{name}")["iter_num"] for name in ("best.pt", "ckpt.pt")] == [2, 0]
    evaluates(monkeypatch, 2.0)
    out = launch(train, "--init_from=resume")  # from the newer of the two
    assert "steps: 2 to 2," in out
    best = load("out/best.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (2, 2.0)


def test_the_best_model_can_be_gone_back_to_and_judged(launch, tiny, monkeypatch):
    monkeypatch.setattr(sample, "ROOT", tiny)
    steps = "--max_iters=4", "--eval_interval=2", "--lr_decay_iters=8"
    with monkeypatch.context() as patch:
        evaluates(patch, 3.0, 1.0, 2.0)
        launch(train, *TINY, *steps, "--always_save_checkpoint=False")
    judged = launch(train, "--init_from=resume", "--eval_only")
    assert "step 2: train loss" in judged
    newest = launch(train, "--init_from=resume", "--eval_only", "--checkpoint_file=last.pt")
    assert "step 4: train loss" in newest
    text = "--device=cpu", "--dtype=float32", "--num_samples=1", "--max_new_tokens=200"
    drawn = launch(sample, *text)
    assert drawn == launch(sample, *text, "--checkpoint_file=ckpt.pt")
    assert drawn != launch(sample, *text, "--checkpoint_file=last.pt")
    launch(train, *TINY, *steps, "--max_iters=3", "--out_dir=straight")
    evaluates(monkeypatch, 1.0, 0.5)
    back = "--checkpoint_file=ckpt.pt", "--max_iters=3"
    assert "steps: 2 to 3," in launch(train, "--init_from=resume", *back)
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"))
    assert [load(f"out/{name}")["iter_num"] for name in ("ckpt.pt", "last.pt")] == [3, 3]
    assert list(losses("out")) == [0, 1, 2]


# --- an older run --------------------------------------------------------------------------------


def test_a_fresh_run_moves_the_older_one_aside_and_keeps_one(launch, tiny):
    out = [launch(train, *TINY, f"--max_iters={n}", "--eval_interval=9") for n in (1, 2, 3)]
    assert "moved" not in out[0] and "moved the older run in out to out/previous" in out[2]
    assert [load(f"{name}/ckpt.pt")["iter_num"] for name in ("out", "out/previous")] == [3, 2]
    assert [len(losses(name)) for name in ("out", "out/previous")] == [3, 2]
    assert files("out") == ["best.pt", "ckpt.pt", "log.jsonl", "previous"]
    assert files("out/previous") == ["best.pt", "ckpt.pt", "log.jsonl"]


def test_a_run_without_a_step_is_deleted_rather_than_kept_for_one_with_steps(launch, tiny):
    for steps in (2, 0):
        launch(train, *TINY, f"--max_iters={steps}", "--decay_lr=False")
    assert load("out/ckpt.pt")["iter_num"] == 0 and "loss" not in log("out")[-1]
    out = launch(train, *TINY, "--max_iters=1")
    assert "deleted the older run in out: out/previous keeps a longer one" in out
    assert [load(f"{name}/ckpt.pt")["iter_num"] for name in ("out", "out/previous")] == [1, 2]


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_a_kill_while_an_older_run_moves_aside_loses_no_run(launch, tiny, monkeypatch, moved):
    """Killed after so many of its three files; the third also before the folder has its name."""
    launch(train, *TINY, "--max_iters=1")
    replace, left = os.replace, [moved]

    def killed(source, target):
        if "previous.new" in str(target):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        replace(source, target)

    def unnamed(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "rename", unnamed)
        with pytest.raises(SystemExit):
            launch(train, *TINY, "--max_iters=2")
    launch(train, *TINY, "--max_iters=3")
    assert [load(f"{name}/ckpt.pt")["iter_num"] for name in ("out", "out/previous")] == [3, 1]
    assert len(losses("out/previous")) == 1
    launch(train, *TINY, "--max_iters=4")
    assert [load(f"{name}/ckpt.pt")["iter_num"] for name in ("out", "out/previous")] == [4, 3]
    assert files("out") == ["best.pt", "ckpt.pt", "log.jsonl", "previous"]


def test_other_peoples_files_stay_in_a_folder(launch, tiny):
    (tiny / "out").mkdir()
    for name in ("letter.tmp", "ckpt.pt.tmp"):
        (tiny / "out" / name).write_text("half")
    launch(train, *TINY, "--max_iters=1")
    assert (tiny / "out" / "letter.tmp").read_text() == "half"
    assert not (tiny / "out" / "ckpt.pt.tmp").exists()


def test_a_run_that_saves_while_another_starts_is_not_written_over(launch, tiny, monkeypatch):
    launch(train, *TINY, "--max_iters=2")
    prepare = train.prepare_model

    def meanwhile(*arguments):
        monkeypatch.setattr(train, "prepare_model", prepare)
        launch(train, "--init_from=resume", "--max_iters=4")
        return prepare(*arguments)

    monkeypatch.setattr(train, "prepare_model", meanwhile)
    with pytest.raises(SystemExit) as stop:
        launch(train, "--init_from=resume", "--max_iters=3")
    assert stop.value.code == "error: another run has just saved to out; start this one again"
    assert load("out/ckpt.pt")["iter_num"] == 4


def test_a_signal_during_an_evaluation_ends_the_run_after_its_save(launch, tiny, monkeypatch):
    evaluate, calls = train.evaluate, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--max_iters=6", "--eval_interval=2")
    assert stop.value.code == 128 + signal.SIGTERM
    assert load("out/ckpt.pt")["iter_num"] == 2


# --- patience, and saves between evaluations -----------------------------------------------------


def test_a_run_out_of_patience_names_its_best_model(launch, tiny, monkeypatch):
    evaluates(monkeypatch, 3.0, 2.0, 2.5, 2.4, 2.3)
    options = [*TINY, "--max_iters=20", "--eval_interval=2", "--patience=3"]
    out = launch(train, *options)
    assert out.splitlines()[-2:] == [
        "stopped: no better model since step 2; --patience=0 goes on",
        "best model: out/best.pt, val loss 2.0000",
    ]
    assert load("out/ckpt.pt")["iter_num"] == 8


def test_patience_counts_on_after_a_resume(launch, tiny, monkeypatch):
    evaluates(monkeypatch, 3.0, 2.0, 2.5, 2.5, 2.4, 2.3)  # step 4 is evaluated once more
    options = [*TINY, "--eval_interval=2", "--patience=3"]
    at_step(monkeypatch, {4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(SystemExit):
        launch(train, *options, "--max_iters=20")
    at_step(monkeypatch, {})
    launch(train, "--init_from=resume", "--max_iters=20")
    assert load("out/ckpt.pt")["iter_num"] == 8


def test_saves_between_evaluations_change_nothing_but_the_newest(launch, tiny, monkeypatch):
    options = [*TINY, "--max_iters=6", "--eval_interval=4", "--dropout=0.1", "--eval_iters=2"]
    launch(train, *options, "--out_dir=plain")
    saves = []
    write = folder.Keeper.write

    def noted(keeper, names, content):
        saves.append(content["iter_num"])
        return write(keeper, names, content)

    monkeypatch.setattr(folder.Keeper, "write", noted)
    launch(train, *options, "--save_interval=1e-9")
    assert saves == [0, 1, 2, 3, 4, 5, 6]
    assert_equal(load("plain/ckpt.pt"), load("out/ckpt.pt"))
    assert_equal(load("plain/best.pt"), load("out/best.pt"))
    assert losses("plain") == losses("out")


def test_patience_is_asked_for_only_where_there_was_an_evaluation(launch, tiny, monkeypatch):
    evaluates(monkeypatch, 3.0, 3.5, 3.4)
    at_step(monkeypatch, {6: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(SystemExit):
        launch(train, *TINY, "--eval_interval=4", "--max_iters=20")
    at_step(monkeypatch, {})
    out = launch(train, "--init_from=resume", "--patience=1")
    assert "stopped: no better model since step 0; --patience=0 goes on" in out
    assert load("out/ckpt.pt")["iter_num"] == 8


def test_patience_that_ends_with_the_run_is_not_told(launch, tiny, monkeypatch):
    evaluates(monkeypatch, 3.0, 3.5)
    out = launch(train, *TINY, "--eval_interval=4", "--max_iters=4", "--patience=1")
    assert "stopped" not in out


def test_a_run_that_went_back_to_an_older_file_writes_the_newest_anew(launch, tiny, monkeypatch):
    evaluates(monkeypatch, 3.0, 2.0, 9.0, 2.0)
    launch(train, *TINY, "--max_iters=4", "--eval_interval=2", "--lr_decay_iters=9")
    assert [load(f"out/{name}")["iter_num"] for name in ("ckpt.pt", "best.pt")] == [4, 2]
    launch(train, "--init_from=resume", "--checkpoint_file=best.pt", "--max_iters=2")
    assert [load(f"out/{name}")["iter_num"] for name in ("ckpt.pt", "best.pt")] == [2, 2]
