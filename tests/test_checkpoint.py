"""A run that was stopped, killed or ran out of disk equals one that never was; files of others."""

import os
import random
import shutil
import signal
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import (
    RECIPE,
    TINY,
    assert_equal,
    at_step,
    find_losses,
    load,
    log,
    losses,
    nanogpt_checkpoint,
)

import sample
import train
from data.tokenizer import read_meta
from data.tokens import TokenFile
from engine import checkpoint

pytest.importorskip("resource")  # POSIX, as the signals are
slow = pytest.mark.slow
FULL = [*TINY, "--lr_decay_iters=8", "--dropout=0.2", "--gradient_accumulation_steps=2"]
GROWING = ["--batch_ramp_iters=5", "--batch_ramp_start=0.3", "--sampling=epochs"]
KILLS = 30


def files(folder):
    return sorted(name for name in os.listdir(folder) if name != ".lock")


def assert_same_runs(left, right):
    assert_equal(load(f"{left}/ckpt.pt"), load(f"{right}/ckpt.pt"))
    assert losses(left) == losses(right) and list(losses(left)) == sorted(losses(left))
    assert load(f"{left}/ckpt.pt")["best_val_loss"] == load(f"{right}/ckpt.pt")["best_val_loss"]


# --- a resume is exact ---------------------------------------------------------------------------

WAYS = [
    ("float32", False),
    ("bfloat16", False),
    pytest.param("float32", True, marks=slow),
    pytest.param("bfloat16", True, marks=slow),
]


@pytest.mark.parametrize("more", [[], RECIPE, GROWING], ids=["gpt2", "recipe", "growing"])
@pytest.mark.parametrize("dtype, compiled", WAYS)
def test_stopping_and_resuming_equals_never_stopping(launch, tiny, dtype, compiled, more):
    if compiled and not sys.platform.startswith("linux"):
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()  # after 8 versions of a function it compiles no more
    options = *FULL, *more, f"--dtype={dtype}", f"--compile={compiled}"
    launch(train, *options, "--max_iters=8", "--out_dir=straight", "--eval_interval=8")
    launch(train, *options, "--max_iters=4", "--out_dir=resumed", "--eval_interval=8")
    launch(train, "--init_from=resume", "--out_dir=resumed", "--max_iters=8")
    assert_equal(load("straight/ckpt.pt"), load("resumed/ckpt.pt"))
    assert losses("straight") == losses("resumed")


# From 3 summands on their order matters.
TOGETHER = [*product(("float32", "bfloat16"), (False, True), (2,)), ("float32", False, 3)]


@slow
@pytest.mark.parametrize("dtype, compiled, processes", TOGETHER)
def test_it_does_with_several_processes(finish, tiny, dtype, compiled, processes):
    options = *FULL, f"--dtype={dtype}", f"--compile={compiled}"
    options += (f"--gradient_accumulation_steps={2 * processes}",)
    together = {"processes": processes}
    finish(*options, "--max_iters=8", "--out_dir=straight", **together)
    finish(*options, "--max_iters=4", "--out_dir=resumed", **together)
    finish("--init_from=resume", "--out_dir=resumed", "--max_iters=8", **together)
    assert_equal(load("straight/ckpt.pt"), load("resumed/ckpt.pt"))
    assert losses("straight") == losses("resumed")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_the_run_after_its_step_with_all_saved(
    launch, tiny, monkeypatch, capsys, name
):
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    if handler == signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as under nohup")
    options = *TINY, "--max_iters=6", "--eval_interval=4", "--dropout=0.2"
    launch(train, *options, "--out_dir=straight")
    with monkeypatch.context() as patch:
        at_step(patch, {2: lambda: os.kill(os.getpid(), number)})
        with pytest.raises(SystemExit) as stop:
            launch(train, *options)
    assert stop.value.code == 128 + number and signal.getsignal(number) is handler
    assert "out keeps step 3 and the best, step 0 with " in capsys.readouterr().out.splitlines()[-1]
    launch(train, "--init_from=resume")
    assert_same_runs("straight", "out")


