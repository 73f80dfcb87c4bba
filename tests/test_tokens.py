"""Token files and tokenizers."""

import pickle

import numpy as np
import pytest
import torch
from conftest import META, TEXT, token_file

from data.tokenizer import GPT2, BPETokenizer, CharTokenizer, char_meta, make_tokenizer, read_meta
from data.tokens import TokenFile, send, write_dataset
from engine.process import UserError, atomic


def test_a_dataset_is_nanogpts_raw_uint16_and_plain_pickle(tmp_path):
    meta = char_meta("ab\n")
    write_dataset(tmp_path, meta, train=[[0, 1], [2]], val=[[1]])
    assert (tmp_path / "train.bin").read_bytes() == b"\0\0\1\0\2\0"
    assert np.memmap(tmp_path / "val.bin", np.uint16).tolist() == [1]
    with open(tmp_path / "meta.pkl", "rb") as file:
        assert pickle.load(file) == meta
    tables = {"itos": {0: "\n", 1: "a", 2: "b"}, "stoi": {"\n": 0, "a": 1, "b": 2}}
    assert meta == {"vocab_size": 3, **tables}


def test_a_large_vocabulary_takes_uint32_and_gpt2_no_meta(tmp_path):
    large = {"vocab_size": 100_000, "tokenizer": "cl100k_base"}
    write_dataset(tmp_path, large, train=[[99_999] * 5])
    assert (tmp_path / "train.bin").stat().st_size == 20
    assert TokenFile(tmp_path / "train.bin", read_meta(tmp_path), 4).ids[:].tolist() == [99_999] * 5
    write_dataset(tmp_path, GPT2, train=[[50_256] * 5])
    assert read_meta(tmp_path) == GPT2 and not (tmp_path / "meta.pkl").exists()
    assert (tmp_path / "train.bin").stat().st_size == 10


def test_bytes_per_token_counts_utf8_and_skips_padding_and_ends(tmp_path, gpt2_files):
    meta = char_meta("aé東")
    tokens = token_file(tmp_path / "val.bin", [0, 0, 1, 2, 2], meta)
    assert tokens.bytes_per_token() == (1 + 1 + 2 + 3 + 3) / 5
    ids = BPETokenizer(GPT2).encode("Hello there<|endoftext|>")
    tokens = token_file(tmp_path / "val.bin", [*ids, 50300, 50300], GPT2)
    assert tokens.bytes_per_token() == len("Hello there") / 5


