"""Checkpoints: a run that was stopped and went on equals one that never was; files of others."""

import math
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_equal, load, log, losses, nanogpt_checkpoint

import sample
import train
from data.tokenizer import read_meta
from data.tokens import TokenFile
from engine.runtime import choose_dtype
from model import GPTConfig

FULL = [*TINY, "--lr_decay_iters=8", "--dropout=0.2", "--gradient_accumulation_steps=2"]
slow = pytest.mark.slow


def assert_same_runs(left, right):
    assert_equal(load(f"{left}/ckpt.pt"), load(f"{right}/ckpt.pt"))
    assert losses(left) == losses(right) and list(losses(left)) == sorted(losses(left))


WAYS = [
    ("float32", False),
    ("bfloat16", False),
    pytest.param("float32", True, marks=slow),
    pytest.param("bfloat16", True, marks=slow),
]


@pytest.mark.parametrize("dtype, compiled", WAYS)
def test_stopping_and_resuming_equals_going_on(launch, tiny, dtype, compiled):
    if compiled and not sys.platform.startswith("linux"):
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()  # past 8 versions of a function, of other tests too, it compiles no more
    options = *FULL, f"--dtype={dtype}", f"--compile={compiled}"
    launch(train, *options, "--max_iters=8", "--out_dir=straight", "--eval_interval=8")
    launch(train, *options, "--max_iters=4", "--out_dir=resumed", "--eval_interval=3")
    launch(train, "--init_from=resume", "--out_dir=resumed", "--max_iters=8", "--eval_interval=2")
    assert_same_runs("straight", "resumed")
    assert load("resumed/ckpt.pt")["iter_num"] == 8


# From 3 summands on their order matters.
TOGETHER = [*product(("float32", "bfloat16"), (False, True), (2,)), ("float32", False, 3)]


@slow
@pytest.mark.parametrize("dtype, compiled, processes", TOGETHER)
def test_so_it_does_with_several_processes(finish, tiny, dtype, compiled, processes):
    options = *FULL, f"--dtype={dtype}", f"--compile={compiled}"
    options += (f"--gradient_accumulation_steps={2 * processes}",)
    together = {"processes": processes}
    finish(*options, "--max_iters=8", "--out_dir=straight", "--eval_interval=8", **together)
    finish(*options, "--max_iters=4", "--out_dir=resumed", "--eval_interval=3", **together)
    on = "--init_from=resume", "--out_dir=resumed", "--max_iters=8", "--eval_interval=2"
    finish(*on, **together)
    assert_same_runs("straight", "resumed")


@slow
def test_the_number_of_processes_may_change(launch, finish, tiny):
    """The most that was seen to differ over 12 steps: 4e-8 of a loss, and no weight at all."""
    options = [*TINY, "--lr_decay_iters=12", "--gradient_accumulation_steps=2"]
    launch(train, *options, "--max_iters=12", "--out_dir=straight")
    launch(train, *options, "--max_iters=4", "--out_dir=changing")
    finish("--init_from=resume", "--out_dir=changing", "--max_iters=8", processes=2)
    launch(train, "--init_from=resume", "--out_dir=changing", "--max_iters=12")
    assert losses("changing") == pytest.approx(losses("straight"), rel=1e-6)
    assert_equal(load("straight/ckpt.pt"), load("changing/ckpt.pt"), atol=1e-6, rtol=0)


def test_a_float16_run_keeps_its_loss_scale(launch, tiny, monkeypatch):
    scaler = torch.amp.GradScaler
    options = {"init_scale": 2.0**127, "growth_interval": 1000}  # the loss overflows at first
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler("cpu", **options))
    launch(train, *TINY, "--max_iters=30", "--max_bad_steps=1", "--lr_decay_iters=40")
    saved = load("out/ckpt.pt")
    scale, updates = saved["scaler"]["scale"], saved["optimizer"]["state"][0]["step"].item()
    skipped = 127 - math.log2(scale)  # each halved it
    assert skipped >= 1 and updates == 30 - skipped
    launch(train, "--init_from=resume", "--max_iters=31")
    assert load("out/ckpt.pt")["scaler"]["scale"] == scale


# --- what a resumed run takes over ---------------------------------------------------------------


def test_auto_resume_starts_anew_and_then_resumes(launch, tiny):
    auto = *TINY, "--auto_resume=True", "--lr_decay_iters=6"
    launch(train, *TINY, "--lr_decay_iters=6", "--max_iters=6", "--out_dir=straight")
    (tiny / "out").mkdir()
    (tiny / "out" / "log.jsonl").write_text('{"iter": 0, "settings": {}}\n')  # of one that died
    first = launch(train, *auto, "--max_iters=3")
    second = launch(train, *auto, "--max_iters=6")
    assert "steps: 0 to 3" in first and "steps: 3 to 6" in second
    assert_same_runs("straight", "out")
    assert not (tiny / "out" / "previous").exists()


