"""Where a run runs: device, precision, compilation, processes. One process is a world of size 1."""

import ctypes
import importlib.util
import os
import re
import signal
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

# Dense peaks in TFLOP/s, from data sheets: 16-bit, then float32 (as TF32 from Ampere on).
PEAKS = {
    "B200": (2250, 1125), "H200": (989, 495), "H100 PCIe": (756, 378), "H100 NVL": (835, 418),
    "H100": (989, 495), "A100": (312, 156), "A6000": (155, 77), "A10G": (70, 35), "A10": (125, 62),
    "L40S": (362, 183), "L4": (121, 60), "RTX 5090": (209, 105), "RTX 4090": (165, 83),
    "RTX 3090": (71, 36), "V100": (125, 15.7), "T4": (65, 8.1),
}  # fmt: skip

_store = None  # what torchrun's processes share, with or without a group
_signals = []  # those that catch_signals() caught
_handlers = {}  # what it replaced, by name of the signal


@dataclass(frozen=True)
class Run:
    """What one process computes on, and its place among `world_size` processes."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer state stay float32
    compile: bool
    rank: int
    world_size: int
    name: str  # of the device
    about: str  # one line: what was chosen and why

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def seed(self, *key):
        """Seed what dropout draws from; torch.manual_seed() takes its time for other devices."""
        number = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(number)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(number)

    def reduce(self, op, number):
        """Return the "sum", "min" or "max" of a number over all ranks. Every rank must call it."""
        if self.world_size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)  # on the CPU: no sync of a GPU
        dist.all_reduce(total, getattr(dist.ReduceOp, op.upper()))
        return total.item()

    def stop_requested(self):
        """Return the signal that asked any rank to stop, else 0. Every rank must call it."""
        return int(self.reduce("max", max(_signals, default=0)))

    def say(self, *words, **options):
        """Print on rank 0; a terminal that is gone or a full disk does not end a run."""
        if self.rank == 0:
            with suppress(OSError):
                print(*words, flush=True, **options)

    def now(self):
        """Return a time in seconds, after the device has done the work it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def peak_flops(self):
        """Return the device's dense peak in FLOP/s for its dtype, None where it is not known."""
        peaks = next((PEAKS[card] for card in PEAKS if re.search(rf"\b{card}\b", self.name)), None)
        return peaks and peaks[self.dtype == torch.float32] * 1e12


def start(device, dtype, compile, backend="gloo", timeout=600):
    """Return the Run for the settings of these names, in the group that torchrun made, if any."""
    device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    dtype, why_dtype = choose_dtype(dtype, device)
    compile, why_compile = choose_compile(compile, device)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    if device.type == "cpu" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # Keep freed memory: getting it anew took a quarter of a step.
        with suppress(AttributeError, OSError, TypeError):  # there is no glibc
            ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
            ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
    if world_size > 1:  # gloo also on GPUs, for the numbers that only the hosts share
        backend = f"cpu:gloo,cuda:{backend}" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, None, timedelta(seconds=timeout), world_size, rank, _store)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    about = f"{world_size} x {name}, {str(dtype)[6:]} ({why_dtype}), {why_compile}"
    return Run(device, dtype, compile, rank, world_size, name, about)


def choose_device(name, local_rank):
    """Return the torch.device for the setting `device`; each local rank has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if torch.backends.mps.is_available() else name
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device={name}: this machine has none; try --device=auto") from None
    return device


def choose_dtype(name, device):
    """Return the torch.dtype for the setting `dtype`, and why."""
    if name != "auto":
        if name not in ("float32", "bfloat16") and (name, device.type) != ("float16", "cuda"):
            raise ValueError(f"dtype={name}: choose auto, float32, bfloat16, or float16 on CUDA")
        return getattr(torch, name), "as set"
    if device.type == "cuda":  # is_bf16_supported() is also true where it is emulated, slowly
        real = torch.cuda.get_device_capability(device) >= (8, 0)
        return (torch.bfloat16, "the GPU's own") if real else (torch.float16, "no bfloat16 here")
    # On a CPU with AVX512-BF16 but no AMX, matmuls in bfloat16 took 1.75 times those in float32.
    amx = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
    return (torch.bfloat16, "AMX") if amx else (torch.float32, "no fast bfloat16 here")


def choose_compile(setting, device):
    """Return whether to torch.compile, and why."""
    if setting not in ("auto", True, False):
        raise ValueError(f"compile={setting}: choose auto, True or False")
    if setting != "auto":
        return setting, "compiled as set" if setting else "not compiled as set"
    works = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    works = works and importlib.util.find_spec("triton") is not None
    return works, "compiled" if works else "not compiled: wants a recent GPU and Triton"


def compile_model(model, run, attempt):
    """Compile `model` in place if `run` wants it; return `run` with what came of it.

    If `attempt()` fails, the model is left as it was. It calls what wrap() made of the model, so
    that the compiler splits its graph where DDP sends gradients.
    """
    if not run.compile:
        return run
    why = ""
    try:
        model.compile()
        with run.autocast():
            attempt()
    except Exception as fault:  # no compiler, no driver, an unsupported Python: all sorts
        fatal = isinstance(fault, ValueError | torch.OutOfMemoryError)
        if fatal or is_sharded(next(model.parameters())):  # whose other ranks wait for this one
            raise
        why = f"{type(fault).__name__}: {fault}".splitlines()[0]
    if not run.reduce("max", bool(why)):
        return run
    model._compiled_call_impl = None  # undoes Module.compile()
    model.zero_grad(set_to_none=True)
    run.say(f"not compiled, which is slower: {why or 'another rank failed'}")
    return replace(run, compile=False, about=f"{run.about}, but that failed")


def recompute(blocks):
    """Let each of `blocks` keep only its input, and run again in the backward pass, in place."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


