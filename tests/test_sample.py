"""Sampling, run as a user runs it."""

import io
import json
import sys

import pytest
from conftest import TEXT, TINY

import sample
import train
from data.tokenizer import make_meta
from data.tokens import write_dataset

EXACT = "--device=cpu", "--dtype=float32"  # in 16 bits, rows of a batch may round differently
END = "<|endoftext|>"


@pytest.fixture
def trained(launch, tiny, monkeypatch):
    """Train a small model in out/ and remove its dataset: the checkpoint must be enough."""
    launch(train, *TINY, "--max_iters=40", "--learning_rate=1e-2")
    for path in (tiny / "data" / "tiny").iterdir():
        path.unlink()
    monkeypatch.setattr(sample, "ROOT", tiny)
    return lambda *arguments: launch(sample, *EXACT, *arguments)


@pytest.fixture
def documents(launch, tiny, monkeypatch):
    """Train a small model on bytes, in documents of various lengths with end-of-text between."""
    ids = [[*b"ab" * (n % 7 + 1), *b"\n" * (n % 3), 256] for n in range(300)]
    write_dataset(tiny / "data" / "tiny", make_meta("bytes", []), train=ids, val=ids)
    launch(train, *TINY, "--max_iters=40", "--learning_rate=1e-2")
    monkeypatch.setattr(sample, "ROOT", tiny)
    return lambda *arguments: launch(sample, *EXACT, *arguments)


def texts(out):
    parts = out.split("\n---------------\n")
    assert parts.pop() == ""
    return parts


def test_samples_continue_the_prompt_and_differ(trained):
    drawn = texts(trained("--start=1 plus", "--num_samples=3", "--max_new_tokens=30"))
    assert len(drawn) == 3 and len(set(drawn)) == 3
    assert all(text.startswith("1 plus") and len(text) == 36 for text in drawn)
    assert all(set(text) <= set(TEXT) for text in drawn)


def test_a_sample_does_not_depend_on_how_many_are_drawn(trained):
    options = "--max_new_tokens=40", "--seed=5"
    five = texts(trained("--num_samples=5", *options))
    assert texts(trained("--num_samples=1", *options)) == five[:1]
    assert texts(trained("--num_samples=2", *options)) == five[:2]
    assert texts(trained("--num_samples=2", "--max_new_tokens=40", "--seed=6")) != five[:2]


def test_temperature_0_takes_the_most_likely(trained):
    options = "--num_samples=2", "--max_new_tokens=30"
    drawn = texts(trained("--temperature=0", *options))
    assert drawn[0] == drawn[1]
    assert texts(trained("--top_k=1", *options)) == drawn
    assert texts(trained("--top_p=1e-6", *options)) == drawn


@pytest.mark.parametrize("count", [1, 3])
def test_a_sample_ends_before_stop(trained, count):
    options = f"--num_samples={count}", "--max_new_tokens=60", "--start=2 plus"
    free = texts(trained(*options))
    assert any("ma" in text for text in free)
    assert texts(trained(*options, "--stop=ma")) == [text.split("ma")[0] for text in free]
    assert all(text.startswith("2 plus") for text in texts(trained(*options, "--stop=s")))


@pytest.mark.parametrize("count", [1, 4])
def test_a_sample_ends_at_end_of_text_but_not_at_that_of_the_prompt(documents, count):
    for start in (f"ab{END}ab", ""):
        options = f"--start={start}", f"--num_samples={count}", "--max_new_tokens=80"
        drawn = texts(documents(*options))
        assert all(text.startswith(start) for text in drawn)
        assert all(END not in text.removeprefix(start) for text in drawn)
        assert count == 1 or min(map(len, drawn)) < 60


def test_half_a_character_is_not_shown(launch, tiny, monkeypatch):
    text = "東京" * 100
    ids = [*text.encode()]
    write_dataset(tiny / "data" / "tiny", make_meta("bytes", []), train=[ids], val=[ids])
    launch(train, *TINY, "--max_iters=60", "--learning_rate=1e-2")
    out = launch(
        sample, *EXACT, "--start=東", "--num_samples=1", "--max_new_tokens=60", "--temperature=0"
    )
    assert texts(out) == [text[:21]]


def test_a_prompt_may_come_from_a_file_or_be_empty(trained, tiny):
    (tiny / "prompt.txt").write_text("3 plus 4", encoding="utf-8")
    options = "--num_samples=1", "--max_new_tokens=5"
    assert trained("--start=FILE:prompt.txt", *options).startswith("3 plus 4")
    assert len(texts(trained("--start=", *options))[0]) == 5


def test_each_prompt_of_a_file_gives_the_samples_that_it_gives_alone(documents, tiny):
    lines = ["ab", "a" * 16, f"b{END}ab", " \u00e9 "]
    windows = "\ufeff{}\r\n\r\n{}\r\n{}\r\n \r\n{}\r\n".format(*lines)
    (tiny / "windows.txt").write_bytes(windows.encode())
    options = "--temperature=1", "--num_samples=2", "--max_new_tokens=40"
    alone = sum((texts(documents(*options, f"--start={line}")) for line in lines), [])
    together = texts(documents(*options, "--prompts=windows.txt", "--out=samples.jsonl"))
    assert together == alone
    lines_of_json = (tiny / "samples.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines_of_json]
    assert [line["prompt"] + line["text"] for line in found] == alone
    assert [line["prompt"] for line in found[::2]] == lines


def test_typed_prompts_are_answered_in_turn(trained, monkeypatch):
    options = "--max_new_tokens=20", "--num_samples=1"
    expected = [trained(*options, f"--start={start}") for start in ("1 plus", "2 plus")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 plus\n2 plus\n"))
    out = trained(*options, "--interactive")
    ask = "prompt, or Ctrl-D to end: "
    assert out == f"{ask}{expected[0]}{ask}{expected[1]}{ask}"


def test_a_full_disk_keeps_the_older_file(trained, tiny, file_limit):
    (tiny / "samples.jsonl").write_text("older")
    file_limit(1000)
    with pytest.raises(SystemExit, match="/samples.jsonl: File too large$"):
        trained("--out=samples.jsonl")
    assert (tiny / "samples.jsonl").read_text() == "older"
    assert sorted(path.suffix for path in tiny.iterdir() if path.is_file()) == [".jsonl"]
