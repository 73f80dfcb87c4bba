"""Each part of engine/fast.py equals PyTorch's, or is alike in distribution."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine import fast
from model import GPT, GPTConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 500, 2**26])
def test_the_loss_in_parts_equals_the_plain_one(monkeypatch, at_once, dtype):
    monkeypatch.setattr(fast, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    x, weight = torch.randn(40, 16), torch.randn(100, 16)
    targets = torch.randint(100, (40,))
    targets[:7] = -1
    x.requires_grad_(), weight.requires_grad_()
    loss = fast.LossInParts.apply(x, weight, targets, dtype, True)
    found = loss, *torch.autograd.grad(3 * loss, (x, weight))
    plain = F.cross_entropy((x.to(dtype) @ weight.to(dtype).t()).float(), targets, ignore_index=-1)
    expected = plain, *torch.autograd.grad(3 * plain, (x, weight))
    bound = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 2e-2}
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **bound)
    assert torch.equal(fast.LossInParts.apply(x, weight, targets, dtype, False), loss)


def dropout(p):
    return partial(fast.dropout, nn.Dropout(p))


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.999])
def test_dropout_keeps_its_mean_and_rate(p):
    torch.manual_seed(0)
    x = torch.ones(1_000_003, requires_grad=True)
    y = dropout(p)(x)
    kept = y > 0
    spread = math.sqrt(p * (1 - p) / len(x))
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * spread
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=0.01, atol=0)
    assert abs(y.mean().item() - 1) < 5 * spread / (1 - p)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    neighbours = torch.stack([kept[:-1], kept[1:]]).float()  # three of four pairs share a word
    assert abs(torch.corrcoef(neighbours)[0, 1].item()) < 5 / math.sqrt(len(x))


def test_dropout_of_nothing_and_of_almost_everything():
    x = torch.randn(1000)
    assert torch.equal(fast.dropout(nn.Dropout(0.2).eval(), x), x)
    assert torch.equal(dropout(0.0)(x), x)
    assert torch.equal(dropout(1e-9)(x), x)
    assert dropout(1 - 1e-9)(x).isfinite().all()


def test_dropout_is_drawn_from_torchs_generator():
    q, k, v = torch.randn(3, 2, 3, 70, 16, requires_grad=True)

    def draw(seed):
        torch.manual_seed(seed)
        y = fast.attend(q, k, v, dropout_p=0.2, is_causal=True)
        return y, *torch.autograd.grad(dropout(0.2)(y).sum(), (q, k, v))

    for one, two, other in zip(draw(1), draw(1), draw(2), strict=True):
        assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("at_once", [1, 3000, 2**18])
@pytest.mark.parametrize("T", [1, 63, 64, 150])
def test_attention_in_blocks_equals_the_plain_one(monkeypatch, T, at_once):
    monkeypatch.setattr(fast, "WEIGHTS_AT_ONCE", at_once)
    q, k, v, weights = torch.randn(4, 2, 3, T, 16)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    found = fast.DroppedAttention.apply(q, k, v, 1e-9)  # too little to drop anything
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(found, plain)
    found, plain = (torch.autograd.grad((y * weights).sum(), inputs) for y in (found, plain))
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_dropout_drops_weights_and_keeps_their_mean(dtype):
    T, p = 150, 0.2
    q, k, v, weights = torch.randn(4, 2, 8, T, T, dtype=dtype)
    inputs = [t.requires_grad_() for t in (q, k, v)]

    def attend(values):
        torch.manual_seed(0)  # the same weights are dropped
        return fast.attend(q, k, values, dropout_p=p, is_causal=True)

    past = torch.ones(T, T).tril() > 0
    mask = attend(torch.eye(T, dtype=dtype).expand_as(v)) != 0  # the weights themselves
    assert not mask[..., ~past].any()
    count = mask[..., past].numel()
    assert abs(mask[..., past].float().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)
    scores = (q.float() @ k.float().transpose(2, 3) / math.sqrt(T)).masked_fill(~past, -math.inf)
    plain = (scores.softmax(3) * mask / (1 - p)) @ v.float()
    found = attend(v)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    bound = {"atol": 0.05 if dtype == torch.bfloat16 else 1e-4, "rtol": 1e-2}
    found, plain = (torch.autograd.grad((y * weights).sum(), inputs) for y in (found, plain))
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs, **bound)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (10, 1), (1, 48), (3, 16), (49,), (8,)])
def test_a_linear_layer_of_few_rows_equals_the_plain_one(monkeypatch, shape, bias):
    monkeypatch.setattr(fast, "LARGE_MATRIX", 0)
    layer, x = nn.Linear(32, 96, bias), torch.randn(*shape, 32)
    plain = F.linear(x, layer.weight, layer.bias)
    with torch.inference_mode():
        found = fast.linear(layer, x)
        assert found.is_contiguous() and found.shape == plain.shape
        torch.testing.assert_close(found, plain.detach())
    fast.linear(layer, x).sum().backward()
    assert layer.weight.grad is not None


def count_calls(monkeypatch):
    """Count the calls of each part, by name."""
    calls = dict.fromkeys(("head_loss", "dropout", "attend", "linear"), 0)

    def counted(name, part):
        def call(*arguments, **options):
            calls[name] += 1
            return part(*arguments, **options)

        return call

    for name in calls:
        monkeypatch.setattr(fast, name, counted(name, getattr(fast, name)))
    return calls


@pytest.mark.parametrize(
    "device, expected",
    [
        ("cpu", {"head_loss": 1, "dropout": 5, "attend": 2, "linear": 8}),
        ("cuda", {"head_loss": 1, "dropout": 0, "attend": 0, "linear": 0}),
    ],
)
def test_a_model_computes_with_the_parts_that_gain_on_its_device(monkeypatch, device, expected):
    calls = count_calls(monkeypatch)
    model = GPT(GPTConfig(16, 40, n_layer=2, n_head=2, n_embd=32, dropout=0.1))
    tokens = torch.randint(40, (3, 17))
    model(tokens[:, :-1], tokens[:, 1:], loss_only=True)
    assert not any(calls.values())  # the plain model needs none
    names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    fast.use_fast_parts(model, torch.device(device))
    assert (list(model.state_dict()), [name for name, _ in model.named_parameters()]) == names
    model(tokens[:, :-1], tokens[:, 1:], loss_only=True)
    assert calls == expected


@pytest.mark.parametrize("few", [0, 2**22])
def test_a_model_with_the_parts_has_the_losses_and_gradients_of_the_plain_one(monkeypatch, few):
    monkeypatch.setattr(fast, "FEW_LOGITS", few)
    config = GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32)
    torch.manual_seed(0)
    plain = GPT(config)
    quick = GPT(config)
    quick.load_state_dict(plain.state_dict())
    fast.use_fast_parts(quick, torch.device("cpu"))
    tokens = torch.randint(40, (3, 17))
    for model in (plain, quick):
        model(tokens[:, :-1], tokens[:, 1:], loss_only=True).backward()
    for (name, mine), theirs in zip(quick.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    logits, loss = quick(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(logits, plain(tokens[:, :-1], tokens[:, 1:])[0])
    torch.testing.assert_close(quick(tokens[:, :-1], tokens[:, 1:], loss_only=True), loss)


def test_attention_of_a_backward_pass_in_bfloat16_is_that_of_float32():
    q, k, v = torch.randn(3, 2, 3, 16, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = fast.attend(q, k, v, is_causal=True)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert torch.equal(found, expected)
