"""Time the training step of train.py: the same function on the same batches, nothing around it.

    python bench.py --compile=True
    python bench.py config/train_shakespeare_char.py --baseline=True
    python bench.py --batch_size=2 --dtype=float32 --seconds=30 --profile=True
    python bench.py --new_tokens=256 --num_samples=10

Takes the settings of train.py and its config files; by default GPT-2 124M at 12 x 1024 tokens.
"""

import math
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

import train
from configurator import configure
from data.batches import Batches
from data.tokenizer import GPT2, read_meta
from data.tokens import TokenFile, files_of
from engine.fast import use_fast_parts
from engine.process import UserError, one_line_errors
from engine.runtime import compile_model, start_runtime
from engine.timing import peak_memory, time_laps

# Benchmark
steps = 100                         # steps to measure at most, in each turn
seconds = 60.0                      # time to take them in; one is measured in any case
real_data = True                    # the dataset, where it is prepared; False: random tokens
baseline: bool | str = False        # True: nanoGPT's way of it too, in turn; "only": without ours
profile = False                     # write trace.json and print the operators that take longest
new_tokens = 0                      # time drawing so many tokens instead of training steps
num_samples = 1                     # side by side
gradient_accumulation_steps = 1     # micro-batches per step; train.py's own default is 40

RANGES = {
    "steps": (1, 2**31),
    "seconds": (1e-3, 2**31),
    "new_tokens": (0, 2**31),
    "num_samples": (1, 2**31),
}
ROOT = Path(__file__).resolve().parent


def load_tokens():
    """Return the tokens to train on, random ones if need be."""
    path = ROOT / "data" / train.dataset / "train.bin"
    if real_data and files_of(path)[0].exists():
        return TokenFile(path, read_meta(path.parent), train.block_size)
    generator = np.random.default_rng(train.seed)
    ids = generator.integers(GPT2["vocab_size"], size=2**20 + train.block_size, dtype="u2")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder, "random.bin")
        ids.tofile(path)
        return TokenFile(path, GPT2, train.block_size)


# --- our way and nanoGPT's -----------------------------------------------------------------------

# Each returns a function that does the work once more, and its model.


def our_step(tokens, meta, config, runtime):
    """A training step of train.py."""
    state = train.build_state(None, meta, {"train": tokens}, config, runtime)
    batches = Batches(tokens, config, runtime)
    model, full = train.prepare_model(state, batches, runtime), train.batch_ramp_iters
    return lambda index: train.train_step(model, state, batches, full + index, runtime), state.model


