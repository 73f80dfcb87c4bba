"""Estimate a training step on 8 and on 64 GPUs, none of which this project has seen.

    python docs/simulate.py

Prints the assumptions and the result as Markdown tables, those of docs/speed.md. A step is taken
apart into layers: engine/size.py counts their FLOPs and numbers, rings of GPUs send their weights
and gradients, and a link sends one thing at a time while the GPU computes the next.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from engine.runtime import PEAKS  # noqa: E402
from engine.size import forward_flops, memory, parameters, peak  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

MODELS = {"124M": (12, 12, 768), "1.5B": (48, 25, 1600)}  # layers, heads, channels
PER_MACHINE = 8
MICRO_BATCH, SEQUENCES = 12, 480  # of config/train_gpt2.py, 1024 tokens each
EFFICIENCY = 0.4  # share of a card's peak that its kernels reach
LINK_SHARE = 0.8  # share of a link's rate that a ring reaches
LATENCY = {True: 50e-6, False: 100e-6}  # seconds of a collective: within a machine, between them
NUMBER = 4  # bytes of a weight and of a gradient: train.py keeps and sends float32
OPTIMIZER_BYTES = 28  # per parameter: AdamW reads 4 numbers, writes 3


@dataclass
class Card:
    name: str
    nvlink: float  # bytes/s that a GPU sends to those of its machine, while it receives as many
    network: float  # bytes/s of its own card to other machines, each way
    memory: float  # bytes/s


CARDS = [Card("A100", 300e9, 25e9, 2.0e12), Card("H100", 450e9, 50e9, 3.35e12)]
ASSUMPTIONS = [
    ("peak in 16 bits", "A100 312, H100 989 TFLOP/s", "data sheets, dense"),
    ("share of it that kernels reach", EFFICIENCY, "assumed, that of `tools/size.py`"),
    ("NVLink, each way", "A100 300, H100 450 GB/s", "data sheets: 600 and 900 in both"),
    ("network of each GPU, each way", "A100 200, H100 400 Gb/s", "InfiniBand HDR and NDR"),
    ("GPUs in a machine", PER_MACHINE, "assumed, with a network card for each"),
    ("share of a link's rate that a ring reaches", LINK_SHARE, "assumed"),
    ("a collective's latency", "50 us, between machines 100 us", "assumed"),
    ("memory's rate", "A100 2.0, H100 3.35 TB/s", "data sheets, cards of 80 GB"),
    ("weights and gradients sent", "float32", "`train.py`"),
    ("AdamW", "28 bytes per parameter through memory", "fused: reads 4 numbers, writes 3"),
    ("backward pass", "twice the FLOPs of the forward pass", "`engine/size.py`"),
    ("overlap", "one layer ahead; a link sends one thing at a time", "`fully_shard`, DDP"),
    ("FSDP", "weights come twice, gradients leave once per micro-batch", "`fully_shard`"),
]


class Line:
    """Something that does one thing at a time: a GPU's arithmetic, or a link."""

    def __init__(self):
        self.free, self.busy = 0.0, 0.0  # when it is free again; seconds it has worked

    def work(self, seconds, ready):
        """Do what takes `seconds` and can begin at `ready`; return when it is done."""
        self.free = max(self.free, ready) + seconds
        self.busy += seconds
        return self.free


@dataclass
class Ring:
    """`size` GPUs that each send to the next, at `rate` bytes/s."""

    size: int
    rate: float
    latency: float

    def gather(self, count):
        """Return the seconds in which all get `count` numbers, of which each has a share.

        To add up `count` numbers of each, so that each gets the sum of a share, takes as long; to
        give all of them the whole sum, twice as long.
        """
        return self.latency + (self.size - 1) / self.size * count * NUMBER / self.rate


def rings(card, gpus, way):
    """Return the ring that shards, or over which DDP sums, and that of replicas, if any.

    Over several machines a ring is as fast as the slower of NVLink and all network cards of a
    machine together, as each of them can serve a part of the numbers.
    """
    machines = gpus // PER_MACHINE
    inner = Ring(PER_MACHINE, LINK_SHARE * card.nvlink, LATENCY[True])
    if machines == 1:
        return inner, None
    if way == "hybrid":
        return inner, Ring(machines, LINK_SHARE * card.network, LATENCY[False])
    slower = min(card.nvlink, PER_MACHINE * card.network)
    return Ring(gpus, LINK_SHARE * slower, LATENCY[False]), None


def layers(model):
    """Return (FLOPs of the forward pass of a sequence, parameters) of each layer in turn.

    The first is the tables, the last the head, whose matrix is the token table.
    """
    flops, counts = forward_flops(model), parameters(model)
    tables = counts.pop("token table") + counts.pop("position table")
    head, depth = flops.pop("head"), model.config.n_layer
    block = sum(flops.values()) / depth, sum(counts.values()) / depth
    return [(0, tables), *[block] * depth, (head, 0)]


