"""Token files, batches, tokenizers and prepare scripts."""

import importlib
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, TEXT

import runtime
from data.tokens import (
    GPT2,
    Batches,
    BPETokenizer,
    CharTokenizer,
    TokenFile,
    atomic,
    char_meta,
    make_tokenizer,
    read_meta,
    send,
    write_dataset,
)

CPU = runtime.Run(torch.device("cpu"), torch.float32, False, 0, 1, "cpu", "")
META = {"vocab_size": 100, "stoi": {}, "itos": {}}


def ranks(world_size):
    return [runtime.Run(*(CPU.device, CPU.dtype, False, r, world_size, "", "")) for r in range(world_size)]  # noqa: E501 # fmt: skip


def token_file(path, ids, meta=META, block_size=4):
    path.write_bytes(np.asarray(ids, "<u2").tobytes())
    return TokenFile(path, meta, block_size)


def test_a_dataset_is_nanogpts_raw_uint16_and_plain_pickle(tmp_path):
    meta = char_meta("ab\n")
    write_dataset(tmp_path, meta, train=[[0, 1], [2]], val=[[1]])
    assert (tmp_path / "train.bin").read_bytes() == b"\0\0\1\0\2\0"
    assert np.memmap(tmp_path / "val.bin", np.uint16).tolist() == [1]
    with open(tmp_path / "meta.pkl", "rb") as file:
        assert pickle.load(file) == meta
    assert meta == {"vocab_size": 3, "itos": {0: "\n", 1: "a", 2: "b"}, "stoi": {"\n": 0, "a": 1, "b": 2}}  # noqa: E501 # fmt: skip


def test_a_large_vocabulary_takes_uint32_and_gpt2_no_meta(tmp_path):
    large = {"vocab_size": 100_000, "tokenizer": "cl100k_base"}
    write_dataset(tmp_path, large, train=[[99_999] * 5])
    assert (tmp_path / "train.bin").stat().st_size == 20
    assert TokenFile(tmp_path / "train.bin", read_meta(tmp_path), 4).ids.tolist() == [99_999] * 5
    write_dataset(tmp_path, GPT2, train=[[50_256] * 5])
    assert read_meta(tmp_path) == GPT2 and not (tmp_path / "meta.pkl").exists()
    assert (tmp_path / "train.bin").stat().st_size == 10


def test_an_error_while_writing_leaves_what_was_there(tmp_path):
    write_dataset(tmp_path, META, train=[[1, 2, 3]], val=[[4]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken():
        yield [5] * 1000
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_dataset(tmp_path, META, train=[[9]], val=broken())
    with pytest.raises(RuntimeError), atomic(tmp_path / "train.bin") as file:
        file.write(b"half")
        raise RuntimeError("interrupted")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "ids, block_size, line",
    [
        ([], 4, "holds 0 tokens and 0 bytes; block_size=4 needs 5 tokens, all of them whole"),
        ([1] * 4, 4, "holds 4 tokens and 0 bytes; block_size=4 needs 5 tokens, all of them whole"),
        ([1, 2, 100, 3, 4], 4, "holds id 100, the vocabulary 100"),
    ],
)
def test_a_token_file_that_cannot_be_trained_on_gets_a_line(tmp_path, ids, block_size, line):
    with pytest.raises(ValueError) as fault:
        token_file(tmp_path / "train.bin", ids, block_size=block_size)
    assert str(fault.value) == f"{tmp_path}/train.bin {line}"


def test_an_odd_length_and_a_missing_file_get_a_line(tmp_path):
    path = tmp_path / "mine" / "train.bin"
    path.parent.mkdir()
    with pytest.raises(ValueError) as fault:
        TokenFile(path, META, 4)
    advice = "make it: python data/text/prepare.py --input=FILE --dataset=mine"
    assert str(fault.value) == f"no train.bin in {path.parent}; {advice}"
    (path.parent / "prepare.py").touch()
    with pytest.raises(ValueError, match=f"make it: python {path.parent}/prepare.py$"):
        TokenFile(path, META, 4)
    path.write_bytes(b"\0" * 21)
    with pytest.raises(ValueError, match="holds 10 tokens and 1 bytes; block_size=4 needs 5"):
        TokenFile(path, META, 4)


def test_ids_beyond_the_vocabulary_of_a_large_file_are_found_in_their_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("data.tokens.SCAN_BYTES", 0)
    tokens = token_file(tmp_path / "train.bin", [1] * 50 + [100] + [1] * 50)
    assert tokens.windows(np.array([0, 45]), 5).tolist() == [[1] * 5] * 2
    with pytest.raises(ValueError, match="holds id 100, the vocabulary 100"):
        tokens.windows(np.array([46]), 5)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1]), pickle.dumps({"a": 1})])
