"""Token files and tokenizers."""

import os
import pickle

import numpy as np
import pytest
import torch

from data.bpe import train_bpe
from data.tokenizer import GPT2, make_meta, make_tokenizer, read_meta
from data.tokens import TokenFile, write_dataset
from engine.process import UserError

META = {"vocab_size": 100}


def token_file(path, ids, block_size=4):
    """Write ids to `path` and open it."""
    path.write_bytes(np.asarray(ids, "<u2").tobytes())
    return TokenFile(path, META, block_size)


def test_a_dataset_is_nanogpts_raw_uint16_and_plain_pickle(tmp_path):
    write_dataset(tmp_path, make_meta("char", ["ab", "\n"]), train=[[0, 1], [2]], val=[[1]])
    ids = [(tmp_path / name).read_bytes() for name in ("train.bin", "val.bin")]
    assert ids == [b"\0\0\1\0\2\0", b"\1\0"]
    tables = {"itos": {0: "\n", 1: "a", 2: "b"}, "stoi": {"\n": 0, "a": 1, "b": 2}}
    assert pickle.loads((tmp_path / "meta.pkl").read_bytes()) == {"vocab_size": 3, **tables}


@pytest.mark.parametrize("vocab_size, size", [(65536, 10), (65537, 20)])
def test_every_id_arrives_on_the_device_as_it_was_written(tmp_path, vocab_size, size):
    ids = [0, 1, 2**15 - 1, 2**15, vocab_size - 1]
    write_dataset(tmp_path, {"vocab_size": vocab_size}, train=[ids])
    assert (tmp_path / "train.bin").stat().st_size == size
    tokens = TokenFile(tmp_path / "train.bin", read_meta(tmp_path), 4)
    sent = tokens.windows(np.array([0]), 5)
    assert sent.dtype == torch.int64 and sent.tolist() == [ids]


def test_a_dataset_in_gpt2_tokens_has_no_meta(tmp_path):
    write_dataset(tmp_path, META, train=[[1] * 5])
    write_dataset(tmp_path, GPT2, train=[[50_256] * 5])
    assert read_meta(tmp_path) == GPT2 and not (tmp_path / "meta.pkl").exists()


def test_an_error_while_writing_keeps_the_old_dataset(tmp_path):
    write_dataset(tmp_path, META, train=[[1, 2, 3]], val=[[4]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken():
        yield [5] * 1000
        raise OSError("disk full")

    with pytest.raises(UserError, match="disk full"):
        write_dataset(tmp_path, GPT2, train=[[9]], val=broken())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "content, line",
    [
        (None, "No such file or directory"),
        (b"", "cannot mmap an empty file"),
        (bytes(11), "Size of .*available data is not a multiple of the data-type size"),
        (bytes(8), "has 4 tokens, too few for block_size=4"),
        (b"\1\0" * 50 + b"\x64\0", "contains token id 100, but the vocabulary has only 100 tokens"),
    ],
)
def test_a_file_that_cannot_be_trained_on_gets_a_line(tmp_path, content, line):
    path = tmp_path / "train.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} .*{line}"):
        TokenFile(path, META, 4)


def test_ids_beyond_the_vocabulary_are_found_when_they_are_read_too(tmp_path):
    tokens = token_file(tmp_path / "train.bin", [1] * 50)
    np.memmap(tmp_path / "train.bin", "<u2", "r+")[9] = 100  # not there when it was opened
    assert tokens.windows(np.array([0, 4, 10]), 5).tolist() == [[1] * 5] * 3
    with pytest.raises(UserError, match="contains token id 100"):
        tokens.windows(np.array([0, 5]), 5)


def test_a_digest_identifies_a_file_and_reads_little_of_a_large_one(tmp_path):
    path = tmp_path / "a.bin"
    first = token_file(path, range(90)).digest()
    assert token_file(path, range(90)).digest() == first != token_file(path, [1] * 90).digest()
    os.truncate(path, 2**40)  # a terabyte, mostly a hole
    assert TokenFile(path, META, 4).digest().startswith("549755813888 tokens, SHA-256 ")


def test_evaluation_windows_are_all_or_evenly_spaced(tmp_path):
    tokens = token_file(tmp_path / "val.bin", [1] * 50)
    assert tokens.evenly_spaced(4, maximum=100).tolist() == list(range(0, 48, 4))
    assert tokens.evenly_spaced(4, maximum=3).tolist() == [0, 16, 32]


# --- tokenizers ----------------------------------------------------------------------------------


def test_characters_become_ids_and_back_and_unknown_ones_are_named():
    tokenizer = make_tokenizer(make_meta("char", ["1 plus 2"]))
    assert tokenizer.decode_bytes(tokenizer.encode("plus 12")) == b"plus 12"
    with pytest.raises(UserError, match="^2 unknown characters: '\\+é'$"):
        tokenizer.encode("1 + é")


def test_gpt2_tokens_become_text_and_back(gpt2_files):
    tokenizer = make_tokenizer(GPT2)
    assert tokenizer.encode("Hello world<|endoftext|>") == [15496, 995, 50256]
    assert tokenizer.decode_bytes([15496, 995]) == b"Hello world"
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    assert 50256 not in next(tokenizer.encode_batch(["a<|endoftext|>b"]))


def test_byte_pairs_of_a_text_without_spaces_are_learned_in_seconds():
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 1_500_000))
    assert train_bpe([text], 300)["vocab_size"] == 300
