"""Token files, batches and tokenizers."""

import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEXT

from data.tokenizer import GPT2, BPETokenizer, CharTokenizer, char_meta, make_tokenizer, read_meta
from data.tokens import Batches, TokenFile, permute, send, write_dataset
from engine.process import UserError, atomic
from engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32, False, 0, 1, "cpu", "")
META = {"vocab_size": 100, "stoi": {}, "itos": {}}


def ranks(world_size):
    return [replace(CPU, rank=rank, world_size=world_size) for rank in range(world_size)]


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
    tables = {"itos": {0: "\n", 1: "a", 2: "b"}, "stoi": {"\n": 0, "a": 1, "b": 2}}
    assert meta == {"vocab_size": 3, **tables}


def test_a_large_vocabulary_takes_uint32_and_gpt2_no_meta(tmp_path):
    large = {"vocab_size": 100_000, "tokenizer": "cl100k_base"}
    write_dataset(tmp_path, large, train=[[99_999] * 5])
    assert (tmp_path / "train.bin").stat().st_size == 20
    assert TokenFile(tmp_path / "train.bin", read_meta(tmp_path), 4).ids.tolist() == [99_999] * 5
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


# --- batches -------------------------------------------------------------------------------------


def draw_from(tokens, runtime=CPU, batch_size=4, **given):
    config = dict(batch_size=batch_size, gradient_accumulation_steps=12 // batch_size)
    config |= dict(block_size=4, seed=1337, batch_ramp_iters=0, batch_ramp_start=0.5, max_iters=99)
    config |= dict(sampling="random")
    return Batches(tokens, config | given, runtime)


GROWING = dict(batch_ramp_iters=8, batch_ramp_start=1 / 3)  # 4, 5, ... 12, 12 sequences


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_a_step_reads_the_same_sequences_whoever_asks_when(tmp_path, sampling):
    tokens = token_file(tmp_path / "train.bin", np.arange(100) % 97)
    straight = draw_from(tokens, sampling=sampling)
    expected = [torch.cat(straight(step)).tolist() for step in range(6)]
    again = draw_from(tokens, sampling=sampling)
    for step in (5, 2, 2, 3):
        assert torch.cat(again(step)).tolist() == expected[step]
    other = draw_from(tokens, seed=1338, sampling=sampling)
    assert torch.cat(other(0)).tolist() != expected[0] != expected[1]
    for world_size in (2, 3, 4):
        shares = [draw_from(tokens, run, sampling=sampling)(5) for run in ranks(world_size)]
        assert torch.cat([torch.cat(share) for share in shares]).tolist() == expected[5]
        assert len({sum(map(len, share)) for share in shares}) == 1
        assert max(len(micro_batch) for share in shares for micro_batch in share) <= 4


def test_no_micro_batch_is_empty_where_it_holds_one_sequence(tmp_path):
    tokens = token_file(tmp_path / "train.bin", np.arange(100) % 97)
    for step in range(10):
        for run in ranks(4):
            share = draw_from(tokens, run, 1, **GROWING)(step)
            assert set(map(len, share)) <= {1, 2}


@pytest.mark.parametrize("step", range(10))
def test_a_growing_step_is_shared_within_one_and_in_as_many_micro_batches(tmp_path, step):
    tokens = token_file(tmp_path / "train.bin", np.arange(100) % 97)
    expected = torch.cat(draw_from(tokens, CPU, 3, **GROWING)(step)).tolist()
    assert len(expected) == min(12, 4 + step)
    for world_size in (2, 3, 4):
        shares = [draw_from(tokens, run, 3, **GROWING)(step) for run in ranks(world_size)]
        assert torch.cat([torch.cat(share) for share in shares]).tolist() == expected
        assert len({len(share) for share in shares}) == 1
        assert {1, 2, 3} >= {len(micro_batch) for share in shares for micro_batch in share}
        sizes = [sum(map(len, share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    with pytest.raises(UserError, match="divide among 1, 2, 3, 4 processes, not among 6"):
        draw_from(tokens, ranks(6)[0], 3, **GROWING)


def test_a_growing_step_reaches_its_size_and_the_tokens_add_up(tmp_path):
    tokens = token_file(tmp_path / "train.bin", np.arange(100) % 97)
    steady = draw_from(tokens)
    assert [steady.sequences_at(step) for step in (0, 1, 100)] == [12, 12, 12]
    growing = draw_from(tokens, batch_ramp_iters=6)
    assert [growing.sequences_at(step) for step in range(8)] == [6, 7, 8, 9, 10, 11, 12, 12]
    for first in range(9):
        for last in range(first, 12):
            expected = 4 * sum(map(growing.sequences_at, range(first, last)))
            assert growing.tokens_until(last) - growing.tokens_until(first) == expected


@pytest.mark.parametrize("growing", [{}, GROWING])
def test_an_epoch_has_each_window_once_in_another_order_from_another_start(tmp_path, growing):
    meta = {"vocab_size": 203}
    tokens = token_file(tmp_path / "train.bin", np.arange(203), meta)  # 49 windows of 4
    batches = draw_from(tokens, sampling="epochs", **growing)
    rows = torch.cat([torch.cat(batches(step)) for step in range(17)])
    epochs = [rows[49 * epoch : 49 * (epoch + 1)] for epoch in range(3)]
    starts = [epoch[:, 0].tolist() for epoch in epochs]
    offsets = [min(each) for each in starts]
    for offset, each, epoch in zip(offsets, starts, epochs, strict=True):
        assert sorted(each) == list(range(offset, offset + 4 * 49, 4)) != each
        assert (epoch == epoch[:, :1] + torch.arange(5)).all()
    assert len(set(offsets)) > 1 and offsets[0] < 4
    orders = [[(start - min(each)) // 4 for start in each] for each in starts]
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("size", range(5, 24))
def test_epochs_of_the_smallest_files_stay_inside(tmp_path, size):
    tokens = token_file(tmp_path / "train.bin", np.arange(size))
    batches = draw_from(tokens, sampling="epochs")
    rows = torch.cat([torch.cat(batches(step)) for step in range(9)])
    assert (rows == rows[:, :1] + torch.arange(5)).all() and rows.max() < size


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 1000])
def test_permute_is_a_permutation_that_its_keys_choose(size):
    def order(seed):
        keys = np.random.default_rng(seed).integers(2**63, size=6, dtype=np.uint64)
        return permute(np.arange(size), size, keys).tolist()

    assert sorted(order(1)) == list(range(size))
    assert size < 6 or order(1) != order(2)


def test_a_permutation_of_ten_billion_takes_no_memory_and_spreads_neighbours():
    keys = np.random.default_rng(0).integers(2**63, size=6, dtype=np.uint64)
    places = permute(np.arange(20_000), 10**10, keys)
    assert places.min() >= 0 and places.max() < 10**10 and len(set(places.tolist())) == 20_000
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05  # as of drawn numbers: 0.007
    assert abs(places.mean() / 10**10 - 0.5) < 0.02


def test_windows_are_runs_of_the_file_and_every_start_occurs(tmp_path):
    tokens = token_file(tmp_path / "train.bin", np.arange(20))
    batches = draw_from(tokens, CPU, 8)
    rows = torch.cat([torch.cat(batches(step)) for step in range(50)])
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
    batches = draw_from(tokens, CPU, 16, gradient_accumulation_steps=8, block_size=1024)

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
