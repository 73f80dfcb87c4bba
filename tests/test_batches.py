"""What each step reads: the same whoever asks, shared among ranks, each window once per epoch."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import META, token_file

from data.batches import Batches, permute
from data.tokens import TokenFile, write_dataset
from engine.process import UserError
from engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32, False, 0, 1, "cpu", "")


def ranks(world_size):
    return [replace(CPU, rank=rank, world_size=world_size) for rank in range(world_size)]


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


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_the_steps_of_several_files_are_those_of_one(tmp_path, sampling):
    ids = np.arange(100) % 97
    one = draw_from(token_file(tmp_path / "train.bin", ids), sampling=sampling)
    (tmp_path / "cut").mkdir()
    parts = {f"train_{n:04}": [part] for n, part in enumerate(np.split(ids, [3, 50, 51, 99]))}
    write_dataset(tmp_path / "cut", META, **parts)
    several = TokenFile(tmp_path / "cut" / "train.bin", META, 4)
    many = draw_from(several, sampling=sampling)
    for step in range(20):
        pairs = zip(one(step), many(step), strict=True)
        assert all(torch.equal(left, right) for left, right in pairs)


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
