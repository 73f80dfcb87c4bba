"""Measure and draw what docs/course.md says.

    python docs/course.py statements
    python data/stdlib_char/prepare.py && python docs/course.py tokenizers
    python docs/course.py vocabularies
    python train.py config/train_stdlib_char.py && python docs/course.py attention
    python docs/course.py stream
    python docs/course.py compile

`attention` and `stream` look into the checkpoint in out-stdlib-char.
"""

import ast
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402
from data import tokenizer  # noqa: E402
from data.tokenizer import GPT2, make_meta, make_tokenizer, read_meta  # noqa: E402
from data.tokens import TokenFile, id_dtype, send  # noqa: E402
from engine.process import UserError, one_line_errors  # noqa: E402

ROOMS = {
    "the five scripts": ["*.py"],
    "data/": ["data/*.py", "data/*/*.py"],
    "config/": ["config/*.py"],
    "engine/": ["engine/*.py"],
    "tools/": ["tools/*.py"],
    "docs/": ["docs/*.py"],
    "tests/": ["tests/*.py"],
}
SNIPPET = "def close(self):\n    self.close()\n"
HEADS = [(1, 2), (1, 4), (2, 2), (3, 1), (3, 3), (4, 2)]  # layer and head, counted from 1
CPU = torch.device("cpu")


