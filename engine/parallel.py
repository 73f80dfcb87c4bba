"""What several processes share: gradients averaged, or weights sharded.

Sharded weights are whole nowhere: while a model is made, a process holds its share of it and one
whole parameter at a time.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from engine.process import UserError


def make_mesh(fsdp, timeout, runtime):
    """Return the mesh of ranks to shard weights over, None where the setting `fsdp` asks for none.

    "hybrid" gives it two dimensions: each machine has all weights, its processes share them. Every
    rank must call it.
    """
    if fsdp not in (True, False, "hybrid"):
        raise UserError(f"fsdp={fsdp}: choose True, False or hybrid")
    device_type, world_size = runtime.device.type, runtime.world_size
    if not fsdp or world_size == 1:
        return None
    if fsdp != "hybrid":
        return dist.init_device_mesh(device_type, (world_size,))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    least, most = (int(runtime.reduce(op, local)) for op in ("min", "max"))
    if least < most:
        raise UserError(
            f"fsdp=hybrid needs as many processes on each machine, not {least} to {most}; "
            f"give each the same --nproc_per_node"
        )
    ranks = torch.arange(world_size).view(-1, local)  # (machines, processes of each)
    limit = timedelta(seconds=timeout)  # init_device_mesh() would let them wait for half an hour
    replicas, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), limit)
    shards, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), limit)
    names = "replicate", "shard"
    return dist.DeviceMesh.from_group([replicas, shards], device_type, ranks, mesh_dim_names=names)


# --- a model in shares ---------------------------------------------------------------------------


def make_model(model_class, shape, weights, seed, device, mesh=None):
    """Return a `model_class` of `shape` on `device`, sharded over the ranks of `mesh` if given.

    It has the `weights`, name -> tensor, or where they are None those that it draws from `seed`,
    sharded or not the same. Raises load_state_dict's RuntimeError where they do not fit.
    """
    torch.manual_seed(seed)
    if mesh is None and weights is None:
        return model_class(shape).to(device)
    if mesh is None:
        return model_class.from_state(shape, weights, device)
    if weights is None:
        shares = draw_shares(model_class, shape, mesh)
    else:
        shares = {name: share(tensor.float(), mesh) for name, tensor in weights.items()}
    with torch.device("meta"):  # no memory and no random numbers
        model = model_class(shape)
    shard(model, model.transformer.h, mesh)
    model.load_state_dict(shares, assign=True)
    model.tie()
    return model


def draw_shares(model_class, shape, mesh):
    """Return this rank's share of the parameters that a new model has on the CPU, name -> share."""
    with torch.device("meta"), Draws(mesh) as draws:
        model = model_class(shape)
    drawn = model.state_dict(keep_vars=True).items()
    return {name: draws.shares[tensor] for name, tensor in drawn if tensor in draws.shares}


class Draws(TorchDispatchMode):
    """While it is active, keeps a share of what tensors on the meta device would be filled with.

    It draws as many random numbers as on the CPU, a whole tensor at a time. nn.init fills in place,
    by the functions below; a parameter that is made otherwise is missing.
    """

    FILLS = {getattr(torch.ops.aten, name) for name in ("normal_", "uniform_", "zero_", "fill_")}

    def __init__(self, mesh):
        super().__init__()
        self.mesh, self.shares = mesh, WeakTensorKeyDictionary()  # of tensors that still exist

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        fills = function.overloadpacket in self.FILLS
        assert fills or not function._schema.is_mutable, function
        if fills:
            tensor, *values = arguments
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            function(whole, *values, **(options or {}))
            self.shares[tensor] = share(whole, self.mesh)
        return function(*arguments, **(options or {}))


def shard(model, blocks, mesh):
    """Spread the parameters of `model` over the ranks of `mesh`, in place, by blocks (FSDP2)."""
    from torch.distributed.fsdp import fully_shard  # here, because it takes a second to import

    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)


def share(tensor, mesh):
    """Return this rank's share of `tensor`, which every rank has: nothing is sent."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]  # fully_shard's
    whole = tensor.contiguous()  # as fully_shard needs it
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


# --- one and several alike -----------------------------------------------------------------------


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
    return share(tensor, parameter.device_mesh) if is_sharded(parameter) else tensor


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
