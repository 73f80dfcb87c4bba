"""Where a run runs: device, precision, compilation and the group of processes.

One process is a world of size 1, so callers never ask whether there are several.
"""

import importlib.util
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# Dense peaks in TFLOP/s from the makers' data sheets, by a part of the device name; the first match
# counts. First bfloat16 or float16, then float32 as it runs here: TF32 from Ampere on.
PEAKS = {
    "B200": (2250, 1125), "H200": (989, 495), "H100 PCIe": (756, 378), "H100 NVL": (835, 418),
    "H100": (989, 495), "A100": (312, 156), "A6000": (155, 77), "A10": (125, 62),
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
    about: str  # one line: what was chosen and why

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, number):
        """Return a number summed over all ranks. Every rank must call it."""
        total = torch.tensor([number], dtype=torch.float64)
        if self.world_size > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return total.item()

    def say(self, *words):
        if self.rank == 0:
            print(*words, flush=True)

    def synchronize(self):
        """Wait until the device has done its work, so that a clock can be read."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def peak_flops(self):
        """Return the device's dense peak in FLOP/s for its dtype, None where it is not known."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        peaks = next((PEAKS[card] for card in PEAKS if card in name), None)
        return peaks and peaks[self.dtype == torch.float32] * 1e12


def start(device, dtype, compile, backend):
    """Return the Run for the settings of these names, in the group that torchrun made, if any."""
    device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    dtype, why_dtype = choose_dtype(dtype, device)
    compile, why_compile = choose_compile(compile, device)
    name = device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group(backend if device.type == "cuda" else "gloo")
    precision = str(dtype).removeprefix("torch.")
    about = f"{world_size} x {name}, {precision} ({why_dtype}), {why_compile}"
    return Run(device, dtype, compile, rank, world_size, about)


def choose_device(name, local_rank):
    """Return the torch.device for the setting `device`; each local rank has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if torch.backends.mps.is_available() else name
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device={name}: this machine has none; try --device=auto") from None
    return device


def choose_dtype(name, device):
    """Return the torch.dtype for the setting `dtype`, and why."""
    if name != "auto":
        allowed = ["float32", "bfloat16"] + ["float16"] * (device.type == "cuda")
        if name not in allowed:
            raise ValueError(f"dtype={name}: {device.type} allows auto, {', '.join(allowed)}")
        return getattr(torch, name), "as set"
    if device.type == "cuda":  # is_bf16_supported() is also true where it is emulated, slowly
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU has it"
        return torch.float16, "no bfloat16 below compute capability 8.0"
    chip = getattr(torch.cpu, "get_capabilities", dict)()  # newer releases only
    if device.type == "cpu" and (chip.get("amx_bf16") or chip.get("avx512_bf16")):
        return torch.bfloat16, "the CPU has it"
    return torch.float32, f"no fast bfloat16 on this {device.type}"


def choose_compile(setting, device):
    """Return whether to torch.compile, and why."""
    if isinstance(setting, bool):
        return setting, "compiled, as set" if setting else "not compiled, as set"
    if setting != "auto":
        raise ValueError(f"compile={setting}: choose auto, True or False")
    if device.type != "cuda":
        return False, "not compiled: gains little here"
    if torch.cuda.get_device_capability(device) < (7, 0) or not importlib.util.find_spec("triton"):
        return False, "not compiled: needs Triton and compute capability 7.0"
    return True, "compiled"


def compile_model(model, run, tokens):
    """Compile `model` in place if the run wants it and it works for a micro-batch like `tokens`."""
    if not run.compile:
        return
    tokens = tokens.to(run.device)
    try:
        model.compile()
        with run.autocast():
            model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:  # no compiler, no driver, an unsupported Python: all sorts
        model._compiled_call_impl = None  # undoes Module.compile()
        run.say(f"not compiled, which is slower: {type(fault).__name__}: {fault}".splitlines()[0])
    model.zero_grad(set_to_none=True)


def wrap(model, run):
    """Return `model`, made to average gradients over ranks when there are several."""
    if run.world_size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextmanager
def one_line_errors():
    """End a script on a user's mistake with one line per fault and status 1, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as fault:
        raise SystemExit("\n".join(f"error: {line}" for line in str(fault).splitlines())) from None
    except torch.OutOfMemoryError:
        advice = "halve --batch_size and double --gradient_accumulation_steps for the same result"
        raise SystemExit(f"error: the GPU's memory is full; {advice}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # 128 + SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
