"""Time the training step of train.py: the same function on the same batches, nothing around it.

    python bench.py --compile=True
    python bench.py config/train_shakespeare_char.py
    python bench.py --batch_size=2 --dtype=float32 --seconds=30 --profile=True

Takes the settings of train.py and its config files; by default GPT-2 124M at 12 x 1024 tokens.
"""

import math
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import runtime
import train
from configurator import configure
from data.tokens import GPT2, Batches, TokenFile, read_meta

# Benchmark
steps = 100                         # steps to measure at most
seconds = 60.0                      # time to take them in; one is measured in any case
real_data = True                    # the dataset, where it is prepared; False: random tokens
baseline = False                    # time nanoGPT's way to make the same step too, in turn
profile = False                     # write trace.json and print the operators that take longest
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


def nanogpts_step(tokens, meta, run):
    """Return a function that makes a step the way nanoGPT does, on a model of its own.

    All logits at once, sequences cut one by one, AdamW fused only on CUDA; there in bfloat16 and
    compiled, elsewhere in float32 and eager.
    """
    model, cuda = train.build_model(None, meta, run), run.device.type == "cuda"
    ours = model.configure_optimizers(train.weight_decay, train.learning_rate, (0.9, 0.95), "cpu")
    optimizer = torch.optim.AdamW(ours.param_groups, fused=cuda)
    micro_steps = train.gradient_accumulation_steps // run.world_size

    def cut():
        starts = torch.randint(len(tokens.ids) - train.block_size, (train.batch_size,)).tolist()
        rows = [tokens.ids[at : at + train.block_size + 1].astype("i8") for at in starts]
        pair = [row[:-1] for row in rows], [row[1:] for row in rows]
        pair = [torch.stack([torch.from_numpy(row) for row in half]) for half in pair]
        return [(t.pin_memory() if cuda else t).to(run.device, non_blocking=True) for t in pair]

    def loss_of(idx, targets):
        logits = model.lm_head(model.hidden(idx))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    loss_of = torch.compile(loss_of) if cuda else loss_of

    def step(index):
        for _ in range(micro_steps):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=cuda):
                loss = loss_of(*cut()) / micro_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # for the log

    return step


def time_steps(step, run, seconds):
    """Return seconds per step of step(1), step(2), ..., by laps; step(0) warms up.

    Laps are of up to 10 steps, as between log lines, so that waiting for the device costs little.
    """
    began = run.now()
    step(0)
    times, index, lap = [], 1, 1
    # Ranks have clocks of their own and must agree when to stop: the slowest counts.
    while not times or (index < steps and run.reduce("max", run.now() - began) < seconds):
        lap_began = run.now()
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
    profiler.export_chrome_trace("trace.json")
    order = "self_cuda_time_total" if run.device.type == "cuda" else "self_cpu_time_total"
    run.say(profiler.key_averages().table(sort_by=order, row_limit=15))
    run.say("trace.json holds the whole of it")


@runtime.one_line_errors()
def main(config):
    run = runtime.start(train.device, train.dtype, train.compile, train.backend, train.timeout)
    train.check_settings(run.world_size)
    if baseline and run.world_size > 1:
        raise ValueError("--baseline=True compares single processes; leave torchrun out")
    if train.init_from == "resume":
        raise ValueError("bench.py times a new model; leave --init_from=resume out")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        tokens, meta = load_tokens(scratch)
    state = train.build_state(None, meta, run)
    sizes = train.gradient_accumulation_steps, train.batch_size, train.block_size
    batches = Batches(tokens, *sizes, train.seed, run)
    run.say(f"hardware: {run.about}")
    run.say(f"data: {tokens.path.name if tokens.path.name == 'random.bin' else tokens.path}")
    flops = state.model.flops_per_token()
    millions = state.model.get_num_params() / 1e6
    run.say(f"model: {millions:.2f}M parameters, {flops / 1e6:,.0f} MFLOPs per token")
    model = runtime.wrap(state.model, run)
    attempt = partial(train.try_step, model, state, batches, run)
    run = runtime.compile_model(state.model, run, attempt)

    def step(index):
        train.train_step(model, state, batches, index, run)

    rounds, times, theirs = 3 if baseline else 1, [], []
    their_step = nanogpts_step(tokens, meta, run) if baseline else None
    for _ in range(rounds):
        times += time_steps(step, run, seconds / rounds)
        theirs += time_steps(their_step, run, seconds / rounds) if baseline else []
    median, per_step = statistics.median(times), math.prod(sizes)
    shape = " x ".join(map(str, sizes))
    spread = f"{min(times) * 1000:.2f} to {max(times) * 1000:.2f} in {len(times)} laps"
    run.say(f"step: {shape} tokens, median {median * 1000:.2f} ms ({spread})")
    mfu = state.model.estimate_mfu(per_step / run.world_size, median, run.peak_flops())
    known = f"mfu {mfu:.2%}" if mfu else "mfu unknown: no peak for this device"
    rate = f"{flops * per_step / median / 1e12:.2f} TFLOP/s"
    run.say(f"speed: {per_step / median:,.0f} tokens/s, {rate}, {known}")
    if baseline:
        other = statistics.median(theirs)
        run.say(f"nanoGPT's way: median {other * 1000:.2f} ms, {other / median:.2f} times as long")
    run.say(f"peak memory: {peak_memory(run) / 2**30:.2f} GiB")
    if profile:
        write_profile(step, run)


if __name__ == "__main__":
    main(configure(globals(), vars(train)))
