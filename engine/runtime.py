"""Where a run computes: device, precision, compilation, and its place among other processes.

One process is a world of size 1.
"""

import importlib.util
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from engine.parallel import is_sharded
from engine.process import UserError, caught_signal, reason, shared_store, user_error

# Dense peaks in TFLOP/s, from data sheets: 16-bit, then float32 (as TF32 from Ampere on).
PEAKS = {
    "B200": (2250, 1125), "H200": (989, 495), "H100 PCIe": (756, 378), "H100 NVL": (835, 418),
    "H100": (989, 495), "A100": (312, 156), "A6000": (155, 77), "A10G": (70, 35), "A10": (125, 62),
    "L40S": (362, 183), "L4": (121, 60), "RTX 5090": (209, 105), "RTX 4090": (165, 83),
    "RTX 3090": (71, 36), "V100": (125, 15.7), "T4": (65, 8.1),
}  # fmt: skip


@dataclass
class Runtime:
    """What this process computes on, and its place among `world_size` processes."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer state stay float32
    compile: bool  # whether models are compiled; False once that has failed
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
        """Return the "sum", "min" or "max" over all ranks of a number, or of each in a list.

        Every rank must call it.
        """
        if self.world_size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)  # on the CPU: no sync of a GPU
        dist.all_reduce(total, getattr(dist.ReduceOp, op.upper()))
        return total.tolist()

    def stop_requested(self):
        """Return the signal that asked any rank to stop, else 0. Every rank must call it."""
        return int(self.reduce("max", caught_signal()))

    def say(self, text, end="\n"):
        """Print on rank 0; a terminal that is gone or a full disk does not end a run."""
        if self.rank == 0 and text:
            with suppress(OSError):
                print(text, end=end, flush=True)

    def now(self):
        """Return a time in seconds, after the device has done the work it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def peak_flops(self):
        """Return the device's dense peak in FLOP/s for its dtype, None where it is not known."""
        for card, (low_precision, full_precision) in PEAKS.items():
            if re.search(rf"\b{card}\b", self.name):
                peak = full_precision if self.dtype == torch.float32 else low_precision
                return peak * 1e12
        return None


def start_runtime(device, dtype, compile, backend="gloo", timeout=600, lenient=()):
    """Return the Runtime for the settings of these names, in torchrun's process group, if any.

    A setting named in `lenient`, "device" or "dtype", becomes "auto" where this machine lacks it.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, why_device = choose_device(device, "device" in lenient)
    dtype, why_dtype = choose_dtype(dtype, device, "dtype" in lenient)
    compile, why_compile = choose_compile(compile, device)
    if device.type not in ("cpu", "mps"):
        torch.accelerator.set_device_index(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    if world_size > 1:
        backend = choose_backend(device, backend)
        limit = timedelta(seconds=timeout)
        dist.init_process_group(backend, None, limit, world_size, rank, shared_store(timeout))
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    name = get_name(device) if get_name else device.type
    precision = str(dtype).removeprefix("torch.")
    about = f"{world_size} x {name}{why_device}, {precision} ({why_dtype}), {why_compile}"
    return Runtime(device, dtype, compile, rank, world_size, name, about)


CANNOT = RuntimeError, AssertionError, NotImplementedError, ImportError  # of torch, for a device


def choose_device(name, fall_back=False):
    """Return the torch.device for the setting `device`, and what keeps this run from a GPU, if so.

    A device asked for by name that cannot be used is a UserError with torch's reason, or with
    `fall_back` the same as "auto", which falls back to the CPU.
    """
    if name != "auto":
        try:
            return open_device(name), ""
        except CANNOT as fault:
            why = f"device={name} cannot be used: {reason(fault)}"
        if not fall_back:
            raise UserError(f"{why}; try --device=auto")
        return choose_device("auto")[0], f" ({why})"
    if not torch.accelerator.is_available():
        return torch.device("cpu"), ""
    name = torch.accelerator.current_accelerator().type
    if name == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return torch.device("cpu"), ""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
    if processes > gpus:
        why = f"{processes} processes for {gpus} GPUs; lower --nproc_per_node"
        return torch.device("cpu"), f" ({why})"
    try:
        return open_device(name), ""
    except CANNOT as fault:
        return torch.device("cpu"), f" ({name} cannot be used: {reason(fault)})"


def open_device(name):
    """Return the torch.device called `name` after a first use of it; each process has its own."""
    device = torch.device(name)
    if device.index is None and device.type not in ("cpu", "mps", "meta"):
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
    torch.zeros(1, device=device).item()  # "meta" has no values
    return device


def choose_dtype(name, device, fall_back=False):
    """Return the torch.dtype for the setting `dtype`, and why. `fall_back` as in choose_device."""
    if name in ("float32", "bfloat16") or (name == "float16" and device.type == "cuda"):
        return getattr(torch, name), "as set"
    if name != "auto" and not fall_back:
        raise UserError(f"dtype={name}: choose auto, float32, bfloat16, or float16 on CUDA")
    if device.type == "cuda":  # is_bf16_supported() is also true where it is emulated, slowly
        real = torch.cuda.get_device_capability(device) >= (8, 0)
        return (torch.bfloat16, "the GPU's own") if real else (torch.float16, "no bfloat16 here")
    supports = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if supports and supports():
        return torch.bfloat16, "the device's own"
    # On a CPU with AVX512-BF16 but no AMX, matmuls in bfloat16 took 1.75 times those in float32.
    amx = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
    return (torch.bfloat16, "AMX") if amx else (torch.float32, "no fast bfloat16 here")


def choose_backend(device, backend):
    """Return the backend of the process group: `backend` on CUDA, else PyTorch's for the device."""
    if device.type in ("cpu", "mps"):
        return "gloo"
    if device.type != "cuda":
        with user_error(f"device={device.type} on several processes", ValueError):
            backend = dist.get_default_backend_for_device(device)
    return f"cpu:gloo,{device.type}:{backend}"  # gloo for the numbers that only the hosts share


def choose_compile(setting, device):
    """Return whether to torch.compile, and why."""
    if setting not in ("auto", True, False):
        raise UserError(f"compile={setting}: choose auto, True or False")
    if setting != "auto":
        return setting, "compiled as set" if setting else "not compiled as set"
    works = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    works = works and importlib.util.find_spec("triton") is not None
    return works, "compiled" if works else "not compiled: wants a recent GPU and Triton"


def compile_model(model, runtime, attempt):
    """Compile `model` in place if `runtime.compile` is True; where that fails, set it to False.

    `attempt()` runs what is to be compiled: in training through what wrap() made of the model, so
    that the compiler splits its graph where DDP sends gradients. If it fails, the model is as it
    was.
    """
    if not runtime.compile:
        return
    why = ""
    try:
        model.compile()
        with runtime.autocast():
            attempt()
    except Exception as fault:  # no compiler, no driver, an unsupported Python: all sorts
        sharded = is_sharded(next(model.parameters()))  # then the other ranks wait for this one
        if sharded or isinstance(
            fault, UserError | FloatingPointError | torch.OutOfMemoryError
        ):
            raise
        why = reason(fault)
    if runtime.reduce("max", bool(why)):
        model._compiled_call_impl = None  # undoes Module.compile()
        model.zero_grad(set_to_none=True)
        runtime.compile, runtime.about = False, f"{runtime.about}, but that failed"
        runtime.say(f"not compiled, which is slower: {why or 'another rank failed'}")
