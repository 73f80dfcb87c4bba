"""What PyTorch also has, in less time or memory: the loss, dropout, attention, a linear layer.

Each equals PyTorch's in value and gradient, or in distribution where it is random. model.py could
do without: F.cross_entropy, nn.Dropout, F.scaled_dot_product_attention and nn.Linear take the same
places.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

LOGITS_AT_ONCE = 2**26  # numbers, of 4 bytes, in the loss
FEW_LOGITS = 2**22  # so few are not worth a loop
WEIGHTS_AT_ONCE = 2**18  # numbers, of 4 bytes, in attention with dropout: for a core's cache


# --- loss ----------------------------------------------------------------------------------------


def head_loss(x, weight, targets):
    """Return the mean cross-entropy of targets (N), -1 ignored, for x (N, C) and weight (V, C)."""
    if len(x) * len(weight) <= FEW_LOGITS:
        return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    return HeadLoss.apply(x, weight, targets, dtype, torch.is_grad_enabled())


class HeadLoss(torch.autograd.Function):
    """The same where the N * V logits would be the largest tensor of a step.

    Here a few rows of them are made at a time, in `dtype`, and turned into both gradients while
    they are there.
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


class Dropout(nn.Dropout):
    """In training, 0 with probability p for each element, which is else divided by 1 - p.

    CPUs draw one number per element, one after the other: here one serves four. That rounds p to a
    multiple of 2**-16; the division uses the rounded one, so that the mean stays.
    """

    def forward(self, x):
        active = self.training and self.p > 0
        if not active or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        dropped = lanes_dropped(self.p)
        return (x * keep_mask(x.shape, dropped)).mul_(2**16 / (2**16 - dropped))


def lanes_dropped(p):
    """Return how many of the 2**16 values of a random number mean that an element is dropped."""
    return min(round(p * 2**16), 2**16 - 1)


def keep_mask(shape, dropped, generator=None):
    """Return a bool tensor of `shape`, False with probability dropped / 2**16."""
    size = math.prod(shape)
    words = torch.empty((size + 3) // 4, dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits
    return (words.view(torch.int16)[:size] >= dropped - 2**15).view(shape)


# --- attention -----------------------------------------------------------------------------------


def attend(q, k, v, dropout_p=0.0, is_causal=False):
    """Return the attention (B, H, T, D) of q, k and v, as F.scaled_dot_product_attention does.

    Where a CPU will go backward it is in float32: bfloat16's backward takes several times as long.
    """
    options = {"dropout_p": dropout_p, "is_causal": is_causal}
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        q, k, v = q.float(), k.float(), v.float()
        if dropout_p and is_causal and not torch.compiler.is_compiling():
            return DroppedAttention.apply(q, k, v, dropout_p)
        return F.scaled_dot_product_attention(q, k, v, **options)


class DroppedAttention(torch.autograd.Function):
    """Causal attention (B, H, T, D) of q, k and v, its weights dropped out with probability p.

    On CPUs PyTorch holds all B * H * T * T weights for that, masks and gradients too. Here a block
    of them is made at a time, and made again, masks included, in the backward pass.
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
    """Yield the attention weights of q and k (N, T, D) block by block, with which to keep.

    As heads, rows and columns, three slices; then weights and mask (heads, rows, columns).
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


class Linear(nn.Linear):
    """x @ weight.T + bias, as the transpose of weight @ x.T where a CPU has few rows, in sampling.

    With 10 rows of 768 that took two thirds of the time, from 8 to 48 less, beyond them the same.
    """

    def forward(self, x):
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
            return super().forward(x)
        rows = x.numel() // x.size(-1)
        if not 8 <= rows <= 48 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        y = (self.weight @ x.reshape(rows, -1).t()).t().contiguous().view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias
