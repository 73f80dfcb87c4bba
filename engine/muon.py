"""Muon: momentum, orthogonalized, for the matrices between embedding and head.

Adam scales each number of a gradient separately. Muon sets all singular values of a matrix's update
to about 1, so that directions with small gradients are learned as fast as the few with large ones.
Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.

torch.optim.Muon(adjust_lr_fn="match_rms_adamw") ended with a loss 0.019 to 0.021 higher in each of
3 seeds of config/race_laptop.py (1.900 instead of 1.881, 2026-11-26): it takes queries, keys and
values as one matrix, and its polynomials are older.
"""

import math

import torch
import torch.distributed as dist

from engine.runtime import shard_like, unshard

MOMENTUM = 0.95
# Five odd polynomials a x - b x^3 + c x^5, one after another: singular values between 0.001 and 1
# come near 1 (Polar Express, arXiv:2505.16932; coefficients of modded-nanogpt).
POLYNOMIALS = [
    (8.156554524902461, 22.48329292557795, 15.878769915207462),
    (4.042929935166739, 2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, 2.772484153217685, 0.5060648178503393),
    (3.285753657755655, 2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, 1.7097828382687081, 0.42323551169305323),
]


def orthogonalize(matrices):
    """Return approximately U V^T for each of the matrices U S V^T, (N, rows, columns).

    Products are computed in the precision of autocast.
    """
    if matrices.size(1) > matrices.size(2):
        return orthogonalize(matrices.mT).mT
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    x = matrices / (1.01 * norm + 1e-7)  # singular values below 1
    for a, b, c in POLYNOMIALS:
        squares = x @ x.mT  # (N, rows, rows)
        factor = torch.baddbmm(squares, squares, squares, beta=-b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        x = factor @ x
    return x.type_as(matrices)


def orthogonalize_together(matrices):
    """Return orthogonalize() of the matrices (N, rows, columns). Collective: ranks share them."""
    if not dist.is_initialized():
        return orthogonalize(matrices)
    world_size = dist.get_world_size()
    mine = slice(dist.get_rank(), None, world_size)
    matrices[mine] = orthogonalize(matrices[mine])
    for index, matrix in enumerate(matrices):
        dist.broadcast(matrix, index % world_size)
    return matrices


class Muon(torch.optim.AdamW):
    """AdamW, and Muon for the parameter groups that have `parts`.

    Such a group holds matrices, each of them `parts` matrices stacked on one another: 3 for the
    queries, keys and values of attention. Updates are scaled to the usual length of AdamW's
    (Moonshot, arXiv:2502.16982), so that one learning rate and one decay serve all groups.
    """

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if "parts" not in group]
        super().step(closure)
        self.param_groups = groups
        for group in groups:
            by_shape = {}
            if "parts" in group:
                for parameter in group["params"]:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for alike in by_shape.values():
                self.update(alike, group)

    def update(self, parameters, group):
        """Update parameters of one shape together: a GPU would wait for many small products."""
        parts = group["parts"]
        gradients = [g for p in parameters for g in self.mean_gradient(p).chunk(parts)]
        updates = orthogonalize_together(torch.stack(gradients))  # (N, rows, columns)
        longest = max(updates.shape[1:])
        length = 0.2 * math.sqrt(longest)  # 0.2 per number, as with AdamW
        rate = group["lr"]
        for parameter, update in zip(parameters, updates.split(parts), strict=True):
            update = shard_like(parameter, update.flatten(0, 1))
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.sub_(update, alpha=rate * length)

    def mean_gradient(self, parameter):
        """Update the mean gradient; return it with the newest ahead (Nesterov), unsharded."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW's load_state_dict() expects it
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"]
        mean.lerp_(parameter.grad, 1 - MOMENTUM)
        return unshard(parameter.grad.lerp(mean, MOMENTUM))


def make_muon(blocks, matrices, vectors, **settings):
    """Return a Muon for the matrices of `blocks`, with AdamW for all other parameters."""
    stacked = [block.attn.c_attn.weight for block in blocks]
    hidden = {*blocks.parameters()}
    single = [p for p in matrices if p in hidden - {*stacked}]
    others = [p for p in matrices if p not in hidden]
    groups = [
        {"params": stacked, "parts": 3},
        {"params": single, "parts": 1},
        {"params": others},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return Muon(groups, **settings)