def test_a_broken_meta_gets_one_line(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"meta\.pkl describes no dataset \(.*\); prepare it"):
        read_meta(tmp_path)


def test_a_meta_that_holds_code_is_refused_and_runs_nothing(tmp_path):
    proof = tmp_path / "proof"
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 5, "x": Payload(proof)}))
    with pytest.raises(ValueError, match=r"it asks to run (_?io|builtins)\.open"):
        read_meta(tmp_path)
    assert not proof.exists()


# --- batches -------------------------------------------------------------------------------------


def test_a_step_reads_the_same_sequences_whoever_asks_when(tmp_path):
    tokens = token_file(tmp_path / "train.bin", np.arange(100) % 97)
    straight = Batches(tokens, 3, 4, 4, 1337, CPU)
    expected = [torch.cat(straight(step)).tolist() for step in range(6)]
    again = Batches(tokens, 3, 4, 4, 1337, CPU)
    assert [torch.cat(again(step)).tolist() for step in (5, 2, 2, 3)] == [expected[s] for s in (5, 2, 2, 3)]  # noqa: E501 # fmt: skip
    other = Batches(tokens, 3, 4, 4, 1338, CPU)
    assert torch.cat(other(0)).tolist() != expected[0] != expected[1]
    for world_size in (2, 3, 4):
        shares = [Batches(tokens, 3, 4, 4, 1337, run)(5) for run in ranks(world_size)]
        assert torch.cat([torch.cat(share) for share in shares]).tolist() == expected[5]
        assert len({sum(map(len, share)) for share in shares}) == 1
        assert max(len(micro_batch) for share in shares for micro_batch in share) <= 4


def test_windows_are_runs_of_the_file_and_every_start_occurs(tmp_path):
    tokens = token_file(tmp_path / "train.bin", np.arange(20))
    rows = torch.cat([torch.cat(Batches(tokens, 1, 8, 4, 0, CPU)(step)) for step in range(50)])
    assert rows.dtype == torch.int16 and rows.shape == (400, 5)  # as on disk
    assert (rows == rows[:, :1] + torch.arange(5)).all()
    assert set(rows[:, 0].tolist()) == set(range(16))


@pytest.mark.parametrize("vocab_size", [65536, 65537])
def test_every_id_arrives_on_the_device_as_it_was_written(tmp_path, vocab_size):
    ids = [0, 1, 2**15 - 1, 2**15, vocab_size - 1]
    write_dataset(tmp_path, {"vocab_size": vocab_size}, train=[ids])
    tokens = TokenFile(tmp_path / "train.bin", read_meta(tmp_path), 4)
    sent = send(tokens.windows(np.array([0]), 5), torch.device("cpu"))
    assert sent.dtype == torch.int64 and sent.tolist() == [ids]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_steps_on_a_large_file(tmp_path):
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(2**29)
    tokens = TokenFile(tmp_path / "train.bin", META, 1024)
    batches = Batches(tokens, 8, 16, 1024, 0, CPU)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    batches(0)
    before = resident()
    for step in range(1, 200):  # reads about 50 MB of pages all over the file
        batches(step)
    assert resident() - before < 2**24