def passes(parts, way):
    """Return (FLOPs, numbers to gather before, numbers to sum up after) for forward and backward.

    The tables are gathered once, and a ring of DDP sums up a layer only in the last micro-batch.
    """
    sharded = way != "DDP"
    forward = [(flops, count * sharded, 0) for flops, count in parts]
    backward = [(2 * flops, count * sharded, count) for flops, count in reversed(parts)]
    flops, _, tables = backward[-1]
    return [*forward, *backward[:-1], (flops, 0, tables)]


def simulate(model, card, gpus, way):
    """Return seconds of a step, of its arithmetic, and of sending, of which a part is hidden."""
    shares, replicas = rings(card, gpus, way)
    sequences = -(-SEQUENCES // gpus)
    micro_batches = -(-sequences // MICRO_BATCH)
    speed = EFFICIENCY * 1e12 * PEAKS[card.name][0] / (sequences / micro_batches)
    gpu, link, network = Line(), Line(), Line()
    parts = layers(model)
    work = passes(parts, way) * micro_batches
    gathered = link.work(shares.gather(work[0][1]), 0) if work[0][1] else 0.0
    for index, (flops, _, count) in enumerate(work):
        begun, ready = max(gpu.free, gathered), gathered
        if index + 1 < len(work) and work[index + 1][1]:  # the next layer's weights
            gathered = link.work(shares.gather(work[index + 1][1]), begun)
        done = gpu.work(flops / speed, ready)
        last = index >= len(work) - 2 * len(parts)
        if way == "DDP" and count and last:
            link.work(2 * shares.gather(count), done)
        if way != "DDP" and count:
            summed = link.work(shares.gather(count), done)
            if replicas:
                network.work(2 * replicas.gather(count / PER_MACHINE), summed)
    count = sum(count for _, count in parts) / (1 if way == "DDP" else shares.size)
    updating = OPTIMIZER_BYTES * count / card.memory
    step = max(gpu.free, link.free, network.free) + updating
    return step, gpu.busy + updating, link.busy + network.busy


def row(name, model, card, gpus, way):
    """Return a row of the table."""
    step, arithmetic, sending = simulate(model, card, gpus, way)
    sequences = -(-SEQUENCES // gpus) * gpus
    config = {"batch_size": MICRO_BATCH, "optimizer": "adamw", "activation_checkpointing": False}
    config |= {"fsdp": way != "DDP", "fast_parts": True}
    config["gradient_accumulation_steps"] = sequences / MICRO_BATCH
    share = PER_MACHINE if way == "hybrid" else gpus  # over how many a model is spread
    held = memory(model, config, 2, share)
    hidden = 1 - (step - arithmetic) / sending
    rate = sequences * model.config.block_size / step
    used = rate * model.flops_per_token() / (gpus * 1e12 * PEAKS[card.name][0])
    cells = (
        name, f"{gpus} x {card.name}", way, f"{1000 * step:,.0f}", f"{1000 * arithmetic:,.0f}",
        f"{1000 * sending:,.0f}", f"{hidden:.0%}", f"{rate / 1e6:,.2f}M", f"{used:.0%}",
        f"{peak(held, config, share) / 1e9:,.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def build(n_layer, n_head, n_embd):
    """Return GPT-2 of this size on the meta device, where it takes no memory."""
    with torch.device("meta"):
        return GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=False))


def main():
    print("| assumption | value | source |\n| --- | --- | --- |")
    for what, value, source in ASSUMPTIONS:
        print(f"| {what} | {value} | {source} |")
    print("\n| model | layer | GFLOP forward, per sequence | MB of weights, and of gradients |")
    print("| --- | --- | --- | --- |")
    models = {name: build(*sizes) for name, sizes in MODELS.items()}
    for name, model in models.items():
        tables, block, *_, head = layers(model)
        kinds = {"tables": tables, f"each of {model.config.n_layer} blocks": block, "head": head}
        for kind, (flops, count) in kinds.items():
            print(f"| {name} | {kind} | {flops / 1e9:,.1f} | {NUMBER * count / 1e6:,.1f} |")
    titles = "model, GPUs, way, ms per step, arithmetic, sending, hidden, tokens/s, MFU, GB"
    print(f"\n| {titles.replace(', ', ' | ')} |\n|{' --- |' * 10}")
    for name, model in models.items():
        for card in CARDS:
            for gpus in (PER_MACHINE, 64):
                for way in ("DDP", "FSDP") if gpus == PER_MACHINE else ("DDP", "FSDP", "hybrid"):
                    print(row(name, model, card, gpus, way))


if __name__ == "__main__":
    main()
