"""What a model takes: parameters by part, FLOPs, memory; and what scaling laws say of its training.

All is arithmetic on a model that may lie on the meta device, where it takes no memory. GB are 1e9
bytes. The figures are compared with PyTorch's own counts in tests/test_size.py.
"""

import math
import os
from contextlib import suppress
from pathlib import Path

import torch

from engine.process import memory_advice

PARTS = {  # in the name of a parameter -> the part it belongs to
    "wte": "token table",
    "wpe": "position table",
    "ln_": "gains and biases of norms",
    "attn.c_attn": "queries, keys, values",
    "attn.c_proj": "projection after attention",
    "mlp.c_fc": "MLP, up",
    "mlp.c_proj": "MLP, down",
    "lm_head": "head",
}
# L = E + A / N**alpha + B / D**beta, in nats, of N parameters trained on D tokens.
LAWS = {
    "Hoffmann et al. 2022": (1.69, 406.4, 410.7, 0.34, 0.28),  # arXiv:2203.15556, approach 3
    "Besiroglu et al. 2024": (1.8172, 482.01, 2085.43, 0.3478, 0.3658),  # arXiv:2404.10102, refit
}


def parameters(model):
    """Return {part: number of parameters}. A tied head is in the token table."""
    counts = {}
    for name, parameter in model.named_parameters():
        part = next((part for key, part in PARTS.items() if key in name), "others")
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def forward_flops(model):
    """Return {product: FLOPs} of the forward pass of one sequence of block_size tokens.

    A multiplication and an addition each count as one, and attention as if nothing were masked. The
    backward pass takes twice as many.
    """
    shape, flops = model.config, {}
    T, C, L = shape.block_size, shape.n_embd, shape.n_layer
    for name, parameter in model.named_parameters():
        part = next((part for key, part in PARTS.items() if key in name), "others")
        if parameter.dim() == 2 and not part.endswith("table"):
            flops[part] = flops.get(part, 0) + 2 * T * parameter.numel()
    flops["attention scores"] = flops["attention, of values"] = 2 * L * T * T * C
    flops["head"] = 2 * T * C * shape.vocab_size
    return flops


# --- memory --------------------------------------------------------------------------------------


def activation_bytes(shape, number_bytes):
    """Return bytes per token, layer and channel that a block keeps for the backward pass.

    `number_bytes` is the size of a number in matrix products: 4, or 2 under autocast. 16 bits come
    to 36 where Korthikanti et al. (arXiv:2205.05198) count 34 with a residual stream in 16 bits.
    What attention with dropout keeps on a CPU is left out: T * T weights per head without fast
    parts, a copy of queries, keys and values with them.
    """
    stream = 2 * 4  # what the two norms read, in float32
    products = 14 * number_bytes  # norms 2, queries, keys, values 3, attention 1, MLP 4 + 4
    if shape.position == "rotary" or shape.rms_norm:
        products += 3 * number_bytes  # new queries and keys, and a copy of what attention returns
    if shape.rms_norm and (number_bytes == 2 or shape.position == "rotary"):
        products += 2 * 4  # queries and keys as their norms read them, in float32
    return stream + products + 2 * (shape.dropout > 0)  # the masks of two dropouts


