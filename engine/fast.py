"""Parts of a GPT that take less time or memory than PyTorch's own, put into a built model.

Each equals PyTorch's function in value and gradient, or in distribution where it is random. Without
use_fast_parts() a model computes with F.cross_entropy, nn.Dropout, F.scaled_dot_product_attention
and nn.Linear. What each gains is in docs/speed.md.
"""

import ctypes
import math
import os
from contextlib import suppress
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.process import UserError

LOGITS_AT_ONCE = 2**26  # numbers, of 4 bytes, that the loss holds at once
FEW_LOGITS = 2**22  # up to so many are computed at once, as PyTorch does
WEIGHTS_AT_ONCE = 2**18  # numbers, of 4 bytes, in attention with dropout: they fit a core's cache
LARGE_MATRIX = 2**19  # numbers from which on a linear layer gains with few rows


def use_fast_parts(model, device):
    """Let `model` compute with the functions below where `device` gains by them, in place.

    Its parameters and their names stay. On a CPU it also changes how this process keeps memory.
    `model` has an `lm_head` and a method head_loss(x, targets); an attention layer has an attribute
    `attend`, with the signature of F.scaled_dot_product_attention.
    """
    model.head_loss = partial(head_loss, model.lm_head)
    if device.type != "cpu":
        return
    keep_freed_memory()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.forward = partial(dropout, module)
        elif isinstance(module, nn.Linear):
            module.forward = partial(linear, module)
        elif hasattr(module, "attend"):
            module.attend = attend


# --- memory ---------------------------------------------------------------------------------------


