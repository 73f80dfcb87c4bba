"""The prepare scripts: counts, bytes and tokens against references, and what they refuse."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED, TEXT

from data.corpus import local_corpus
from data.tokenizer import GPT2, BPETokenizer, make_meta, make_tokenizer, read_meta


@pytest.fixture
def prepare(launch, tmp_path, monkeypatch):
    """Run data/NAME/prepare.py with `tmp_path` in place of its folder."""

    def run(name, *arguments):
        script = importlib.import_module(f"data.{name}.prepare")
        monkeypatch.setattr(script, "DATA" if name == "text" else "FOLDER", tmp_path)
        return launch(script, *arguments)

    return run


def read(path):
    return np.fromfile(path, np.uint16).tolist()


@pytest.fixture
def shakespeare():
    path = SHARED / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("no copy of Tiny Shakespeare beside the project")
    return path


def test_shakespeare_has_its_counts_in_characters(prepare, tmp_path, shakespeare):
    out = prepare("shakespeare_char", f"--input={shakespeare}")
    assert "65 characters" in out and "1,003,854 tokens" in out and "111,540 tokens" in out
    ids = read(tmp_path / "train.bin") + read(tmp_path / "val.bin")
    text = make_tokenizer(read_meta(tmp_path)).decode_bytes(ids)
    assert text == shakespeare.read_bytes()


def test_shakespeare_has_its_counts_in_gpt2_tokens(prepare, tmp_path, shakespeare, gpt2_files):
    out = prepare("shakespeare", f"--input={shakespeare}")
    assert "301,966 tokens" in out and "36,059 tokens" in out
    own = prepare("text", f"--input={shakespeare}", "--dataset=own", "--tokenizer=gpt2")
    assert "301,966 tokens" in own and "36,059 tokens" in own
    for split in ("train.bin", "val.bin"):  # cutting the text into pieces changed no token
        assert read(tmp_path / split) == read(tmp_path / "own" / split)


def test_a_mark_at_the_begin_of_own_text_and_windows_line_ends_are_dropped(prepare, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_bytes("\ufeffone\r\ntwo\r\n".encode())
    prepare("text", f"--input={tmp_path}/in", "--dataset=own")
    ids = read(tmp_path / "own" / "train.bin") + read(tmp_path / "own" / "val.bin")
    text = make_tokenizer(read_meta(tmp_path / "own")).decode_bytes(ids)
    assert text == b"one\ntwo\n" * 2


def test_another_file_is_not_taken_for_shakespeare(prepare, tmp_path):
    (tmp_path / "page.html").write_text("404: Not Found")
    with pytest.raises(SystemExit) as stop:
        prepare("shakespeare_char", f"--input={tmp_path}/page.html")
    assert stop.value.code.startswith(f"error: {tmp_path}/page.html is not Tiny Shakespeare: its ")
    assert not (tmp_path / "train.bin").exists()


def test_without_network_shakespeare_says_where_to_put_a_copy(prepare, tmp_path, monkeypatch):
    def unreachable(url, timeout):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(SystemExit) as stop:
        prepare("shakespeare_char")
    advice = f"offline, put a copy at {tmp_path}/input.txt or give --input=PATH"
    assert stop.value.code.endswith(advice)


def test_the_standard_library_gives_the_same_bytes_each_time(prepare, tmp_path):
    first = prepare("stdlib_char")
    train = (tmp_path / "train.bin").read_bytes()
    assert prepare("stdlib_char") == first and (tmp_path / "train.bin").read_bytes() == train
    text = make_tokenizer(read_meta(tmp_path)).decode_bytes(read(tmp_path / "train.bin")).decode()
    assert text.isascii() and "def dataclass(" in text and "import unittest" in text


def test_own_text_becomes_characters(prepare, tmp_path):
    (tmp_path / "own.txt").write_text(TEXT + "äöü", encoding="utf-8")
    out = prepare("text", f"--input={tmp_path}/own.txt", "--dataset=own")
    assert f"{len(TEXT) + 3:,} characters" in out
    ids = read(tmp_path / "own" / "train.bin") + read(tmp_path / "own" / "val.bin")
    tokenizer = make_tokenizer(read_meta(tmp_path / "own"))
    assert tokenizer.decode_bytes(ids).decode() == TEXT + "äöü"
    assert len(read(tmp_path / "own" / "train.bin")) == int(0.9 * len(TEXT + "äöü"))


@pytest.mark.parametrize("tokenizer, size", [("bytes", 257), ("bpe:300", 300), ("bpe:9999", None)])
def test_own_text_becomes_bytes_or_byte_pairs_of_its_own(prepare, tmp_path, tokenizer, size):
    """No file of tiktoken's is read, and no character is unknown."""
    text = "".join(f"def f{n}():\n    return {n * 37} + 'äö 東'\n\n" for n in range(200))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "in" / "b.txt").write_text("more", encoding="utf-8")
    prepare("text", f"--input={tmp_path}/in", "--dataset=own", f"--tokenizer={tokenizer}")
    meta = read_meta(tmp_path / "own")
    assert size is None or meta["vocab_size"] == size
    encoder = make_tokenizer(meta)
    ids = read(tmp_path / "own" / "train.bin") + read(tmp_path / "own" / "val.bin")
    assert encoder.decode_bytes(ids).decode() == f"{text}<|endoftext|>more<|endoftext|>"
    assert ids[-1] == encoder.eot == meta["vocab_size"] - 1
    assert tokenizer == "bytes" or len(ids) < 0.6 * len(text.encode())
    strange = "漢字 \x00 ~<|endoftext|>"
    assert encoder.decode_bytes(encoder.encode(strange)).decode() == strange


