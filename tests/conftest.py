"""What the tests share: a way to run a script as the command line does, and a small dataset."""

import os
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
def gpt2_files(monkeypatch):
    """Make tiktoken's GPT-2 files available offline, or skip."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        if not (SHARED / "tiktoken_cache").exists():
            pytest.skip("no copy of tiktoken's GPT-2 files: set TIKTOKEN_CACHE_DIR")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
