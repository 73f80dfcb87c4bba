"""How a process behaves: which errors get one line, what memory advice says, who owns a folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

import sample
import train
from data.tokenizer import char_meta
from data.tokens import write_dataset
from engine.process import UserError, atomic, explain, link, one_line_errors, user_error


@pytest.mark.parametrize(
    "fault", [ValueError("too many values"), ImportError("no such name"), OSError(5, "worn out")]
)
def test_only_our_own_errors_lose_their_traceback(fault):
    @one_line_errors
    def hacked(config):
        raise fault

    @one_line_errors
    def mistaken(config):
        raise UserError("one\ntwo")

    with pytest.raises(type(fault)):
        hacked({})
    with pytest.raises(SystemExit) as stop:
        mistaken({})
    assert stop.value.code == "error: one\nerror: two"


def test_a_reason_is_one_line():
    with pytest.raises(UserError, match="^it: KeyError: 'a'$"), user_error("it", KeyError):
        raise KeyError("a")
    with pytest.raises(UserError, match="^x: No such file or directory$"), user_error("x", OSError):
        open("nothing/like/it")
    with pytest.raises(ValueError, match="^mine$"), user_error("x", OSError):
        raise ValueError("mine")


@pytest.mark.parametrize(
    "settings, advice",
    [
        ({"batch_size": 12, "gradient_accumulation_steps": 40},
         "try --batch_size=6 --gradient_accumulation_steps=80, which trains alike"),
        ({"batch_size": 3}, "lower --batch_size, now 3"),
        ({"batch_size": 1, "activation_checkpointing": False},
         "try --activation_checkpointing=True, then a smaller --block_size"),
        ({"batch_size": 1, "activation_checkpointing": True},
         "take a smaller model or context, or a machine with more"),
        ({"max_new_tokens": 9, "num_samples": 10, "batch_size": 64},
         "lower --batch_size, now 64, the most samples side by side"),
        ({"max_new_tokens": 9, "num_samples": 1, "batch_size": 64, "prompts": "p.txt"},
         "lower --batch_size, now 64, the most samples side by side"),
        ({"max_new_tokens": 9, "num_samples": 1, "batch_size": 64},
         "take a smaller model, or a machine with more"),
        ({"new_tokens": 9, "num_samples": 2, "batch_size": 12}, "lower --num_samples, now 2"),
    ],
)  # fmt: skip
def test_the_advice_where_memory_runs_out_follows_the_settings(settings, advice):
    faults = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    )
    for fault in faults:
        assert explain(fault, settings) == f"out of memory: {advice}"


def test_a_link_is_the_same_file_and_a_copy_where_links_do_not_work(tmp_path, monkeypatch):
    path, name = tmp_path / "a", tmp_path / "b"
    with atomic(path) as file:
        file.write(b"content")
    link(path, name)
    assert name.samefile(path)

    def refuse(*paths):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    link(path, name)
    assert name.read_bytes() == b"content" and not name.samefile(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_home_folder_is_meant_by_a_tilde(launch, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny / "home"))
    launch(train, *TINY, "--max_iters=1", "--out_dir=~/run")
    assert (tiny / "home" / "run" / "ckpt.pt").exists() and not Path("~").exists()
    launch(sample, "--out_dir=~/run", "--num_samples=1", "--max_new_tokens=3", "--device=cpu")


def test_a_terminal_that_is_not_utf_8_loses_no_sample(launch, tiny):
    ids = [n % 3 for n in range(200)]
    write_dataset(tiny / "data" / "tiny", char_meta("a\u4e2d\n"), train=[ids], val=[ids])
    launch(train, *TINY, "--max_iters=1")
    command = [sys.executable, str(ROOT / "sample.py"), "--num_samples=1", "--max_new_tokens=50"]
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([*command, "--start=\u4e2d"], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(b"\\u4e2d"), done.stderr
    assert done.stdout.count(b"\\u4e2d") > 1 and done.stdout.endswith(b"\n---------------\n")


# --- one run owns its folder ---------------------------------------------------------------------


def snapshot(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def test_a_second_run_into_a_folder_changes_nothing_until_the_first_is_gone(start, launch, tiny):
    first = start(*TINY, "--max_iters=1000000", "--eval_interval=1000000", "--lr_decay_iters=9")
    while not first.stdout.readline().startswith("iter 5:"):
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)  # it lives, and is quiet
    before = snapshot("out")
    for more in ([], ["--init_from=resume"]):
        with pytest.raises(SystemExit) as stop:
            launch(train, *TINY, "--max_iters=9", *more)
        owner = f"out is in use by process {first.pid} on "
        assert stop.value.code.startswith(f"error: {owner}")
        assert stop.value.code.endswith("; give another --out_dir, or wait")
    assert snapshot("out") == before
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert "steps: 0 to 9" in launch(train, "--init_from=resume", "--max_iters=9")