def nanogpts_step(tokens, meta, config, runtime):
    """The same with PyTorch's own functions, all logits at once, and sequences cut one by one.

    AdamW is fused only on CUDA; there in bfloat16 and compiled if ours is, elsewhere in float32 and
    eager.
    """
    cuda = runtime.device.type == "cuda"
    model = train.build_model(None, meta, config, runtime.device)
    optimizer = model.configure_optimizers(
        train.weight_decay, train.learning_rate, (train.beta1, train.beta2),
        device_type="cuda" if cuda else "none",  # then not fused
    )  # fmt: skip
    if cuda and runtime.compile:
        model.compile()

    def cut():
        starts = torch.randint(len(tokens.ids) - train.block_size, (train.batch_size,)).tolist()
        rows = [tokens.ids[at : at + train.block_size + 1].astype("i8") for at in starts]
        halves = [row[:-1] for row in rows], [row[1:] for row in rows]
        pair = [torch.stack([torch.from_numpy(row) for row in half]) for half in halves]
        pair = [half.pin_memory() if cuda else half for half in pair]
        return [half.to(runtime.device, non_blocking=True) for half in pair]

    batch = cut()

    def step(index):
        nonlocal batch
        for _ in range(train.gradient_accumulation_steps):
            with torch.autocast(runtime.device.type, torch.bfloat16, enabled=cuda):
                _, loss = model(*batch)
            batch = cut()  # while a GPU computes
            (loss / train.gradient_accumulation_steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, model


def our_samples(tokens, meta, config, runtime):
    """new_tokens tokens for each of num_samples samples, side by side, as sample.py draws them."""
    model = train.build_model(None, meta, config, runtime.device).cast_matrices(runtime.dtype)
    if train.fast_parts:
        use_fast_parts(model, runtime.device)
    idx = torch.zeros(num_samples, 1, dtype=torch.long, device=runtime.device)
    compile_model(model, runtime, lambda: model.generate(idx, 3))

    def draw(index):
        with runtime.autocast():
            model.generate(idx, new_tokens, temperature=0.8, top_k=200)

    return draw, model


def nanogpts_samples(tokens, meta, config, runtime):
    """The same, one sample after the other and without a cache."""
    model = train.build_model(None, meta, config, runtime.device)
    idx = torch.zeros(1, 1, dtype=torch.long, device=runtime.device)

    def draw(index):
        with runtime.autocast():
            for _ in range(num_samples):
                model.generate(idx, new_tokens, temperature=0.8, top_k=200, use_cache=False)

    return draw, model


# --- measuring -----------------------------------------------------------------------------------


def measure(tokens, meta, config, runtime):
    """Time each way in turn, and print what came of it."""
    ours, theirs = (our_samples, nanogpts_samples) if new_tokens else (our_step, nanogpts_step)
    ways = {"ours": ours, "nanoGPT's way": theirs}
    chosen = {False: ["ours"], True: list(ways), "only": ["nanoGPT's way"]}[baseline]
    made = {name: ways[name](tokens, meta, config, runtime) for name in chosen}
    for work, _ in made.values():
        work(0)  # the first compiles, and fills the allocator
    times = {name: [] for name in chosen}
    for name in chosen * 3:  # by turns, so that a slow minute meets both
        times[name] += time_laps(made[name][0], steps, seconds / 3, runtime)
    medians = [report(name, times[name], model, runtime) for name, (_, model) in made.items()]
    if baseline is True:
        runtime.say(f"nanoGPT's way takes {medians[1] / medians[0]:.2f} times as long")
    if profile:
        write_profile(made[chosen[0]][0], runtime)


def report(name, times, model, runtime):
    """Print how fast the way `name` is, from its times; return their median."""
    shape = (
        (num_samples, new_tokens)
        if new_tokens
        else (train.gradient_accumulation_steps, train.batch_size, train.block_size)
    )
    median = statistics.median(times)
    rate = math.prod(shape) / median
    runtime.say(
        f"{name}: {' x '.join(map(str, shape))} tokens, median {median * 1e3:.2f} ms "
        f"({min(times) * 1e3:.2f} to {max(times) * 1e3:.2f} in {len(times)} laps), "
        f"{rate:,.0f} tokens/s"
    )
    if not new_tokens:
        mfu = model.estimate_mfu(rate / runtime.world_size, 1, runtime.peak_flops())
        known = f"mfu {mfu:.2%}" if mfu else "mfu unknown: no peak for this device"
        runtime.say(f"  {model.flops_per_token() * rate / 1e12:.2f} TFLOP/s, {known}")
    return median


def write_profile(work, runtime):
    """Profile three calls into trace.json, for a browser's tracing page; print what cost most."""
    with torch.profiler.profile() as profiler:
        for index in range(3):
            work(index)
    if runtime.rank == 0:
        profiler.export_chrome_trace("trace.json")
    runtime.say(
        profiler.key_averages().table(f"self_{runtime.device.type}_time_total", row_limit=15)
    )


@one_line_errors
def main(config):
    train.check_settings(config)
    runtime = start_runtime(train.device, train.dtype, train.compile, train.backend, train.timeout)
    if baseline not in (True, False, "only"):
        raise UserError(f"baseline={baseline}: choose True, False or only")
    if (baseline or new_tokens) and runtime.world_size > 1:
        raise UserError("--baseline and --new_tokens time single processes; leave torchrun out")
    if train.init_from == "resume":
        raise UserError("bench.py times a new model; leave --init_from=resume out")
    tokens = load_tokens()
    runtime.say(f"hardware: {runtime.about}\ndata: {tokens.path.name}, {len(tokens.ids):,} tokens")
    measure(tokens, tokens.meta, config, runtime)
    runtime.say(f"peak memory: {peak_memory(runtime) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main(configure(globals(), vars(train)))
