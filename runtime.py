"""Where a run runs: device, precision, compilation, processes. One process is a world of size 1."""

import ctypes
import importlib.util
import os
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Dense peaks in TFLOP/s, from data sheets: 16-bit, then float32 (as TF32 from Ampere on).
PEAKS = {
    "B200": (2250, 1125), "H200": (989, 495), "H100 PCIe": (756, 378), "H100 NVL": (835, 418),
    "H100": (989, 495), "A100": (312, 156), "A6000": (155, 77), "A10G": (70, 35), "A10": (125, 62),
    "L40S": (362, 183), "L4": (121, 60), "RTX 5090": (209, 105), "RTX 4090": (165, 83),
    "RTX 3090": (71, 36), "V100": (125, 15.7), "T4": (65, 8.1),
}  # fmt: skip


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

    def sum(self, number):
        """Return a number summed over all ranks. Every rank must call it."""
        total = torch.tensor(number, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total := total.to(self.device))
        return total.item()

    def say(self, *words):
        if self.rank == 0:
            print(*words, flush=True)

    def now(self):
        """Return a time in seconds, after the device has done the work it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def peak_flops(self):
        """Return the device's dense peak in FLOP/s for its dtype, None where it is not known."""
        peaks = next((PEAKS[card] for card in PEAKS if card in self.name), None)
        return peaks and peaks[self.dtype == torch.float32] * 1e12


def start(device, dtype, compile, backend):
    """Return the Run for the settings of these names, in the group that torchrun made, if any."""
    device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    dtype, why_dtype = choose_dtype(dtype, device)
    compile, why_compile = choose_compile(compile, device)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    if device.type == "cpu":  # keep freed memory: getting it anew took a quarter of a step
        with suppress(AttributeError, OSError, TypeError):  # there is no glibc
            ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
            ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
    if world_size > 1:
        dist.init_process_group(backend if device.type == "cuda" else "gloo")
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
        torch.empty(0, device=device)
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
    """Compile `model` in place if the run wants it and `attempt()`, which calls it, then works."""
    try:
        if run.compile:
            model.compile()
            with run.autocast():
                attempt()
    except Exception as fault:  # no compiler, no driver, an unsupported Python: all sorts
        model._compiled_call_impl = None  # undoes Module.compile()
        run.say(f"not compiled, which is slower: {type(fault).__name__}: {fault}".splitlines()[0])


def wrap(model, run):
    """Return `model`, made to average gradients over ranks when there are several."""
    parallel = torch.nn.parallel.DistributedDataParallel
    return model if run.world_size == 1 else parallel(model, gradient_as_bucket_view=True)


@contextmanager
def one_line_errors():
    """End a script on a user's mistake with a line per fault and status 1, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as fault:
        raise SystemExit("\n".join(f"error: {line}" for line in str(fault).splitlines())) from None
    except torch.OutOfMemoryError:
        advice = "halve --batch_size and double --gradient_accumulation_steps"
        raise SystemExit(f"error: out of GPU memory; {advice} for the same result") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # 128 + SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