def count_statements():
    """Print how much code each room holds."""
    for room, patterns in ROOMS.items():
        paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
        trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
        nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.stmt)]
        texts = [n for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
        print(f"| {room} | {len(paths)} | {len(nodes) - len(texts):,} |")


# --- tokenizers ----------------------------------------------------------------------------------


def text_of(dataset, split):
    """Return the text that a split of a dataset of characters was made of."""
    folder = ROOT / "data" / dataset
    tokens = TokenFile(folder / f"{split}.bin", read_meta(folder), 1)
    return make_tokenizer(tokens.meta).decode_bytes(tokens.ids[:].tolist()).decode()


def newer_pattern():
    """Return how cl100k_base, GPT-4's, cuts a text into words: spaces and digits are grouped."""
    from tiktoken_ext import openai_public

    load = openai_public.load_tiktoken_bpe
    openai_public.load_tiktoken_bpe = lambda *_, **__: {}  # the tokens would be downloaded
    pattern = openai_public.cl100k_base()["pat_str"]
    openai_public.load_tiktoken_bpe = load
    return pattern


def compare_tokenizers():
    """Print bytes per token on two texts, and what a vocabulary costs on disk and in the model."""
    train, python = text_of("stdlib_char", "train"), text_of("stdlib_char", "val")[:500_000]
    prose, ours = text_of("shakespeare_char", "val"), tokenizer.WORDS
    gpt2 = make_tokenizer(GPT2)
    rows = [("bytes", ours), ("gpt2", ours)]
    rows += [(f"bpe:{size}", ours) for size in (1000, 8000, 32_000, 65_536, 100_000)]
    rows += [("bpe:32000", gpt2.encoding._pat_str), ("bpe:32000", newer_pattern())]
    for name, pattern in rows:
        tokenizer.WORDS = pattern  # how a BPE of one's own cuts a text into words
        encoder = make_tokenizer(make_meta(name, [train]))
        rates = [len(text.encode()) / len(encoder.encode(text)) for text in (python, prose)]
        disk = id_dtype(encoder.meta).itemsize / rates[0]
        table = encoder.vocab_size * 768 / 1e6
        print(
            f"| {name} | {encoder.vocab_size:,} | {rates[0]:.2f} | {rates[1]:.2f} | {disk:.2f} "
            f"| {table:.1f}M, {table / (table + 85.1):.0%} |",
            flush=True,
        )
    tokenizer.WORDS = ours
    begun = time.perf_counter()
    encoded = sum(len(ids) for ids in gpt2.encode_corpus([train] * 4))
    print(f"GPT-2's: {encoded / (time.perf_counter() - begun):,.0f} tokens/s to prepare")


def train_vocabularies():
    """Print what the same model makes of one text in different tokens, in the same steps."""
    folder = ROOT / "data" / "course"
    folder.mkdir(exist_ok=True)
    text = text_of("stdlib_char", "train") + text_of("stdlib_char", "val")
    (folder / "input.txt").write_text(text, encoding="utf-8")
    for kind in ("char", "bytes", "bpe:512", "bpe:2048", "bpe:8192", "gpt2"):
        name = f"course_{kind.replace(':', '_')}"
        options = f"--input={folder}/input.txt", f"--dataset={name}", f"--tokenizer={kind}"
        run("data/text/prepare.py", *options)
        options = f"--dataset={name}", f"--out_dir={ROOT}/out-{name}", "--max_iters=300"
        options += "--eval_interval=300", "--eval_iters=50"
        shown = run("train.py", "config/train_stdlib_char.py", *options)
        loss, bits = re.findall(r"val loss ([\d.]+),.* ([\d.]+) bits per byte", shown)[-1]
        count = re.search(r"model: ([\d.]+)M", shown)[1]
        ms = statistics.median(float(each) for each in re.findall(r"time ([\d.]+)ms", shown)[-6:])
        rate = float(loss) / np.log(2) / float(bits)  # bytes per token
        print(f"| {kind} | {rate:.2f} | {count}M | {ms:.0f} | {loss} | {bits} |", flush=True)


def run(script, *options):
    """Return what a script of ours prints."""
    command = [sys.executable, ROOT / script, *options]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


# --- inside the model ----------------------------------------------------------------------------


def load():
    """Return the model of out-stdlib-char in eval mode, its tokenizer, and 100 windows of val."""
    model, encoder, dataset = sample.load("resume", ROOT / "out-stdlib-char", None, CPU)
    tokens = TokenFile(ROOT / "data" / dataset / "val.bin", encoder.meta, 1)
    length = model.config.block_size
    ids = send(tokens.windows(tokens.evenly_spaced(length, 100), length + 1), CPU)
    return model.eval(), encoder, ids


@torch.no_grad()
def draw_attention():
    """Draw where some heads look while the model reads SNIPPET."""
    model, encoder, _ = load()
    maps = []

    def attend(q, k, v, **options):
        """Attention as in the paper, which keeps the weights; softmax of q k / sqrt(D)."""
        scores = q @ k.transpose(2, 3) / q.size(3) ** 0.5  # (B, H, T, T)
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(3)
        maps.append(weights[0])
        return weights @ v

    for block in model.transformer.h:
        block.attn.attend = attend
    model(torch.tensor([encoder.encode(SNIPPET)]))
    labels = [character.replace("\n", "↵").replace(" ", "·") for character in SNIPPET]
    figure, axes = plt.subplots(2, 3, figsize=(15, 10.5), layout="constrained")
    for panel, (layer, head) in zip(axes.flat, HEADS, strict=True):
        panel.imshow(maps[layer - 1][head - 1].sqrt(), cmap="Blues", vmin=0, vmax=1)
        panel.set_title(f"layer {layer}, head {head}")
        style = {"fontsize": 8, "family": "monospace"}
        panel.set_xticks(range(len(labels)), labels, **style)
        panel.set_yticks(range(len(labels)), labels, **style)
        panel.tick_params(length=0, pad=2)
    figure.supylabel("the character that looks")
    figure.supxlabel("the character looked at")
    figure.savefig(ROOT / "assets" / "attention.png", dpi=80)


@torch.no_grad()
def draw_stream():
    """Draw the residual stream: its length, what it predicts after each layer, and who matters."""
    model, _, ids = load()
    stream, added = [], {"attention": [], "MLP": []}

    def loss_of(x):
        return model.head_loss(model.transformer.ln_f(x), ids[:, 1:]).item()

    def size(x):
        return x.norm(dim=2).mean().item()

    hooks = [model.transformer.drop.register_forward_hook(lambda m, a, x: stream.append(x))]
    for block in model.transformer.h:
        hooks.append(block.register_forward_hook(lambda m, a, x: stream.append(x)))
        for part, name in ((block.attn, "attention"), (block.mlp, "MLP")):
            hooks.append(
                part.register_forward_hook(lambda m, a, x, name=name: added[name].append(size(x)))
            )
    whole = model(ids[:, :-1], ids[:, 1:], loss_only=True).item()
    for hook in hooks:
        hook.remove()
    losses, places = list(map(loss_of, stream)), ["embedding"]
    places += [f"layer {n + 1}" for n in range(len(losses) - 1)]
    for place, loss in zip(places, losses, strict=True):
        print(f"loss read off after the {place}: {loss:.3f}")

    costs = remove_each(model, ids) - whole
    names = [f"head {n + 1}" for n in range(model.config.n_head)] + ["MLP"]
    for layer, row in enumerate(costs):
        print(f"layer {layer + 1}: without", dict(zip(names, row.round(3).tolist(), strict=True)))

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    axes[0].plot(places, list(map(size, stream)), "o-", label="the stream")
    for name, sizes in added.items():
        axes[0].plot(places[1:], sizes, "o--", label=f"what {name} adds")
    axes[0].set_ylabel("length of a position's vector, mean")
    axes[0].legend(frameon=False)
    axes[1].plot(places, losses, "o-")
    axes[1].set_ylabel("loss, read off by the last norm and the head")
    image = axes[2].imshow(costs, cmap="Reds", vmin=0)
    axes[2].set_xticks(range(len(names)), names)
    axes[2].set_yticks(range(len(costs)), places[1:])
    axes[2].set_title("loss that removing it costs")
    for (row, column), cost in np.ndenumerate(costs):
        color = "white" if cost > costs.max() / 2 else "black"
        axes[2].text(column, row, f"{cost:.2f}", ha="center", va="center", color=color)
    figure.colorbar(image)
    for panel in axes[:2]:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "assets" / "stream.png", dpi=80)