SLOW_STEP = """
import time
import train
from configurator import configure

train_step = train.train_step

def slow(model, state, batches, runtime):
    if state.step == 3:
        time.sleep(60)
    return train_step(model, state, batches, runtime)

train.train_step = slow
train.main(configure(vars(train)))
"""


@slow
@pytest.mark.skipif(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="SIGINT is ignored")
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


@slow
def test_kill_9_at_any_moment_costs_nothing(start, finish, tiny):
    """Kill at 30 random moments; the end is that of a run never killed."""
    options = [*TINY, "--dropout=0.2", "--max_iters=3000", "--eval_interval=2", "--eval_iters=1"]
    options += ["--always_save_checkpoint=False", "--learning_rate=1e-2", "--auto_resume=True"]
    finish(*options, "--out_dir=straight")
    moments = random.Random(1)
    for _ in range(KILLS):
        process = start(*options)
        for line in process.stdout:
            if line.startswith("iter"):
                break
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    finish(*options)
    assert_same_runs("straight", "out")
    assert_equal(load("straight/best.pt"), load("out/best.pt"))
    assert files("out") == ["best.pt", "ckpt.pt", "log.jsonl"]


# --- which settings and data a resume takes ------------------------------------------------------


def test_a_resume_takes_all_settings_but_the_flags_and_prints_those(launch, tiny):
    (tiny / "c.py").write_text("learning_rate = 0.5\nbatch_size = 2")
    launch(train, *TINY, "--max_iters=2", "--learning_rate=1e-3", "--weight_decay=0.1")
    flags = "--learning_rate=5e-4", "--max_iters=4", "--weight_decay=0.2", "--beta1=0.8"
    out = launch(train, "c.py", "--init_from=resume", *flags).splitlines()
    assert sorted(out[:4]) == [
        "beta1: 0.9 -> 0.8",
        "learning_rate: 0.001 -> 0.0005",
        "max_iters: 2 -> 4",
        "weight_decay: 0.1 -> 0.2",
    ]
    saved = load("out/ckpt.pt")
    group = saved["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["betas"]) == (0.2, (0.8, 0.95))
    assert saved["config"]["learning_rate"] == 5e-4 and saved["config"]["batch_size"] == 4


def test_a_shorter_context_can_be_resumed_with(launch, tiny):
    launch(train, *TINY, "--max_iters=2")
    assert "block_size: 16 -> 8" in launch(
        train, "--init_from=resume", "--block_size=8", "--max_iters=3"
    )
    saved = load("out/ckpt.pt")
    assert saved["model"]["transformer.wpe.weight"].shape == (8, 32)
    assert saved["optimizer"]["state"][1]["exp_avg"].shape == (8, 32)
    assert saved["model_args"]["block_size"] == 8


def test_changed_data_are_refused_unless_allowed_and_then_count_from_anew(
    launch, tiny, monkeypatch
):
    find_losses(monkeypatch, 3.0, 2.0, 2.5, 2.2)
    launch(train, *TINY, "--max_iters=2", "--eval_interval=2")
    before = load("out/ckpt.pt")["data"]
    path = tiny / "data" / "tiny" / "train.bin"
    ids = path.read_bytes()
    path.write_bytes(ids[: len(ids) // 4 * 2])
    now = {**before, "train": TokenFile(path, read_meta(path.parent), 16).digest()}
    with pytest.raises(SystemExit) as stop:
        launch(train, "--init_from=resume", "--max_iters=4")
    changed = f"the data have changed from {before} to {now}"
    assert stop.value.code == f"error: {changed}; --new_data=True continues with them"
    launch(train, "--init_from=resume", "--max_iters=4", "--new_data=True")
    assert load("out/ckpt.pt")["data"] == now
    assert load("out/best.pt")["best_val_loss"] == 2.2  # the 2.0 was of the other data
    assert load("out/previous/1/best.pt")["best_val_loss"] == 2.0


# --- the newest and the best ---------------------------------------------------------------------


@pytest.mark.parametrize("always, saved_steps", [(True, [0, 1, 2, 3, 4]), (False, [0, 1, 2, 4])])
def test_the_newest_and_the_best_state_are_kept(launch, tiny, monkeypatch, always, saved_steps):
    find_losses(monkeypatch, 3.0, 2.0, 1.0, 2.5, 2.6)
    written, atomic = [], checkpoint.atomic

    def watched(path):
        if path.suffix == ".pt":
            written.append(path.name)
        return atomic(path)

    monkeypatch.setattr(checkpoint, "atomic", watched)
    out = launch(
        train, *TINY, "--max_iters=4", "--eval_interval=1", f"--always_save_checkpoint={always}"
    )
    last = "4 of 4 steps done; out keeps step 4 and the best, step 2 with val loss 1.0000"
    assert out.splitlines()[-1] == last
    assert files("out") == ["best.pt", "ckpt.pt", "log.jsonl"]
    best, newest = load("out/best.pt"), load("out/ckpt.pt")
    assert (best["iter_num"], newest["iter_num"]) == (2, 4)
    assert best["best_val_loss"] == newest["best_val_loss"] == 1.0
    assert written == ["best.pt"] * 3 + ["ckpt.pt"] * (len(saved_steps) - 3)
    find_losses(monkeypatch, 2.7, 0.5)
    launch(train, "--init_from=resume", "--max_iters=5")
    assert os.path.samefile("out/ckpt.pt", "out/best.pt") and load("out/best.pt")["iter_num"] == 5


def test_sampling_takes_the_best_state_or_the_one_that_is_named(launch, tiny, monkeypatch):
    monkeypatch.setattr(sample, "ROOT", tiny)
    find_losses(monkeypatch, 3.0, 1.0, 2.0)
    launch(train, *TINY, "--max_iters=4", "--eval_interval=2", "--learning_rate=0.1")
    text = "--device=cpu", "--dtype=float32", "--num_samples=1", "--max_new_tokens=200"
    drawn = launch(sample, *text)
    assert drawn == launch(sample, *text, "--checkpoint_file=best.pt")
    assert drawn != launch(sample, *text, "--checkpoint_file=ckpt.pt")


@pytest.mark.parametrize("subject", ["loss", "weight"])
def test_a_model_that_is_not_finite_is_never_saved(launch, tiny, monkeypatch, subject):
    build_state, states = train.build_state, []

    def watched(*arguments):
        states.append(build_state(*arguments))
        return states[-1]

    def spoil():
        states[0].model.transformer.ln_f.weight.data[3] = torch.inf

    monkeypatch.setattr(train, "build_state", watched)
    find_losses(monkeypatch, 3.0, 2.0, float("nan") if subject == "loss" else 1.0)
    at_step(monkeypatch, {5: spoil} if subject == "weight" else {})
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--max_iters=9", "--eval_interval=3")
    assert (
        stop.value.code
        == "error: step 6: the loss or a weight is not finite; resume with a lower --learning_rate"
    )
    assert load("out/ckpt.pt")["iter_num"] == load("out/best.pt")["iter_num"] == 3


# --- saves that fail -----------------------------------------------------------------------------


def test_a_save_without_room_keeps_the_older_state_and_later_saves_work(
    launch, tiny, monkeypatch, file_limit
):
    def make_room():
        assert load("out/ckpt.pt")["iter_num"] == 2
        file_limit(None)

    at_step(monkeypatch, {3: lambda: file_limit(100_000), 4: make_room})  # it has 330,000 bytes
    out = launch(train, *TINY, "--max_iters=6", "--eval_interval=2")
    line = "step 4 is not saved: File too large; the newest saved step is 2"
    assert out.splitlines().count(line) == 1 and out.count("is not saved") == 1
    assert load("out/ckpt.pt")["iter_num"] == 6
    assert files("out") == ["best.pt", "ckpt.pt", "log.jsonl"]


def move_away():
    os.rename("out", "moved")
    Path("out").mkdir()
    shutil.copy("moved/.lock", "out/.lock")


@pytest.mark.parametrize(
    "trouble",
    [move_away, lambda: (shutil.rmtree("out"), Path("out").touch())],
    ids=["moved", "gone"],
)
def test_a_folder_that_is_another_one_gets_no_state_and_exit_status_1(
    launch, tiny, monkeypatch, trouble
):
    at_step(monkeypatch, {3: trouble})
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--max_iters=4", "--eval_interval=2")
    assert stop.value.code == 1 and not Path("out/ckpt.pt").exists()


# --- an older run and other states ---------------------------------------------------------------


def test_a_new_run_moves_each_older_one_to_a_numbered_folder(launch, tiny):
    for steps in (1, 2, 3):
        out = launch(train, *TINY, f"--max_iters={steps}", "--eval_interval=9")
    assert "kept the older run in out/previous/2" in out.splitlines()
    folders = ["out", "out/previous/1", "out/previous/2"]
    assert [load(f"{folder}/ckpt.pt")["iter_num"] for folder in folders] == [3, 1, 2]
    assert [len(losses(folder)) for folder in folders] == [3, 1, 2]
    assert files("out/previous/2") == ["best.pt", "ckpt.pt", "log.jsonl"]


def test_a_resume_from_another_state_sets_the_newest_aside(launch, tiny, monkeypatch):
    find_losses(monkeypatch, 3.0, 1.0, 2.0)
    launch(train, *TINY, "--max_iters=4", "--eval_interval=2", "--lr_decay_iters=8")
    monkeypatch.undo()
    monkeypatch.setattr(train, "ROOT", tiny)
    monkeypatch.chdir(tiny)
    launch(train, *TINY, "--max_iters=3", "--lr_decay_iters=8", "--out_dir=straight")
    launch(train, "--init_from=resume", "--checkpoint_file=best.pt", "--max_iters=3")
    assert load("out/previous/1/ckpt.pt")["iter_num"] == 4
    assert load("out/previous/1/best.pt")["iter_num"] == 2
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"))
    assert list(losses("out")) == [0, 1, 2] and list(losses("out/previous/1")) == [0, 1, 2, 3]
    assert "steps: 3 to 4" in launch(train, "--init_from=resume", "--max_iters=4")
    assert files("out/previous") == ["1"]


def test_the_shape_of_a_model_cannot_change_on_a_resume(launch, tiny):
    launch(train, *TINY, "--max_iters=1")
    nanogpt_checkpoint("theirs", 21)
    for folder in ("out", "theirs"):
        with pytest.raises(SystemExit, match="has rms_norm=False; leave --rms_norm out"):
            launch(train, "--init_from=resume", "--rms_norm=True", f"--out_dir={folder}")


def test_a_state_with_a_name_of_the_user_can_be_resumed(launch, tiny):
    launch(train, *TINY, "--max_iters=2")
    Path("kept").mkdir()
    os.rename("out/ckpt.pt", "kept/mine.pt")
    options = "--init_from=resume", "--out_dir=kept", "--checkpoint_file=mine.pt"
    assert "steps: 2 to 3" in launch(train, *options, "--max_iters=3")


@pytest.mark.parametrize("damage", [lambda content: content[:-1000], lambda content: content[:100]])
def test_a_damaged_best_state_is_no_obstacle_and_a_damaged_newest_names_it(launch, tiny, damage):
    launch(train, *TINY, "--max_iters=2")
    good = Path("out/ckpt.pt").read_bytes()
    Path("out/best.pt").unlink()
    Path("out/best.pt").write_bytes(damage(good))
    launch(train, "--init_from=resume", "--max_iters=3")
    Path("out/best.pt").unlink(missing_ok=True)
    Path("out/best.pt").write_bytes(good)
    Path("out/ckpt.pt").write_bytes(damage(good))
    with pytest.raises(SystemExit, match="^error: out/ckpt.pt cannot be read as a checkpoint: "):
        launch(train, "--init_from=resume", "--max_iters=4")
    out = launch(train, "--init_from=resume", "--max_iters=4", "--checkpoint_file=best.pt")
    assert "steps: 2 to 4" in out
    assert Path("out/previous/1/ckpt.pt").read_bytes() == damage(good)


def test_only_temporary_files_of_this_project_are_removed(launch, tiny):
    Path("out").mkdir()
    for name in ("ckpt.pt.0123abcd.tmp", "ckpt.pt.tmp", "notes.tmp", "hf.tmp"):
        Path("out", name).write_text("x")
    launch(train, *TINY, "--max_iters=1")
    assert set(files("out")) >= {"ckpt.pt.tmp", "notes.tmp", "hf.tmp"}
    assert "ckpt.pt.0123abcd.tmp" not in files("out")


def test_one_run_owns_the_folder(start, launch, tiny):
    first = start(*TINY, "--max_iters=1000000", "--eval_interval=1000000", "--lr_decay_iters=9")
    while not first.stdout.readline().startswith("iter 5:"):
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)  # it lives, and is quiet
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    for more in ([], ["--init_from=resume"]):
        with pytest.raises(SystemExit, match="error: out is in use by another process; wait, or"):
            launch(train, *TINY, "--max_iters=9", *more)
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert "steps: 0 to 9" in launch(train, "--init_from=resume", "--max_iters=9")


def test_prefixes_of_other_trainers_are_read(launch, tiny):
    launch(train, *FULL, "--max_iters=2")
    saved = load("out/ckpt.pt")
    weights = {f"module._orig_mod.{name}": weight for name, weight in saved["model"].items()}
    torch.save({**saved, "model": weights}, "out/ckpt.pt")
    read = checkpoint.read_checkpoint(Path("out/ckpt.pt"))["model"]
    assert all(torch.equal(read[name], weight) for name, weight in saved["model"].items())


def test_a_lock_that_is_a_link_is_refused(launch, tiny):
    Path("out").mkdir()
    Path("target").write_text("precious")
    Path("out/.lock").symlink_to(Path("target").resolve())
    with pytest.raises(SystemExit, match="error: out/.lock: Too many levels of symbolic links"):
        launch(train, *TINY, "--max_iters=1")
    assert Path("target").read_text() == "precious"


# --- files of others -----------------------------------------------------------------------------


def test_a_checkpoint_is_nanogpts_with_more_keys(launch, tiny):
    launch(train, *TINY, "--max_iters=3")
    saved = load("out/ckpt.pt")
    keys = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    more = {
        "tokenizer",
        "data",
        "scaler",
        "gelu_tanh",
        "wandb_id",
        "best_step",
        "bad_steps",
    }
    assert saved.keys() == keys | more
    fields = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert saved["model_args"].keys() == fields
    assert saved["iter_num"] == 3 and saved["config"]["n_embd"] == 32
    assert saved["tokenizer"] == read_meta(tiny / "data" / "tiny")
    assert saved["best_val_loss"] == min(e["val/loss"] for e in log("out") if "val/loss" in e)
    launch(train, *TINY, *RECIPE, "--max_iters=1")
    assert load("out/ckpt.pt")["model_args"].keys() == fields | {"position", "rms_norm", "tied"}


@pytest.mark.parametrize(
    "machine",
    [
        {},
        {"device": "cuda", "dtype": "float16", "compile": True, "backend": "nccl"},
        {"device": "mps", "dtype": "float16", "compile": False},
    ],
)
def test_a_checkpoint_of_nanogpt_resumes_with_its_optimizer_and_is_sampled(
    launch, tiny, monkeypatch, machine
):
    vocab_size = read_meta(tiny / "data" / "tiny")["vocab_size"]
    weights = nanogpt_checkpoint("theirs", vocab_size, **machine)
    here = "--device=cpu", "--dtype=float32"
    monkeypatch.setattr(sample, "ROOT", tiny)  # of its dataset's meta.pkl
    out = launch(sample, "--out_dir=theirs", "--num_samples=2", "--max_new_tokens=20", *here)
    assert out.count("---------------") == 2
    with monkeypatch.context() as patch:
        find_losses(patch, 1.0)  # the best so far, so it is saved
        launch(train, "--init_from=resume", "--out_dir=theirs", "--compile=False", *here)
    saved = load("theirs/ckpt.pt")
    assert saved["iter_num"] == 7 and saved["config"]["backend"] == "nccl"
    assert all(torch.equal(saved["model"][name], tensor) for name, tensor in weights.items())
    for moments in saved["optimizer"]["state"].values():
        assert moments["step"] == 7
        assert (moments["exp_avg"] == 0.01).all() and (moments["exp_avg_sq"] == 0.02).all()
    assert "iter 7: loss" in launch(
        train, "--init_from=resume", "--out_dir=theirs", "--max_iters=9"
    )
    assert load("theirs/ckpt.pt")["optimizer"]["state"][0]["step"] == 9