def test_what_a_resumed_run_changes_is_printed(launch, tiny):
    (tiny / "c.py").write_text("learning_rate = 0.5\nbatch_size = 2")
    launch(train, *TINY, "--max_iters=2", "--learning_rate=1e-3", "--weight_decay=0.1")
    flags = "--learning_rate=5e-4", "--max_iters=4", "--weight_decay=0.2", "--beta1=0.8"
    out = launch(train, "c.py", "--init_from=resume", *flags).splitlines()
    assert out[:5] == [
        "batch_size: stays 4; only --batch_size=2 changes it",
        "learning_rate: 0.001 -> 0.0005",
        "max_iters: 2 -> 4",
        "weight_decay: 0.1 -> 0.2",
        "beta1: 0.9 -> 0.8",
    ]
    checkpoint = load("out/ckpt.pt")
    group = checkpoint["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["betas"]) == (0.2, (0.8, 0.95))
    assert checkpoint["config"]["learning_rate"] == 5e-4


def test_a_shorter_context_can_be_resumed_with(launch, tiny):
    launch(train, *TINY, "--max_iters=2")
    out = launch(train, "--init_from=resume", "--block_size=8", "--max_iters=3")
    assert "block_size: 16 -> 8" in out
    checkpoint = load("out/ckpt.pt")
    assert checkpoint["model"]["transformer.wpe.weight"].shape == (8, 32)
    assert checkpoint["optimizer"]["state"][1]["exp_avg"].shape == (8, 32)
    assert checkpoint["model_args"]["block_size"] == 8


def test_other_data_than_before_is_refused_unless_it_is_asked_for(launch, tiny):
    launch(train, *TINY, "--max_iters=2")
    was = load("out/ckpt.pt")["data"]
    path = tiny / "data" / "tiny" / "train.bin"
    ids = path.read_bytes()
    path.write_bytes(ids[: len(ids) // 4 * 2])
    now = TokenFile(path, read_meta(path.parent), 16).digest()
    assert now.startswith(f"{len(ids) // 4} tokens, ") and was["train"] != now
    with pytest.raises(SystemExit) as stop:
        launch(train, "--init_from=resume", "--max_iters=3")
    changed = f"train.bin of dataset tiny has changed: it had {was['train']}, and has {now}"
    assert stop.value.code == f"error: {changed}; --new_data=True goes on with it"
    assert load("out/ckpt.pt")["iter_num"] == 2
    launch(train, "--init_from=resume", "--eval_only")  # which trains on nothing
    launch(train, "--init_from=resume", "--max_iters=3", "--new_data=True")
    assert load("out/ckpt.pt")["data"] == {"train": now, "val": was["val"]}
    launch(train, "--init_from=resume", "--max_iters=4")  # asked for once


def test_a_checkpoint_whose_device_is_not_here_resumes_on_another(launch, tiny):
    if torch.cuda.is_available():
        pytest.skip("has the device that is missing here")
    launch(train, *TINY, "--max_iters=2")
    saved = load("out/ckpt.pt")
    saved["config"] |= {"device": "cuda", "dtype": "float16", "compile": False}
    torch.save(saved, "out/ckpt.pt")
    with pytest.raises((RuntimeError, AssertionError)) as fault:
        torch.zeros(1, device="cuda")
    lost = f"device=cuda cannot be used: {type(fault.value).__name__}: "
    with pytest.raises(SystemExit) as stop:
        launch(train, "--init_from=resume", "--device=cuda")
    assert stop.value.code.startswith(f"error: {lost}")
    assert stop.value.code.endswith("; try --device=auto")
    reason = stop.value.code.removeprefix("error: ").removesuffix("; try --device=auto")
    out = launch(train, "--init_from=resume", "--max_iters=3")
    dtype, why = choose_dtype("auto", torch.device("cpu"))
    precision = f"{str(dtype).removeprefix('torch.')} ({why})"
    line = f"hardware: 1 x cpu ({reason}), {precision}, not compiled as set"
    assert line in out.splitlines()
    assert "iter 2: loss" in out


# --- files of others -----------------------------------------------------------------------------


def test_a_checkpoint_is_nanogpts_with_more_keys(launch, tiny):
    launch(train, *TINY, "--max_iters=3")
    checkpoint = load("out/ckpt.pt")
    keys = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    more = {"tokenizer", "data", "scaler", "gelu_tanh", "wandb_id", "watch"}
    assert checkpoint.keys() == keys | more
    fields = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert checkpoint["model_args"].keys() == fields
    assert checkpoint["iter_num"] == 3 and checkpoint["config"]["n_embd"] == 32
    assert checkpoint["tokenizer"] == read_meta(tiny / "data" / "tiny")
    assert not any(name.startswith("_orig_mod.") for name in checkpoint["model"])
    assert checkpoint["best_val_loss"] == min(e["val/loss"] for e in log("out") if "val/loss" in e)


@pytest.mark.parametrize(
    "machine",
    [
        {},
        {"device": "cuda", "dtype": "float16", "compile": True, "backend": "nccl"},
        {"device": "mps", "dtype": "float16", "compile": False},
        {"device": "cpu", "dtype": "float16", "compile": True},  # nanoGPT's default dtype there
    ],
)
def test_a_checkpoint_of_nanogpt_resumes_at_its_step_with_its_optimizer(launch, tiny, machine):
    vocab_size = read_meta(tiny / "data" / "tiny")["vocab_size"]
    weights = nanogpt_checkpoint("theirs", vocab_size, **machine)
    resume = "--init_from=resume", "--out_dir=theirs"
    launch(train, *resume)  # which writes what it read, as the best model so far
    kept = load("theirs/best.pt")
    assert kept["iter_num"] == 7 and kept["config"]["compile"] == "auto"
    for name, tensor in weights.items():
        assert torch.equal(kept["model"][name], tensor)
    assert all(s["step"] == 7 for s in kept["optimizer"]["state"].values())
    assert all((s["exp_avg"] == 0.01).all() for s in kept["optimizer"]["state"].values())
    assert all((s["exp_avg_sq"] == 0.02).all() for s in kept["optimizer"]["state"].values())
    assert "iter 7: loss" in launch(train, *resume, "--max_iters=9")
    assert load("theirs/ckpt.pt")["optimizer"]["state"][0]["step"] == 9


def test_a_checkpoint_of_nanogpt_is_sampled_from(launch, tiny, monkeypatch):
    monkeypatch.setattr(sample, "ROOT", tiny)  # where its dataset's meta.pkl is
    nanogpt_checkpoint("theirs", read_meta(tiny / "data" / "tiny")["vocab_size"])
    out = launch(sample, "--out_dir=theirs", "--num_samples=2", "--max_new_tokens=20", "--start=1")
    assert out.count("---------------") == 2


def as_older_code_wrote_it(path, **config):
    """Rewrite a checkpoint: without digests, with gelu_tanh among the model's arguments."""
    saved = load(path)
    gelu_tanh = saved.pop("gelu_tanh")
    del saved["data"], saved["watch"]
    if gelu_tanh:
        saved["model_args"]["gelu_tanh"] = True
    added = "auto_resume", "checkpoint_file", "new_data", "fast_parts"
    settings = {name: value for name, value in saved["config"].items() if name not in added}
    saved["config"] = settings | config
    keys = "model optimizer scaler model_args iter_num best_val_loss config tokenizer wandb_id"
    assert saved.keys() == set(keys.split())
    torch.save(saved, path)


@pytest.mark.parametrize("gelu_tanh", [False, True])
def test_a_checkpoint_of_older_code_resumes_exactly(launch, tiny, monkeypatch, gelu_tanh):
    monkeypatch.setattr(train, "GPTConfig", partial(GPTConfig, gelu_tanh=gelu_tanh))
    launch(train, *FULL, "--max_iters=8", "--out_dir=straight")
    launch(train, *FULL, "--max_iters=4")
    monkeypatch.undo()
    monkeypatch.setattr(train, "ROOT", tiny)
    monkeypatch.chdir(tiny)
    Path("out/best.pt").unlink()  # which it did not keep
    as_older_code_wrote_it("out/ckpt.pt")
    launch(train, "--init_from=resume", "--max_iters=8")
    assert_same_runs("straight", "out")
    assert load("out/ckpt.pt")["gelu_tanh"] is gelu_tanh
    assert load("out/best.pt")["iter_num"] in (4, 8)  # the better of those it saw


def test_a_newest_model_of_older_code_is_not_taken_for_its_best(launch, tiny, monkeypatch):
    launch(train, *TINY, "--max_iters=2")
    Path("out/best.pt").unlink()
    as_older_code_wrote_it("out/ckpt.pt")
    saved = load("out/ckpt.pt")
    saved["best_val_loss"] = 1.0  # of a model that it wrote over
    torch.save(saved, "out/ckpt.pt")
    monkeypatch.setattr(train, "evaluate", lambda *a: {"train": 1.0, "val": 2.0})
    launch(train, "--init_from=resume", "--max_iters=4", "--always_save_checkpoint=False")
    best = load("out/ckpt.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (4, 2.0)