def keep_freed_memory():
    """Let the C library keep memory that is freed: asking for it anew took a quarter of a step."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with suppress(AttributeError, OSError, TypeError):  # there is no glibc
            ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
            ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD


def recompute_activations(blocks, dropout, device):
    """Let each of `blocks` keep only its input and run again in the backward pass, in place.

    Raises UserError where it would run again with other dropout masks.
    """
    if dropout and device.type == "mps":
        raise UserError("activation_checkpointing on mps needs --dropout=0: it draws other masks")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


# --- loss ----------------------------------------------------------------------------------------


def head_loss(head, x, targets):
    """Return the mean cross-entropy of targets (B, T), -1 ignored, for x (B, T, C).

    `head` is the linear layer that makes logits of x; all of them exist only where they are few.
    """
    x, targets, weight = x.flatten(0, 1), targets.flatten(), head.weight
    if len(x) * len(weight) <= FEW_LOGITS:
        return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    return LossInParts.apply(x, weight, targets, dtype, torch.is_grad_enabled())


class LossInParts(torch.autograd.Function):
    """Mean cross-entropy of targets (N) for x (N, C) and weight (V, C), without N * V logits.

    They would be the largest tensor of a step. A few rows of them are made at a time, in `dtype`,
    and turned into the gradients of x and weight at once, so that none is kept for the backward
    pass (Liger, arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_gradients):
        loss, count = torch.zeros((), device=x.device), (targets >= 0).sum()
        matrix, rows = weight.to(dtype), max(1, LOGITS_AT_ONCE // len(weight))
        grad_x = torch.empty_like(x) if with_gradients else None
        grad_weight = torch.zeros_like(weight) if with_gradients else None
        for at in range(0, len(x), rows):
            part, correct = x[at : at + rows].to(dtype), targets[at : at + rows, None]
            kept, correct = correct >= 0, correct.clamp(min=0)
            logits = (part @ matrix.t()).float()  # (rows, V)
            total = logits.logsumexp(1, keepdim=True)
            loss += ((total - logits.gather(1, correct)) * kept).sum()
            if with_gradients:
                slope = logits.sub_(total).exp_()  # the softmax, less 1 where it should be 1
                slope.scatter_add_(1, correct, torch.full_like(total, -1)).mul_(kept)
                slope = slope.to(dtype)
                grad_x[at : at + rows] = slope @ matrix
                grad_weight += slope.t() @ part
        ctx.save_for_backward(grad_x, grad_weight, count)
        return loss / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = gradient / count
        return grad_x * scale, grad_weight * scale, None, None, None


# --- dropout -------------------------------------------------------------------------------------


def dropout(module, x):
    """Return x with elements set to 0 with probability module.p, the others divided by 1 - p.

    PyTorch draws one random number per element on a CPU, one after the other; here one serves four.
    That rounds p to a multiple of 2**-16. The division uses the rounded p, so the mean stays.
    """
    if not module.training or module.p == 0 or torch.compiler.is_compiling():
        return F.dropout(x, module.p, module.training)
    dropped = lanes_dropped(module.p)
    return (x * keep_mask(x.shape, dropped)).mul_(2**16 / (2**16 - dropped))


def lanes_dropped(p):
    """Return how many of the 2**16 values of a 16-bit number stand for a dropped element."""
    return min(round(p * 2**16), 2**16 - 1)


def keep_mask(shape, dropped, generator=None):
    """Return a bool tensor of `shape`, False with probability dropped / 2**16."""
    size = math.prod(shape)
    words = torch.empty((size + 3) // 4, dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits
    return (words.view(torch.int16)[:size] >= dropped - 2**15).view(shape)


# --- attention -----------------------------------------------------------------------------------


def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """Return the attention (B, H, T, D) of q, k and v, as F.scaled_dot_product_attention does.

    For a backward pass it is computed in float32: PyTorch's in bfloat16 takes 1.6 to 5 times as
    long on a CPU.
    """
    options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
    if not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        q, k, v = q.float(), k.float(), v.float()
        if dropout_p and is_causal and not torch.compiler.is_compiling():
            return DroppedAttention.apply(q, k, v, dropout_p)
        return F.scaled_dot_product_attention(q, k, v, **options)


class DroppedAttention(torch.autograd.Function):
    """Causal attention (B, H, T, D) of q, k and v, with dropout of its weights.

    PyTorch holds all B * H * T * T weights for this on a CPU, with their masks and gradients. Here
    a block of them is made at a time, and made again, mask included, in the backward pass
    (FlashAttention, arXiv:2205.14135, section 3.1).
    """

    @staticmethod
    def forward(ctx, q, k, v, p):
        shape, (q, k, v) = q.shape, (t.flatten(0, 1) for t in (q, k, v))  # (B * H, T, D)
        seed, dropped = int(torch.randint(2**62, ())), lanes_dropped(p)
        scale, out = 2**16 / (2**16 - dropped), torch.empty_like(q)
        for heads, rows, seen, weights, mask in blocks(q, k, seed, dropped):
            out[heads, rows] = torch.bmm(weights.mul_(mask), v[heads, seen])
        ctx.save_for_backward(q, k, v, out.mul_(scale))
        ctx.shape, ctx.settings = shape, (seed, dropped, scale)
        return out.view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (q, k, v, out), (seed, dropped, scale) = ctx.saved_tensors, ctx.settings
        gradient = gradient.flatten(0, 1)
        mean = (gradient * out).sum(2, keepdim=True)  # of the weights' gradients, weighted
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for heads, rows, seen, weights, mask in blocks(q, k, seed, dropped):
            part, mask = gradient[heads, rows], mask.float().mul_(scale)
            slope = torch.bmm(part, v[heads, seen].transpose(1, 2)).mul_(mask)
            slope.sub_(mean[heads, rows]).mul_(weights)  # through the softmax
            grad_v[heads, seen] += torch.bmm(weights.mul_(mask).transpose(1, 2), part)
            grad_q[heads, rows] = torch.bmm(slope, k[heads, seen])
            grad_k[heads, seen] += torch.bmm(slope.transpose(1, 2), q[heads, rows])
        root = math.sqrt(q.size(2))
        return *(t.view(ctx.shape) for t in (grad_q.div_(root), grad_k.div_(root), grad_v)), None


def blocks(q, k, seed, dropped):
    """Yield the attention weights of q and k (N, T, D) block by block, and which of them to keep.

    A block is heads, rows and columns, three slices, then weights and mask (heads, rows, columns).
    """
    (N, T, D), generator = q.shape, torch.Generator().manual_seed(seed)
    for first in range(0, T, 64):  # short blocks compute little that lies in the future
        last = min(first + 64, T)
        future = torch.full((last - first, last), -math.inf).triu_(first + 1)
        at_once = max(1, WEIGHTS_AT_ONCE // future.numel())
        for head in range(0, N, at_once):
            heads, rows, seen = slice(head, head + at_once), slice(first, last), slice(last)
            keys = k[heads, seen].transpose(1, 2)
            scores = torch.baddbmm(future, q[heads, rows], keys, alpha=1 / math.sqrt(D))
            yield heads, rows, seen, scores.softmax(2), keep_mask(scores.shape, dropped, generator)


# --- linear --------------------------------------------------------------------------------------


def linear(module, x):
    """Return x @ weight.T + bias, as the transpose of weight @ x.T for few rows, in sampling.

    Matrix libraries repack the larger factor for few rows. From 8 to 48 rows, and a large matrix,
    this way took 0.65 to 0.95 of the time; with other numbers it took longer.
    """
    rows = x.numel() // x.size(-1)
    few = 8 <= rows <= 48 and module.weight.numel() >= LARGE_MATRIX
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    if not few or plain or x.dtype != torch.float32:
        return F.linear(x, module.weight, module.bias)
    y = (module.weight @ x.reshape(rows, -1).t()).t().contiguous().view(*x.shape[:-1], -1)
    return y if module.bias is None else y + module.bias