# --- several processes ---------------------------------------------------------------------------


def shard(model, run):
    """Spread the parameters of `model` over all ranks, in place, block by block (FSDP2)."""
    from torch.distributed.fsdp import fully_shard  # here, because it takes a second to import
    mesh = dist.init_device_mesh(run.device.type, (run.world_size,))
    for part in (*model.transformer.h, model):
        fully_shard(part, mesh=mesh)
    return model


def wrap(model, run):
    """Return `model`, made to average gradients over ranks, as a sharded one does by itself."""
    if run.world_size == 1 or is_sharded(next(model.parameters())):
        return model
    return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")  # a DTensor


def like(parameter, tensor):
    """Return `tensor`, sharded as `parameter` of the same shape is, if it is."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def joined(tensor):
    """Return `tensor`, put together if it is sharded. Every rank must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole(tree, run):
    """Return `tree` of dicts and tensors with sharded ones put together, every rank calling it.

    They come to the CPU on rank 0, one by one, and are None elsewhere.
    """
    if isinstance(tree, dict):
        return {key: whole(value, run) for key, value in tree.items()}
    if not is_sharded(tree):
        return tree
    tensor = joined(tree)
    return tensor.cpu() if run.rank == 0 else None


# --- the end of a process ------------------------------------------------------------------------


def catch_signals():
    """Let SIGTERM, SIGINT and SIGUSR1 set Run.stop_requested(); a second SIGINT kills at once."""

    def note(number, frame):
        _signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    _signals.clear()
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            _handlers[name] = signal.signal(getattr(signal, name), note)


def explain(fault):
    """Return the lines that tell a user what to mend, or None: then it is a bug of ours."""
    text = str(fault)
    if isinstance(fault, ValueError | OSError | ImportError):
        return f"{fault.filename}: {fault.strerror}" if getattr(fault, "filename", "") else text
    if isinstance(fault, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "out of memory: halve --batch_size and double --gradient_accumulation_steps"
    if isinstance(fault, dist.DistError) or "gloo" in text:
        reason = text.splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        return f"another process is gone or out of reach ({reason}); --init_from=resume goes on"


def already_said(lines, rank):
    """Return whether another rank said this; rank 0 has a second to speak for all."""
    with suppress(dist.DistError):  # the machine that keeps the store has ended
        for _ in range(10 * (rank > 0)):
            if not _store.check([lines]):
                time.sleep(0.1)  # wait() would log its own timeout
        return _store.add(lines, 1) > 1


@contextmanager
def one_line_errors():
    """End a script on a user's mistake with a line per fault and status 1, without a traceback.

    Ranks that fail alike speak once.
    """
    global _store
    rank, several = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        if several:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)  # else it meets old keys
            _store = dist.PrefixStore(f"attempt {attempt}", next(dist.rendezvous("env://"))[0])
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # 128 + SIGINT
    except Exception as fault:
        lines = explain(fault)
        if lines is None:
            raise
        if _store is not None and isinstance(fault, ValueError) and already_said(lines, rank):
            raise SystemExit(1) from None
        prefix = f"error: rank {rank}: " if rank else "error: "
        raise SystemExit("\n".join(prefix + line for line in lines.splitlines())) from None
    finally:
        for name in _handlers:
            signal.signal(getattr(signal, name), _handlers[name])
        if dist.is_initialized():
            dist.destroy_process_group()
