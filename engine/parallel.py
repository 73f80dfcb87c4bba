"""What several processes share: gradients averaged, or weights sharded."""

import torch
import torch.distributed as dist


def shard(model, blocks, fsdp, runtime):
    """Spread the parameters of `model` over all ranks if `fsdp`, in place, block by block (FSDP2)."""
    if not fsdp or runtime.world_size == 1:
        return
    from torch.distributed.fsdp import fully_shard  # here, because it takes a second to import

    mesh = dist.init_device_mesh(runtime.device.type, (runtime.world_size,))
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)


def wrap(model, runtime):
    """Return `model`, made to average gradients over ranks, as a sharded one does by itself."""
    if runtime.world_size == 1 or is_sharded(next(model.parameters())):
        return model
    return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")  # a DTensor


def unshard(tensor):
    """Return the whole of `tensor`. Every rank must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(parameter, tensor):
    """Return this rank's share of `tensor` if `parameter`, of the same shape, is sharded."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )  # every rank has it: nothing is sent


def gather_on_rank_0(tree, runtime):
    """Return `tree`, of dicts and tensors, with sharded tensors whole. Every rank must call it.

    They come to the CPU of rank 0, one by one, and are None elsewhere.
    """
    if isinstance(tree, dict):
        return {key: gather_on_rank_0(value, runtime) for key, value in tree.items()}
    if not is_sharded(tree):
        return tree
    tensor = unshard(tree)
    return tensor.cpu() if runtime.rank == 0 else None
