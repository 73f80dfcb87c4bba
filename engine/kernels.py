"""Functions that model.py calls by name because they are faster than PyTorch's on a CPU.

Each equals PyTorch's function in value and gradient, or in distribution if it is random. To compute
with plain PyTorch, call the function named in its docstring instead; docs/speed.md has the gains.
In a compiled model they are plain PyTorch in any case, which the compiler fuses.
"""

import math

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

CHUNK = 1024  # rows of logits that the chunked loss holds at once
FEW_LOGITS = 2**22  # up to this many logits are computed in one piece
NUMBERS = 2**16  # different values of 16 bits
ROWS = 128  # of attention weights that attention with dropout computes at once


def eager_on_cpu(x):
    return x.device.type == "cpu" and not is_compiling()


def cross_entropy(x, weight, targets):
    """Return the mean of F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1).

    x (N, C), weight (V, C), targets (N). In float32 it never holds many of the N * V logits, which
    would be the largest tensor of a training step. In 16 bits F.linear_cross_entropy would round
    the loss to three digits.
    """
    is_plain = is_compiling() or not hasattr(F, "linear_cross_entropy")  # new in PyTorch 2.13
    in_16_bits = x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type)
    if is_plain or in_16_bits or len(x) * len(weight) <= FEW_LOGITS:
        logits = F.linear(x, weight)
        logits = logits.float()
        return F.cross_entropy(logits, targets, ignore_index=-1)
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
    return F.linear_cross_entropy(x, weight, targets, ignore_index=-1, options=chunks)


def dropout(x, p, training):
    """Return F.dropout(x, p, training), with p rounded down to a multiple of 2**-16.

    PyTorch draws a random number for each element on a CPU. Here 64 random bits serve 4 elements.
    """
    if not training or p == 0 or not eager_on_cpu(x):
        return F.dropout(x, p, training)
    size = x.numel()
    count = size // 4 + 1  # of words with four numbers each
    words = torch.empty(count, dtype=torch.int64)
    words.random_(-(2**63), None)  # all 64 bits
    numbers = words.view(torch.int16)[:size].view(x.shape)  # -NUMBERS / 2 to NUMBERS / 2 - 1
    dropped = int(p * NUMBERS)
    lowest = dropped - NUMBERS // 2
    is_kept = numbers >= lowest
    share_kept = 1 - dropped / NUMBERS
    mask = is_kept / share_kept
    return x * mask.type_as(x)


def attention(q, k, v, dropout_p, is_causal):
    """Return F.scaled_dot_product_attention of q, k, v (B, T, H, D), in the same layout.

    On a CPU, training computes in float32, because PyTorch's backward pass in bfloat16 takes 1.6 to
    5 times as long. The weights are dropped by the dropout above.
    """
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    if not eager_on_cpu(q) or not torch.is_grad_enabled():
        y = F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal)
        return y.transpose(1, 2)
    dtype = q.dtype
    with torch.autocast("cpu", enabled=False):
        q = q.float()
        k = k.float()
        v = v.float()
        if dropout_p and is_causal:
            y = dropped_attention(q, k, v, dropout_p)
        else:
            y = F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal)
    y = y.transpose(1, 2)
    return y.to(dtype)


def dropped_attention(q, k, v, p):
    """Return causal attention (B, H, T, D) with dropout of its weights, some rows at a time.

    Row t has no weights beyond column t, so most of the future is never computed.
    """
    B, H, T, D = q.shape
    q = q.flatten(0, 1) / math.sqrt(D)
    k = k.flatten(0, 1)
    v = v.flatten(0, 1)
    future = torch.full((T, T), -math.inf).triu_(1)
    y = []
    for first in range(0, T, ROWS):
        last = min(first + ROWS, T)
        mask = future[first:last, :last]
        queries = q[:, first:last]
        keys = k[:, :last]
        values = v[:, :last]
        scores = torch.baddbmm(mask, queries, keys.mT)  # (B * H, rows, last)
        weights = scores.softmax(2)
        weights = dropout(weights, p, True)
        y.append(weights @ values)
    y = torch.cat(y, dim=1)
    return y.view(B, H, T, D)
