"""The benchmark, run as a user runs it."""

import json
import re

import pytest
import torch
from conftest import TINY

import bench
import train
from data.tokenizer import char_meta
from data.tokens import write_dataset
from docs import growth

# What follows `ours: ` or `nanoGPT's way: ` and the shape of the work.
RATE = r" tokens, median [\d.]+ ms \([\d.]+ to [\d.]+ in \d+ laps\), [\d,]+ tokens/s"
FLOPS = r"  [\d.]+ TFLOP/s, mfu unknown: no peak for this device"
RATIO = r"nanoGPT's way takes \d+\.\d\d times as long"
MEMORY = r"peak memory: \d+\.\d\d GiB"
FEW = *TINY, "--steps=1", "--seconds=0.1"


@pytest.fixture
def built(monkeypatch):
    """Note the models that the benchmark builds."""
    models, build = [], train.build_model

    def spy(*arguments):
        models.append(build(*arguments))
        return models[-1]

    monkeypatch.setattr(train, "build_model", spy)
    return models


def test_the_benchmark_times_the_real_step(launch, tiny, monkeypatch):
    steps, step = [], train.train_step

    def spy(model, state, batches, number, runtime):
        steps.append(number)
        return step(model, state, batches, number, runtime)

    monkeypatch.setattr(train, "train_step", spy)
    monkeypatch.setattr(bench, "ROOT", tiny)
    launch(bench, *TINY, "--steps=5", "--seconds=5", "--profile=True")
    assert steps[:6] == [0, 1, 2, 3, 4, 5]  # one to warm up, then five
    assert steps[-3:] == [0, 1, 2]  # for the profile
    assert json.loads((tiny / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    "options, lines",
    [
        ([], ["ours: 1 x 4 x 16" + RATE, FLOPS]),
        (["--baseline=only"], ["nanoGPT's way: 1 x 4 x 16" + RATE, FLOPS]),
        (
            ["--baseline=True", "--gradient_accumulation_steps=2", "--dropout=0.2"],
            ["ours: 2 x 4 x 16" + RATE, FLOPS, "nanoGPT's way: 2 x 4 x 16" + RATE, FLOPS, RATIO],
        ),
        (
            ["--baseline=True", "--new_tokens=9", "--num_samples=3"],
            ["ours: 3 x 9" + RATE, "nanoGPT's way: 3 x 9" + RATE, RATIO],
        ),
    ],
)
def test_each_mode_prints_its_lines(launch, tiny, options, lines):
    found = launch(bench, *FEW, "--dataset=none", *options).splitlines()
    expected = ["hardware: 1 x cpu, float32 .+", "data: random.bin, 1,048,592 tokens"]
    for line, pattern in zip(found, [*expected, *lines, MEMORY], strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    assert not (tiny / "out").exists()


@pytest.mark.parametrize("work", [[], ["--new_tokens=2"]])
def test_nanogpts_way_is_the_model_without_fast_parts(launch, tiny, built, work):
    launch(bench, *FEW, "--baseline=True", *work)
    ours, theirs = built
    assert "head_loss" in vars(ours) and "head_loss" not in vars(theirs)
    assert not any("forward" in vars(module) for module in theirs.modules())


def test_nanogpts_way_makes_the_same_update(launch, tiny, built, monkeypatch):
    ids = [n % 7 for n in range(17)]  # one window: both read the same tokens
    write_dataset(tiny / "data" / "tiny", char_meta("abcdefg"), train=[ids], val=[ids])
    monkeypatch.setattr(bench, "ROOT", tiny)
    assert "data: train.bin, 17 tokens" in launch(bench, *FEW, "--baseline=True")
    ours, theirs = (dict(model.named_parameters()) for model in built)
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_growth_script_understands_the_benchmark():
    small = "--dataset=none", "--n_layer=1", "--n_embd=8", "--block_size=16", "--seconds=0.1"
    for options in (small, (*small, "--new_tokens=8")):
        seconds, memory = growth.measure(*options)
        assert 0 < seconds < 60 and 0.1 < memory < 4
