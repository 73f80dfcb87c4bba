"""Random command lines and damaged files: each gives lines that begin with "error:", or works.

A plain run tries few examples, with -m slow many; the same ones each time.
"""

import os
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TEXT, TINY, Payload

import configurator
import train
from data.tokenizer import make_meta, make_tokenizer, read_meta
from engine.checkpoint import read_checkpoint
from engine.process import UserError, explain
from model import GPT, GPTConfig

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

FEW, MANY = 100, 10_000  # examples of each test (a third per file of a pretrained folder)


def examples(count):
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def both(test):
    """Return `test` as two: with few examples, and, marked slow, with many."""
    slow = pytest.param(MANY, marks=pytest.mark.slow, id="many")
    amounts = pytest.param(FEW, id="few"), slow
    return pytest.mark.parametrize("amount", amounts)(test)


def lines_or_result(function, *arguments):
    """Return what `function` gives, or None where it ends in lines for a user, and only so."""
    try:
        return function(*arguments)
    except SystemExit as stop:
        assert all(line.startswith("error: ") for line in stop.code.splitlines()), stop.code
    except (UserError, RuntimeError, FloatingPointError) as fault:
        text = explain(fault, "")
        assert text, fault  # the line for a user; "" for a bug
    return None


# --- settings ------------------------------------------------------------------------------------

NAMES = sorted(configurator.read_settings(vars(train)))
VALUES = ["", "0", "-1", "1", "1e9", "1e999", "nan", "True", "none", "x", "[", "'", "10**9", "()"]
VALUES += ["9" * 5000, "((" * 300, "-" * 5000 + "1", "\ud800", "1_0", "0x1F", "1j", "b'x'", "..."]
value = st.sampled_from(VALUES) | st.text(max_size=20)
name = st.sampled_from(NAMES) | st.text(max_size=12)
word = st.one_of(
    st.builds("--{}={}".format, name, value),
    st.builds("--{}".format, name),
    value,
    st.sampled_from(["-", "--", "--=", "-x", "c.py", ".", "config", "/", "a" * 300, "\0"]),
)
expression = value | st.sampled_from(["1 / 0", "exit()", "print", "[0] * 2**62", "open", "10**400"])
line = st.one_of(
    st.builds("{} = {}".format, name, expression),
    st.builds("{}".format, expression),
    st.sampled_from(["import os", "def f():", "    return f()", "f()", "raise", "vars()[5] = 5"]),
)


def configure(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    return configurator.configure(dict(vars(train)))


@both
def test_any_command_line_is_understood_or_gets_lines(tmp_path, monkeypatch, amount):
    monkeypatch.chdir(tmp_path)
    known = configurator.read_settings(vars(train))

    @examples(amount)
    @given(st.lists(word.filter(lambda word: word not in ("--help", "-h")), max_size=4))
    def attempt(words):
        config = lines_or_result(configure, words, monkeypatch)
        for name, value in (config or {}).items():
            assert type(value).__name__.removesuffix("Type") in known[name].kinds

    attempt()


@both
def test_any_config_file_is_understood_or_gets_lines(tmp_path, monkeypatch, amount):
    monkeypatch.chdir(tmp_path)
    source = st.lists(line, max_size=4).map("\n".join)
    content = source.map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=30)

    @examples(amount)
    @given(content)
    def attempt(content):
        Path("c.py").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler: Python prints them, and goes on
            lines_or_result(configure, ["c.py"], monkeypatch)

    attempt()


SMALL = ["-1", "0", "1", "2", "3", "7", "0.5", "1e-9", "33", "None", "True", "False", "x", ""]
SMALL += ["auto", "cpu", "cpu:1", "float32", "bfloat16", "resume", "tiny", "a/b", "out/log.jsonl"]
SLOW = {"compile", "init_from", "wandb_log", "max_iters", "eval_iters"}  # or reach for the network
some = st.builds("--{}={}".format, st.sampled_from(sorted({*NAMES} - SLOW)), st.sampled_from(SMALL))


@both
def test_a_run_with_any_settings_ends_well_or_with_lines(launch, tiny, amount):
    few_steps = *TINY, "--max_iters=2", "--eval_iters=1"

    @examples(amount // 5)
    @given(st.lists(some, min_size=1, max_size=3))
    def attempt(words):
        lines_or_result(launch, train, *few_steps, *words)

    attempt()


# --- files ---------------------------------------------------------------------------------------


def damage(content):
    """Return a strategy for `content` with a byte changed, or cut, or with other bytes inside."""
    place = st.integers(0, len(content) - 1)
    return st.one_of(
        st.builds(lambda at, mask: content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :],
                  place, st.integers(1, 255)),
        st.builds(lambda at: content[:at], place),
        st.builds(lambda at, other: content[:at] + other + content[at + len(other) :],
                  place, st.binary(min_size=1, max_size=9)),
    )  # fmt: skip


@both
def test_a_damaged_meta_is_refused_or_whole(tmp_path, monkeypatch, amount):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "meta.pkl"
    good, code = (pickle.dumps({**make_meta("char", [TEXT]), **x}) for x in ({}, {"x": Payload()}))

    @examples(amount)
    @example(b"\x80\x02}r\xff\xff\xff\x7f.")
    @given(damage(good) | damage(code))
    def attempt(content):
        path.write_bytes(content)
        meta = lines_or_result(read_meta, tmp_path)
        tokenizer = lines_or_result(make_tokenizer, meta) if meta else None
        if tokenizer:
            text = "".join(meta.get("stoi", ""))
            assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()

    attempt()
    assert os.listdir(tmp_path) == ["meta.pkl"]  # no `proof` that code ran


@both
def test_a_damaged_checkpoint_is_refused_or_whole(tmp_path, monkeypatch, amount):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    whole = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "iter_num": 1}
    whole |= {"model_args": vars(model.config), "config": {"dataset": "x"}, "tokenizer": {}}
    expected = {k: repr(v) for k, v in whole.items() if k != "model_args"}
    path = tmp_path / "ckpt.pt"
    torch.save({**whole, "config": Payload()}, path)
    code = path.read_bytes()
    torch.save(whole, path)

    at = path.read_bytes().rindex(b"ckpt/data/2")  # in the zip file's list of names

    @examples(amount)
    @example(path.read_bytes()[:at] + b"\n" + path.read_bytes()[at + 1 :])
    @given(damage(path.read_bytes()) | damage(code))
    def attempt(content):
        path.unlink()  # an older one may still be mapped
        path.write_bytes(content)
        found = lines_or_result(read_checkpoint, path)
        if found:
            assert {k: repr(found[k]) for k in whole if k != "model_args"} == expected
            state = GPT.from_state(GPTConfig(**found["model_args"]), found["model"]).state_dict()
            assert all(torch.equal(state[key], whole["model"][key]) for key in whole["model"])

    attempt()
    assert os.listdir(tmp_path) == ["ckpt.pt"]
