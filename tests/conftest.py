"""What the tests share: a way to run a script as the command line does, and a small dataset."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from configurator import configure
from data.tokenizer import CharTokenizer, make_meta
from data.tokens import TokenFile, write_dataset

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # the models are tiny: on a busy machine more threads wait for each other
SHARED = ROOT.parent / "shared" / "data"  # real corpora, where they are
TINY = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --dataset=tiny".split()
TINY += "--gradient_accumulation_steps=1 --device=cpu --dtype=float32 --warmup_iters=0".split()
RECIPE = ["--position=rotary", "--rms_norm", "--tied=False", "--optimizer=muon"]
TEXT = "".join(f"{n} plus {m} makes {n + m}.\n" for n in range(40) for m in range(5))
META = {"vocab_size": 100, "stoi": {}, "itos": {}}
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


def limit_files(size):
    """Bound the size of every file that this process writes, in bytes; None lifts the bound."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or most, most))


@pytest.fixture
def file_limit():
    """Give a test limit_files(); launch() lifts the bound: pytest may print to a file too."""
    if resource is None:
        pytest.skip("files have no limits here")
    return limit_files


@pytest.fixture
def launch(capsys, monkeypatch):
    """Run a script's main in this process; return what it printed. SystemExit holds its errors."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        others = [vars(train)] if script.__name__ in ("bench", "tools.size") else []
        capsys.readouterr()
        try:
            script.main(configure(vars(script), *others))
        finally:
            if resource:
                limit_files(None)
        return capsys.readouterr().out

    return run


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Make data/tiny, of characters, in a folder that train.py takes for its own; return that."""
    meta = make_meta("char", [TEXT])
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

    def run(*arguments, processes=1, options=(), script="train.py", **how):
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        several = [*TORCHRUN, f"--nproc_per_node={processes}", *options]
        command = [*(several if processes > 1 else [sys.executable]), script, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=env, cwd=tiny, **(pipes | how)))
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


def token_file(path, ids, meta=META, block_size=4):
    """Write ids to `path` and open it."""
    path.write_bytes(np.asarray(ids, "<u2").tobytes())
    return TokenFile(path, meta, block_size)


def at_step(monkeypatch, actions):
    """Call `actions[step]()` before that training step."""
    train_step = train.train_step

    def watched(model, state, batches, runtime):
        actions.get(state.step, bool)()
        return train_step(model, state, batches, runtime)

    monkeypatch.setattr(train, "train_step", watched)


def find_losses(monkeypatch, *values):
    """Make the evaluations of a run return these validation losses, one after the other."""
    found = iter(values)
    monkeypatch.setattr(train, "evaluate", lambda *args: {"train": 1.0, "val": next(found)})


class Payload:
    """Code that a pickle would run: it creates the file `proof`."""

    def __reduce__(self):
        return open, ("proof", "w")


def save_pretrained(folder, **sizes):
    """Save a tiny, random model of the shape of GPT-2; skip without transformers."""
    transformers = pytest.importorskip("transformers")
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 21, **sizes}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    model.save_pretrained(folder)
    return model


def nanogpt_checkpoint(folder, vocab_size, **config):
    """Write a checkpoint as nanoGPT lays it out: compiled names, resolved device, tensors."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
    arguments = {**sizes, "bias": False, "vocab_size": vocab_size, "dropout": 0.0}
    layer = {"ln_1.weight": (32,), "attn.c_attn.weight": (96, 32), "attn.c_proj.weight": (32, 32)}
    layer |= {"ln_2.weight": (32,), "mlp.c_fc.weight": (128, 32), "mlp.c_proj.weight": (32, 128)}
    shapes = {"wte.weight": (vocab_size, 32), "wpe.weight": (16, 32)}
    shapes |= {f"h.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    shapes = {f"transformer.{k}": v for k, v in (shapes | {"ln_f.weight": (32,)}).items()}
    weights = {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    order = sorted(shapes, key=lambda name: len(shapes[name]) < 2)  # matrices, then vectors
    matrices = sum(len(shape) == 2 for shape in shapes.values())
    hyper = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": False, "maximize": False}
    hyper |= {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
    groups = [
        {**hyper, "weight_decay": 0.1, "params": list(range(matrices))},
        {**hyper, "weight_decay": 0.0, "params": list(range(matrices, len(order)))},
    ]
    state = {
        index: {
            "step": torch.tensor(7.0),
            "exp_avg": torch.full(shapes[name], 0.01),
            "exp_avg_sq": torch.full(shapes[name], 0.02),
        }
        for index, name in enumerate(order)
    }
    settings = {"out_dir": "elsewhere", "dataset": "tiny", "batch_size": 4, "block_size": 16}
    settings |= {"gradient_accumulation_steps": 1, "max_iters": 7, "warmup_iters": 2}
    settings |= {"device": "cpu", "dtype": "float32", "compile": False, "init_from": "scratch"}
    named = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    named["_orig_mod.lm_head.weight"] = weights["transformer.wte.weight"]
    Path(folder).mkdir()
    content = {
        "model": named,
        "optimizer": {"state": state, "param_groups": groups},
        "model_args": arguments,
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.5),
        "config": settings | config,
    }
    torch.save(content, Path(folder, "ckpt.pt"))
    return weights


@pytest.fixture
def gpt2_files(monkeypatch):
    """Make tiktoken's GPT-2 files available offline, or skip."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        if not (SHARED / "tiktoken_cache").exists():
            pytest.skip("no copy of tiktoken's GPT-2 files: set TIKTOKEN_CACHE_DIR")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