def memory(model, config, number_bytes, world_size=1, cpu=False):
    """Return {what: bytes} of a training step, for each of `world_size` processes; peak() adds up.

    `config` holds batch_size, optimizer, activation_checkpointing, fsdp, fast_parts and
    gradient_accumulation_steps; `number_bytes` is as above.
    """
    shape, C = model.config, model.config.n_embd
    tokens = min(config["batch_size"], sequences_of_rank(config, world_size)) * shape.block_size
    count = sum(parameter.numel() for parameter in model.parameters())
    hidden = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    muons = hidden if config["optimizer"] == "muon" else 0
    share = world_size if config["fsdp"] else 1
    if config["fsdp"] == "hybrid":
        share = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    block = tokens * C * activation_bytes(shape, number_bytes)
    kept = shape.n_layer * block
    at_once = tokens * C * (20 + 12 * number_bytes)  # gradients within one block
    if config["activation_checkpointing"]:
        kept = shape.n_layer * tokens * C * 4
        at_once += block
    logits = tokens * shape.vocab_size
    if config["fast_parts"]:
        logits = min(logits, max(2**26, shape.vocab_size))  # engine/fast.py makes a part of them
    sizes = {
        "weights": 4 * count // share,
        "weights in 16 bits": 2 * count // share if number_bytes == 2 else 0,
        "optimizer": (8 * count - 4 * muons) // share,
        "gradients": 4 * count // share,
        "activations": kept,
        "gradients of activations, logits": max(at_once, logits * (4 + number_bytes)),
    }
    if cpu:  # measured: see docs/speed.md
        moving = sizes["activations"] + sizes["gradients of activations, logits"]
        sizes["freed, but kept in pieces"] = moving // 4
        sizes["Muon's update"] = 12 * muons  # larger than any piece: directions, batches, results
        sizes["Python and PyTorch"] = 350_000_000
    if share > 1:  # two blocks are whole at a time, and the table
        whole = 2 * hidden // shape.n_layer + shape.vocab_size * C
        sizes["gathered weights"] = 4 * whole
    return sizes


def sequences_of_rank(config, world_size):
    """Return how many sequences of a step a process takes at most."""
    sequences = config["batch_size"] * config["gradient_accumulation_steps"]
    return -(-sequences // world_size)  # rounded up


def peak(sizes, config, world_size=1):
    """Return how many bytes of `sizes`, of memory(), are held at the fullest moment of a step.

    When the last activation is there, the first gradient of a weight is not, unless an earlier
    micro-batch left some.
    """
    gradients = sizes["gradients"]
    if sequences_of_rank(config, world_size) <= config["batch_size"]:
        moving = sizes["activations"] + sizes["gradients of activations, logits"]
        gradients = max(0, gradients - moving)
    return sum(sizes.values()) - sizes["gradients"] + gradients


def note_memory(model, config, runtime):
    """Set config.memory to a phrase on what a step takes, and print it where that does not fit."""
    cpu, world_size = runtime.device.type == "cpu", runtime.world_size
    number_bytes = 4 if runtime.dtype == torch.float32 else 2
    needed = peak(memory(model, config, number_bytes, world_size, cpu), config, world_size)
    available = device_memory(runtime.device)
    config.memory = f"a step takes about {needed / 1e9:.2f} GB"
    if available:
        config.memory += f", the {runtime.device.type} has {available / 1e9:.2f} GB"
    if 0 < available < needed:
        runtime.say(f"memory: {config.memory}; {memory_advice(config)}")


def device_memory(device):
    """Return the bytes that each process on `device` may use, 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if not hasattr(os, "sysconf"):  # Windows
        return 0
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # the limit of a container; "max" is none
        most = min(most, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return most // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# --- scaling laws --------------------------------------------------------------------------------


def predicted_loss(law, count, tokens):
    """Return the loss, in nats per token, that a law of LAWS gives `count` parameters, `tokens`."""
    E, A, B, alpha, beta = LAWS[law]
    return E + A / count**alpha + B / tokens**beta


def best_size(law, flops):
    """Return the parameters and tokens of the least predicted loss for `flops` = 6 N D."""
    _, A, B, alpha, beta = LAWS[law]
    scale = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    count = scale * (flops / 6) ** (beta / (alpha + beta))
    return count, flops / (6 * count)


def best_tokens(count):
    """Return the tokens that suit `count` parameters, a line through Hoffmann et al.'s table 3.

    Their second approach, from fixed budgets of compute; nanoGPT's notebook fitted the line.
    """
    return 10 ** (1.0409573169995892 * math.log10(count) + 0.9353887152390791)
