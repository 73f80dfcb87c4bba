"""What the tests share: a way to run a script as the command line does, and a small dataset."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from configurator import configure
from data.tokens import CharTokenizer, char_meta, write_dataset

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # the models are tiny: on a busy machine more threads wait for each other
SHARED = ROOT.parent / "shared" / "data"  # real corpora, where they are
TINY = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --dataset=tiny".split()
TINY += "--gradient_accumulation_steps=1 --device=cpu --dtype=float32 --warmup_iters=0".split()
TEXT = "".join(f"{n} plus {m} makes {n + m}.\n" for n in range(40) for m in range(5))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def load(path):
    return torch.load(path, weights_only=True)


def log(folder):
    lines = Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses(folder):
    return {entry["iter"]: entry["loss"] for entry in log(folder) if "loss" in entry}


def assert_equal(left, right, **tolerance):
    """Require two checkpoints to hold the same weights and optimizer state."""
    tolerance = tolerance or {"atol": 0, "rtol": 0}
    for name, tensor in left["model"].items():
        torch.testing.assert_close(right["model"][name], tensor, **tolerance)
    for index, moments in left["optimizer"]["state"].items():
        for name, tensor in moments.items():
            other = right["optimizer"]["state"][index][name]
            torch.testing.assert_close(other, tensor, **tolerance)


@pytest.fixture
def launch(capsys, monkeypatch):
    """Run a script's main in this process; return what it printed. SystemExit holds its errors."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        others = [vars(train)] if script.__name__ == "bench" else []
        capsys.readouterr()
        script.main(configure(vars(script), *others))
        return capsys.readouterr().out

    return run


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Make data/tiny, of characters, in a folder that train.py takes for its own; return that."""
    meta = char_meta(set(TEXT))
    ids, cut = CharTokenizer(meta).encode(TEXT), len(TEXT) * 9 // 10
    write_dataset(tmp_path / "data" / "tiny", meta, train=[ids[:cut]], val=[ids[cut:]])
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(tiny):
    """Start train.py, or another script of `tiny`, in processes of its own; return the Popen."""
    shutil.copy(ROOT / "train.py", tiny)
    started = []

    def run(*arguments, processes=1, options=(), script="train.py", stdout=subprocess.PIPE):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        several = [*TORCHRUN, f"--nproc_per_node={processes}", *options]
        command = [*(several if processes > 1 else [sys.executable]), script, *arguments]
        pipes = {"stdout": stdout, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=env, cwd=tiny, **pipes))
        return started[-1]

    yield run
    for process in started:
        for child in workers(process) * (process.poll() is None):  # torchrun's outlive it
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate(timeout=30)


def workers(process):
    """Return the process ids of what `process` started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


@pytest.fixture
def finish(start):
    """Run train.py as `start` does and to its end; return what it printed."""

    def run(*arguments, status=0, **options):
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, (process.returncode, out, err)
        return out if status == 0 else err

    return run


@pytest.fixture
def gpt2_files(monkeypatch):
    """Make tiktoken's GPT-2 files available offline, or skip."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        if not (SHARED / "tiktoken_cache").exists():
            pytest.skip("no copy of tiktoken's GPT-2 files: set TIKTOKEN_CACHE_DIR")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
