"""The machine that a run computes on: device, precision, and its process group.

One process is a world of size 1, so that the training loop has no special cases.
"""

import atexit
import ctypes
import importlib.util
import logging
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from engine.process import UserError, reason, user_error

# Dense peaks in TFLOP/s, from data sheets: 16-bit, then float32 (TF32 from Ampere on).
PEAKS = {
    "B200": (2250, 1125), "H200": (989, 495), "H100 PCIe": (756, 378), "H100 NVL": (835, 418),
    "H100": (989, 495), "A100": (312, 156), "A6000": (155, 77), "A10G": (70, 35), "A10": (125, 62),
    "L40S": (362, 183), "L4": (121, 60), "RTX 5090": (209, 105), "RTX 4090": (165, 83),
    "RTX 3090": (71, 36), "V100": (125, 15.7), "T4": (65, 8.1),
}  # fmt: skip


@dataclass
class Runtime:
    """The device of this process and its rank among `world_size` processes."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer states stay float32
    compile: bool
    rank: int
    world_size: int
    name: str  # of the device
    about: str  # device, precision and compilation with the reasons, in one line

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def seed(self, *key):
        """Seed dropout with integers; torch.manual_seed() spends time on other devices."""
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def reduce(self, op, number):
        """Return the "sum", "min" or "max" of a number over all ranks. Collective."""
        if self.world_size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)  # on the CPU: does not sync a GPU
        dist.all_reduce(total, getattr(dist.ReduceOp, op.upper()))
        return total.item()

    def say(self, text):
        """Print on rank 0. A closed terminal or a full disk does not end a run."""
        if self.rank == 0 and text:
            with suppress(OSError):
                print(text, flush=True)

    def now(self):
        """Return the time in seconds after the device has finished its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def peak_flops(self):
        """Return the peak of the device in FLOP/s for its dtype, or None if it is unknown."""
        for card, (half, full) in PEAKS.items():
            if re.search(rf"\b{card}\b", self.name):
                return 1e12 * (full if self.dtype == torch.float32 else half)

    def peak_memory(self):
        """Return the maximum memory used so far on the GPU in bytes; 0 on other devices."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def start_runtime(config):
    """Return the Runtime for the settings device, dtype, compile, backend and timeout.

    Joins the process group of torchrun if there is one. Collective.
    """
    device = choose_device(config["device"])
    with user_error("the environment variables of torchrun", KeyError, ValueError):
        rank = int(os.environ.get("RANK", 0))
        world_size = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
        if world_size > 1 and "backend" in config:  # sample.py works alone
            join_process_group(rank, world_size, device, config)
    dtype, why = choose_dtype(config["dtype"], device)
    compile = choose_compile(config.get("compile", False), device)
    name = f"{device.type} with {torch.get_num_threads()} threads"
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for products in float32
        # cuDNN's attention plans anew for each number of keys: 40 ms per token of a sample. In
        # training the other ones are as fast (docs/speed.md).
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.use_deterministic_algorithms(config.get("deterministic", False))
    if compile:
        fall_back_to_eager(rank)
    about = f"{world_size} x {name}, {str(dtype)[6:]} ({why}), {'' if compile else 'not '}compiled"
    return Runtime(device, dtype, compile, rank, world_size, name, about)


def choose_device(name):
    """Return the torch.device of this process for the setting `device`, after a test allocation.

    "auto" takes the GPU of this process if the machine has one for each process. UserError if the
    device cannot be used.
    """
    if name == "auto":
        name = "cpu"
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if torch.accelerator.is_available() and torch.accelerator.device_count() >= processes:
            name = torch.accelerator.current_accelerator().type
    with user_error(f"device={name} cannot be used, --device=cpu works", Exception):
        device = torch.device(name)
        if device.index is None and device.type not in ("cpu", "mps"):
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()
    return device


def choose_dtype(name, device):
    """Return the torch.dtype for the setting `dtype`, and why."""
    if name in ("float32", "bfloat16") or (name == "float16" and device.type == "cuda"):
        return getattr(torch, name), "as set"
    if name != "auto":
        raise UserError(f"dtype={name}: choose auto, float32, bfloat16, or float16 on CUDA")
    if device.type == "cuda":  # is_bf16_supported() is also True if bfloat16 is emulated, slowly
        is_fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return (torch.bfloat16, "fast here") if is_fast else (torch.float16, "no fast bfloat16")
    if device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16"):
        return torch.bfloat16, "AMX"
    return torch.float32, "bfloat16 is often slower here"


def choose_compile(setting, device):
    """Return whether to try to compile: with "auto" on recent GPUs with Triton."""
    if setting != "auto":
        return setting
    is_recent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return is_recent and importlib.util.find_spec("triton") is not None


def fall_back_to_eager(rank):
    """Run functions eagerly that cannot be compiled; the compiler's first warning is printed."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    def show(record):
        logger.disabled = True  # one line is enough
        text = reason(record.exc_info[1]) if record.exc_info else record.getMessage()
        print(f"not compiled, which is slower: {text.splitlines()[0]} (cache: {cache_dir()})")

    torch._dynamo.config.suppress_errors = True
    torch._functorch.config.force_non_lazy_backward_lowering = True  # for the backward pass too
    logger = logging.getLogger("torch._dynamo.convert_frame")
    logger.addFilter(show)
    logger.disabled = rank > 0


def keep_freed_memory():
    """Let the C library keep freed memory: fresh pages took a quarter of a training step."""
    with suppress(AttributeError, OSError, TypeError):  # systems without glibc
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD


# --- several processes ---------------------------------------------------------------------------


def join_process_group(rank, world_size, device, config):
    # Numbers that the hosts share go through gloo, which needs no GPU.
    backend = f"cpu:gloo,cuda:{config['backend']}" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config["timeout"])
    # Without a prefix, a group that torchrun restarted would read the addresses of the old one.
    prefix = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(prefix, next(dist.rendezvous("env://", timeout=timeout))[0])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    atexit.register(time.sleep, 0.1)  # a thread of gloo aborts if the interpreter has ended
    atexit.register(dist.destroy_process_group)  # runs before the line above


def place_model(model, blocks, fsdp, runtime):
    """Move `model` to the device of this process; with `fsdp` only this rank's shard (FSDP2).

    Each of its `blocks` is gathered separately. fsdp="hybrid" shards within each machine and keeps
    a copy per machine.
    """
    if not fsdp or runtime.world_size == 1:
        model.to(runtime.device)
        return
    from torch.distributed.fsdp import fully_shard  # here, because it takes half a second

    local = int(os.environ["LOCAL_WORLD_SIZE"]) if fsdp == "hybrid" else runtime.world_size
    mesh = dist.init_device_mesh(
        runtime.device.type,
        (runtime.world_size // local, local),
        mesh_dim_names=("replicate", "shard"),
    )
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")  # a DTensor


def unshard(tensor):
    """Return the full tensor. Collective if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(parameter, tensor):
    """Return this rank's shard of `tensor`, which all ranks have, if `parameter` is sharded."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    return distribute_tensor(tensor, mesh, parameter.placements, src_data_rank=None)


def gather(tree, rank):
    """Return `tree`, of dicts and tensors, with shards joined on the CPU of rank 0. Collective."""
    if isinstance(tree, dict):
        return {key: gather(value, rank) for key, value in tree.items()}
    if not is_sharded(tree):
        return tree
    tensor = unshard(tree)
    return tensor.cpu() if rank == 0 else None
