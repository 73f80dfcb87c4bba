"""The prepare scripts: their counts, bytes and tokens against references."""

import importlib
import json
import random
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import regex
from tiktoken_ext import openai_public

from configurator import configure
from data.bpe import WORDS
from data.tokenizer import GPT2, PIECE, BPETokenizer, make_tokenizer, read_meta

SHAKESPEARE = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason="no Tiny Shakespeare")


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Run data/NAME/prepare.py in `tmp_path` and return the printed text."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        script = importlib.import_module(f"data.{name}.prepare")
        monkeypatch.setattr(script, "DATA" if name == "text" else "FOLDER", tmp_path)
        monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
        script.main(configure(vars(script)))
        return capsys.readouterr().out

    return run


def read(folder="own"):
    """Return the ids of the two splits of a dataset."""
    return [np.fromfile(Path(folder, f"{split}.bin"), "<u2").tolist() for split in ("train", "val")]


def decoded(folder="own"):
    """Return the text of both splits of a dataset."""
    train, val = read(folder)
    return make_tokenizer(read_meta(Path(folder))).decode_bytes(train + val).decode()


@needs_shakespeare
def test_shakespeare_has_nanogpts_counts_in_characters(prepare):
    out = prepare("shakespeare_char", f"--input={SHAKESPEARE}")
    assert "65 characters" in out and "1,003,854 tokens" in out and "111,540 tokens" in out
    assert decoded(".") == SHAKESPEARE.read_text()


@needs_shakespeare
def test_shakespeare_has_nanogpts_counts_in_gpt2_tokens_as_own_text_too(prepare, gpt2_files):
    out = prepare("shakespeare", f"--input={SHAKESPEARE}")
    assert "301,966 tokens" in out and "36,059 tokens" in out
    prepare("text", f"--input={SHAKESPEARE}", "--dataset=own", "--tokenizer=gpt2")
    assert read() == read(".")