def test_byte_pairs_are_those_of_the_library_that_made_them(monkeypatch):
    """tiktoken, which reads them, gives the ids that tokenizers gives; longest words included."""
    tokenizers = pytest.importorskip("tokenizers")
    made = []
    build = tokenizers.Tokenizer
    monkeypatch.setattr(tokenizers, "Tokenizer", lambda *a: made.append(build(*a)) or made[-1])
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    encoder = make_tokenizer(make_meta("bpe:600", iter([text[:5000], text[5000:]])))
    other = text.replace("nanoGPT", "Änderung  12345\n\n\t") + " don't"
    pieces = [encoder.decode_bytes([token]) for token in encoder.encode(other)]
    level = tokenizers.decoders.ByteLevel()
    expected = [level.decode([token]).encode() for token in made[0].encode(other).tokens]
    assert b"".join(pieces).decode() == other and len(pieces) == len(expected)
    shown = zip(pieces, expected, strict=True)
    assert all(ours == theirs for ours, theirs in shown if ours.isascii())


def test_cutting_a_text_into_pieces_changes_no_token_of_its_own(prepare, tmp_path, monkeypatch):
    script = importlib.import_module("data.text.prepare")
    text = "def f():\n\n\n    return 1\nx = ...\n\n\t'a'  12345 b\n" * 30 + "end"
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    options = f"--input={tmp_path}/own.txt", "--dataset=own", "--tokenizer=bpe:300"
    found = []
    for size in (50, 2**20):
        monkeypatch.setattr(script, "PIECE", size)
        prepare("text", *options)
        found.append([read(tmp_path / "own" / f"{split}.bin") for split in ("train", "val")])
    assert found[0] == found[1]


def test_cutting_a_text_into_pieces_changes_no_token(prepare, tmp_path, monkeypatch, gpt2_files):
    script = importlib.import_module("data.text.prepare")
    monkeypatch.setattr(script, "PIECE", 50)
    text = "def f():\n\n\n    return 1\nx = ...\n\n\t'a'\n" * 20
    text += "one\r\ntwo\n \nthree\n" * 10 + "end"
    (tmp_path / "own.txt").write_text(text, newline="")
    prepare("text", f"--input={tmp_path}/own.txt", "--dataset=own", "--tokenizer=gpt2")
    cut = int(0.9 * len(text := text.replace("\r\n", "\n")))
    whole = [BPETokenizer(GPT2).encode(part) for part in (text[:cut], text[cut:])]
    assert read(tmp_path / "own" / "train.bin") == whole[0]
    assert read(tmp_path / "own" / "val.bin") == whole[1]


SHAPES = {
    "blank lines between one-line paragraphs": "A paragraph of a line.\n\n" * 3000,
    "a list": "- an item\n" * 6000,
    "no line end": "word and word " * 5000,
    "no spaces": "line\n" * 12_000,
    "marks and numbers": "3.14, 2.71; (1 + 1) == 2!\n\n\t" * 2500,
}


