"""Muon: momentum, orthogonalized, for the matrices between embedding and head.

Adam scales each number of a gradient by itself. Muon takes a matrix as a whole: it sets all
singular values of the update near 1, so that directions in which the gradient is small are learned
as fast as the few in which it is large. Source: Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine.parallel import shard_like, unshard

# Five odd polynomials a x + b x^3 + c x^5, one after another: singular values between 0.001 and 1
# come near 1 (Polar Express, arXiv:2505.16932; the figures are those of modded-nanogpt).
POLYNOMIALS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def orthogonalize(matrices):
    """Return U V^T, nearly, for each of the matrices U S V^T, (N, rows, columns), rows <= columns.

    Computes in bfloat16 on GPUs, and in float32 elsewhere, where bfloat16 is slow.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / (1.01 * torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # singular values below 1
    for a, b, c in POLYNOMIALS:
        squares = x @ x.mT  # (N, rows, rows)
        factor = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        x = factor @ x
    return x


def orthogonalize_shares(matrices):
    """Return what orthogonalize() makes of `matrices`, of which each rank computes a share."""
    if not dist.is_initialized():
        return orthogonalize(matrices)
    share = -(-len(matrices) // dist.get_world_size())  # rounded up
    mine = matrices[dist.get_rank() * share :][:share]
    mine = F.pad(mine, (0, 0, 0, 0, 0, share - len(mine)))  # the last ranks may have fewer
    mine = orthogonalize(mine)
    everyones = mine.new_empty(share * dist.get_world_size(), *mine.shape[1:])
    dist.all_gather_into_tensor(everyones, mine)
    return everyones[: len(matrices)]


def orthogonalize_all(matrices):
    """Return a list of what orthogonalize() makes of matrices of any shapes, a batch per shape.

    Every rank must call it.
    """
    batches = {}
    for index, matrix in enumerate(matrices):
        wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.mT
        batches.setdefault(wide.shape, {})[index] = wide
    results = [None] * len(matrices)
    for batch in batches.values():
        batch_results = orthogonalize_shares(torch.stack(list(batch.values())))
        for index, result in zip(batch, batch_results, strict=True):
            results[index] = result if result.shape == matrices[index].shape else result.mT
    return results


class Muon(torch.optim.AdamW):
    """AdamW, and Muon for the parameter groups that have a `momentum`.

    Such a group holds matrices, each of them `parts` matrices on top of one another: 3 for the
    queries, keys and values of attention. Updates are as long as AdamW's usually are (Moonshot,
    arXiv:2502.16982), so that one learning rate and one decay serve all groups.

    Where `found_inf`, an attribute as in the fused AdamW, is 1, nothing changes.
    """

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        super().step(closure)
        self.param_groups = groups
        good = 1 - getattr(self, "found_inf", torch.zeros(()))
        hidden = [(p, group) for group in groups if "momentum" in group for p in group["params"]]
        parts = []
        for parameter, group in hidden:
            direction = self.direction(parameter, group["momentum"], good)
            parts += unshard(direction).chunk(group["parts"])
        results = iter(orthogonalize_all(parts))
        for parameter, group in hidden:
            update = [next(results) for _ in range(group["parts"])]
            length = 0.2 * math.sqrt(max(update[0].shape))  # per number 0.2, as AdamW's
            rate = group["lr"] * good
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.sub_(rate * length * shard_like(parameter, torch.cat(update)))

    def direction(self, parameter, momentum, good):
        """Return the mean gradient, with the newest one ahead of it (Nesterov), and update it."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW's load_state_dict() looks for it
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"]
        gradient = torch.where(good == 1, parameter.grad, mean)  # then the mean stays as it is
        mean.lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)
