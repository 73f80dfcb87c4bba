"""Which sequences a step reads: the same for everyone who asks, shared among the ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.batches import Batches, sequences_at, tokens_until
from data.tokens import TokenFile, write_dataset
from engine.process import UserError

GROWING = {"batch_ramp_iters": 8, "batch_ramp_start": 1 / 3}  # 4, 5, ... 12, 12 sequences


@pytest.fixture
def draw(tmp_path):
    """Return a function that makes the Batches of a rank, of 12 sequences of 5 tokens a step.

    The data are the numbers 0 to `size` - 1.
    """

    def make(size=100, rank=0, ranks=1, batch_size=3, **settings):
        write_dataset(tmp_path, {"vocab_size": size}, train=[range(size)])
        tokens = TokenFile(tmp_path / "train.bin", {"vocab_size": size}, 4)
        config = {"batch_size": batch_size, "gradient_accumulation_steps": 12 // batch_size}
        config |= {"block_size": 4, "seed": 1337, "sampling": "random"}
        config |= {"batch_ramp_iters": 0, "batch_ramp_start": 1.0}
        runtime = SimpleNamespace(rank=rank, world_size=ranks, device=torch.device("cpu"))
        return Batches(tokens, config | settings, runtime)

    return make


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_a_step_reads_the_same_sequences_whatever_was_asked_before(draw, sampling):
    expected = [torch.cat(draw(sampling=sampling)(step)).tolist() for step in range(6)]
    batches = draw(sampling=sampling)
    for step in (5, 2, 2, 3):
        assert torch.cat(batches(step)).tolist() == expected[step] != expected[step - 1]
    assert torch.cat(draw(sampling=sampling, seed=1338)(0)).tolist() != expected[0]


def test_random_windows_are_drawn_from_the_seed_and_the_step(draw):
    for step in (0, 3):
        starts = np.random.default_rng([1337, step]).integers(96, size=12)
        assert torch.cat(draw()(step)).tolist() == [[*range(s, s + 5)] for s in starts]


@pytest.mark.parametrize("step", range(10))
def test_ranks_share_a_growing_step_in_equally_many_micro_batches(draw, step):
    expected = torch.cat(draw(**GROWING)(step)).tolist()
    assert len(expected) == min(12, 4 + step)
    for ranks in (2, 3, 4):
        shares = [draw(rank=rank, ranks=ranks, **GROWING)(step) for rank in range(ranks)]
        assert torch.cat([torch.cat(share) for share in shares]).tolist() == expected
        assert len({len(share) for share in shares}) == 1
        assert {1, 2, 3} >= {len(micro_batch) for share in shares for micro_batch in share}
        sizes = [sum(map(len, share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_processes_that_cannot_share_a_step_get_a_line(draw):
    for ranks, settings in ((5, {}), (6, GROWING)):
        with pytest.raises(UserError, match=f"^{ranks} processes cannot share 12 sequences"):
            draw(ranks=ranks, **settings)


def test_the_tokens_of_the_steps_add_up(draw):
    config = draw(**GROWING).config
    for step in range(12):
        assert tokens_until(step, config) == 4 * sum(sequences_at(s, config) for s in range(step))


@pytest.mark.parametrize("growing", [{}, GROWING])
def test_an_epoch_has_each_window_once_in_a_new_order_from_a_new_start(draw, growing):
    batches = draw(203, sampling="epochs", **growing)  # 49 windows of 4
    rows = torch.cat([torch.cat(batches(step)) for step in range(17)])
    epochs = [rows[49 * epoch : 49 * (epoch + 1), 0].tolist() for epoch in range(3)]
    for starts in epochs:
        assert sorted(starts) == list(range(min(starts), min(starts) + 4 * 49, 4)) != starts
    assert len({min(starts) for starts in epochs}) > 1
    orders = {tuple(start - min(starts) for start in starts) for starts in epochs}
    assert len(orders) == 3


@pytest.mark.parametrize("size", range(5, 24))
def test_epochs_of_the_smallest_files_stay_inside(draw, size):
    batches = draw(size, sampling="epochs")
    rows = torch.cat([torch.cat(batches(step)) for step in range(9)])
    assert (rows == rows[:, :1] + torch.arange(5)).all() and rows.max() < size
