"""Sharded states: the same run as with ckpt.pt, safe from kills, and no code of a stranger."""

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, Payload, assert_equal, find_losses, load, losses, workers

import sample
import train
from engine.sharded import step_folders

slow = pytest.mark.slow
RUN = [*TINY, "--sharded_save=True", "--fsdp=True", "--lr_decay_iters=8", "--dropout=0.2"]
RUN += ["--gradient_accumulation_steps=2", "--eval_interval=2", "--learning_rate=1e-2"]
CONVERT = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]


def folders(path="out"):
    return [folder.name for folder in step_folders(Path(path))]


def convert(folder, file="out/converted.pt"):
    """Return the state in a step folder as PyTorch's own tool converts it."""
    done = subprocess.run([*CONVERT, folder, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load(file)


def test_the_newest_and_the_best_step_are_kept(launch, tiny, monkeypatch):
    find_losses(monkeypatch, 3.0, 1.0, 2.0, 2.5)
    launch(train, *RUN, "--max_iters=6")
    assert folders() == ["step-6", "step-2"]
    Path("out/step-9").mkdir()  # a save that was killed
    find_losses(monkeypatch, 2.0, 2.1, 2.0)
    assert "steps: 6 to 8" in launch(train, "--init_from=resume", "--max_iters=8")
    for number, before in enumerate((["step-8", "step-2"], ["step-0"]), start=1):
        find_losses(monkeypatch, 2.0)
        launch(train, *RUN, "--max_iters=0")
        assert folders() == ["step-0"] and folders(f"out/previous/{number}") == before


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resume_is_exact_and_pytorchs_tool_makes_a_checkpoint_to_sample_from(
    launch, tiny, monkeypatch, optimizer
):
    monkeypatch.setattr(sample, "ROOT", tiny)
    options = *RUN, f"--optimizer={optimizer}"
    launch(train, *options, "--max_iters=8", "--sharded_save=False", "--out_dir=straight")
    for steps in (0, 4, 8):
        launch(train, *options, "--auto_resume=True", f"--max_iters={steps}")
    converted = convert("out/step-8")
    straight = load("straight/ckpt.pt")
    assert losses("straight") == losses("out")
    for name, tensor in straight["model"].items():
        assert torch.equal(converted["model"][name], tensor)
    text = "--device=cpu", "--dtype=float32", "--num_samples=1", "--max_new_tokens=50"
    drawn = launch(sample, *text, "--checkpoint_file=converted.pt")
    assert drawn == launch(sample, *text, "--out_dir=straight", "--checkpoint_file=ckpt.pt")
    os.mkdir("single")
    shutil.move("out/converted.pt", "single/ckpt.pt")
    launch(train, "--init_from=resume", "--out_dir=single", "--sharded_save=False", "--max_iters=9")
    launch(train, "--init_from=resume", "--out_dir=straight", "--max_iters=9")
    assert_equal(load("straight/ckpt.pt"), load("single/ckpt.pt"))


def test_a_hostile_table_runs_nothing(launch, tiny):
    launch(train, *RUN, "--max_iters=2")
    Path("out/step-2/.metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(SystemExit, match="out/step-2/.metadata: it asks to run io.open"):
        launch(train, "--init_from=resume", "--max_iters=3")
    assert not Path("proof").exists()


def test_a_missing_shard_is_found(launch, tiny):
    launch(train, *RUN, "--max_iters=2")
    table = pickle.loads(Path("out/step-2/.metadata").read_bytes())
    table.state_dict_metadata["model.transformer.wte.weight"].chunks = []
    Path("out/step-2/.metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(SystemExit, match="it lacks a shard of model.transformer.wte.weight"):
        launch(train, "--init_from=resume", "--max_iters=3")


@slow
def test_two_processes_save_their_shards_and_one_continues(launch, finish, tiny):
    launch(train, *RUN, "--dropout=0", "--max_iters=8", "--sharded_save=False", "--out_dir=one")
    finish(*RUN, "--dropout=0", "--max_iters=2", processes=2)
    assert len(list(Path("out/step-2").glob("*.distcp"))) == 2
    launch(train, "--init_from=resume", "--max_iters=4")
    finish("--init_from=resume", "--max_iters=8", processes=2)
    assert losses("out") == pytest.approx(losses("one"), rel=1e-5)
    converted, one = convert("out/step-8"), load("one/ckpt.pt")
    for name, tensor in one["model"].items():
        torch.testing.assert_close(converted["model"][name], tensor, atol=1e-4, rtol=0)


@slow
def test_kill_9_of_all_ranks_at_any_moment_costs_nothing(start, finish, tiny):
    options = [*RUN, "--max_iters=1500", "--eval_interval=20", "--eval_iters=1"]
    finish(*options, "--out_dir=straight", processes=2)
    moments = random.Random(1)
    for _ in range(6):
        process = start(*options, "--auto_resume=True", processes=2)
        process.stdout.readline()  # it is about to train
        time.sleep(moments.uniform(0.5, 2.5))
        assert process.poll() is None, process.communicate()
        for worker in workers(process):
            os.kill(worker, signal.SIGKILL)
        process.wait()
    finish(*options, "--auto_resume=True", processes=2)
    left, right = convert("straight/step-1500", "a.pt"), convert("out/step-1500", "b.pt")
    assert all(torch.equal(left["model"][name], right["model"][name]) for name in left["model"])
    assert losses("straight") == losses("out")
