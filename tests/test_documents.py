"""Corpora of documents: which formats, which split, and the same bytes after any interruption."""

import errno
import gzip
import json
import lzma
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from configurator import configure
from data import documents
from data.fineweb import prepare as fineweb
from data.tokenizer import make_tokenizer, read_meta
from data.tokens import TokenFile
from engine.process import UserError

TEXTS = [f"Document {n}: {n} plus {n} makes {n + n}.\n\nIt ends." for n in range(60)]
MANY = [f"Document {n}." for n in range(1500)]  # two batches


def json_lines(texts):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Run data/fineweb/prepare.py on docs.jsonl, with bytes as tokens; return the printed text."""
    monkeypatch.setattr(fineweb, "DATA", tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("docs.jsonl").write_bytes(json_lines(TEXTS))
    Path("many.jsonl").write_bytes(json_lines(MANY))

    def run(*arguments, dataset="own"):
        options = [f"--dataset={dataset}", "--input=docs.jsonl", "--tokenizer=bytes", *arguments]
        monkeypatch.setattr(sys, "argv", [fineweb.__file__, *options])
        fineweb.main(configure(vars(fineweb)))
        return capsys.readouterr().out

    return run


def refusal(prepare, *arguments):
    """Return the line with which a preparation ends."""
    with pytest.raises(SystemExit) as stop:
        prepare(*arguments)
    assert "\n" not in stop.value.code
    return stop.value.code


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.[bp][ik][nl]")}


def split_texts(split):
    """Return the documents of a split of the dataset "own" in bytes."""
    tokens = TokenFile(Path("own", f"{split}.bin"), read_meta(Path("own")), 1)
    text = make_tokenizer(tokens.meta).decode_bytes(tokens.ids().tolist()).decode()
    assert text.endswith("<|endoftext|>")
    return text.split("<|endoftext|>")[:-1]


# --- which documents, in which order -------------------------------------------------------------


def test_every_tenth_document_validates_and_all_keep_their_order(prepare):
    out = prepare()
    assert split_texts("val") == TEXTS[::10]
    assert split_texts("train") == [text for n, text in enumerate(TEXTS) if n % 10]
    tokens = sum(len(text) + 1 for text in TEXTS[::10])
    assert out.endswith(f"own/val.bin: {tokens:,} tokens\n")


def test_the_share_that_validates_is_a_setting(prepare):
    prepare("--val_fraction=0.05")
    assert split_texts("val") == TEXTS[::20]


def test_a_large_corpus_holds_out_about_the_share_of_nanogpt():
    assert sum(n < 8_000_000 for n in fineweb.spread_held_out(None)) == 1000 + 3995


def test_a_limit_takes_the_first_documents_and_reads_no_other_file(prepare):
    Path("in").mkdir()
    Path("docs.jsonl").rename("in/a.jsonl")
    Path("in/b.jsonl").write_text("broken")
    prepare("--input=in", "--limit=25")
    assert sorted(split_texts("val") + split_texts("train")) == sorted(TEXTS[:25])


# --- formats -------------------------------------------------------------------------------------


def write_parquet(path, texts, kind):
    table = pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, kind)})
    parquet.write_table(table, path, row_group_size=7)


def compress(path, texts):
    library = {".gz": gzip, ".xz": lzma}.get(path.suffix) or pytest.importorskip("zstandard")
    path.write_bytes(library.compress(json_lines(texts)))


DICTIONARY = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
FORMATS = {
    "a.jsonl": lambda path, texts: path.write_bytes(json_lines(texts)),
    "a.json": lambda path, texts: path.write_text(json.dumps([{"text": text} for text in texts])),
    "a.csv": lambda path, texts: path.write_text('text\n"' + '"\n"'.join(texts) + '"\n'),
    "a.txt": lambda path, texts: [
        path.with_name(f"{n:02}.txt").write_text(text) for n, text in enumerate(texts)
    ],
    "a [1]*.parquet": lambda path, texts: write_parquet(path, texts, pyarrow.string()),
    "large.parquet": lambda path, texts: write_parquet(path, texts, pyarrow.large_string()),
    "view.parquet": lambda path, texts: write_parquet(path, texts, pyarrow.string_view()),
    "dictionary.parquet": lambda path, texts: write_parquet(path, texts, DICTIONARY),
    **dict.fromkeys(["a.jsonl.gz", "a.jsonl.xz", "a.JSONL.zst"], compress),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_number_of_files_gives_the_same_bytes(prepare, name):
    prepare(dataset="expected")
    for begin in (0, 20, 40):
        Path("in", str(begin)).mkdir(parents=True)
        FORMATS[name](Path("in", str(begin), name), TEXTS[begin : begin + 20])
    prepare("--input=in")
    assert contents("own") == contents("expected")


def test_the_text_may_be_in_a_column_of_any_name(prepare):
    Path("docs.jsonl").write_text('{"body": "one", "text": 1}\n{"body": "two", "text": 2}\n')
    prepare("--column=body")
    assert split_texts("val") + split_texts("train") == ["one", "two"]


def test_byte_order_marks_and_windows_line_ends_are_dropped(prepare):
    Path("a.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
    Path("docs.jsonl").write_bytes('\ufeff{"text": "three\\r\\n"}\r\n'.encode())
    prepare("--input=.", "--limit=2")
    assert split_texts("val") + split_texts("train") == ["one\ntwo\n", "three\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "large.parquet"])
def test_empty_documents_are_skipped_and_counted(prepare, name):
    FORMATS[name](Path(name), ["", "one", " \n\t", None, "two", "\u2003", "three"])
    assert "3 documents, 4 empty ones skipped\n" in prepare(f"--input={name}")
    assert split_texts("val") + split_texts("train") == ["one", "two", "three"]


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("a.txt", b"Caf\xe9", "'utf-8' codec can't decode byte 0xe9 in position 3: "),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', "JSON parse error: "),
        ("a.jsonl", b'{"txt": "a"}\n', "no text in column text of ['txt']"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 7}', "no text in column text of ['text']"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}', mtime=0)[:-9],
            "Compressed file ended before ",
        ),
        ("a.parquet", b"PAR1 garbage", "Parquet magic bytes not found in footer"),
    ],
)
def test_a_broken_file_is_named_in_one_line(prepare, tmp_path, name, content, line):
    Path(name).write_bytes(content)
    advice = "check --column=text; if the network failed, run this again"
    start = f"error: cannot read {tmp_path / name} ({advice}): {line}"
    assert refusal(prepare, f"--input={name}").startswith(start)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--tokenizer=char"], "documents need an end-of-text token: tokenizer=gpt2, bytes or bp"),
        (["--tokenizer=gpt7"], "no tokenizer 'gpt7': "),
        (["--dataset=../x"], "--dataset=../x: give a new name, of a folder to be made in "),
        (["--input="], "no input: No such file"),
        (["--limit=1"], "limit=1 must be from 2 to "),
        (["--input=one.txt"], "1 documents leave a split empty; give more, or their number with "),
    ],
)
def test_a_mistake_gets_one_line(prepare, arguments, line):
    Path("one.txt").write_text("one")
    assert refusal(prepare, *arguments).startswith(f"error: {line}")
    assert not list(Path().rglob("*.bin"))


# --- the hub -------------------------------------------------------------------------------------


def test_files_of_the_hub_are_pinned_to_a_commit(monkeypatch):
    names = "in/b.parquet", "in/a.parquet", "README.md"
    files = [SimpleNamespace(rfilename=name) for name in names]
    info = SimpleNamespace(sha="c0ffee", siblings=files)
    hub = SimpleNamespace(dataset_info=lambda name, revision, timeout: info)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    found = documents.find_on_hub("some/corpus", "in/*.parquet", "main")
    folder = "hf://datasets/some/corpus@c0ffee/in"
    assert found == [f"{folder}/a.parquet", f"{folder}/b.parquet"]


def test_a_hub_out_of_reach_gets_a_line_with_a_way_out(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    line = r"^cannot list some/corpus on the hub \(offline, give --input=PATH\): "
    with pytest.raises(UserError, match=line):
        documents.find_on_hub("some/corpus", "*", "main")


# --- interruptions -------------------------------------------------------------------------------


def stop_at(patch, number, fault=KeyboardInterrupt):
    """Raise `fault` instead of the call with this number that changes the disk."""
    calls = iter(range(1, 10**6))

    def stopping(function):
        def call(*arguments):
            if next(calls) == number:
                raise fault
            return function(*arguments)

        return call

    for name in ("fsync", "replace"):
        patch.setattr(os, name, stopping(getattr(os, name)))


def stop_after_one_batch(prepare, monkeypatch, *arguments):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 6)  # two splits and the record take five calls
        prepare("--input=many.jsonl", *arguments)


def test_a_stop_at_any_point_changes_no_byte_and_keeps_the_old_dataset(prepare, monkeypatch):
    prepare("--input=many.jsonl", dataset="new")
    for number in range(1, 16):  # 5 for each batch, 3 for meta.pkl, 2 to move the splits
        prepare()
        old = contents("own")
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, number)
            prepare("--input=many.jsonl")
        assert contents("own") == old or not Path("own", "val.bin").exists()
        prepare("--input=many.jsonl")
        assert contents("own") == contents("new") and not Path("own", "unfinished").exists()


def test_a_restart_keeps_the_files_and_the_tokenizer_of_the_first_start(prepare, monkeypatch):
    prepare("--input=many.jsonl", "--tokenizer=bpe:300", dataset="expected")
    stop_after_one_batch(prepare, monkeypatch, "--tokenizer=bpe:300")
    monkeypatch.setattr(documents, "find_files", None)
    monkeypatch.setattr(documents, "make_meta", None)
    prepare("--input=many.jsonl", "--tokenizer=bpe:300")
    assert contents("own") == contents("expected")


def test_a_full_disk_gets_a_line_and_the_next_start_continues(prepare, tmp_path, monkeypatch):
    prepare("--input=many.jsonl", dataset="expected")
    with monkeypatch.context() as patch:
        stop_at(patch, 6, OSError(errno.ENOSPC, "No space left on device"))
        line = refusal(prepare, "--input=many.jsonl")
    failure = f"cannot write to {tmp_path}/own; make room and run the same command again"
    assert line == f"error: {failure}: No space left on device"
    assert json.loads(Path("own/unfinished/prepare.json").read_bytes())["rows"] == 1000
    prepare("--input=many.jsonl")
    assert contents("own") == contents("expected")


def test_another_preparation_does_not_delete_an_unfinished_one(prepare, tmp_path, monkeypatch):
    stop_after_one_batch(prepare, monkeypatch)
    line = "holds another preparation; repeat its command to finish it, or delete it"
    assert refusal(prepare, "--limit=30") == f"error: {tmp_path}/own/unfinished {line}"


def test_a_second_preparation_at_the_same_time_is_refused(prepare):
    fcntl = pytest.importorskip("fcntl")
    Path("own").mkdir()
    with open("own/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert refusal(prepare).endswith("; wait for it to end")
