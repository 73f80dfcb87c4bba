"""Time the training step of train.py: the same function on the same batches, nothing around it.

    python bench.py --compile=True
    python bench.py config/train_shakespeare_char.py --baseline=True
    python bench.py --batch_size=2 --dtype=float32 --seconds=30 --profile=True
    python bench.py --new_tokens=256 --num_samples=10

Takes the settings of train.py and its config files; by default GPT-2 124M at 12 x 1024 tokens.
"""

import math
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import fast
import runtime
import train
from configurator import configure
from data.tokens import GPT2, Batches, TokenFile, read_meta

# Benchmark
steps = 100                         # steps to measure at most, in each turn
seconds = 60.0                      # time to take them in; one is measured in any case
real_data = True                    # the dataset, where it is prepared; False: random tokens
baseline: bool | str = False        # True: nanoGPT's way of it too, in turn; "only": without ours
profile = False                     # write trace.json and print the operators that take longest
new_tokens = 0                      # time drawing so many tokens instead of training steps
num_samples = 1                     # side by side
gradient_accumulation_steps = 1     # micro-batches per step; train.py's own default is 40

ROOT = Path(__file__).resolve().parent


def load_tokens(scratch):
    """Return the tokens to train on, random ones in a folder `scratch` if need be, and the meta."""
    path = ROOT / "data" / train.dataset / "train.bin"
    if real_data and path.exists():
        meta = read_meta(path.parent)
        return TokenFile(path, meta, train.block_size), meta
    path = Path(scratch, "random.bin")
    generator = np.random.default_rng(train.seed)
    generator.integers(GPT2["vocab_size"], size=2**20 + train.block_size, dtype="u2").tofile(path)
    return TokenFile(path, GPT2, train.block_size), GPT2


# --- two ways to make a step ---------------------------------------------------------------------


class TimedBatches(Batches):
    """Batches that note in `waits` for how many seconds each step waited for what was prepared."""

    def __call__(self, step):
        began, prepared = time.perf_counter(), step in self.ahead
        micro_batches = super().__call__(step)
        self.waits += [time.perf_counter() - began] * prepared
        return micro_batches


def our_step(tokens, meta, run):
    """Return a function that makes step `index` as train.py does, its model, and its waits."""
    state = train.build_state(None, meta, run)
    sizes = train.gradient_accumulation_steps, train.batch_size, train.block_size
    batches = TimedBatches(tokens, *sizes, train.seed, run)
    batches.waits = []
    model = runtime.wrap(state.model, run)
    attempt = partial(train.try_step, model, state, batches, run)
    run = runtime.compile_model(state.model, run, attempt)

    def step(index):
        train.train_step(model, state, batches, index, run)

    return step, state.model, batches.waits


@contextmanager
def plain_functions():
    """Put PyTorch's own functions in the places of those in fast.py."""
    with (
        mock.patch.object(fast.Dropout, "forward", torch.nn.Dropout.forward),
        mock.patch.object(fast.Linear, "forward", torch.nn.Linear.forward),
        mock.patch.object(fast, "attend", F.scaled_dot_product_attention),
    ):
        yield


def nanogpts_step(tokens, meta, run):
    """Return a function that makes a step the way nanoGPT does, its model, and no waits.

    All logits at once, sequences cut one by one, AdamW fused only on CUDA; there in bfloat16 and
    compiled if ours is, elsewhere in float32 and eager.
    """
    model, cuda = train.build_model(None, meta, run), run.device.type == "cuda"
    rates = train.weight_decay, train.learning_rate, (train.beta1, train.beta2)
    groups = model.configure_optimizers(*rates, "cpu").param_groups
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=rates[1], betas=rates[2], fused=cuda)
    micro_steps = train.gradient_accumulation_steps

    def cut():
        starts = torch.randint(len(tokens.ids) - train.block_size, (train.batch_size,)).tolist()
        rows = [tokens.ids[at : at + train.block_size + 1].astype("i8") for at in starts]
        pair = [row[:-1] for row in rows], [row[1:] for row in rows]
        pair = [torch.stack([torch.from_numpy(row) for row in half]) for half in pair]
        return [(t.pin_memory() if cuda else t).to(run.device, non_blocking=True) for t in pair]

    def loss_of(idx, targets):
        logits = model.lm_head(model.hidden(idx))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    loss_of = torch.compile(loss_of) if cuda and run.compile else loss_of
    batch = cut()

    def step(index):
        nonlocal batch
        for _ in range(micro_steps):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=cuda), plain_functions():
                loss = loss_of(*batch) / micro_steps
            batch = cut()  # while a GPU computes
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, model, []


# --- measuring -----------------------------------------------------------------------------------


def time_steps(step, run, seconds, warm):
    """Return seconds per step of step(1), step(2), ..., by laps; unless `warm`, after step(0).

    Laps are of up to 10 steps, as between log lines, so that waiting for the device costs little.
    """
    began = run.now()
    if not warm:
        step(0)
    times, index, lap = [], 1, 1
    # Ranks have clocks of their own and must agree when to stop: the slowest counts.
    while not times or (index <= steps and run.reduce("max", run.now() - began) < seconds):
        lap, lap_began = min(lap, steps + 1 - index), run.now()
        for _ in range(lap):
            step(index)
            index += 1
        times.append(run.reduce("max", run.now() - lap_began) / lap)
        lap = max(1, min(10, round(0.1 / times[-1])))
    return times


