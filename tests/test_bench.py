"""The benchmark, run as a user runs it."""

import json

import pytest
import torch
from conftest import TINY

import bench
import train
from data.tokens import char_meta, write_dataset
from docs import growth


def test_the_benchmark_times_the_real_step(launch, tiny, monkeypatch):
    steps, step = [], train.train_step

    def spy(model, state, batches, number, runtime):
        steps.append(number)
        return step(model, state, batches, number, runtime)

    monkeypatch.setattr(train, "train_step", spy)
    monkeypatch.setattr(bench, "ROOT", tiny)
    out = launch(bench, *TINY, "--steps=5", "--seconds=5", "--profile=True")
    assert steps[:6] == [0, 1, 2, 3, 4, 5]  # one to warm up, then five
    assert steps[-3:] == [0, 1, 2]  # for the profile
    for start in ("hardware: 1 x cpu", "data: train.bin, 3,", "ours: 1 x 4 x 16 tokens, "):
        assert sum(line.startswith(start) for line in out.splitlines()) == 1
    assert json.loads((tiny / "trace.json").read_text())["traceEvents"]
    out = launch(bench, *TINY, "--dataset=no", "--steps=1", "--seconds=0.1")
    assert "data: random.bin" in out and not (tiny / "out").exists()


def test_the_benchmark_compares_with_nanogpts_way(launch, tiny):
    out = launch(bench, *TINY, "--steps=2", "--dropout=0.2", "--baseline=True")
    assert out.count("tokens, median") == 2 and "nanoGPT's way takes " in out
    out = launch(bench, *TINY, "--steps=2", "--baseline=only")
    assert out.count("tokens, median") == 1 and "nanoGPT's way: 1 x 4 x 16 tokens" in out
    out = launch(bench, *TINY, "--new_tokens=20", "--num_samples=3", "--baseline=True")
    assert "ours: 3 x 20 tokens" in out and "nanoGPT's way: 3 x 20 tokens" in out


def test_nanogpts_way_makes_the_same_update(launch, tiny, monkeypatch):
    ids = [n % 7 for n in range(17)]  # one window: both read the same tokens
    write_dataset(tiny / "data" / "tiny", char_meta("abcdefg"), train=[ids], val=[ids])
    built, build = [], train.build_model

    def spy(*arguments):
        built.append(build(*arguments))
        return built[-1]

    monkeypatch.setattr(train, "build_model", spy)
    monkeypatch.setattr(bench, "ROOT", tiny)
    launch(bench, *TINY, "--steps=1", "--seconds=0.1", "--baseline=True")
    assert len(built) == 2
    ours, theirs = (dict(model.named_parameters()) for model in built)
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_growth_script_understands_the_benchmark():
    small = "--dataset=none", "--n_layer=1", "--n_embd=8", "--block_size=16", "--seconds=0.1"
    for options in (small, (*small, "--new_tokens=8")):
        seconds, memory = growth.measure(*options)
        assert 0 < seconds < 60 and 0.1 < memory < 4
