"""Measure and draw figures of docs/course.md.

    python data/stdlib_char/prepare.py
    python docs/course.py tokenizers
    python train.py config/train_stdlib_char.py
    python docs/course.py attention

`attention` looks into the checkpoint in out-stdlib-char.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.tokenizer import make_meta, make_tokenizer, read_meta  # noqa: E402
from data.tokens import TokenFile  # noqa: E402
from engine.checkpoint import find_checkpoint  # noqa: E402
from engine.process import UserError, one_line_errors  # noqa: E402
from model import GPT, GPTConfig, rms_norm, rotary_table, rotate  # noqa: E402

SNIPPET = "def close(self):\n    self.close()\n"
HEADS = [(1, 2), (1, 4), (2, 2), (3, 1), (3, 3), (4, 2)]  # layer and head, counted from 1


def text_of(dataset, split):
    """Return the text of a split of a dataset of characters."""
    folder = ROOT / "data" / dataset
    meta = read_meta(folder)
    tokens = TokenFile(folder / f"{split}.bin", meta, block_size=1)
    ids = tokens.ids().tolist()
    return make_tokenizer(meta).decode_bytes(ids).decode()


def bytes_per_token(tokenizer, text):
    content = text.encode()
    ids = tokenizer.encode(text)
    return len(content) / len(ids)


def compare_tokenizers():
    """Print the bytes per token of several tokenizers, on Python code and on English prose."""
    train = text_of("stdlib_char", "train")
    python = text_of("stdlib_char", "val")[:500_000]
    prose = (ROOT / "docs" / "course.md").read_text("utf-8")
    for name in ("bytes", "bpe:1000", "bpe:8000", "bpe:32000", "gpt2"):
        try:
            meta = make_meta(name, [train])
            tokenizer = make_tokenizer(meta)
        except UserError as fault:  # GPT-2's files need a network once
            print(fault)
            continue
        rate = bytes_per_token(tokenizer, python)
        rate_of_prose = bytes_per_token(tokenizer, prose)
        count = tokenizer.vocab_size
        print(f"| {name} | {count:,} | {rate:.2f} | {rate_of_prose:.2f} |", flush=True)


# --- inside the model ----------------------------------------------------------------------------


def load_model():
    saved = find_checkpoint(ROOT / "out-stdlib-char")
    config = GPTConfig(**saved["model_args"])
    model = GPT.from_state(config, saved["model"])
    return model.eval(), make_tokenizer(saved["tokenizer"])


def attention_weights(attn, x):
    """Return the attention weights (H, T, T) of a layer for its normalized input x (1, T, C)."""
    T = x.size(1)
    H = attn.config.n_head
    qkv = attn.c_attn(x).view(1, T, 3, H, -1)
    q, k, _ = qkv.unbind(2)  # (1, T, H, D) each
    D = q.size(3)
    rotation = rotary_table(attn.config)[:, :T]
    q = rms_norm(rotate(q, rotation)).transpose(1, 2)
    k = rms_norm(rotate(k, rotation)).transpose(1, 2)
    scores = q @ k.mT / D**0.5  # (1, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores.masked_fill_(future, -torch.inf)
    return scores.softmax(3)[0]


@torch.no_grad()
def draw_attention():
    """Draw where some heads look while the model reads SNIPPET."""
    import matplotlib.pyplot as plt

    model, tokenizer = load_model()
    maps = []

    def add_map(attn, inputs, output):
        maps.append(attention_weights(attn, inputs[0]))

    for block in model.transformer.h:
        block.attn.register_forward_hook(add_map)
    ids = tokenizer.encode(SNIPPET)
    idx = torch.tensor([ids])
    model(idx)
    labels = SNIPPET.replace("\n", "↵")
    labels = labels.replace(" ", "·")
    ticks = range(len(labels))
    figure, axes = plt.subplots(2, 3, figsize=(15, 10.5), layout="constrained")
    for panel, (layer, head) in zip(axes.flat, HEADS, strict=True):
        weights = maps[layer - 1][head - 1].sqrt()
        panel.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        panel.set_title(f"layer {layer}, head {head}")
        panel.set_xticks(ticks, list(labels), fontsize=8, family="monospace")
        panel.set_yticks(ticks, list(labels), fontsize=8, family="monospace")
    figure.supylabel("the character that looks")
    figure.supxlabel("the character looked at")
    figure.savefig("attention.png", dpi=80)


PARTS = {"tokenizers": compare_tokenizers, "attention": draw_attention}


@one_line_errors()
def main(name):
    if name not in PARTS:
        raise SystemExit(f"error: give one of: {', '.join(PARTS)}")
    PARTS[name]()


if __name__ == "__main__":
    main("".join(sys.argv[1:]))
