"""A user's mistakes: each gets one line and status 1, and nothing is lost, written or run.

A row is a mistake and its exact line; {tmp} is the folder of the test, and what a library adds to
a line, which differs with its version, is "...".
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
from data.tokenizer import bpe_meta, char_meta, read_meta
from data.tokens import TokenFile
from model import GPT, GPTConfig

SIZES = {"block_size": 16, "vocab_size": 21, "n_layer": 2, "n_head": 2, "n_embd": 32}
CKPT, TRAIN, META = "run/ckpt.pt", "data/tiny/train.bin", "data/tiny/meta.pkl"
RESUME = ["--init_from=resume", "--out_dir=run", "--device=cpu"]


@pytest.fixture(autouse=True)
def world(tiny, monkeypatch):
    """Make what mistakes are made with: a dataset, a checkpoint and a tiny pretrained folder."""
    monkeypatch.setattr(sample, "ROOT", tiny)
    torch.manual_seed(0)
    model, meta = GPT(GPTConfig(**SIZES, bias=False)), read_meta(tiny / "data" / "tiny")
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    settings = dict(argument.removeprefix("--").split("=") for argument in TINY)
    settings = {k: int(v) if v.isdigit() else v for k, v in settings.items()}
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": 1}
    whole |= {"model_args": {**SIZES, "bias": False, "dropout": 0.0}}
    whole |= {"config": settings, "tokenizer": meta}
    Path("run").mkdir()
    torch.save(whole, CKPT)
    return tiny


def snapshot(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(launch, script, arguments, line):
    """Require the line, and that all files are afterwards as they were."""
    here = Path.cwd()
    before = snapshot(here)
    with pytest.raises(SystemExit) as stop:
        launch(script, *arguments)
    lines = [f"error: {part}" for part in line.replace("{tmp}", str(here)).splitlines()]
    given = str(stop.value.code).splitlines()
    assert len(given) == len(lines), given
    for mine, expected in zip(given, lines, strict=True):
        start, dots, end = expected.partition("...")
        whole = mine[: len(start)] + dots + mine[max(len(mine) - len(end), len(start)) :]
        assert (whole if dots else mine) == expected
    assert snapshot(here) == before


# --- settings ------------------------------------------------------------------------------------

NO_FILE = "a setting is given as --key=value"
NO_UTF8 = "SyntaxError: (unicode error) 'utf-8' codec can't decode byte"


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--out_dir"], "--out_dir needs a value"),
        (["--out_dir", "--eval_only"], "--out_dir needs a value"),
        (["--max_iters", "--min_lr"], "--max_iters needs a value\n--min_lr needs a value"),
        (["--nothing"], "unknown setting 'nothing': --help lists them all"),
        (["--max_iter=5"], "unknown setting 'max_iter': did you mean max_iters?"),
        (["--max-iters=5"], "unknown setting 'max-iters': did you mean max_iters?"),
        (["-max_iters=5"], "unknown setting '-max_iters': did you mean max_iters?"),
        (["--"], "unknown setting '': --help lists them all"),
        (["--max_iters=5.5"], "max_iters must be int, got 5.5"),
        (["--max_iters=five"], "max_iters must be int, got 'five'"),
        (["--max_iters="], "max_iters must be int, got ''"),
        (["--max_iters=[5]"], "max_iters must be int, got [5]"),
        (["--max_iters=True"], "max_iters must be int, got True"),
        (["--max_iters=1e999"], "max_iters must be int, got inf"),
        (["--learning_rate=1e999"], "learning_rate must be float, got inf"),
        (["--learning_rate=nan"], "learning_rate must be float, got 'nan'"),
        (["--learning_rate=1" + "0" * 400], "learning_rate must be float, got 1000..."),
        (["--learning_rate=1" + "0" * 5000], "learning_rate must be float, got '1000..."),
        (["--eval_only=1"], "eval_only must be bool, got 1"),
        (["--eval_only", "no"], "eval_only must be bool, got 'no'"),
        (["--lr_decay_iters=x"], "lr_decay_iters must be int or None, got 'x'"),
        (["max_iters=5"], f"no config file 'max_iters=5'; {NO_FILE}"),
        (
            ["no.py", "--n_head=x"],
            f"no config file 'no.py'; {NO_FILE}\nn_head must be int, got 'x'",
        ),
        (["data"], f"no config file 'data'; {NO_FILE}"),
        (["x" * 300], f"no config file '{'x' * 300}'; {NO_FILE}"),
        (["a\0b"], f"no config file 'a\\x00b'; {NO_FILE}"),
        ([*TINY, "--n_head=3"], "n_embd=32 is no multiple of n_head=3"),
        ([*TINY, "--min_lr=-1"], "min_lr=-1.0 must be at least 0"),
        (
            [*TINY, "--learning_rate=1e-4", "--min_lr=1e-3"],
            "min_lr=0.001 exceeds learning_rate=0.0001; lower --min_lr",
        ),
        (
            [*TINY, "--init_from=auto"],
            "init_from=auto: say what to start from, and add --auto_resume=True",
        ),
        (
            [*TINY, "--out_dir=~nobody-like-it/x"],
            "~nobody-like-it/x: RuntimeError: Could not determine home directory.",
        ),
        (
            [*TINY, "--lr_decay_iters=-5", "--decay_lr=False"],
            "lr_decay_iters=-5 must be at least 0",
        ),
        (
            [*TINY, "--max_bad_steps=0", "--timeout=0"],
            "max_bad_steps=0 must be at least 1\ntimeout=0.0 must be at least 1",
        ),
        ([*TINY, f"--seed={2**63}"], f"seed={2**63} must be below {2**63}"),
        (
            [*TINY, "--max_iters=1e30"],
            f"max_iters={int(1e30)} must be below {2**31}",
        ),
        ([*TINY, "--beta1=1"], "beta1=1.0 must be below 1"),
        ([*TINY, "--device=cuda:9"], "device=cuda:9 cannot be used: ...; try --device=auto"),
        (
            [*TINY, "--device=meta"],
            "device=meta cannot be used: RuntimeError: ...; try --device=auto",
        ),
        (
            [*TINY, "--dtype=float16"],
            "dtype=float16: choose auto, float32, bfloat16, or float16 on CUDA",
        ),
        (
            [*TINY, "--out_dir=run/ckpt.pt"],
            "out_dir=run/ckpt.pt: {tmp}/run/ckpt.pt is not a folder that can be written to",
        ),
        (
            [*TINY, "--out_dir=run/ckpt.pt/a/b"],
            "out_dir=run/ckpt.pt/a/b: {tmp}/run/ckpt.pt is not a folder that can be written to",
        ),
        ([*TINY, "--out_dir=" + "x" * 300], "x" * 300 + ": File name too long"),
        (
            [*TINY, "--warmup_iters=9", "--lr_decay_iters=9"],
            "warmup_iters=9 leaves no step to decay in before lr_decay_iters=9; "
            "lower --warmup_iters",
        ),
        (
            [*TINY, "--warmup_iters=9", "--lr_decay_iters=8"],
            "warmup_iters=9 leaves no step to decay in before lr_decay_iters=8; "
            "lower --warmup_iters",
        ),
    ],
)
def test_a_wrong_setting(launch, arguments, line):
    refused(launch, train, arguments, line)


@pytest.mark.parametrize(
    "content, line",
    [
        (b"max_iter = 5", "unknown setting 'max_iter': did you mean max_iters?"),
        (
            b"max_iters = 'many'\nbias = 0",
            "bias must be bool, got 0\nc.py: max_iters must be int, got 'many'",
        ),
        (b"out_dir = 5", "out_dir must be str, got 5"),
        (b"out_dir = None", "out_dir must be str, got None"),
        (b"learning_rate = float('nan')", "learning_rate must be float, got nan"),
        (b"learning_rate = 10**400", "learning_rate must be float, got 1000..."),
        (
            b"import torch\nbeta1 = torch.zeros(3, 3)",
            "beta1 must be float, got tensor([[0., 0., 0.], [0., 0., 0.], [0., 0., 0.]])",
        ),
        (b"beta1 = dict(a=1)", "beta1 must be float, got {'a': 1}"),
        (b"max_iters = 5 +", "SyntaxError: invalid syntax (c.py, line 1)"),
        (b"max_iters = 5 / 0", "ZeroDivisionError: division by zero"),
        (b"raise RuntimeError('one\\ntwo')", "RuntimeError: one two"),
        (b"exit()", "SystemExit: None"),
        (b"raise KeyboardInterrupt", "KeyboardInterrupt:"),
        (b"def f(): return f()\nf()", "RecursionError: maximum recursion depth exceeded..."),
        (b"max_iters = [0] * 2**62", "MemoryError:"),
        (b"import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'"),
        (b"globals()[5] = 5", "TypeError: 'int' object is not subscriptable"),
        (b"out_dir = 'Caf\xe9'", f"{NO_UTF8} 0xe9..."),
        (b"max_iters = 5\0", "...source code string cannot contain null bytes"),
        (b"\x80\x04\x95\xff\xfe", f"{NO_UTF8} 0x80..."),
    ],
)
def test_a_wrong_config_file(launch, content, line):
    Path("c.py").write_bytes(content)
    refused(launch, train, ["c.py"], f"c.py: {line}")


def test_only_one_process_of_a_machine_speaks(launch, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    for arguments, status in (["--max_iter=5"], 1), (["no.py"], 1), (["--help"], 0):
        with pytest.raises(SystemExit) as stop:
            launch(train, *arguments)
        assert (stop.value.code or 0) == status
    assert capsys.readouterr() == ("", "")


# --- datasets ------------------------------------------------------------------------------------


def ids(*values):
    return torch.tensor(values, dtype=torch.uint16).numpy().tobytes()


def put(path, content):
    Path(path).write_bytes(content)


def meta(**changes):
    put(META, pickle.dumps({**char_meta(TEXT), **changes}))


MAKE = "no {}.bin in {{tmp}}/data/tiny; make it: python data/text/prepare.py --input=FILE "
MAKE += "--dataset=tiny"
NEED = "block_size=16 needs 17 tokens, all of them whole"
NO_META = "{tmp}/data/tiny/meta.pkl describes no dataset"
AGAIN = "prepare it again"


@pytest.mark.parametrize(
    "spoil, line",
    [
        (
            lambda: Path(TRAIN).unlink(),
            MAKE.format("train"),
        ),
        (
            lambda: Path("data/tiny/val.bin").unlink(),
            MAKE.format("val"),
        ),
        (lambda: put(TRAIN, b""), "{tmp}/data/tiny/train.bin holds 0 tokens and 0 bytes; " + NEED),
        (
            lambda: put(TRAIN, b"\0" * 101),
            "{tmp}/data/tiny/train.bin holds 50 tokens and 1 bytes; " + NEED,
        ),
        (
            lambda: put(TRAIN, b"\0" * 32),
            "{tmp}/data/tiny/train.bin holds 16 tokens and 0 bytes; " + NEED,
        ),
        (
            lambda: put(TRAIN, ids(*[1] * 500, 21, *[1] * 500)),
            "{tmp}/data/tiny/train.bin holds id 21, the vocabulary 21",
        ),
        (
            lambda: meta(**char_meta("abc")),
            "{tmp}/data/tiny/train.bin holds id 20, the vocabulary 3",
        ),
        (lambda: put(META, b""), f"{NO_META} (EOFError: ); {AGAIN}"),
        (
            lambda: put(META, b"garbage"),
            f"{NO_META} (invalid literal for int() with base 10: b'arbag'); {AGAIN}",
        ),
        (lambda: put(META, Path(META).read_bytes()[:50]), f"{NO_META} (EOFError: ); {AGAIN}"),
        (
            lambda: put(META, pickle.dumps([1])),
            f"{NO_META} (TypeError: list indices must be integers or slices, not str); {AGAIN}",
        ),
        (lambda: put(META, pickle.dumps({})), f"{NO_META} (KeyError: 'vocab_size'); {AGAIN}"),
        (
            lambda: put(META, b"\x80\x02}r\xff\xff\xff\x7f."),
            f"{NO_META} (KeyError: 'vocab_size'); {AGAIN}",
        ),
        (lambda: meta(vocab_size="21"), f"{NO_META} (its vocab_size is '21'); {AGAIN}"),
        (lambda: meta(vocab_size=0), f"{NO_META} (its vocab_size is 0); {AGAIN}"),
        (
            lambda: meta(vocab_size=2**40),
            f"{NO_META} (its vocab_size is {2**40}); {AGAIN}",
        ),
        (
            lambda: meta(vocab_size=22),
            f"{NO_META} (its characters and ids do not match); {AGAIN}",
        ),
        (
            lambda: meta(itos=char_meta("abc")["itos"]),
            f"{NO_META} (its characters and ids do not match); {AGAIN}",
        ),
        (
            lambda: meta(stoi=None),
            f"{NO_META} (AttributeError: 'NoneType' object has no attribute 'get'); {AGAIN}",
        ),
        (
            lambda: put(META, pickle.dumps(bpe_meta([b"ab"]) | {"vocab_size": 300})),
            f"{NO_META} (its vocab_size does not fit its tokens, or one of them is there twice); "
            f"{AGAIN}",
        ),
        (
            lambda: put(META, pickle.dumps(bpe_meta([b"ab"]) | {"pairs": ["\u6771"]})),
            f"{NO_META} (its pairs: UnicodeEncodeError: 'latin-1' codec can't encode character "
            f"'\\u6771' in position 0: ordinal not in range(256)); {AGAIN}",
        ),
        (
            lambda: meta(extra=Payload()),
            f"{NO_META} (UnpicklingError: it asks to run ...open); {AGAIN}",
        ),
    ],
)
def test_a_wrong_dataset(launch, spoil, line):
    spoil()
    refused(launch, train, TINY, line)


@pytest.mark.parametrize(
    "spoil, arguments, line",
    [
        (
            lambda: Path(META).unlink(),
            RESUME,
            "dataset tiny has a vocabulary of 50304, the model 21; "
            "prepare the dataset with the model's tokenizer",
        ),
        (
            lambda: meta(**char_meta(TEXT.replace("0", "O"))),
            RESUME,
            "dataset tiny is encoded unlike the checkpoint's; give another",
        ),
        (
            lambda: None,
            [*TINY, "--init_from=gpt2"],
            "dataset tiny has a vocabulary of 21, the model 50257; "
            "prepare the dataset with the model's tokenizer",
        ),
    ],
)
def test_a_dataset_of_another_vocabulary(launch, spoil, arguments, line):
    spoil()
    refused(launch, train, arguments, line)


def test_a_dataset_in_another_order_than_before(launch):
    def digest():
        return TokenFile(Path(TRAIN), read_meta(Path(TRAIN).parent), 16).digest()

    was = digest()
    change(data={"train": was})
    put(TRAIN, np.fromfile(TRAIN, "<u2")[::-1].tobytes())
    changed = f"train.bin of dataset tiny has changed: it had {was}, and has {digest()}"
    refused(launch, train, RESUME, f"{changed}; --new_data=True goes on with it")


# --- checkpoints ---------------------------------------------------------------------------------


def change(**parts):
    """Rewrite the checkpoint with `parts` in it; a part that is None is left out."""
    whole = {**torch.load(CKPT, weights_only=True), **parts}
    torch.save({key: part for key, part in whole.items() if part is not None}, CKPT)


def arguments_of_model(**fields):
    change(model_args={**SIZES, "bias": False, "dropout": 0.0, **fields})


def flip(path, at):
    content = bytearray(Path(path).read_bytes())
    content[at] ^= 255
    put(path, content)


def in_the_weights():
    weights = torch.load(CKPT, weights_only=True)["model"]["transformer.wte.weight"]
    return Path(CKPT).read_bytes().index(weights.numpy().tobytes()) + 100


UNREADABLE = "run/ckpt.pt cannot be read as a checkpoint: "


def other(**fields):
    shown = {**SIZES, "bias": False, "dropout": 0.0, **fields}  # what the file says
    return f"the checkpoint is of another kind of model: {shown}"


@pytest.mark.parametrize(
    "spoil, line",
    [
        (lambda: put(CKPT, b""), UNREADABLE + "it was cut short or is another kind of file"),
        (
            lambda: put(CKPT, b"garbage" * 99),
            UNREADABLE + "it was cut short or is another kind of file",
        ),
        (
            lambda: put(CKPT, Path(CKPT).read_bytes()[:9000]),
            UNREADABLE + "it was cut short or is another kind of file",
        ),
        (lambda: flip(CKPT, in_the_weights()), UNREADABLE + "'ckpt/data/0' in it is damaged"),
        (
            lambda: torch.save(Payload(), CKPT),
            UNREADABLE + "UnpicklingError: Weights only load failed",
        ),
        (
            lambda: change(config=Payload()),
            UNREADABLE + "UnpicklingError: Weights only load failed",
        ),
        (
            lambda: torch.save([1], CKPT),
            UNREADABLE + "AttributeError: 'list' object has no attribute 'get'",
        ),
        (
            lambda: torch.save({"weight": torch.zeros(2)}, CKPT),
            "run/ckpt.pt is no checkpoint: it lacks model, model_args, iter_num, config",
        ),
        (
            lambda: change(config=[], iter_num="1"),
            "run/ckpt.pt is no checkpoint: it lacks iter_num, config",
        ),
        (lambda: change(tokenizer="gpt2"), "run/ckpt.pt is no checkpoint: it lacks tokenizer"),
        (lambda: change(model={"x": 1}), "the weights have 0 layers, the model 2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("script", [train, sample], ids=["resume", "sample"])
def test_a_wrong_checkpoint(launch, script, spoil, line):
    spoil()
    arguments = RESUME if script is train else ["--out_dir=run", "--device=cpu"]
    refused(launch, script, arguments, line)


UNFIT = "the checkpoint's optimizer fits another model: "
WRONG_SHAPE = "tensor 2 has exp_avg of shape (7,), not (96, 32)"


def spoil_optimizer(spoil):
    """Make one update, save its moments, and let `spoil` change them."""
    checkpoint = torch.load(CKPT, weights_only=True)
    model = GPT.from_state(GPTConfig(**SIZES, bias=False), checkpoint["model"])
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    model(torch.zeros(1, 8, dtype=torch.long))[0].sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    spoil(state["state"])
    change(optimizer=state)


def wrong_shape(state):
    state[2]["exp_avg"] = torch.ones(7)


@pytest.mark.parametrize(
    "spoil, script, arguments, line",
    [
        (
            lambda: None,
            train,
            ["--init_from=resume", "--out_dir=no"],
            "no ckpt.pt in no; name the folder of a run with --out_dir",
        ),
        (
            lambda: None,
            sample,
            ["--out_dir=no"],
            "no ckpt.pt in no; name the folder of a run with --out_dir",
        ),
        (
            lambda: None,
            train,
            [*RESUME, "--checkpoint_file=no.pt"],
            "run/no.pt cannot be read as a checkpoint: No such file or directory",
        ),
        (
            lambda: None,
            sample,
            ["--out_dir=run", "--checkpoint_file=no.pt"],
            "run/no.pt cannot be read as a checkpoint: No such file or directory",
        ),
        (
            lambda: change(optimizer=None),
            train,
            RESUME,
            "the checkpoint in run holds no optimizer state to resume with",
        ),
        (
            lambda: change(optimizer=[]),
            train,
            RESUME,
            "run/ckpt.pt is no checkpoint: it lacks optimizer",
        ),
        (
            lambda: spoil_optimizer(lambda state: state.pop(1)),
            train,
            RESUME,
            UNFIT + "it has moments of 14 tensors, the model 15",
        ),
        (
            lambda: spoil_optimizer(lambda state: state[0].pop("exp_avg")),
            train,
            RESUME,
            UNFIT + "KeyError: 'exp_avg'",
        ),
        (
            lambda: spoil_optimizer(lambda state: state.update({99: state.pop(0)})),
            train,
            RESUME,
            UNFIT + "IndexError: list index out of range",
        ),
        (
            lambda: spoil_optimizer(wrong_shape),
            train,
            RESUME,
            UNFIT + WRONG_SHAPE,
        ),
        (
            lambda: change(optimizer={"state": {}, "param_groups": []}),
            train,
            RESUME,
            UNFIT + "zip() argument 2 is shorter than argument 1",
        ),
        (
            lambda: change(config={"batch_size": "x"}),
            train,
            RESUME,
            "the checkpoint's settings: batch_size must be int, got 'x'",
        ),
        (lambda: arguments_of_model(n_head=0), sample, ["--out_dir=run"], other(n_head=0)),
        (lambda: arguments_of_model(n_head=3), sample, ["--out_dir=run"], other(n_head=3)),
        (
            lambda: arguments_of_model(n_layer=10**12),
            sample,
            ["--out_dir=run"],
            other(n_layer=10**12),
        ),
        (lambda: arguments_of_model(n_embd="32"), sample, ["--out_dir=run"], other(n_embd="32")),
        (lambda: arguments_of_model(rotary=True), sample, ["--out_dir=run"], other(rotary=True)),
        (
            lambda: arguments_of_model(n_layer=3),
            sample,
            ["--out_dir=run"],
            "the weights have 2 layers, the model 3",
        ),
        (
            lambda: arguments_of_model(n_embd=64),
            sample,
            ["--out_dir=run"],
            "the weights do not fit the model: Error(s) in loading state_dict for GPT: size "
            "mismatch for transformer.wte.weight: ...",
        ),
        (
            lambda: None,
            train,
            [*RESUME, "--n_embd=64"],
            "the checkpoint has n_embd=32; leave --n_embd out",
        ),
        (
            lambda: None,
            train,
            [*RESUME, "--block_size=32"],
            "block_size=32 exceeds the model's 16; lower --block_size",
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


CHOOSE = "init_from=scrach: choose scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
CHOOSE += "OWNER/NAME or a folder"
WEIGHTS = "folder/model.safetensors"
HEADER = "folder: SafetensorError: Error while deserializing header: "
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
    "spoil, line",
    [
        (
            lambda: put(WEIGHTS, Path(WEIGHTS).read_bytes()[:5000]),
            f"{HEADER}incomplete metadata...",
        ),
        (lambda: put(WEIGHTS, b""), f"{HEADER}header too small"),
        (lambda: flip(WEIGHTS, 20), f"{HEADER}invalid UTF-8 in header..."),
        (
            lambda: Path(WEIGHTS).unlink(),
            "folder: OSError: Error no file named model.safetensors...",
        ),
        (
            lambda: put("folder/config.json", b"{"),
            "folder: OSError: It looks like the config file...",
        ),
        (lambda: put("folder/config.json", b"[]"), "folder: Unrecognized model in folder..."),
        (lambda: Path("folder/config.json").unlink(), "folder: Unrecognized model in folder..."),
        (lambda: describe(**GPT2_SHAPE, vocab_size=22), "folder: RuntimeError: ..."),
        (
            lambda: describe(**GPT2_SHAPE | {"n_head": 5}, vocab_size=21),
            "folder: `embed_dim` must be divisible by num_heads...",
        ),
        (
            lambda: describe(**GPT2_SHAPE | {"n_head": 0}, vocab_size=21),
            "folder: ZeroDivisionError: ...",
        ),
        (lambda: describe(model_type="llama"), "folder: it is no GPT-2: its model_type is 'llama'"),
        (describe_code, "folder: The repository folder contains custom code..."),
        (pickle_code, "folder: UnpicklingError: Weights only load failed"),
    ],
)
def test_a_wrong_pretrained_folder(launch, pretrained, spoil, line):
    Path("folder").mkdir()
    for name, content in pretrained.items():
        put(f"folder/{name}", content)
    spoil()
    refused(launch, train, [*TINY, "--init_from=folder"], line)


@pytest.mark.parametrize(
    "script, arguments, line",
    [
        (
            train,
            ["--init_from=folder", "--block_size=64"],
            "block_size=64 exceeds the model's 32; lower --block_size",
        ),
        (train, ["--init_from=scrach"], CHOOSE),
        (sample, ["--init_from=folder"], "the tokenizer has 50257 tokens, the model 21; ..."),
        (sample, ["--init_from=scrach"], CHOOSE),
    ],
)
def test_a_wrong_choice_of_model(launch, pretrained, gpt2_files, script, arguments, line):
    Path("folder").mkdir()
    for name, content in pretrained.items():
        put(f"folder/{name}", content)
    refused(launch, script, [*TINY * (script is train), "--device=cpu", *arguments], line)


# --- prompts and samples -------------------------------------------------------------------------

PROMPT = "the prompt cannot be read as UTF-8 text: "
ONE_OF = "--start, --prompts and --interactive exclude one another; give one"
ONE_EACH = "--interactive prints a sample per line; leave out --num_samples and --out"


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--start=" + "1" * 17], "the prompt has 17 tokens, the model reads 16 at most"),
        (["--start=1+1"], "1 unknown characters: '+' (PLUS SIGN)"),
        (
            ["--start=Caf\udce9"],
            PROMPT
            + (
                "UnicodeEncodeError: 'utf-8' codec can't encode character '\\udce9' in position 3: "
                "surrogates not allowed"
            ),
        ),
        (
            ["--start=FILE:latin1.txt"],
            PROMPT + "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9 in position 3: "
            "unexpected end of data",
        ),
        (
            ["--start=FILE:~nobody-like-it/x"],
            "~nobody-like-it/x: RuntimeError: Could not determine home directory.",
        ),
        (["--start=FILE:no.txt"], PROMPT + "No such file or directory"),
        (["--start=FILE:run"], PROMPT + "Is a directory"),
        (
            ["--num_samples=0", "--top_k=-1"],
            "num_samples=0 must be at least 1\ntop_k=-1 must be at least 0",
        ),
        (["--temperature=-1"], "temperature=-1.0 must be at least 0"),
        (["--top_p=2"], "top_p=2.0 must be below 1.01"),
        (["--max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["--start"], "--start needs a value"),
        (["--start=1", "--prompts=lines.txt"], ONE_OF),
        (["--start=1", "--interactive=True"], ONE_OF),
        (["--prompts=lines.txt", "--interactive"], ONE_OF),
        (["--interactive", "--num_samples=1"], ONE_EACH),
        (["--interactive", "--out=samples.txt"], ONE_EACH),
        (["--batch_size=0"], "batch_size=0 must be at least 1"),
        (["--prompts=lines.txt"], "lines.txt, line 3: 1 unknown characters: '+' (PLUS SIGN)"),
        (
            ["--prompts=long.txt"],
            "long.txt, line 2: the prompt has 17 tokens, the model reads 16 at most",
        ),
        (["--prompts=blank.txt"], "blank.txt holds no prompt; write one in a line"),
        (["--prompts=no.txt"], "no.txt cannot be read as UTF-8 text: No such file or directory"),
        (["--prompts=run"], "run cannot be read as UTF-8 text: Is a directory"),
        (
            ["--prompts=latin1.txt"],
            "latin1.txt cannot be read as UTF-8 text: UnicodeDecodeError: 'utf-8' codec can't "
            "decode byte 0xe9 in position 3: unexpected end of data",
        ),
        (["--out=run"], "out=run is not a file; name one"),
        (["--out=/dev/null"], "out=/dev/null is not a file; name one"),
        (
            ["--out=no/such/samples.txt"],
            "out=no/such/samples.txt: no/such is not a folder that can be written to",
        ),
        (
            ["--out=run/ckpt.pt/samples.txt"],
            "out=run/ckpt.pt/samples.txt: run/ckpt.pt is not a folder that can be written to",
        ),
    ],
)
def test_a_wrong_prompt_or_choice_of_tokens(launch, arguments, line):
    put("latin1.txt", "Caf\u00e9".encode("latin-1"))
    put("lines.txt", b"1 plus\n\n1+1\n")
    put("long.txt", b"1\n" + b"1" * 17)
    put("blank.txt", b" \n\n")
    refused(launch, sample, ["--out_dir=run", "--device=cpu", *arguments], line)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--baseline=both"], "baseline=both: choose True, False or only"),
        (["--steps=0"], "steps=0 must be at least 1"),
        (["--new_tokens=-1"], "new_tokens=-1 must be at least 0"),
        (["--new_tokens=9", "--num_samples=0"], "num_samples=0 must be at least 1"),
        (["--init_from=resume"], "bench.py times a new model; leave --init_from=resume out"),
        (["--n_head=0"], "n_head=0 must be at least 1"),
    ],
)
def test_a_wrong_benchmark(launch, arguments, line):
    refused(launch, bench, [*TINY, *arguments], line)


@pytest.mark.skipif(torch.cuda.device_count() > 8, reason="has the device that is missing here")
@pytest.mark.parametrize("script", [train, sample], ids=["train", "sample"])
def test_a_device_that_is_not_there(launch, script):
    line = "device=cuda:8 cannot be used: ...; try --device=auto"
    refused(launch, script, [*RESUME, "--device=cuda:8"], line)


def test_a_model_that_went_to_infinity(launch):
    weights = torch.load(CKPT, weights_only=True)["model"]
    weights["transformer.ln_f.weight"].fill_(torch.inf)
    change(model=weights)
    line = "the logits are not finite; try another checkpoint"
    refused(launch, sample, ["--out_dir=run", "--device=cpu"], line)


def test_extremes_that_are_no_mistakes(launch):
    few = "--out_dir=run", "--device=cpu", "--num_samples=1", "--max_new_tokens=3"
    launch(sample, *few, "--temperature=1e-300", "--top_k=1e15")
    launch(sample, *few, "--temperature=1e300", "--top_p=1e-300")
    launch(sample, *few, "--seed=123456789012345678901234567890")


# --- as a user sees it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil, command, line",
    [
        (lambda: None, ["train.py", "--out_dir"], "--out_dir needs a value"),
        (lambda: put("c.py", b"exit(0)"), ["train.py", "c.py", *RESUME], "c.py: SystemExit: 0"),
        (
            lambda: change(config=Payload()),
            ["sample.py", *RESUME],
            "run/ckpt.pt cannot be read as a checkpoint: UnpicklingError: Weights only load failed",
        ),
        (  # -O drops every assert
            lambda: spoil_optimizer(wrong_shape),
            ["-O", "train.py", *RESUME],
            UNFIT + WRONG_SHAPE,
        ),
    ],
)
def test_a_process_ends_with_its_line_and_status_1(spoil, command, line):
    spoil()
    for script in "train.py", "sample.py":  # where they find data/tiny
        shutil.copy(ROOT / script, Path.cwd())
    before = snapshot(Path.cwd())
    full, env = [sys.executable, "-W", "ignore", *command], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(full, capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {line}\n")
    assert snapshot(Path.cwd()) == before
