"""Parameters, FLOPs, memory, time and price of a training command, before you run it.

    python tools/size.py config/train_gpt2.py --gpus=8 --gpu=H100 --price=2.5
    python tools/size.py config/train_shakespeare_char.py --gpu=cpu --gpu_memory=16

Takes train.py's settings and config files. --gpu=cpu measures this machine. If the dataset is not
prepared, the vocabulary is GPT-2's. Tests compare the FLOPs, and the activations a block keeps,
with PyTorch's own counts.
"""

import re
import sys
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from configurator import configure
from data.batches import tokens_until
from data.tokenizer import read_meta
from data.tokens import TokenFile
from engine.kernels import CHUNK
from engine.process import one_line_errors
from engine.runtime import PEAKS

# Hardware
gpus = 1                          # processes, with one GPU each
gpu = "A100"                      # a card, such as H100 or RTX 4090, or cpu
gpu_memory = 80.0                 # GB of each
mfu: float | None = None          # expected share of its peak; None: 0.4, on a CPU 0.8
price = 0.0                       # of one GPU per hour, in your currency

ALLOWED = {"gpus": (1, 1_000_000), "gpu": ["cpu", *PEAKS], "init_from": ["scratch"]}


def build(config):
    """Return the model that the settings describe, on the meta device: it takes no memory."""
    meta = read_meta(train.ROOT / "data" / config["dataset"])
    with torch.device("meta"):
        return train.build_model(None, meta, config)


def parameters(model):
    """Return {name: number of parameters, added up over the blocks}. A tied head is the wte."""
    counts = {}
    for name, parameter in model.named_parameters():
        part = re.sub(r"\.\d+", "", name)  # without the number of the block
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


# --- memory --------------------------------------------------------------------------------------


def state_bytes(model, config):
    """Return the bytes of the weights and of the optimizer's moments. A checkpoint holds both."""
    count = sum(parameter.numel() for parameter in model.parameters())
    moments = 8 * count
    if config["optimizer"] == "muon":  # one moment of the blocks' matrices instead of two
        moments -= 4 * 12 * model.config.n_layer * model.config.n_embd**2
    return 4 * count, moments


def activation_bytes(shape, number_bytes):
    """Return the bytes per token, layer and channel that a block keeps for the backward pass.

    `number_bytes` is the size of a number in matrix products: 4, or 2 for 16 bits. This counts 36
    for GPT-2 in 16 bits, Korthikanti et al. (arXiv:2205.05198) 34 with a residual stream in 16
    bits. Dropout keeps more.
    """
    kept = 8 + 14 * number_bytes  # 8: the two norms keep their float32 inputs
    if shape.position == "rotary" or shape.rms_norm:
        kept += 8 + 2 * number_bytes  # queries and keys before and after
    return kept


def memory(model, config, number_bytes):
    """Return {part: bytes} of a training step in each process. Their sum estimates the peak.

    On an H200 a step of GPT-2 124M took 6.8 GiB compiled and 12.5 GiB eager (2026-11-27); the
    estimate is 9.3 GiB. Not counted: masks of dropout, attention weights with dropout on a CPU, and
    the blocks that FSDP gathers for a moment. A CPU process also holds Python and PyTorch, about
    0.35 GB, and freed memory that the C library keeps in pieces.
    """
    shape = model.config
    weights, moments = state_bytes(model, config)
    if config["fsdp"]:
        weights //= gpus
        moments //= gpus
    sequences = config["batch_size"] // max(1, gpus // config["gradient_accumulation_steps"])
    tokens = sequences * shape.block_size
    stream = tokens * shape.n_embd  # numbers in the residual stream
    block = stream * activation_bytes(shape, number_bytes)
    activations = shape.n_layer * block
    gradients = stream * (20 + 12 * number_bytes)  # within a block
    if config["activation_checkpointing"]:
        activations = shape.n_layer * stream * 4
        gradients += block
    if number_bytes == 4 and config["compile"] is not True:
        tokens = min(tokens, CHUNK)  # the loss is computed in chunks
    logits = tokens * shape.vocab_size * (4 + number_bytes)
    return {
        "weights": weights,
        "weights in 16 bits": weights * (4 - number_bytes) // 4,
        "gradients": weights,
        "optimizer": moments,
        "activations": activations,
        "gradients of activations, or logits": max(gradients, logits),
    }


# --- report --------------------------------------------------------------------------------------


def report(title, figures):
    """Print a line for each figure, a dict name -> number, below a title."""
    print(title)
    for name, figure in figures.items():
        print(f"  {name:36}{round(figure, 2):>22,}")


def report_memory(model, config, number_bytes):
    """Print the bytes of a step, and if it fits, with and without activation checkpointing."""
    report("Bytes of a step in each process", memory(model, config, number_bytes))
    for recompute in (False, True):
        changed = config | {"activation_checkpointing": recompute}
        peak = sum(memory(model, changed, number_bytes).values()) / 1e9
        verdict = "fits" if peak < gpu_memory else "DOES NOT FIT"
        print(f"  {peak:.2f} GB, activation_checkpointing={recompute}: {verdict} {gpu_memory} GB")


def report_run(model, config, peak):
    """Print tokens, epochs, time and price at a peak in TFLOP/s."""
    tokens = tokens_until(config["max_iters"], config)
    rate = gpus * peak * 1e12 / model.flops_per_token()
    share = mfu or (0.8 if gpu == "cpu" else 0.4)
    rate *= share
    run = {"FLOPs per token, 6 N + 12 L C T": model.flops_per_token(), "tokens": tokens}
    path = train.ROOT / "data" / config["dataset"] / "train.bin"
    if path.exists():
        run["epochs"] = tokens / TokenFile(path, read_meta(path.parent), block_size=1).count
    run["tokens per second"] = rate
    run["hours"] = tokens / rate / 3600
    run["price"] = run["hours"] * gpus * price
    run["bytes of a checkpoint"] = sum(state_bytes(model, config))
    report(f"Run, at {share:.0%} of the peak speed (--mfu)", run)


def cpu_tflops():
    """Return the TFLOP/s of this machine in a product of float32 matrices, measured."""
    matrix = torch.rand(2048, 2048)
    timer = Timer("matrix @ matrix", globals=locals(), num_threads=torch.get_num_threads())
    return 2 * 2048**3 / timer.timeit(10).median / 1e12


@one_line_errors()
def main(config):
    model = build(config)
    is_float32 = gpu == "cpu" or config["dtype"] == "float32"
    peak = cpu_tflops() if gpu == "cpu" else PEAKS[gpu][is_float32]
    counts = parameters(model) | {"all but wpe": model.get_num_params()}
    report("Parameters, added up over the blocks", counts)
    report_memory(model, config, 4 if is_float32 else 2)
    report_run(model, config, peak)


if __name__ == "__main__":
    main(configure(globals(), vars(train)))
