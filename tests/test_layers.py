"""Each layer from the inside: the figures against plain ones, and a run that they do not change."""

import math

import pytest
import torch
from conftest import TINY, assert_equal, load, log, losses

import train
from engine.layers import layer_of

LAYERS = {"wte", "wpe", "h.0", "h.1", "ln_f"}


def measured(folder):
    return {entry["iter"]: entry for entry in log(folder) if "clipped" in entry}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_figures_are_the_norms_of_the_step(launch, tiny, monkeypatch, optimizer):
    """Of the second step, from the weights before and after it, saved by runs that end there."""
    options = [*TINY, f"--optimizer={optimizer}", "--grad_clip=0.5", "--lr_decay_iters=9"]
    gradients = {}
    clip = torch.nn.utils.clip_grad_norm_

    def keep(parameters, most):
        parameters = list(parameters)
        norm = clip(parameters, most)
        gradients[len(gradients)] = [p.grad.clone() for p in parameters]
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    for end in (1, 2):
        launch(train, *options, f"--max_iters={end}", f"--out_dir={end}", "--health_interval=1")
    before, after = load("1/ckpt.pt")["model"], load("2/ckpt.pt")["model"]
    names = [name for name in before if name != "lm_head.weight"]
    entry = measured("2")[1]
    for layer in LAYERS:
        mine = [name for name in names if layer_of(name) == layer]
        weight = math.hypot(*(before[name].norm() for name in mine))
        update = math.hypot(*((after[name] - before[name]).norm() for name in mine))
        gradient = math.hypot(*(gradients[2][names.index(name)].norm() for name in mine))
        assert entry[f"weight_norm/{layer}"] == pytest.approx(weight, rel=1e-4)
        assert entry[f"update_ratio/{layer}"] == pytest.approx(update / weight, rel=1e-3)
        assert entry[f"grad_norm/{layer}"] == pytest.approx(gradient, rel=1e-4)
    assert entry["clipped"] == 1.0
    assert entry["attention_score/h.0"] > -math.inf


def test_a_run_that_is_looked_at_is_the_same_run(launch, tiny):
    options = [*TINY, "--dropout=0.1", "--max_iters=6", "--log_interval=1"]
    launch(train, *options, "--out_dir=plain")
    launch(train, *options, "--out_dir=seen", "--health_interval=2")
    assert_equal(load("plain/ckpt.pt"), load("seen/ckpt.pt"))
    assert losses("plain") == losses("seen")
    assert not measured("plain") and sorted(measured("seen")) == [0, 2, 4]


@pytest.mark.slow
def test_sharded_weights_have_the_same_norms(launch, finish, tiny):
    options = [*TINY, "--batch_size=4", "--max_iters=3", "--health_interval=1"]
    launch(train, *options, "--out_dir=one")
    finish(*options, "--fsdp=True", "--out_dir=two", processes=2)
    for step, entry in measured("one").items():
        scores = {name for name in entry if name.startswith("attention")}  # of other sequences
        assert entry.keys() == measured("two")[step].keys()
        expected = {name: entry[name] for name in entry.keys() - scores}
        found = {name: measured("two")[step][name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