def peak_memory(run):
    """Return the most memory used so far in bytes, of the GPU or else of this process."""
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_profile(step, run):
    """Profile three steps into trace.json, for a browser's tracing page; print what cost most."""
    kinds = torch.profiler.supported_activities()
    with torch.profiler.profile(activities=kinds) as profiler:
        for index in range(3):
            step(index)
        run.now()
    if run.rank == 0:
        profiler.export_chrome_trace("trace.json")
    order = "self_cuda_time_total" if run.device.type == "cuda" else "self_cpu_time_total"
    run.say(profiler.key_averages().table(sort_by=order, row_limit=15))
    run.say("trace.json holds the whole of it")


def report(name, times, model, run):
    """Print how fast the way `name` makes a step, from its times; return their median."""
    sizes = train.gradient_accumulation_steps, train.batch_size, train.block_size
    median, tokens = statistics.median(times), math.prod(sizes)
    spread = f"{min(times) * 1000:.2f} to {max(times) * 1000:.2f} in {len(times)} laps"
    shape = " x ".join(map(str, sizes))
    run.say(f"{name}: {shape} tokens, median {median * 1000:.2f} ms ({spread})")
    mfu = model.estimate_mfu(tokens / run.world_size, median, run.peak_flops())
    known = f"mfu {mfu:.2%}" if mfu else "mfu unknown: no peak for this device"
    rate = f"{model.flops_per_token() * tokens / median / 1e12:.2f} TFLOP/s"
    run.say(f"  {tokens / median:,.0f} tokens/s, {rate}, {known}")
    return median


def check_settings(run):
    train.check_settings(run.world_size)
    if baseline not in (True, False, "only"):
        raise ValueError(f"baseline={baseline}: choose True, False or only")
    if (baseline or new_tokens) and run.world_size > 1:
        raise ValueError("--baseline and --new_tokens time single processes; leave torchrun out")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if profile and new_tokens:
        raise ValueError("--profile=True is for training steps; leave --new_tokens out")
    if num_samples < 1 or new_tokens and new_tokens < 4:
        few = f"new_tokens={new_tokens}, num_samples={num_samples}"
        raise ValueError(f"{few}: draw 0 or at least 4 tokens, for at least 1 sample")
    if train.init_from == "resume":
        raise ValueError("bench.py times a new model; leave --init_from=resume out")


def measure_training(tokens, meta, run):
    """Time steps, each way in turn, and print what came of it."""
    ways = {"step": our_step} if baseline != "only" else {}
    ways |= {"nanoGPT's way": nanogpts_step} if baseline else {}
    made = {name: make(tokens, meta, run) for name, make in ways.items()}
    step, model, waits = next(iter(made.values()))
    describe(model, run)
    rounds, times = 3 if baseline is True else 1, {name: [] for name in ways}
    for _ in range(rounds):
        for name in ways:
            times[name] += time_steps(made[name][0], run, seconds / rounds, warm=times[name])
    medians = [report(name, times[name], model, run) for name in ways]
    if waits:
        run.say(f"waiting for data: {statistics.fmean(waits) / medians[0]:.2%} of a step")
    if baseline is True:
        run.say(f"nanoGPT's way takes {medians[1] / medians[0]:.2f} times as long")
    if profile:
        write_profile(step, run)


def measure_sampling(meta, run):
    """Time the tokens that a new model draws; nanoGPT has no cache and draws samples in turn."""
    model, rates = train.build_model(None, meta, run).cast_matrices(run.dtype), []
    prompts = torch.zeros(num_samples, 1, dtype=torch.long, device=run.device)
    run = runtime.compile_model(model, run, lambda: model.generate(prompts, 3))
    ways = {"sampling": (num_samples, True)} if baseline != "only" else {}
    ways |= {"nanoGPT's way": (1, False)} if baseline else {}
    describe(model, run)
    for name, (count, use_cache) in ways.items():
        idx = prompts[:count]
        with run.autocast(), nullcontext() if use_cache else plain_functions():
            model.generate(idx, 3, use_cache=use_cache)
            moments = [run.now()]
            for _ in model.stream(idx, new_tokens, temperature=0.8, top_k=200, use_cache=use_cache):
                moments.append(run.now())
        ends = [moments[new_tokens * quarter // 4] for quarter in range(5)]
        quarters = [count * new_tokens / 4 / (end - begin) for begin, end in pairwise(ends)]
        rates.append(count * new_tokens / (moments[-1] - moments[0]))
        run.say(f"{name}: {count} x {new_tokens} tokens, {rates[-1]:,.1f} tokens/s", end="")
        run.say(f" (by quarters {', '.join(f'{rate:,.1f}' for rate in quarters)})")
    if baseline is True:
        run.say(f"nanoGPT's way takes {rates[0] / rates[1]:.2f} times as long")


def describe(model, run):
    millions, megaflops = model.get_num_params() / 1e6, model.flops_per_token() / 1e6
    run.say(f"model: {millions:.2f}M parameters, {megaflops:,.0f} MFLOPs per token")


@runtime.one_line_errors()
def main(config):
    run = runtime.start(train.device, train.dtype, train.compile, train.backend, train.timeout)
    check_settings(run)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        tokens, meta = load_tokens(scratch)
    run.say(f"hardware: {run.about}")
    if new_tokens:
        measure_sampling(meta, run)
    else:
        run.say(f"data: {'random tokens' if tokens.path.name == 'random.bin' else tokens.path}")
        measure_training(tokens, meta, run)
    both = " of both" if baseline is True else ""
    run.say(f"peak memory: {peak_memory(run) / 2**30:.2f} GiB{both}")


if __name__ == "__main__":
    main(configure(globals(), vars(train)))