# --- tokenizers ----------------------------------------------------------------------------------


def test_characters_go_to_ids_and_back_and_unknown_ones_are_named():
    tokenizer = make_tokenizer(char_meta(TEXT))
    assert tokenizer.decode_bytes(tokenizer.encode(TEXT)).decode() == TEXT
    assert isinstance(tokenizer, CharTokenizer) and tokenizer.eot is None
    with pytest.raises(ValueError) as fault:
        tokenizer.encode("1 + é")
    names = "'+' (PLUS SIGN), 'é' (LATIN SMALL LETTER E WITH ACUTE)"
    assert str(fault.value) == f"2 unknown characters: {names}"


def test_gpt2_tokens_go_to_text_and_back(gpt2_files):
    tokenizer = make_tokenizer(GPT2)
    assert tokenizer.encode("Hello world<|endoftext|>") == [15496, 995, 50256]
    assert tokenizer.decode_bytes([15496, 995]) == b"Hello world"
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    assert 50256 not in next(tokenizer.encode_corpus(["a<|endoftext|>b"]))


def test_an_unreachable_tokenizer_names_the_cache(monkeypatch):
    import tiktoken

    def unreachable(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(ValueError, match="no tokenizer gpt2: no network; offline, set TIKTOKEN_CA"):
        BPETokenizer(GPT2)


# --- prepare scripts -----------------------------------------------------------------------------


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
        (["--input=no.txt"], "error: --input=no.txt: give a text file, or a folder with .txt or .md files"),  # noqa: E501
        (["--input=in.txt"], "error: --dataset=: give a new name, of a folder to be made in "),
        (["--input=in.txt", "--dataset=../x"], "error: --dataset=../x: give a new name, of a folder to be made in "),  # noqa: E501
        (["--input=in.txt", "--dataset=own", "--tokenizer=gpt7"], "error: no tokenizer gpt7: Unknown encoding gpt7"),  # noqa: E501
        (["--input=latin1.txt", "--dataset=own"], "error: latin1.txt is not UTF-8 text: "),
    ],
)  # fmt: skip
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
    datasets = pytest.importorskip("datasets")
    out = prepare("openwebtext", f"--input={tmp_path}/docs.jsonl", "--num_proc=1")
    rows = datasets.Dataset.from_dict({"text": documents})
    split = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    encoding = BPETokenizer(GPT2).encoding
    for name, part in (("train", split["train"]), ("val", split["test"])):
        expected = [i for text in part["text"] for i in [*encoding.encode_ordinary(text), 50256]]
        assert read(tmp_path / f"{name}.bin") == expected
        assert f"{name}.bin: {len(expected):,} tokens" in out
    limited = prepare("openwebtext", f"--input={tmp_path}/docs.jsonl", "--limit=10")
    assert "train.bin: 36 tokens" in limited and "val.bin: 4 tokens" in limited


def test_an_interruption_leaves_nothing(prepare, tmp_path, gpt2_files, documents, monkeypatch):
    pytest.importorskip("datasets")
    script = importlib.import_module("data.openwebtext.prepare")
    real = script.encoded

    def interrupted(documents, name, encoding):
        yield from real(documents, name, encoding)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "encoded", interrupted)
    with pytest.raises(SystemExit) as stop:
        prepare("openwebtext", f"--input={tmp_path}/docs.jsonl")
    assert stop.value.code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


def test_a_partial_openwebtext_is_refused(prepare, tmp_path, gpt2_files, documents, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": documents})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    with pytest.raises(SystemExit) as stop:
        prepare("openwebtext")
    assert stop.value.code == "error: the hub gave 40 documents of 8,013,769; try later"
    assert not (tmp_path / "train.bin").exists()


def test_a_prepare_script_runs_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "data" / "text" / "prepare.py"), "--help"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "--val_fraction=0.1" in shown
