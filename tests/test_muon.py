"""Muon: against singular values, against torch.optim.Muon, and in runs that stop and go on."""

import copy

import pytest
import torch
from conftest import TINY, assert_equal, load, losses

import train
from engine import muon
from engine.muon import Muon, orthogonalize_all
from model import GPT, GPTConfig

MUON = [*TINY, "--optimizer=muon", "--lr_decay_iters=8", "--dropout=0.2"]
slow = pytest.mark.slow


def matrix(rows, columns, smallest=0.01):
    """Return a random matrix with singular values from `smallest` to 1."""
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), min(rows, columns))
    left, right = (torch.linalg.qr(torch.randn(n, len(values))).Q for n in (rows, columns))
    return left * values @ right.T


def test_singular_values_come_near_1():
    torch.manual_seed(0)
    shapes = (64, 64), (96, 32), (32, 96), (64, 64), (1, 8)
    for given, result in zip(shapes, orthogonalize_all([matrix(*s) for s in shapes]), strict=True):
        values = torch.linalg.svdvals(result)
        assert result.shape == given and values.min() > 0.7 and values.max() < 1.3


def test_the_directions_stay():
    """U S V^T becomes U V^T: of a matrix times its transpose, that is positive definite."""
    torch.manual_seed(0)
    given = matrix(48, 32)
    (result,) = orthogonalize_all([given])
    product = result.T @ given
    torch.testing.assert_close(product, product.T, atol=1e-5, rtol=0)
    assert torch.linalg.eigvalsh(product).min() > 0


def updated(weights, gradients, **group):
    """Return what `weights` become in a step of Muon for each of the gradients."""
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = Muon([{"params": [parameter], "momentum": 0.95, **group}], lr=0.1, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (32, 96)])
def test_a_step_equals_that_of_pytorchs_muon(monkeypatch, shape):
    """It computes in bfloat16, so the two differ by a hundredth of an update."""
    monkeypatch.setattr(muon, "POLYNOMIALS", [(3.4445, -4.7750, 2.0315)] * 5)
    torch.manual_seed(0)
    weights, gradients = torch.randn(shape), [matrix(*shape) for _ in range(3)]
    theirs = torch.nn.Parameter(weights.clone())
    options = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95}
    optimizer = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
    ours = updated(weights, gradients, parts=1)
    moved = (theirs - weights).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_queries_keys_and_values_are_three_matrices():
    torch.manual_seed(0)
    weights, gradients = torch.randn(96, 32), [torch.randn(96, 32) for _ in range(2)]
    whole = updated(weights, gradients, parts=3)
    for rows in (slice(0, 32), slice(32, 64), slice(64, 96)):
        alone = updated(weights[rows], [gradient[rows] for gradient in gradients], parts=1)
        torch.testing.assert_close(whole[rows], alone)


def test_the_matrices_of_the_blocks_and_no_others_are_muons():
    model = GPT(GPTConfig(16, 20, 2, 2, 32, bias=True))
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", "muon").param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    fused, others, tables, vectors = [[names[p] for p in group["params"]] for group in groups]
    assert all(name.endswith(".c_attn.weight") for name in fused) and groups[0]["parts"] == 3
    assert {name.split(".", 3)[3] for name in others} == {
        "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
    }  # fmt: skip
    assert tables == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all("ln_" in name or name.endswith(".bias") for name in vectors)
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_momentum():
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 20, 2, 2, 32))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu", "muon")
    idx = torch.randint(20, (4, 16))
    snapshots = []  # of all that a checkpoint holds
    for bad in (0.0, 1.0):
        model(idx, idx)[1].backward()
        if bad:
            model.transformer.h[0].attn.c_attn.weight.grad[3, 3] = torch.nan
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
        both = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        snapshots.append(copy.deepcopy(both))
    assert_equal(*snapshots)


def test_a_stopped_run_goes_on_exactly(launch, tiny):
    launch(train, *MUON, "--max_iters=8", "--out_dir=straight")
    launch(train, *MUON, "--max_iters=4", "--out_dir=resumed")
    launch(train, "--init_from=resume", "--out_dir=resumed", "--max_iters=8")
    assert_equal(load("straight/ckpt.pt"), load("resumed/ckpt.pt"))
    assert losses("straight") == losses("resumed")


def test_an_unknown_optimizer_gets_the_known_ones(launch, tiny):
    with pytest.raises(SystemExit, match="error: optimizer=sgd: choose adamw or muon"):
        launch(train, *TINY, "--optimizer=sgd")


def test_another_optimizer_cannot_take_over(launch, tiny):
    launch(train, *TINY, "--max_iters=2")
    with pytest.raises(SystemExit, match="has optimizer=adamw; leave --optimizer out"):
        launch(train, "--init_from=resume", "--optimizer=muon", "--max_iters=4")


@slow
@pytest.mark.parametrize("processes, sharded", [(2, True), (3, False)])
def test_some_processes_equal_1_and_resume_exactly(launch, finish, tiny, processes, sharded):
    options = [*MUON, "--dropout=0", f"--gradient_accumulation_steps={processes}"]
    shard = f"--fsdp={sharded}"
    launch(train, *options, "--max_iters=8", "--out_dir=one")
    finish(*options, "--max_iters=8", shard, "--out_dir=straight", processes=processes)
    finish(*options, "--max_iters=4", shard, "--out_dir=two", processes=processes)
    finish("--init_from=resume", "--out_dir=two", "--max_iters=8", processes=processes)
    assert losses("one") == pytest.approx(losses("straight"), rel=1e-5)
    assert_equal(load("one/ckpt.pt"), load("straight/ckpt.pt"), atol=1e-4, rtol=0)
    assert_equal(load("straight/ckpt.pt"), load("two/ckpt.pt"))