def remove_each(model, ids):
    """Return the loss without one head or MLP at a time, an array (layers, heads + 1)."""
    H, losses = model.config.n_head, []
    for block in model.transformer.h:
        for head in range(H + 1):

            def silence(module, args, head=head):
                heads = args[0].unflatten(2, (H, -1)).clone()  # (B, T, H, D)
                heads[:, :, head] = 0
                return heads.flatten(2)

            if head < H:
                hook = block.attn.c_proj.register_forward_pre_hook(silence)
            else:
                hook = block.mlp.register_forward_hook(lambda m, a, x: torch.zeros_like(x))
            losses.append(model(ids[:, :-1], ids[:, 1:], loss_only=True).item())
            hook.remove()
    return np.array(losses).reshape(-1, H + 1)


# --- torch.compile -------------------------------------------------------------------------------

SIZES = {
    "the first command, 0.8M": "config/train_stdlib_char.py --batch_ramp_iters=0 --seconds=15",
    "laptop recipe, 0.8M, 12 x 64": "config/train_shakespeare_char.py --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --block_size=64 --dropout=0 --seconds=15",
    "the demo, 10.7M, 64 x 256": "config/train_shakespeare_char.py --seconds=60",
}


def compare_compiled():
    """Print seconds to start and milliseconds per step, eager and compiled in turn, three times."""
    for name, options in SIZES.items():
        found = {False: [], True: []}
        for _ in range(3):
            for compiled in found:
                found[compiled].append(bench(options, compiled))
        (plain_start, plain), (start, fast) = (
            [statistics.median(each) for each in zip(*runs, strict=True)] for runs in found.values()
        )
        longer = max(0, start - plain_start)
        even = f"{1000 * longer / (plain - fast):,.0f}" if fast < plain else "never"
        print(f"| {name} | {plain:.1f} | {fast:.1f} | {plain / fast:.2f} | {longer:.0f} | {even} |")


def bench(options, compiled):
    """Return seconds of the command before it times steps, and milliseconds per step."""
    begun = time.perf_counter()
    shown = run("bench.py", *options.split(), f"--compile={compiled}")
    wall = time.perf_counter() - begun
    timed = float(re.search(r"--seconds=(\d+)", options)[1])
    return wall - timed, float(re.search(r"median ([\d.]+) ms", shown)[1])


PARTS = {
    "statements": count_statements,
    "tokenizers": compare_tokenizers,
    "vocabularies": train_vocabularies,
    "attention": draw_attention,
    "stream": draw_stream,
    "compile": compare_compiled,
}


@one_line_errors
def main(config):
    if config["part"] not in PARTS:
        raise UserError(f"name a part: {', '.join(PARTS)}")
    PARTS[config["part"]]()


if __name__ == "__main__":
    main({"part": "".join(sys.argv[1:])})
