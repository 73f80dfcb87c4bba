"""Muon: against singular values, against torch.optim.Muon, and with several processes."""

import pytest
import torch
from conftest import TINY, assert_equal, load, losses

import train
from engine import muon
from engine.muon import Muon, orthogonalize
from model import GPT, GPTConfig


def matrix(rows, columns):
    """Return a random matrix with singular values from 0.01 to 1."""
    values = torch.logspace(0, -2, min(rows, columns))
    left, right = (torch.linalg.qr(torch.randn(n, len(values))).Q for n in (rows, columns))
    return left * values @ right.T


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (1, 8)])
def test_singular_values_come_near_1_and_directions_stay(shape):
    """U S V^T becomes U V^T, whose product with the transpose of U S V^T is positive definite."""
    torch.manual_seed(0)
    given = matrix(*shape)
    [result] = orthogonalize(given[None])
    values = torch.linalg.svdvals(result)
    assert result.shape == shape and values.min() > 0.7 and values.max() < 1.3
    wide = (result, given) if shape[0] <= shape[1] else (result.T, given.T)
    product = wide[0] @ wide[1].T
    torch.testing.assert_close(product, product.T, atol=1e-5, rtol=0)
    assert torch.linalg.eigvalsh(product).min() > 0


def updated(weights, gradients, parts):
    """Return `weights` after a step of Muon for each of the gradients."""
    parameter = torch.nn.Parameter(weights.clone())
    group = {"params": [parameter], "parts": parts}
    optimizer = Muon([group], lr=0.1, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (32, 96)])
def test_a_step_equals_that_of_pytorchs_muon(monkeypatch, shape):
    """It computes in bfloat16, so the two differ by a hundredth of an update."""
    monkeypatch.setattr(muon, "POLYNOMIALS", [(3.4445, 4.7750, 2.0315)] * 5)
    torch.manual_seed(0)
    weights, gradients = torch.randn(shape), [matrix(*shape) for _ in range(3)]
    theirs = torch.nn.Parameter(weights.clone())
    options = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95}
    optimizer = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
    ours = updated(weights, gradients, parts=1)
    assert (ours - theirs).norm() < 0.02 * (theirs - weights).norm()


def test_queries_keys_and_values_are_three_matrices():
    torch.manual_seed(0)
    weights, gradients = torch.randn(96, 32), [torch.randn(96, 32) for _ in range(2)]
    together = updated(weights, gradients, parts=3)
    for rows in (slice(0, 32), slice(32, 64), slice(64, 96)):
        alone = updated(weights[rows], [gradient[rows] for gradient in gradients], parts=1)
        torch.testing.assert_close(together[rows], alone)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = GPT(GPTConfig(16, 20, 2, 2, 32, bias=True))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", "muon", eps=1e-3)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    stacked, single, tables, vectors = groups
    assert all(name.endswith(".c_attn.weight") for name in stacked)
    assert {name.split(".", 3)[3] for name in single} == {
        "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
    }  # fmt: skip
    assert tables == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all("ln_" in name or name.endswith(".bias") for name in vectors)
    assert sum(map(len, groups)) == len(names)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]
    assert [group.get("parts") for group in optimizer.param_groups] == [3, 1, None, None]
    assert {group["eps"] for group in optimizer.param_groups} == {1e-3}


def test_another_optimizer_cannot_take_over(launch, tiny):
    launch(train, *TINY, "--max_iters=2")
    with pytest.raises(SystemExit, match="error: the checkpoint has no state for this optimizer: "):
        launch(train, "--init_from=resume", "--optimizer=muon", "--max_iters=4")


@pytest.mark.slow
@pytest.mark.parametrize("processes, sharded", [(2, True), (3, False)])
def test_some_processes_equal_one_and_resume_exactly(launch, finish, tiny, processes, sharded):
    options = [*TINY, "--optimizer=muon", "--lr_decay_iters=8", "--tied=False"]
    options += [f"--gradient_accumulation_steps={processes}", f"--fsdp={sharded}"]
    together = {"processes": processes}
    launch(train, *options, "--max_iters=8", "--out_dir=one")
    finish(*options, "--max_iters=8", "--out_dir=straight", **together)
    finish(*options, "--max_iters=4", "--out_dir=two", **together)
    finish("--init_from=resume", "--out_dir=two", "--max_iters=8", **together)
    assert losses("one") == pytest.approx(losses("straight"), rel=1e-5)
    assert_equal(load("one/ckpt.pt"), load("straight/ckpt.pt"), atol=1e-4, rtol=0)
    assert_equal(load("straight/ckpt.pt"), load("two/ckpt.pt"))
