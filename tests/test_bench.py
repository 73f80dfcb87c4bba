"""The benchmark, run as a user runs it."""

import json
import re

import pytest
from conftest import TINY

import bench
import train

FEW = *TINY, "--steps=1", "--seconds=0.1"


def test_the_benchmark_times_the_real_step(launch, tiny, monkeypatch):
    steps, train_step = [], train.train_step

    def watched(model, state, batches, runtime):
        steps.append(state.step)
        return train_step(model, state, batches, runtime)

    monkeypatch.setattr(train, "train_step", watched)
    monkeypatch.setattr(bench, "ROOT", tiny)
    out = launch(bench, *TINY, "--steps=5", "--seconds=5", "--profile", "--batch_ramp_iters=2")
    assert "data: train.bin, 3,519 tokens" in out.splitlines()
    assert steps[:6] == [2, 3, 4, 5, 6, 7] and len(steps) >= 9  # a first one, 5, and the profile
    assert json.loads((tiny / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("work, tokens", [([], 64), (["--new_tokens=9", "--num_samples=3"], 27)])
def test_training_and_sampling_print_their_speed(launch, tiny, work, tokens):
    out = launch(bench, *FEW, "--dataset=none", *work)
    assert out.startswith("hardware: 1 x cpu with ")
    pattern = rf"{tokens} tokens in [\d.]+ ms \(median of \d+, [\d.]+ to [\d.]+\), [\d,]+ tokens/s"
    assert re.search(pattern, out)
    assert ("TFLOP/s" in out) == (not work)
    assert not (tiny / "out").exists()
