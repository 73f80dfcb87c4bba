"""A user's mistakes: each gets one line and status 1, and nothing is lost, changed or run.

A row is a mistake and its line. {tmp} is the folder of the test; "..." stands for words of a
library, which differ with its version.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, TINY, Payload

import bench
import sample
import train
from data.tokenizer import make_meta, read_meta
from model import GPT, GPTConfig

SIZES = {"block_size": 16, "vocab_size": 21, "n_layer": 2, "n_head": 2, "n_embd": 32}
CKPT, TRAIN, META = "run/ckpt.pt", "data/tiny/train.bin", "data/tiny/meta.pkl"
RESUME = ["--init_from=resume", "--out_dir=run", "--device=cpu"]


@pytest.fixture(autouse=True)
def world(tiny, monkeypatch):
    """Make a dataset and a checkpoint."""
    monkeypatch.setattr(sample, "ROOT", tiny)
    torch.manual_seed(0)
    model, meta = GPT(GPTConfig(**SIZES, bias=False)), read_meta(tiny / "data" / "tiny")
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    settings = dict(argument.removeprefix("--").split("=") for argument in TINY)
    settings = {k: int(v) if v.isdigit() else v for k, v in settings.items()}
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": 1}
    saved |= {"model_args": {**SIZES, "bias": False, "dropout": 0.0}}
    saved |= {"config": settings, "tokenizer": meta}
    Path("run").mkdir()
    torch.save(saved, CKPT)


def snapshot(folder):
    """Return the content of all files, without locks."""
    return {
        p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"
    }


def refused(launch, script, arguments, line):
    """Require the line, and that all files are afterwards as they were."""
    before = snapshot(Path.cwd())
    with pytest.raises(SystemExit) as stop:
        launch(script, *arguments)
    expected = [f"error: {part}" for part in line.replace("{tmp}", str(Path.cwd())).splitlines()]
    given = str(stop.value.code).splitlines()
    assert len(given) == len(expected), given
    for mine, wanted in zip(given, expected, strict=True):
        start, dots, end = wanted.partition("...")
        assert mine == wanted or (dots and mine.startswith(start) and mine.endswith(end)), mine
    assert snapshot(Path.cwd()) == before


# --- settings ------------------------------------------------------------------------------------

NO_FILE = "(ends with .py?); a setting is given as --key=value"


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--nothing"], "unknown setting 'nothing', ..."),
        (
            ["--max_iter=5"],
            "unknown setting 'max_iter', the closest is max_iters; --help lists all",
        ),
        (["--max-iters=5"], "unknown setting 'max-iters', ..."),
        (["--"], "unknown setting '', ..."),
        (["--max_iters=5.5"], "max_iters must be int, got 5.5"),
        (["--max_iters=five"], "max_iters must be int, got 'five'"),
        (["--max_iters"], "max_iters must be int, got ''"),
        (["--max_iters=[5]"], "max_iters must be int, got [5]"),
        (["--max_iters=True"], "max_iters must be int, got True"),
        (["--max_iters=1e999"], "max_iters must be int, got inf"),
        (["--learning_rate=nan"], "learning_rate must be float, got 'nan'"),
        (["--learning_rate=1" + "0" * 400], "learning_rate must be float, got 1000..."),
        ([*TINY, "--batch_size=2000000000"], "a step needs 73728 GB, ..."),
        (["--learning_rate=1e999"], "learning_rate=inf must be from 0 to 2147483647"),
        (["--eval_only=1"], "eval_only must be bool, got 1"),
        (["--eval_only", "no"], f"no config file 'no' {NO_FILE}"),
        (["--lr_decay_iters=x"], "lr_decay_iters must be int or None, got 'x'"),
        (["max_iters=5"], f"no config file 'max_iters=5' {NO_FILE}"),
        (
            ["no.py", "--n_head=x"],
            f"no config file 'no.py' {NO_FILE}\nn_head must be int, got 'x'",
        ),
        (["data"], f"no config file 'data' {NO_FILE}"),
        (["--beta1=1"], "beta1=1.0 must be from 0 to 0.9999"),
        ([*TINY, "--n_head=3"], "n_embd must be a multiple of n_head, and of twice n_head ..."),
        (
            [*TINY, "--n_head=32", "--position=rotary"],
            "n_embd must be a multiple of n_head, and of twice n_head ...",
        ),
        ([*TINY, "--position=alibi"], "position='alibi': choose one of ['learned', 'rotary']"),
        ([*TINY, "--fsdp=full"], "fsdp='full': choose one of [True, False, 'hybrid']"),
        (
            [*TINY, "--optimizer=sgd", "--lr_schedule=wsd"],
            "optimizer='sgd': choose one of ['adamw', 'muon']\n"
            "lr_schedule='wsd': choose one of ['cosine', 'linear']",
        ),
        ([*TINY, "--device=cuda:9"], "device=cuda:9 cannot be used, --device=cpu works: ..."),
        ([*TINY, "--device=meta"], "device=meta cannot be used, --device=cpu works: ..."),
        (
            [*TINY, "--dtype=float16"],
            "dtype=float16: choose auto, float32, bfloat16, or float16 on CUDA",
        ),
        ([*TINY, "--compile=maybe"], "compile='maybe': choose one of ['auto', True, False]"),
        ([*TINY, "--out_dir=run/ckpt.pt"], "run/ckpt.pt: File exists"),
        ([*TINY, "--out_dir=run/ckpt.pt/a/b"], "run/ckpt.pt/a/b: Not a directory"),
        ([*TINY, "--out_dir=" + "x" * 300], "x" * 300 + ": File name too long"),
    ],
)
def test_a_wrong_setting(launch, arguments, line):
    refused(launch, train, arguments, line)


@pytest.mark.parametrize(
    "content, line",
    [
        (b"max_iter = 5", "unknown setting 'max_iter', the closest is max_iters; --help lists all"),
        (
            b"max_iters = 'many'\nbias = 1",
            "bias must be bool, got 1\nc.py: max_iters must be int, got 'many'",
        ),
        (b"out_dir = None", "out_dir must be str, got None"),
        (b"learning_rate = 10**400", "learning_rate must be float, got 1000..."),
        (b"beta1 = dict(a=1)", "beta1 must be float, got {'a': 1}"),
        (b"max_iters = 5 +", "invalid syntax (c.py, line 1)"),
        (b"max_iters = 5 / 0", "division by zero"),
        (b"raise RuntimeError('one\\ntwo')", "one"),
        (b"exit()", "None"),
        (b"raise KeyboardInterrupt", "KeyboardInterrupt"),
        (b"def f(): return f()\nf()", "maximum recursion depth exceeded..."),
        (b"import nothing_like_it", "No module named 'nothing_like_it'"),
        (b"out_dir = 'Caf\xe9'", "(unicode error) 'utf-8' codec can't decode byte 0xe9..."),
        (b"max_iters = 5\0", "...source code string cannot contain null bytes"),
    ],
)
def test_a_wrong_config_file(launch, content, line):
    Path("c.py").write_bytes(content)
    refused(launch, train, ["c.py"], f"c.py: {line}")


# --- datasets ------------------------------------------------------------------------------------


def ids(*values):
    return torch.tensor(values, dtype=torch.uint16).numpy().tobytes()


def put(path, content):
    Path(path).write_bytes(content)


def meta(**changes):
    put(META, pickle.dumps({**make_meta("char", [TEXT]), **changes}))


def doubled(node):
    """Return 2**30 nodes that are 30 in a file: nobody may print, compare or hash them."""
    for _ in range(30):
        node = type(node)((node, node))
    return node


ADVICE = "run {tmp}/data/tiny/prepare.py, or data/text/prepare.py for your own text"
NO_META = "{tmp}/data/tiny/meta.pkl describes no dataset"
AGAIN = "prepare it again"
BPE = {"tokenizer": "own", "pairs": ["ab"], "vocab_size": 258}


@pytest.mark.parametrize(
    "spoil, line",
    [
        (lambda: Path(TRAIN).unlink(), f"{{tmp}}/{TRAIN} ({ADVICE}): No such file or directory"),
        (lambda: put(TRAIN, b"\0" * 101), f"{{tmp}}/{TRAIN} ({ADVICE}): ..."),
        (
            lambda: put(TRAIN, b"\0" * 32),
            f"{{tmp}}/{TRAIN} has 16 tokens, too few for block_size=16",
        ),
        (
            lambda: put(TRAIN, ids(*[1] * 500, 21, *[1] * 500)),
            f"{{tmp}}/{TRAIN} contains token id 21, but the vocabulary has only 21 tokens; ...",
        ),
        (lambda: put(META, b""), f"{NO_META} (...); {AGAIN}"),
        (lambda: put(META, b"garbage"), f"{NO_META} (invalid literal for int() ...); {AGAIN}"),
        (lambda: put(META, Path(META).read_bytes()[:50]), f"{NO_META} (...); {AGAIN}"),
        (lambda: put(META, pickle.dumps([1])), f"{NO_META} ('vocab_size'); {AGAIN}"),
        (lambda: put(META, pickle.dumps({})), f"{NO_META} ('vocab_size'); {AGAIN}"),
        (lambda: put(META, b"\x80\x05\x96" + bytes(7) + b"\1."), f"{NO_META} (...); {AGAIN}"),
        (lambda: meta(vocab_size=doubled([])), f"{NO_META} (its vocab_size is [[...); {AGAIN}"),
        (lambda: meta(stoi={doubled(()): 0}), f"{NO_META} (...); {AGAIN}"),
        (lambda: (Path(META).unlink(), os.mkfifo(META)), f"{NO_META} (it is not ...); {AGAIN}"),
        (lambda: put(META, b"\x80\x02}r\xff\xff\xff\x7f."), f"{NO_META} ('vocab_size'); {AGAIN}"),
        (lambda: meta(vocab_size="21"), f"{NO_META} (its vocab_size is '21'); {AGAIN}"),
        (lambda: meta(vocab_size=2**40), f"{NO_META} (its vocab_size is {2**40}); {AGAIN}"),
        (lambda: meta(vocab_size=22), f"{NO_META} (its characters and ids do not match); {AGAIN}"),
        (lambda: meta(itos={0: "a"}), f"{NO_META} (its characters and ids do not match); {AGAIN}"),
        (lambda: meta(stoi=None), f"{NO_META} (...); {AGAIN}"),
        (
            lambda: put(META, pickle.dumps({**BPE, "vocab_size": 300})),
            f"{NO_META} (its vocab_size does not match its tokens, ...); {AGAIN}",
        ),
        (
            lambda: put(META, pickle.dumps({**BPE, "pairs": ["\u6771"]})),
            f"{NO_META} (...); {AGAIN}",
        ),
        (lambda: meta(extra=Payload()), f"{NO_META} (it asks to run ...open); {AGAIN}"),
    ],
)
def test_a_wrong_dataset(launch, spoil, line):
    spoil()
    refused(launch, train, TINY, line)


VOCABULARY = "prepare the dataset with the tokenizer of the model"


@pytest.mark.parametrize(
    "spoil, line",
    [
        (
            lambda: Path(META).unlink(),
            f"dataset tiny has a vocabulary of 50304, the model 21; {VOCABULARY}",
        ),
        (
            lambda: meta(**make_meta("char", [TEXT.replace("0", "O")])),
            "tiny uses a different tokenizer than the checkpoint",
        ),
    ],
)
def test_a_dataset_of_another_tokenizer(launch, spoil, line):
    spoil()
    refused(launch, train, RESUME, line)


# --- checkpoints ---------------------------------------------------------------------------------


def change(**parts):
    """Rewrite the checkpoint with `parts` in it; a part that is None is left out."""
    saved = {**torch.load(CKPT, weights_only=True), **parts}
    torch.save({key: part for key, part in saved.items() if part is not None}, CKPT)


def flip_a_weight():
    weights = torch.load(CKPT, weights_only=True)["model"]["transformer.wte.weight"]
    content = bytearray(Path(CKPT).read_bytes())
    content[content.index(weights.numpy().tobytes()) + 100] ^= 255
    put(CKPT, content)


UNREADABLE = "run/ckpt.pt cannot be read as a checkpoint: "


@pytest.mark.parametrize(
    "spoil, line",
    [
        (lambda: put(CKPT, b""), UNREADABLE + "File is not a zip file"),
        (lambda: put(CKPT, Path(CKPT).read_bytes()[:9000]), UNREADABLE + "File is not a zip file"),
        (flip_a_weight, UNREADABLE + "it is damaged"),
        (
            lambda: torch.save(Payload(), CKPT),
            UNREADABLE + "it holds ['io.open']; if you trust the file, ...",
        ),
        (
            lambda: change(config=Payload()),
            UNREADABLE + "it holds ['io.open']; if you trust the file, ...",
        ),
        (lambda: torch.save([1], CKPT), UNREADABLE + "..."),
        (lambda: (Path(CKPT).unlink(), os.mkfifo(CKPT)), UNREADABLE + "no such file; ..."),
        (lambda: change(model={1: torch.ones(2)}), UNREADABLE + "..."),
        (lambda: change(model={"a": torch.ones(2, device="meta")}), UNREADABLE + "..."),
        (lambda: change(model_args={**SIZES, "n_layer": 3.0}), "n_embd must be ..."),
        (lambda: change(model_args={**SIZES, "n_layer": 10**9}), "n_embd must be ..."),
        (
            lambda: change(best_val_loss=np.float64(2)),
            UNREADABLE + "it holds [...",
        ),
        (
            lambda: change(config={"out_dir": Path("x")}),
            UNREADABLE + "it holds ['pathlib.PosixPath']; if you ...",
        ),
        (lambda: torch.save({"weight": torch.zeros(2)}, CKPT), UNREADABLE + "..."),
        (lambda: change(model=None), UNREADABLE + "'model'"),
        (
            lambda: change(model_args={**SIZES, "n_embd": 64}),
            "the weights do not fit the model: ...",
        ),
        (
            lambda: change(model_args={**SIZES, "n_head": 5}),
            "n_embd must be a multiple of n_head, and of twice n_head ...",
        ),
    ],
)
@pytest.mark.parametrize("script", [train, sample], ids=["resume", "sample"])
def test_a_wrong_checkpoint(launch, script, spoil, line):
    spoil()
    refused(launch, script, RESUME if script is train else ["--out_dir=run", "--device=cpu"], line)


@pytest.mark.parametrize(
    "spoil, script, arguments, line",
    [
        (
            bool,
            train,
            ["--init_from=resume", "--out_dir=no"],
            "no/ckpt.pt cannot be read as a checkpoint: ...",
        ),
        (
            bool,
            sample,
            ["--out_dir=no"],
            "no/ckpt.pt cannot be read as a checkpoint: ...",
        ),
        (
            bool,
            train,
            [*RESUME, "--checkpoint_file=no.pt"],
            "run/no.pt cannot be read as a checkpoint: no such file; there ...",
        ),
        (
            lambda: change(optimizer=None),
            train,
            RESUME,
            "the checkpoint has no state for this optimizer: 'optimizer'",
        ),
        (
            lambda: change(optimizer={"state": {}, "param_groups": []}),
            train,
            RESUME,
            "the checkpoint has no state for this optimizer: zip() ...",
        ),
        (
            lambda: change(config={"batch_size": "x"}),
            train,
            RESUME,
            "batch_size must be int, got 'x'",
        ),
        (bool, train, [*RESUME, "--n_embd=64"], "the checkpoint has n_embd=32; leave --n_embd out"),
        (
            bool,
            train,
            [*RESUME, "--block_size=32"],
            "the model reads 16 tokens; lower --block_size",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(launch, spoil, script, arguments, line):
    spoil()
    refused(launch, script, arguments, line)


# --- pretrained folders --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Save a tiny model of GPT-2's shape; return its files, name -> bytes."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 21}
    folder = tmp_path_factory.mktemp("pretrained")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WEIGHTS = "folder/model.safetensors"
GPT2_SHAPE = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32}


def describe(**fields):
    put("folder/config.json", json.dumps(fields).encode())


def describe_code():
    """Ask for code in the folder's configuration, which a loader may run if it is told to."""
    describe(model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    put("folder/mine.py", b"open('proof', 'w')")


def pickle_code():
    Path(WEIGHTS).unlink()
    torch.save({"transformer.wte.weight": Payload()}, "folder/pytorch_model.bin")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda: put(WEIGHTS, Path(WEIGHTS).read_bytes()[:5000]),
        lambda: put(WEIGHTS, b""),
        lambda: Path(WEIGHTS).unlink(),
        lambda: put("folder/config.json", b"{"),
        lambda: put("folder/config.json", b"[]"),
        lambda: Path("folder/config.json").unlink(),
        lambda: describe(**GPT2_SHAPE, vocab_size=22),
        lambda: describe(**GPT2_SHAPE | {"n_head": 0}, vocab_size=21),
        lambda: describe(model_type="llama"),
        describe_code,
        pickle_code,
    ],
)
def test_a_wrong_pretrained_folder(launch, pretrained, spoil):
    Path("folder").mkdir()
    for name, content in pretrained.items():
        put(f"folder/{name}", content)
    spoil()
    refused(launch, train, [*TINY, "--init_from=folder"], "folder...")


