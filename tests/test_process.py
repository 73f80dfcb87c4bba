"""How a process behaves: which errors get one line, and files that appear complete."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

import sample
import train
from data.tokenizer import make_meta
from data.tokens import write_dataset
from engine.process import UserError, atomic, link, one_line_errors, user_error


def raise_in_main(fault):
    @one_line_errors("buy more")
    def main(config):
        raise fault

    main({})


@pytest.mark.parametrize("fault", [ValueError("a"), ImportError("no such name")])
def test_an_error_in_code_keeps_its_traceback(fault):
    with pytest.raises(type(fault)) as stop:
        raise_in_main(fault)
    assert stop.value is fault


@pytest.mark.parametrize(
    "fault, line",
    [
        (UserError("one\ntwo"), "error: one\nerror: two"),
        (FloatingPointError("not finite"), "error: not finite"),
        (
            ModuleNotFoundError("no", name="wandb"),
            "error: this needs the package wandb: pip install wandb",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "error: out of memory: buy more"),
        (RuntimeError("MPS backend out of memory (9 GB)"), "error: out of memory: buy more"),
        (RuntimeError("CPUAllocator: can't allocate memory: 9"), "error: out of memory: buy more"),
        (MemoryError(), "error: out of memory: buy more"),
        (
            RuntimeError("[x.cc:1] gloo: Connection closed by peer. And more"),
            "error: another process has ended or is out of reach ([x.cc:1] gloo: Connection closed "
            "by peer); resume the run",
        ),
    ],
)
def test_an_error_that_a_user_can_mend_gets_a_line(fault, line):
    with pytest.raises(SystemExit) as stop:
        raise_in_main(fault)
    assert stop.value.code == line


def test_other_ranks_name_themselves(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match="^error: rank 3: no disk here$"):
        raise_in_main(UserError("no disk here"))


def test_a_reason_is_one_line():
    with pytest.raises(UserError, match="^x: No such file or directory$"), user_error("x", OSError):
        open("nothing/like/it")
    with pytest.raises(ValueError, match="^mine$"), user_error("x", OSError):
        raise ValueError("mine")


def test_a_link_is_the_same_file_or_a_copy_without_hard_links(tmp_path, monkeypatch):
    path, name = tmp_path / "a", tmp_path / "b"
    with atomic(path) as file:
        file.write(b"content")
    link(path, name)
    link(path, name)
    assert name.samefile(path)

    def refuse(*paths):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    link(path, name)
    assert name.read_bytes() == b"content" and not name.samefile(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("refused", ["replace", "link"])
def test_a_refused_rename_never_empties_the_linked_file(tmp_path, monkeypatch, refused):
    """The temporary name may already be a name of the only good file."""
    path, name = tmp_path / "a", tmp_path / "b"
    for each in (path, name):
        each.write_bytes(each.name.encode())
    replace, make_link = os.replace, os.link

    def fail_after(source, target):
        if refused == "link":
            make_link(source, target)  # as a network file system may answer a repeated request
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, refused, fail_after)
    if refused == "replace":
        with pytest.raises(UserError, match="b: Input/output error"):
            link(path, name)
    else:
        link(path, name)
    monkeypatch.setattr(os, "replace", replace)
    assert path.read_bytes() == b"a" and name.read_bytes() in (b"a", b"b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with atomic(tmp_path / "a") as file:
        file.write(b"content")
    assert (tmp_path / "a").read_bytes() == b"content"


def test_a_device_is_never_replaced(tmp_path):
    with (
        pytest.raises(UserError, match="^/dev/null is not a regular file$"),
        atomic(Path(os.devnull)),
    ):
        pass


def test_a_tilde_means_the_home_folder(launch, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny / "home"))
    launch(train, *TINY, "--max_iters=1", "--out_dir=~/run")
    assert (tiny / "home" / "run" / "ckpt.pt").exists() and not Path("~").exists()
    launch(sample, "--out_dir=~/run", "--num_samples=1", "--max_new_tokens=3", "--device=cpu")


def test_a_terminal_that_is_not_utf_8_loses_no_sample(launch, tiny):
    ids = [n % 3 for n in range(200)]
    write_dataset(tiny / "data" / "tiny", make_meta("char", ["a\u4e2d\n"]), train=[ids], val=[ids])
    launch(train, *TINY, "--max_iters=1")
    command = [sys.executable, str(ROOT / "sample.py"), "--num_samples=1", "--max_new_tokens=50"]
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([*command, "--start=\u4e2d"], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(b"\\u4e2d"), done.stderr
    assert done.stdout.count(b"\\u4e2d") > 1 and done.stdout.endswith(b"\n---------------\n")
