"""Sampling, run as a user runs it."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TEXT, TINY

import sample
import train
from configurator import configure
from data.tokenizer import bpe_meta, char_meta
from data.tokens import write_dataset

EXACT = "--device=cpu", "--dtype=float32"  # in 16 bits, rows of a batch may round differently
END = "<|endoftext|>"


@pytest.fixture
def trained(launch, tiny, monkeypatch):
    """Train a little model in out/ and remove its dataset: the checkpoint must be enough."""
    launch(train, *TINY, "--max_iters=40", "--learning_rate=1e-2")
    for path in (tiny / "data" / "tiny").iterdir():
        path.unlink()
    monkeypatch.setattr(sample, "ROOT", tiny)
    return lambda script, *arguments: launch(script, *EXACT, *arguments)


@pytest.fixture
def documents(launch, tiny, monkeypatch):
    """Train a little model on bytes, in documents of various lengths with end-of-text between."""
    ids = [[*b"ab" * (n % 7 + 1), *b"\n" * (n % 3), 256] for n in range(300)]
    write_dataset(tiny / "data" / "tiny", bpe_meta([]), train=ids, val=ids)
    launch(train, *TINY, "--max_iters=40", "--learning_rate=1e-2")
    monkeypatch.setattr(sample, "ROOT", tiny)
    return lambda *arguments: launch(sample, *EXACT, *arguments)


def texts(out):
    parts = out.split("\n---------------\n")
    assert parts.pop() == ""
    return parts


def test_samples_continue_the_prompt_and_are_apart(trained):
    drawn = texts(trained(sample, "--start=1 plus", "--num_samples=3", "--max_new_tokens=30"))
    assert len(drawn) == 3 and len(set(drawn)) == 3
    assert all(text.startswith("1 plus") and len(text) == 36 for text in drawn)
    assert all(set(text) <= set(TEXT) for text in drawn)


def test_a_sample_does_not_depend_on_how_many_are_drawn(trained):
    options = "--max_new_tokens=40", "--seed=5"
    five = texts(trained(sample, "--num_samples=5", *options))
    assert texts(trained(sample, "--num_samples=1", *options)) == five[:1]
    assert texts(trained(sample, "--num_samples=2", *options)) == five[:2]
    assert texts(trained(sample, "--num_samples=2", "--max_new_tokens=40", "--seed=6")) != five[:2]


def test_temperature_0_repeats_itself(trained):
    drawn = texts(trained(sample, "--temperature=0", "--num_samples=2", "--max_new_tokens=30"))
    assert drawn[0] == drawn[1]
    assert texts(trained(sample, "--top_k=1", "--num_samples=2", "--max_new_tokens=30")) == drawn
    assert texts(trained(sample, "--top_p=1e-6", "--num_samples=2", "--max_new_tokens=30")) == drawn


@pytest.mark.parametrize("count", [1, 3])
def test_a_sample_ends_before_stop(trained, count):
    options = f"--num_samples={count}", "--max_new_tokens=60", "--start=2 plus"
    free = texts(trained(sample, *options))
    stopped = texts(trained(sample, *options, "--stop=ma"))
    assert stopped == [text[: at if (at := text.find("ma")) >= 0 else None] for text in free]
    assert any("ma" in text for text in free)
    assert all(text.startswith("2 plus") for text in texts(trained(sample, *options, "--stop=s")))


def test_a_prompt_may_come_from_a_file_or_be_empty(trained, tiny):
    (tiny / "prompt.txt").write_text("3 plus 4", encoding="utf-8")
    options = "--num_samples=1", "--max_new_tokens=5"
    assert trained(sample, "--start=FILE:prompt.txt", *options).startswith("3 plus 4")
    assert len(texts(trained(sample, "--start=", *options))[0]) == 5


@pytest.mark.parametrize("start", ["\n", ""])
def test_a_vocabulary_without_a_newline_can_be_sampled(launch, tiny, start):
    ids = [n % 7 for n in range(200)]
    write_dataset(tiny / "data" / "tiny", char_meta("abcdefg"), train=[ids], val=[ids])
    launch(train, *TINY, "--max_iters=1")
    few = "--num_samples=1", "--max_new_tokens=5", "--device=cpu"
    (text,) = texts(launch(sample, f"--start={start}", *few))
    assert set(text) <= set("abcdefg") and len(text) == 5


def test_the_best_and_the_newest_can_be_sampled_by_name(trained):
    few = "--num_samples=1", "--max_new_tokens=5"
    assert trained(sample, "--checkpoint_file=best.pt", *few) == trained(sample, *few)


def test_sampling_leaves_the_optimizer_state_on_the_disk(trained, tiny, monkeypatch):
    checkpoint = torch.load("out/ckpt.pt", weights_only=True)
    for moments in checkpoint["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(2**22)  # 16 MiB each, were they read
    torch.save(checkpoint, "out/ckpt.pt")
    opened, find = [], sample.find_checkpoint

    def spy(*arguments):
        opened.append(find(*arguments))
        return opened[0]

    monkeypatch.setattr(sample, "find_checkpoint", spy)
    trained(sample, "--num_samples=1", "--max_new_tokens=5")
    storage = opened[0]["optimizer"]["state"][0]["exp_avg"].untyped_storage()
    with open("/proc/self/smaps") as file:
        maps = file.read().split("ckpt.pt\n")[1:]
    resident = sum(int(part.split("Rss:")[1].split()[0]) for part in maps)
    assert storage.nbytes() == 2**24 and resident < 4096  # KiB


# --- the end of a text ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_a_sample_ends_at_end_of_text_unless_it_is_to_go_on(documents, count):
    """That of the prompt, and the one that an empty prompt is, do not count."""
    for start in f"ab{END}ab", "":
        options = f"--start={start}", f"--num_samples={count}", "--max_new_tokens=80"
        free = texts(documents(*options, "--end_of_text=False"))
        drawn = [text.removeprefix(start) for text in free]
        assert all(END in text for text in drawn)
        ended = [start + text.partition(END)[0] for text in drawn]
        assert texts(documents(*options)) == ended
        assert texts(documents(*options, "--end_of_text=False", f"--stop={END}")) == ended
        stopped = [start + text.removeprefix(start).partition("ba")[0] for text in ended]
        assert texts(documents(*options, "--stop=ba")) == stopped


# --- prompts of different lengths ----------------------------------------------------------------


def test_each_prompt_of_a_file_gives_what_it_gives_alone(documents, tiny):
    """Far beyond block_size, and where some samples end early."""
    lines = ["ab", "a" * 16, f"b{END}ab", " \u00e9 "]
    (tiny / "unix.txt").write_bytes("\n".join(lines).encode())
    windows = "\ufeff{}\r\n\r\n{}\r\n{}\r\n \r\n{}\r\n".format(*lines)
    (tiny / "windows.txt").write_bytes(windows.encode())
    options = "--temperature=1", "--num_samples=2", "--max_new_tokens=40"
    free = [*options, "--end_of_text=False"]
    alone = sum((texts(documents(*free, f"--start={line}")) for line in lines), [])
    assert texts(documents(*free, "--prompts=unix.txt")) == alone
    assert texts(documents(*free, "--prompts=windows.txt", "--batch_size=3")) == alone
    ended = sum((texts(documents(*options, f"--start={line}")) for line in lines), [])
    assert texts(documents(*options, "--prompts=windows.txt")) == ended != alone


def test_samples_in_several_batches_are_the_same(trained):
    options = "--max_new_tokens=20", "--num_samples=5"
    assert trained(sample, *options, "--batch_size=2") == trained(sample, *options)


# --- the file ------------------------------------------------------------------------------------


def test_a_file_holds_what_was_printed(trained, tiny):
    (tiny / "samples.txt").write_text("older")
    options = "--start=1 plus", "--num_samples=2", "--max_new_tokens=9", "--out=samples.txt"
    printed = trained(sample, *options)
    assert (tiny / "samples.txt").read_bytes().decode() == printed
    assert not [path for path in tiny.iterdir() if path.name.endswith(".tmp")]


def test_a_file_of_json_lines_names_prompt_and_sample(documents, tiny):
    (tiny / "prompts.txt").write_bytes("ab\n\u6f22\u5b57 \"".encode())
    options = "--prompts=prompts.txt", "--num_samples=2", "--out=samples.jsonl"
    printed = texts(documents(*options))
    lines = (tiny / "samples.jsonl").read_bytes().decode().removesuffix("\n").split("\n")
    found = [json.loads(line) for line in lines]
    assert [line["prompt"] + line["text"] for line in found] == printed
    names = [(line["prompt"], line["sample"]) for line in found]
    assert names == [(prompt, k) for prompt in ("ab", "\u6f22\u5b57 \"") for k in (0, 1)]
    assert "\u6f22" in lines[2]


def test_a_file_without_room_keeps_the_older_one(trained, tiny, file_limit):
    (tiny / "samples.txt").write_text("older")
    file_limit(1000)
    with pytest.raises(SystemExit, match="^error: samples.txt: File too large$"):
        trained(sample, "--out=samples.txt")
    assert (tiny / "samples.txt").read_text() == "older"
    assert not (tiny / "samples.txt.tmp").exists()


# --- a conversation ------------------------------------------------------------------------------


def test_line_n_of_the_input_gets_sample_n(trained, monkeypatch, capsys):
    """A line that cannot be a prompt is named, and the next one is read."""
    few = "--max_new_tokens=20", "--temperature=1"
    starts = "1 plus", "2 plus", ""
    one, two, empty = (
        texts(trained(sample, *few, f"--start={start}", "--num_samples=4")) for start in starts
    )
    given = b"1 plus\r\n1+1\n2 plus\nCaf\xe9\n\n" + b"1" * 17 + b"\n1 plus"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    monkeypatch.setattr(sys, "argv", [sample.__file__, *EXACT, *few, "--interactive=True"])
    sample.main(configure(vars(sample)))
    out, err = capsys.readouterr()
    assert texts(out) == [one[0], two[1], empty[2], one[3]]
    why = "UnicodeEncodeError: 'utf-8' codec can't encode character '\\udce9' in position 3: "
    assert err.splitlines() == [
        "error: 1 unknown characters: '+' (PLUS SIGN)",
        f"error: the prompt cannot be read as UTF-8 text: {why}surrogates not allowed",
        "error: the prompt has 17 tokens, the model reads 16 at most",
    ]


def test_on_a_terminal_an_interrupt_ends_the_sample_and_the_end_of_input_the_program(trained):
    pty = pytest.importorskip("pty")
    ours, terminal = pty.openpty()
    command = [sys.executable, str(ROOT / "sample.py"), *EXACT, "--interactive=True"]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    endless = ["--max_new_tokens=1e9"]
    process = subprocess.Popen([*command, *endless], **streams, start_new_session=True)
    os.close(terminal)

    def read_until(end):
        shown = b""
        while not shown.endswith(end):
            shown += os.read(ours, 1000)
        return shown.replace(b"\r\n", b"\n")

    try:
        read_until(b"> ")
        for words in b"1 plus", b"2 plus":
            os.write(ours, words + b"\n")
            shown = b""
            while len(shown) < 300:  # it appears as it is drawn
                shown += os.read(ours, 1000)
            assert shown.count(words) >= 2  # as typed, and before what is drawn
            process.send_signal(signal.SIGINT)
            read_until(b"\n> ")
        os.write(ours, b"\x04")  # Ctrl-D
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
