"""What a training command will take, before anything is trained.

    python tools/size.py config/train_gpt2.py --gpus=8 --gpu=H100
    python tools/size.py config/train_shakespeare_char.py --gpu=cpu
    python tools/size.py config/train_gpt2.py --gpus=8 --picture=scaling.png

Takes the settings of train.py and its config files. Sizes, FLOPs and the laws are arithmetic, of
engine/size.py; time, energy and price follow from the share of the peak that you expect to reach.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from configurator import configure  # noqa: E402
from data.batches import StepSizes  # noqa: E402
from data.tokenizer import GPT2, read_meta  # noqa: E402
from data.tokens import TokenFile, files_of  # noqa: E402
from engine.process import (  # noqa: E402
    UserError,
    import_extra,
    one_line_errors,
    user_error,
    user_path,
)
from engine.runtime import PEAKS  # noqa: E402
from engine.size import (  # noqa: E402
    LAWS,
    best_size,
    best_tokens,
    forward_flops,
    memory,
    parameters,
    peak,
    predicted_loss,
)

# Hardware
gpus = 1                          # processes, each with a GPU of its own
gpu = "A100"                      # a card that the program knows, or cpu
gpu_memory: float | None = None   # GB of each; None: as its data sheet says
tflops: float | None = None       # dense peak of each; None: as its data sheet says
mfu = 0.4                         # share of that peak you expect; nanoGPT reached 0.37 on an A100
watts: float | None = None        # power of each; None: as its data sheet says
price = 0.0                       # of an hour of each, in your currency
# Output
picture = ""                      # file for a picture of the scaling laws, such as scaling.png

RANGES = {
    "gpus": (1, 2**20),
    "gpu_memory": (0, 2**20),
    "tflops": (0, 2**31),
    "mfu": (0, 1),
    "watts": (0, 2**20),
    "price": (0, 2**31),
}
CARDS = {  # card -> GB of memory, watts, from data sheets
    "B200": (180, 1000), "H200": (141, 700), "H100 PCIe": (80, 350), "H100 NVL": (94, 400),
    "H100": (80, 700), "A100": (80, 400), "A6000": (48, 300), "A10G": (24, 300), "A10": (24, 150),
    "L40S": (48, 350), "L4": (24, 72), "RTX 5090": (32, 575), "RTX 4090": (24, 450),
    "RTX 3090": (24, 350), "V100": (32, 300), "T4": (16, 70),
}  # fmt: skip


def build(config):
    """Return the model that the settings describe, on the meta device, and its dataset's tokens.

    The tokens are None where the dataset is not prepared, and the vocabulary then GPT-2's.
    """
    if train.init_from != "scratch":
        raise UserError(f"init_from={train.init_from}: give --n_layer, --n_head, --n_embd instead")
    folder, tokens, meta = ROOT / "data" / train.dataset, None, GPT2
    if files_of(folder / "train.bin")[0].exists():
        meta = read_meta(folder)
        tokens = len(TokenFile(folder / "train.bin", meta, block_size=1).ids)
    with torch.device("meta"):
        return train.build_model(None, meta, config, "meta"), tokens


def gigabytes(count):
    return f"{count / 1e9:,.2f} GB"


def print_parameters(model):
    counts, total = parameters(model), model.get_num_params(non_embedding=False)
    print(f"parameters: {total:,}, {model.get_num_params():,} without the position table")
    for part, count in counts.items():
        print(f"  {part:34}{count:>18,}  {count / total:6.1%}")


def print_flops(model):
    flops = forward_flops(model)
    total = sum(flops.values())
    print(f"FLOPs: {model.flops_per_token():,} per token, forward and backward (6N + 12LCT)")
    for product, count in flops.items():
        print(f"  {product:34}{count:>18,}  {count / total:6.1%}")
    print(f"  {'a forward pass, per sequence':34}{total:>18,}")


def print_memory(model, config, number_bytes, available):
    """Print what a step holds, and whether it fits: as set, and in the ways that take less."""
    print(f"memory, at micro-batches of {train.batch_size} x {train.block_size} tokens:")
    sizes = memory(model, config, number_bytes, gpus, gpu == "cpu")
    for what, size in sizes.items():
        print(f"  {what:34}{gigabytes(size):>18}")
    ways = {"as set": {}, "with --activation_checkpointing": {"activation_checkpointing": True}}
    if gpus > 1:
        ways["with --fsdp"] = {"fsdp": True}
        ways["with both"] = {"fsdp": True, "activation_checkpointing": True}
    for way, changes in ways.items():
        most = peak(memory(model, config | changes, number_bytes, gpus, gpu == "cpu"), config, gpus)
        fits = f", of {gigabytes(available)}" if most < available else ": DOES NOT FIT"
        print(f"  {'at most, ' + way:34}{gigabytes(most):>18}{fits if available else ''}")
    whole = memory(model, config | {"fsdp": False}, number_bytes)
    cache = 2 * train.n_layer * train.n_embd * number_bytes
    print(f"checkpoint: {gigabytes(whole['weights'] + whole['optimizer'])}")
    print(f"cache in sampling: {cache:,} bytes per token and sample")


def print_time(model, config, flops, power, tokens):
    """Print the tokens of the run, and time and price at `flops` per second and `power` watts.

    Returns the tokens; `tokens` are those of the dataset, None where it is not prepared.
    """
    seen = StepSizes(config).tokens_until(train.max_iters)
    epochs = f", {seen / tokens:.2f} epochs of {train.dataset}" if tokens else ""
    print(f"tokens: {seen:,} in {train.max_iters:,} steps{epochs}")
    rate = mfu * gpus * flops / model.flops_per_token()
    if rate:
        hours = seen / rate / 3600
        print(f"time: {hours:,.2f} hours at {mfu:.0%} of {gpus} x {flops / 1e12:,.0f} TFLOP/s")
        energy = f"{hours * gpus * power / 1000:,.1f} kWh"
        print(f"  {rate:,.0f} tokens/s, {energy}, price {hours * gpus * price:,.2f}")
    return seen


def print_laws(model, seen):
    """Print what scaling laws say; they were fitted to models trained with AdamW on web text."""
    count = model.get_num_params()
    best = f"{best_tokens(count):,.0f} tokens for this size (Hoffmann, approach 2)"
    print(f"scaling laws, fitted to 70 million parameters and more:\n  compute-optimal: {best}")
    for law in LAWS if seen else ():
        size, tokens = best_size(law, 6 * count * seen)
        loss, least = predicted_loss(law, count, seen), predicted_loss(law, size, tokens)
        print(
            f"  {law}: this run ends at {loss:.3f}; its compute would at {least:.3f}, "
            f"with {size / 1e6:,.1f}M parameters and {tokens / 1e9:,.2f}B tokens"
        )


def draw_laws(model, seen, path):
    """Draw predicted losses against the number of parameters, at this compute and around it."""
    plt = import_extra("matplotlib.pyplot", "plot")
    count = model.get_num_params()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for law, color in zip(LAWS, ("tab:orange", "tab:blue"), strict=True):
        for factor, width in ((0.1, 0.7), (1, 2), (10, 0.7)):
            budget = factor * 6 * count * seen
            best, _ = best_size(law, budget)
            sizes = [best * 10 ** (step / 20 - 1.5) for step in range(61)]
            losses = [predicted_loss(law, size, budget / (6 * size)) for size in sizes]
            axes.plot(sizes, losses, color=color, linewidth=width, label=law if width > 1 else "")
            axes.plot(best, min(losses), "o", color=color, markersize=4)
        axes.plot(count, predicted_loss(law, count, seen), "*", color=color, markersize=14)
    axes.set(xscale="log", xlabel="parameters", ylabel="predicted loss, nats per token")
    axes.set_title("star: this run; dot: the best size; thin: a tenth of its compute, ten times")
    axes.legend(frameon=False)
    with user_error(path, OSError, ValueError):  # no such folder; a format unknown to matplotlib
        figure.savefig(path, dpi=110)


@one_line_errors
def main(config):
    train.check_settings(config)
    if gpu != "cpu" and gpu not in CARDS:
        raise UserError(f"gpu={gpu}: choose cpu or one of {', '.join(CARDS)}")
    model, tokens = build(config)
    half = gpu != "cpu" if train.dtype == "auto" else train.dtype != "float32"
    low_peak, full_peak = PEAKS.get(gpu, (0, 0))
    card = [*CARDS.get(gpu, (0, 0)), low_peak if half else full_peak]
    for at, given in enumerate((gpu_memory, watts, tflops)):
        if given is not None:
            card[at] = given
    print_parameters(model)
    print_flops(model)
    print_memory(model, config, 2 if half else 4, 1e9 * card[0])
    seen = print_time(model, config, 1e12 * card[2], card[1], tokens)
    print_laws(model, seen)
    if picture and seen:
        draw_laws(model, seen, user_path(picture))


if __name__ == "__main__":
    main(configure(globals(), vars(train)))
