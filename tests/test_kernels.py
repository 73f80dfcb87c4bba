"""Each function of engine/kernels.py equals PyTorch's, or has the same distribution."""

import math

import pytest
import torch
import torch.nn.functional as F

from engine import kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_equals_the_plain_one(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "CHUNK", 7)
    torch.manual_seed(0)
    x, weight = torch.randn(40, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
    targets = torch.randint(100, (40,))
    targets[:7] = -1
    results = []
    for few in (0, 2**22):
        monkeypatch.setattr(kernels, "FEW_LOGITS", few)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = kernels.cross_entropy(x, weight, targets)
        results.append([loss, *torch.autograd.grad(3 * loss, (x, weight))])
    for chunked, plain in zip(*results, strict=True):
        assert chunked.dtype == torch.float32
        torch.testing.assert_close(chunked, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.999])
def test_dropout_keeps_its_rate_and_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1_000_003, requires_grad=True)
    y = kernels.dropout(x, p, True)
    kept = y > 0
    spread = math.sqrt(p * (1 - p) / len(x))
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * spread
    assert abs(y.mean().item() - 1) < 5 * spread / (1 - p)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    neighbours = torch.stack([kept[:-1], kept[1:]]).float()  # three of four pairs share a word
    assert abs(torch.corrcoef(neighbours)[0, 1].item()) < 5 / math.sqrt(len(x))


def test_dropout_of_almost_nothing_and_almost_everything():
    x = torch.randn(1000)
    assert torch.equal(kernels.dropout(x, 0.2, False), x)
    assert torch.equal(kernels.dropout(x, 1e-9, True), x)
    assert kernels.dropout(x, 1 - 1e-9, True).isfinite().all()


def test_dropout_is_drawn_from_the_generator_of_torch():
    q, k, v = torch.randn(3, 2, 3, 70, 16, requires_grad=True)

    def draw(seed):
        torch.manual_seed(seed)
        y = kernels.attention(q, k, v, 0.2, True)
        return y, *torch.autograd.grad(kernels.dropout(y, 0.2, True).sum(), (q, k, v))

    for one, same, other in zip(draw(1), draw(1), draw(2), strict=True):
        assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("rows", [7, 128])
@pytest.mark.parametrize("p", [1e-9, 0.2])
def test_attention_with_dropout_equals_the_plain_formula(monkeypatch, p, rows):
    """The plain formula uses the mask that attention over unit vectors as values shows."""
    monkeypatch.setattr(kernels, "ROWS", rows)
    T = 48
    q, k, v, grad_y = torch.randn(4, 3, T, 4, T, requires_grad=True)

    def attention(values):
        torch.manual_seed(0)  # the same weights are dropped
        return kernels.attention(q, k, values, p, True)

    past = torch.ones(T, T).tril() > 0
    mask = attention(torch.eye(T).view(1, T, 1, T).expand_as(v)).transpose(1, 2) != 0
    assert not mask[..., ~past].any()
    kept = mask[..., past].float()
    assert abs(kept.mean() - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / kept.numel())
    heads = [z.transpose(1, 2) for z in (q, k, v)]
    scores = (heads[0] @ heads[1].mT / math.sqrt(T)).masked_fill(~past, -math.inf)
    expected = ((scores.softmax(3) * mask / (1 - p)) @ heads[2]).transpose(1, 2)
    found = attention(v)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(
        *(torch.autograd.grad(y, (q, k, v), grad_y) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_attention_for_a_backward_pass_is_computed_in_float32():
    q, k, v = torch.randn(3, 2, 16, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = kernels.attention(q, k, v, 0.0, True)
    heads = [z.float().transpose(1, 2) for z in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    assert torch.equal(found, expected.bfloat16())