def need_files_of(tokenizer):
    """Skip where tiktoken has no copy of what this tokenizer needs beside gpt2's files."""
    url = f"https://openaipublic.blob.core.windows.net/encodings/{tokenizer}.tiktoken"
    name = hashlib.sha1(url.encode()).hexdigest()
    copy = Path(os.environ["TIKTOKEN_CACHE_DIR"], name)
    if tokenizer not in ("char", "gpt2") and not copy.exists():
        pytest.skip(f"no copy of tiktoken's files for {tokenizer} in TIKTOKEN_CACHE_DIR")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokenizer", ["char", "gpt2", "cl100k_base"])
def test_any_text_is_read_in_small_pieces_that_change_no_token(
    tmp_path, monkeypatch, gpt2_files, shape, tokenizer
):
    need_files_of(tokenizer)
    script = importlib.import_module("data.text.prepare")
    monkeypatch.setattr(script, "PIECE", 1000)
    monkeypatch.setattr(script, "tokenizer", tokenizer)
    (tmp_path / "own.txt").write_text(SHAPES[shape], newline="")
    parts = [text for text, _ in script.pieces([tmp_path / "own.txt"])]
    assert "".join(parts) == SHAPES[shape] and max(map(len, parts)) < 2100
    if tokenizer != "char":
        encode = BPETokenizer({"tokenizer": tokenizer}).encode
        assert [i for part in parts for i in encode(part)] == encode(SHAPES[shape])


def test_a_long_line_without_spaces_is_cut_somewhere(tmp_path, monkeypatch):
    script = importlib.import_module("data.text.prepare")
    monkeypatch.setattr(script, "tokenizer", "bytes")
    text = "." * 2**21 + " and words " * 500
    (tmp_path / "own.txt").write_text(text)
    parts = [text for text, _ in script.pieces([tmp_path / "own.txt"])]
    assert "".join(parts) == text and max(map(len, parts)) <= 2**19


def test_characters_need_no_place_to_cut(tmp_path, monkeypatch):
    script = importlib.import_module("data.text.prepare")
    monkeypatch.setattr(script, "PIECE", 1000)
    monkeypatch.setattr(script, "tokenizer", "char")
    (tmp_path / "own.txt").write_text("\u4e2d\u6587" * 5000, encoding="utf-8")
    assert max(len(text) for text, _ in script.pieces([tmp_path / "own.txt"])) <= 1000


ALPHABET = " \n\t'.,-/abAs1\u00e9\u4e2d\u3002\u0301\u00b2\u2003"


def test_random_text_in_pieces_gives_the_tokens_of_the_whole(tmp_path, monkeypatch, gpt2_files):
    hypothesis = pytest.importorskip("hypothesis")
    script = importlib.import_module("data.text.prepare")
    monkeypatch.setattr(script, "PIECE", 7)
    monkeypatch.setattr(script, "tokenizer", "gpt2")
    encode = BPETokenizer(GPT2).encode

    @hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @hypothesis.given(hypothesis.strategies.text(alphabet=ALPHABET, max_size=60))
    def attempt(text):
        (tmp_path / "own.txt").write_text(text, newline="", encoding="utf-8")
        parts = [part for part, _ in script.pieces([tmp_path / "own.txt"])]
        assert [i for part in parts for i in encode(part)] == encode(text)

    attempt()


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_no_encoding_of_tiktokens_has_a_token_across_a_cut(monkeypatch, name):
    """Tokens lie within the parts that a pattern cuts out; that needs no file of tokens."""
    hypothesis, regex = pytest.importorskip("hypothesis"), pytest.importorskip("regex")
    encodings = importlib.import_module("tiktoken_ext.openai_public")
    monkeypatch.setattr(encodings, "load_tiktoken_bpe", lambda *arguments, **options: {})
    pattern = regex.compile(getattr(encodings, name)()["pat_str"])
    cut = importlib.import_module("data.text.prepare").CUT

    @hypothesis.settings(max_examples=500, deadline=None, database=None, derandomize=True)
    @hypothesis.given(hypothesis.strategies.text(alphabet=ALPHABET, max_size=60))
    def attempt(text):
        parts = [match.end() for match in pattern.finditer(text)]
        assert {match.end() for match in cut.finditer(text)} <= set(parts)

    attempt()


