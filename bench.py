"""Measure the speed and memory of train.py's training step, or of sampling.

    python bench.py --compile=True
    python bench.py config/train_shakespeare_char.py
    python bench.py --batch_size=2 --dtype=float32 --seconds=30 --profile
    python bench.py --new_tokens=256 --num_samples=10

Takes the settings of train.py and its config files; by default GPT-2 124M with 12 x 1024 tokens.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before PyTorch loads OpenMP: docs/speed.md

import functools
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

import train
from configurator import configure
from data.batches import Batches
from data.tokenizer import GPT2, read_meta
from data.tokens import TokenFile
from engine.process import UserError, one_line_errors
from engine.runtime import start_runtime

# Benchmark
steps = 100                         # maximum number of steps to measure
seconds = 60.0                      # time to spend on them; one is measured in any case
real_data = True                    # the dataset if it is prepared; False: random tokens
profile = False                     # write trace.json and print the slowest operators
new_tokens = 0                      # instead, measure sampling: tokens per sample
num_samples = 1                     # samples that are generated together
gradient_accumulation_steps = 1     # micro-batches per step; train.py's default is 40

ALLOWED = {  # setting -> (minimum, maximum)
    "steps": (1, 2**31 - 1),
    "seconds": (1e-3, 2**31 - 1),
    "new_tokens": (0, 2**31 - 1),
    "num_samples": (1, 2**31 - 1),
}
ROOT = Path(__file__).resolve().parent


def load_tokens():
    """Return the tokens to train on, random ones if the dataset is not prepared."""
    path = ROOT / "data" / train.dataset / "train.bin"
    if real_data and path.exists():
        return TokenFile(path, read_meta(path.parent), train.block_size)
    ids = np.random.default_rng(train.seed).integers(50257, size=2**20 + train.block_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random.bin")
        ids.astype("<u2").tofile(path)
        return TokenFile(path, GPT2, train.block_size)


def training_work(config, runtime):
    """Return a function that makes a training step, the tokens of a step, and the model."""
    tokens = load_tokens()
    runtime.say(f"data: {tokens.path.name}, {tokens.count:,} tokens")
    batches = Batches(tokens, config, runtime)
    state = train.build_state(None, {"train": tokens}, config, runtime)
    state.step = train.batch_ramp_iters  # at the full batch size
    model = train.wrap(state.model, batches, runtime)
    count = train.gradient_accumulation_steps * train.batch_size * train.block_size
    return lambda: train.train_step(model, state, batches, runtime), count, state.model


def sampling_work(config, runtime):
    """Return a function that generates num_samples samples, the number of tokens, and the model."""
    model = train.build_model(None, GPT2, config).eval().to(runtime.device, runtime.dtype)
    for block in model.transformer.h if runtime.compile else []:
        block.compile()
    idx = torch.zeros(num_samples, 1, dtype=torch.long, device=runtime.device)
    work = functools.partial(model.generate, idx, new_tokens, temperature=0.8, top_k=200)
    return work, num_samples * new_tokens, model


def time_laps(work, runtime):
    """Return seconds per call of work(), measured over laps of up to 10 calls. Collective."""
    times, calls, lap = [], 0, 1
    began = runtime.now()
    while calls < steps and runtime.reduce("max", runtime.now() - began) < seconds or not times:
        lap_began = runtime.now()
        for _ in range(lap):
            work()
        calls += lap
        times.append(runtime.reduce("max", runtime.now() - lap_began) / lap)
        lap = max(1, min(10, round(0.1 / times[-1])))  # waiting for the device costs little then
    return times


def write_profile(work, runtime):
    """Profile three calls into trace.json, for the tracing page of a browser; print a summary."""
    with torch.profiler.profile(acc_events=True) as profiler:
        for _ in range(3):
            work()
    if runtime.rank == 0:
        profiler.export_chrome_trace("trace.json")
    order = f"self_{runtime.device.type}_time_total"
    runtime.say(profiler.key_averages().table(order, row_limit=15))


@one_line_errors("lower --batch_size, or --num_samples")
def main(config):
    if train.init_from == "resume":
        raise UserError("bench.py measures a new model; leave --init_from=resume out")
    runtime = start_runtime(config)
    runtime.say(f"hardware: {runtime.about}")
    make = sampling_work if new_tokens else training_work
    work, count, model = make(config, runtime)
    runtime.say("the first call allocates memory, and compiles if wanted ...")
    began = runtime.now()
    work()
    runtime.say(f"first call: {runtime.now() - began:.2f} s")
    times = time_laps(work, runtime)
    median = statistics.median(times)
    rate = count / median
    runtime.say(
        f"{count} tokens in {median * 1e3:.2f} ms (median of {len(times)}, {min(times) * 1e3:.2f} "
        f"to {max(times) * 1e3:.2f}), {rate:,.0f} tokens/s"
    )
    if not new_tokens:
        flops = model.flops_per_token() * rate / runtime.world_size
        text = f"{flops / 1e12:.2f} TFLOP/s on each device"
        if peak := runtime.peak_flops():
            text += f", mfu {flops / peak:.2%}"
        runtime.say(text)
    if memory := runtime.peak_memory():
        runtime.say(f"peak memory: {memory / 2**30:.2f} GiB on the GPU")
    if profile:
        write_profile(work, runtime)


if __name__ == "__main__":
    main(configure(globals(), vars(train)))