@pytest.mark.parametrize("meta", [META | {"stoi": {"a": 7}}, GPT2, {"vocab_size": 100}])
def test_bytes_per_token_are_none_where_they_are_not_known(tmp_path, monkeypatch, meta):
    """Damaged tables; tiktoken's files not here; a meta.pkl of nanoGPT's that names nothing."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "nothing"))
    assert token_file(tmp_path / "val.bin", [0] * 9, meta).bytes_per_token() is None


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


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    path = tmp_path / "mine" / "train.bin"
    path.parent.mkdir()
    (path.parent / "prepare.py").touch()
    with pytest.raises(ValueError, match=f"make it: python {path.parent}/prepare.py$"):
        TokenFile(path, META, 4)


def test_ids_beyond_the_vocabulary_of_a_large_file_are_found_in_their_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("data.tokens.SCAN_BYTES", 0)
    tokens = token_file(tmp_path / "train.bin", [1] * 50 + [100] + [1] * 50)
    assert tokens.windows(np.array([0, 45]), 5).tolist() == [[1] * 5] * 2
    with pytest.raises(ValueError, match="holds id 100, the vocabulary 100"):
        tokens.windows(np.array([46]), 5)


def test_a_digest_tells_files_apart_and_reads_little_of_a_large_one(tmp_path, monkeypatch):
    first = token_file(tmp_path / "a.bin", range(90)).digest()
    assert token_file(tmp_path / "b.bin", range(90)).digest() == first
    assert token_file(tmp_path / "b.bin", [*range(89), 0]).digest() != first
    assert token_file(tmp_path / "b.bin", [*range(89, -1, -1)]).digest() != first
    assert first.startswith("90 tokens, SHA-256 ")
    with open(tmp_path / "large.bin", "wb") as file:
        file.truncate(2**40)  # a terabyte, of holes
    assert TokenFile(tmp_path / "large.bin", META, 4).digest().startswith("549755813888 tokens")


def test_windows_to_evaluate_on_are_all_or_evenly_spaced(tmp_path):
    tokens = token_file(tmp_path / "val.bin", [1] * 50)
    assert tokens.evenly_spaced(4, most=100).tolist() == list(range(0, 48, 4))
    assert tokens.evenly_spaced(4, most=3).tolist() == [0, 16, 32]


@pytest.mark.parametrize("vocab_size", [65536, 65537])
def test_every_id_arrives_on_the_device_as_it_was_written(tmp_path, vocab_size):
    ids = [0, 1, 2**15 - 1, 2**15, vocab_size - 1]
    write_dataset(tmp_path, {"vocab_size": vocab_size}, train=[ids])
    tokens = TokenFile(tmp_path / "train.bin", read_meta(tmp_path), 4)
    sent = send(tokens.windows(np.array([0]), 5), torch.device("cpu"))
    assert sent.dtype == torch.int64 and sent.tolist() == [ids]


# --- several files -------------------------------------------------------------------------------

LONG = {"vocab_size": 97}


@pytest.fixture(params=[[], [50], [1, 2, 3, 50, 50, 99], [7, 49, 50, 51], range(5, 100, 5)])
def both(tmp_path, request, monkeypatch):
    """Open the same 100 ids as one file and as several, cut at the places of the parameter."""
    monkeypatch.setattr("data.tokens.SAMPLE", 7)  # bytes: pieces of the digest cross a cut
    ids = np.arange(100) * 31 % 97
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    write_dataset(tmp_path / "one", LONG, train=[ids])
    for number, part in enumerate(np.split(ids, request.param)):
        write_dataset(tmp_path / "many", LONG, **{f"train_{number:04}": [part]})
    return [TokenFile(tmp_path / name / "train.bin", LONG, 4) for name in ("one", "many")]


@pytest.mark.parametrize("large", [False, True])
def test_several_files_are_read_as_one(both, monkeypatch, large):
    if large:
        monkeypatch.setattr("data.tokens.SCAN_BYTES", 0)
    one, many = both
    for tokens in both:
        tokens.limit(97)
    assert len(one.ids) == len(many.ids) == 100 and one.digest() == many.digest()
    for length in (1, 5, 60, 100):
        starts = np.arange(101 - length)
        assert torch.equal(one.windows(starts, length), many.windows(starts, length))
    for most in (3, 100):
        assert (one.evenly_spaced(4, most) == many.evenly_spaced(4, most)).all()
    assert all((one.ids[a:b] == many.ids[a:b]).all() for a in range(100) for b in range(a, 101))


def test_bytes_per_token_count_all_files(tmp_path):
    meta = char_meta("aé東")
    ids = [0, 0, 1, 2, 2]
    write_dataset(tmp_path, meta, val_0000=[ids[:2]], val_0001=[ids[2:]])
    one = token_file(tmp_path / "one.bin", ids, meta)
    several = TokenFile(tmp_path / "val.bin", meta, 4)
    assert several.bytes_per_token() == one.bytes_per_token() == (1 + 1 + 2 + 3 + 3) / 5


def test_an_id_beyond_the_vocabulary_is_found_in_any_file(tmp_path):
    write_dataset(tmp_path, META, train_0000=[[1] * 9], train_0001=[[100]])
    with pytest.raises(UserError, match=r"train_\*.bin holds id 100, the vocabulary 100"):
        TokenFile(tmp_path / "train.bin", META, 4)


@pytest.mark.parametrize(
    "names, line",
    [
        (["train_0000", "train_0002"], "lacks train_0001.bin but has a later one; copy it again"),
        (["train_0001"], "lacks train_0000.bin but has a later one; copy it again"),
        (["train_0000", "train_1"], "lacks train_0001.bin but has a later one; copy it again"),
        (["train_0000", "train"], "has train.bin and train_0000.bin; remove one of them"),
    ],
)
def test_a_gap_among_the_files_and_two_of_a_kind_get_a_line(tmp_path, names, line):
    for name in names:
        (tmp_path / f"{name}.bin").write_bytes(bytes(18))
    with pytest.raises(UserError, match=f"^{tmp_path} {line}$"):
        TokenFile(tmp_path / "train.bin", META, 4)


def test_half_a_token_in_any_file_is_found(tmp_path):
    write_dataset(tmp_path, META, train_0000=[[1] * 9], train_0001=[[1] * 9])
    with open(tmp_path / "train_0000.bin", "ab") as file:
        file.write(b"1")
    with pytest.raises(UserError, match="train_.*.bin holds 18 tokens and 1 bytes; block_size=4 "):
        TokenFile(tmp_path / "train.bin", META, 4)


def test_another_name_is_no_part_of_a_split(tmp_path):
    write_dataset(tmp_path, META, train=[[1] * 9], train_old=[[2] * 9], trainer_0000=[[3] * 9])
    assert set(TokenFile(tmp_path / "train.bin", META, 4).ids[:].tolist()) == {1}


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


def test_a_dataset_of_one_file_takes_the_place_of_one_of_many(tmp_path):
    write_dataset(tmp_path, META, train=[range(9)], val=[range(3)])
    for number in range(2):
        (tmp_path / f"train_{number:04}.bin").write_bytes((tmp_path / "train.bin").read_bytes())
    (tmp_path / "train_old.bin").touch()
    write_dataset(tmp_path, META, train=[range(5)], val=[range(3)])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["meta.pkl", "train.bin", "train_old.bin", "val.bin"]