def test_each_of_several_files_ends_with_end_of_text(prepare, tmp_path, gpt2_files):
    for name, text in (("b.md", "two words"), ("a.txt", "one " * 20), ("c.py", "ignored")):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    prepare("text", f"--input={tmp_path}/in", "--dataset=own", "--tokenizer=gpt2")
    ids = read(tmp_path / "own" / "train.bin") + read(tmp_path / "own" / "val.bin")
    expected = b"one " * 20 + b"<|endoftext|>two words<|endoftext|>"
    assert BPETokenizer(GPT2).decode_bytes(ids) == expected


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--dataset=own"], "error: --input=: give a text file, or a folder with .txt or "),
        (["--input=no.txt"], "error: --input=no.txt: give a text file, or a folder with .txt or "),
        (["--input=in.txt"], "error: --dataset=: give a new name, of a folder to be made in "),
        (["--input=in.txt", "--dataset=../x"], "error: --dataset=../x: give a new name, of a "),
        (["--input=in.txt", "--dataset=own", "--tokenizer=gpt7"], "error: no tokenizer gpt7: "),
        (["--input=latin1.txt", "--dataset=own"], "error: latin1.txt is not UTF-8 text: "),
        (["--input=in.txt", "--dataset=own", "--tokenizer=bpe"], "error: tokenizer=bpe: give a "),
        (["--input=in.txt", "--dataset=own", "--tokenizer=bpe:9"], "error: tokenizer=bpe:9: give "),
    ],
)
def test_a_mistake_with_own_text_gets_a_line(prepare, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text(TEXT)
    (tmp_path / "latin1.txt").write_bytes("Café".encode("latin-1"))
    with pytest.raises(SystemExit) as stop:
        prepare("text", *arguments)
    assert stop.value.code.startswith(line) and "\n" not in stop.value.code


@pytest.fixture
def documents(tmp_path):
    texts = [f"Document {index}." for index in range(40)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    return texts


def test_openwebtext_splits_as_nanogpt_and_ends_documents(prepare, tmp_path, gpt2_files, documents):
    """Those to train on stay in the order of the corpus."""
    datasets = pytest.importorskip("datasets")
    out = prepare("openwebtext", f"--input={tmp_path}/docs.jsonl", "--num_proc=1")
    rows = datasets.Dataset.from_dict({"text": documents})
    split = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    train = sorted(split["train"]["text"], key=documents.index)
    encoding = BPETokenizer(GPT2).encoding
    for name, texts in (("train", train), ("val", split["test"]["text"])):
        expected = [i for text in texts for i in [*encoding.encode_ordinary(text), 50256]]
        assert read(tmp_path / f"{name}.bin") == expected
        assert f"{name}.bin: {len(expected):,} tokens" in out
    limited = prepare("openwebtext", f"--input={tmp_path}/docs.jsonl", "--limit=10")
    assert "train.bin: 36 tokens" in limited and "val.bin: 4 tokens" in limited


def test_an_interruption_leaves_no_dataset(prepare, tmp_path, gpt2_files, documents, monkeypatch):
    def interrupted(self, texts, threads):
        next(texts)
        yield np.array([1])
        raise KeyboardInterrupt

    monkeypatch.setattr(BPETokenizer, "encode_corpus", interrupted)
    with pytest.raises(SystemExit) as stop:
        prepare("openwebtext", f"--input={tmp_path}/docs.jsonl")
    assert stop.value.code == 130
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert names == [".lock", "docs.jsonl", "unfinished", "unfinished/prepare.json"]


def test_a_partial_openwebtext_is_refused(prepare, tmp_path, gpt2_files, documents, monkeypatch):
    def partial(repository, pattern, revision, commit):
        found = local_corpus(tmp_path / "docs.jsonl")
        found.origin = {"repository": repository, "commit": "0" * 40}
        return found

    monkeypatch.setattr("data.documents.hub_corpus", partial)
    with pytest.raises(SystemExit) as stop:
        prepare("openwebtext")
    assert stop.value.code == "error: the hub gave 40 documents of 8,013,769; try later"
    assert not (tmp_path / "unfinished").exists()
    assert "train.bin: 36 tokens" in prepare("openwebtext", "--limit=10")


def test_a_prepare_script_runs_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "data" / "text" / "prepare.py"), "--help"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "--val_fraction=0.1" in shown