def test_a_download_of_something_else_is_refused_and_not_kept(prepare, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("404: Not Found")
    monkeypatch.setattr("data.shakespeare_char.prepare.URL", page.as_uri())
    line = f"put a copy at {tmp_path}/input.txt or give --input=PATH.: .* is not Tiny Shakespeare"
    with pytest.raises(SystemExit, match=line):
        prepare("shakespeare_char")
    assert [*tmp_path.iterdir()] == [page]


def test_the_standard_library_gives_the_same_bytes_each_time(prepare):
    first = prepare("stdlib_char")
    ids = read(".")
    assert prepare("stdlib_char") == first and read(".") == ids


def test_own_text_becomes_characters_and_its_last_tenth_validates(prepare):
    Path("own.txt").write_bytes("\ufeffone\r\ntwo äöü 漢字\n".encode())
    prepare("text", "--input=own.txt", "--dataset=own")
    assert decoded() == "one\ntwo äöü 漢字\n" and len(read()[1]) == 2


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300", "bpe:9999", "gpt2"])
def test_each_of_several_files_ends_with_an_end_of_text_token(prepare, tokenizer, request):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2_files")
    files = {"a.txt": "one \n\n " * 99, "b.md": "<|endoftext|>two", "c.txt": "", "d.txt": "äö"}
    for name, text in files.items():
        Path(name).write_text(text)
    prepare("text", "--input=.", "--dataset=own", f"--tokenizer={tokenizer}")
    assert decoded() == "".join(f"{text}<|endoftext|>" for text in files.values())
    eot = make_tokenizer(read_meta(Path("own"))).eot
    assert sum(read(), []).count(eot) == 5


def test_files_that_are_left_out_are_counted(prepare):
    """Hidden files and linked folders among them; the case of an ending does not matter."""
    for name in ("a.TXT", "b.py", ".hidden.txt", "notes.md/c.txt", ".checkpoints/d.txt"):
        Path("in", name).parent.mkdir(parents=True, exist_ok=True)
        Path("in", name).write_text(f"this is {name} " * 9)
    Path("in/link").symlink_to(Path("in/notes.md").resolve())
    out = prepare("text", "--input=in", "--dataset=own")
    assert "in: left out 4 files, such as .checkpoints/d.txt, .hidden.txt, b.py\n" in out
    assert decoded() == "this is a.TXT " * 9 + "this is notes.md/c.txt " * 9
    prepare("text", "--input=in", "--dataset=own", "--suffixes=.py,.c")
    assert decoded() == "this is b.py " * 9


def test_a_link_leads_to_the_new_data(prepare, tmp_path):
    Path("own.txt").write_text("some text")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/train.bin").symlink_to(tmp_path / "elsewhere")
    prepare("text", "--input=own.txt", "--dataset=own")
    assert decoded() == "some text" and (tmp_path / "elsewhere").stat().st_size == 16


ALPHABET = " \n\t'.,-/abAs1\u00e9\u4e2d\u3002\u0301\u00b2\u2003"


@pytest.mark.parametrize("name", ["own", "r50k_base", "cl100k_base", "o200k_base"])
def test_no_token_crosses_the_end_of_a_piece(monkeypatch, name):
    """Tokens lie within the words of a pattern, so their files are not needed."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *arguments, **options: {})
    words = WORDS if name == "own" else getattr(openai_public, name)()["pat_str"]
    end = PIECE.pattern.partition("(?:")[2].partition(r"|\Z")[0]
    for length in range(1, 2000):
        text = "".join(random.Random(length).choices(ALPHABET, k=length % 60))
        ends = {match.end() for match in regex.finditer(words, text)}
        assert {match.end() for match in re.finditer(end, text)} <= ends


@pytest.mark.parametrize("text", ["a" * 10**6, " " * (2**20 + 5) + "a", "中文。" * 10**5])
def test_a_long_text_without_words_is_encoded(text, gpt2_files):
    tokenizer = BPETokenizer(GPT2)
    assert tokenizer.decode_bytes(tokenizer.encode(text)).decode() == text


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--input=no.txt"], "no.txt: No such file or directory"),
        (
            ["--input=latin1.txt"],
            "latin1.txt is not UTF-8 text in line 1; convert it: iconv -f latin1 -t utf-8",
        ),
        (
            ["--input=utf16.txt"],
            "utf16.txt is not UTF-8 text in line 1; convert it: iconv -f utf-16",
        ),
        (["--input=nul.txt"], "nul.txt is not UTF-8 text in line 2; convert it: iconv -f utf-16"),
        (["--dataset=../x"], "--dataset=../x: give the name of a new folder in data/"),
        (["--tokenizer=gpt7"], "no tokenizer 'gpt7': Unknown encoding gpt7; offline, "),
        (["--tokenizer=bpe"], "no tokenizer 'bpe': "),
        (["--tokenizer=bpe:x"], "tokenizer=bpe:x, give a size such as bpe:8192: "),
        (["--val_fraction=1"], "val_fraction=1.0 must be from 1e-06 to 0.9"),
    ],
)
def test_a_mistake_with_own_text_gets_one_line(prepare, arguments, line):
    Path("in.txt").write_text("some text")
    Path("latin1.txt").write_bytes("Café".encode("latin-1"))
    Path("utf16.txt").write_bytes("Café".encode("utf-16"))
    Path("nul.txt").write_bytes(b"one\n\0two")
    with pytest.raises(SystemExit) as stop:
        prepare("text", "--input=in.txt", "--dataset=own", *arguments)
    assert stop.value.code.startswith(f"error: {line}") and "\n" not in stop.value.code


def test_openwebtext_is_split_as_in_nanogpt(prepare, gpt2_files):
    texts = [f"Document {index}." for index in range(2500)]
    Path("docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare("openwebtext", "--input=docs.jsonl", "--limit=2500")
    rows = datasets.Dataset.from_dict({"number": range(2500)})
    split = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    encode = BPETokenizer(GPT2).encode
    for part, ids in zip((split["train"], split["test"]), read("."), strict=True):
        assert ids == encode("".join(f"{texts[n]}<|endoftext|>" for n in sorted(part["number"])))