# --- prompts and the benchmark -------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, arguments, line",
    [
        (sample, ["--start=1+1"], "1 unknown characters: '+'"),
        (sample, ["--start=FILE:latin1.txt"], "latin1.txt is not UTF-8 text in line 1; ..."),
        (sample, ["--start=FILE:no.txt"], "no.txt: No such file or directory"),
        (sample, ["--prompts=run"], "run: Is a directory"),
        (sample, ["--num_samples=0"], "num_samples=0 must be from 1 to 2147483647"),
        (sample, ["--top_p=2"], "top_p=2.0 must be from 0 to 1"),
        (
            sample,
            ["--out=no/such/samples.jsonl"],
            "{tmp}/no/such/samples.jsonl: No such file or directory",
        ),
        (bench, ["--steps=0"], "steps=0 must be from 1 to 2147483647"),
        (
            bench,
            ["--init_from=resume"],
            "bench.py measures a new model; leave --init_from=resume out",
        ),
    ],
)
def test_a_wrong_prompt_or_benchmark(launch, script, arguments, line):
    put("latin1.txt", "Caf\u00e9".encode("latin-1"))
    first = ["--out_dir=run", "--device=cpu", "--num_samples=1"] if script is sample else TINY
    refused(launch, script, [*first, *arguments], line)


@pytest.mark.parametrize(
    "command, line",
    [
        (
            ["train.py", "--max_iter=5"],
            "unknown setting 'max_iter', the closest is max_iters; --help lists all",
        ),
        (
            ["-O", "train.py", *RESUME, "--n_head=3"],
            "the checkpoint has n_head=2; leave --n_head out",
        ),
        (
            ["sample.py", "--out_dir=no"],
            "no/ckpt.pt cannot be read as a checkpoint: No such file or directory",
        ),
    ],
)
def test_a_process_ends_with_its_line_and_status_1(command, line):
    for script in ("train.py", "sample.py"):
        shutil.copy(ROOT / script, Path.cwd())
    full = [sys.executable, "-W", "ignore", *command]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(full, capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {line}\n")
