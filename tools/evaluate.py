"""How good a model is on a text: loss, perplexity, bits per byte, and whether it uses its context.

    python tools/evaluate.py --out_dir=out-shakespeare-char
    python tools/evaluate.py --out_dir=out-shakespeare-char --text=play.txt --figures_file=play.json
    python tools/evaluate.py --init_from=gpt2 --dataset=openwebtext --split=val

Every token but the first is predicted once, in windows of block_size tokens that do not overlap;
the last one may be shorter. Losses and bits are exact means over all of them. Compare models with
different tokenizers by bits per byte, which do not depend on how long tokens are.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configurator import configure  # noqa: E402
from data.tokenizer import read_meta  # noqa: E402
from data.tokens import TokenFile  # noqa: E402
from engine.fast import use_fast_parts  # noqa: E402
from engine.process import (  # noqa: E402
    UserError,
    atomic,
    one_line_errors,
    user_error,
    user_path,
)
from engine.runtime import start_runtime  # noqa: E402
from sample import load  # noqa: E402

# Model
init_from = "resume"                # resume: the checkpoint in out_dir; or gpt2, gpt2-xl, a folder
out_dir = "out"                     # folder of the checkpoint
checkpoint_file: str | None = None  # such as best.pt or last.pt; None: ckpt.pt
# Text
dataset = ""                        # name of a folder in data/; empty: the one trained on
split = "val"                       # train or val
text = ""                           # a UTF-8 file, instead of a dataset
# Output
figures_file = ""                   # file for the figures, as JSON
# System
batch_size = 8                      # windows at once
fast_parts = True                   # compute with engine/fast.py; False: as PyTorch does
device = "auto"                     # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                      # auto, float32, bfloat16, float16

RANGES = {"batch_size": (1, 2**31)}
LOGITS_AT_ONCE = 2**26  # numbers, of 4 bytes


def read_tokens(model, tokenizer, trained_on):
    """Return the file to evaluate on, and its ids, a numpy array."""
    if text:
        path = user_path(text)
        with user_error(f"{path} cannot be read as UTF-8 text", OSError, UnicodeError):
            content = path.read_text("utf-8")
        ids = np.array(tokenizer.encode(content), dtype=np.int64)
        if len(ids) < 2:
            raise UserError(f"{path} holds {len(ids)} tokens; give at least 2")
        return path, ids
    if split not in ("train", "val"):
        raise UserError(f"split={split}: choose train or val")
    folder = ROOT / "data" / (dataset or trained_on)
    file = TokenFile(folder / f"{split}.bin", read_meta(folder), 1)
    if read_meta(folder) != tokenizer.meta:
        raise UserError(f"dataset {folder.name} is encoded unlike the model's; give another")
    file.limit(model.config.vocab_size)
    return file.path, file.ids


def windows(ids, length):
    """Yield arrays of rows of ids, (rows, length + 1): each row begins where the last one ended.

    The very last may be shorter.
    """
    whole = (len(ids) - 1) // length
    for first in range(0, whole, batch_size):
        starts = np.arange(first, min(whole, first + batch_size)) * length
        yield ids[starts[:, None] + np.arange(length + 1)]
    if whole * length < len(ids) - 1:
        yield ids[None, whole * length :]


def judge(model, rows, runtime):
    """Return the losses and whether the likeliest token is right, (rows, length) each."""
    tokens = torch.from_numpy(rows.astype(np.int64)).to(runtime.device)
    with runtime.autocast():
        x, targets = model.hidden(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        at_once, losses, right = max(1, LOGITS_AT_ONCE // model.config.vocab_size), [], []
        for part, target in zip(x.split(at_once), targets.split(at_once), strict=True):
            logits = model.lm_head(part).float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            right.append(logits.argmax(1) == target)
    shape = len(rows), -1
    return torch.cat(losses).view(shape).double().cpu(), torch.cat(right).view(shape).cpu()


@torch.inference_mode()
def evaluate(model, ids, lengths, runtime):
    """Return the figures of `model` on `ids`, a dict; `lengths` are the bytes of each token."""
    T = model.config.block_size
    losses, counts = np.zeros(T), np.zeros(T, dtype=np.int64)  # by position in the window
    right = size = 0
    batches = -(-((len(ids) - 1) // T) // batch_size) + ((len(ids) - 1) % T > 0)
    for rows in tqdm(windows(ids, T), total=batches, unit=" batches", leave=False, disable=None):
        each, hits = judge(model, rows, runtime)
        losses[: each.size(1)] += each.sum(0).numpy()
        counts[: each.size(1)] += len(each)
        right += hits.sum().item()
        size += int(lengths[rows[:, 1:]].sum())
    total, count = losses.sum().item(), counts.sum().item()
    if not math.isfinite(total):
        raise UserError("the loss is not finite; try another checkpoint")
    edges = [0, *(2**power for power in range(T.bit_length())), T]
    positions = {}
    for first, last in zip(edges, edges[1:], strict=False):
        if counts[first:last].sum():
            name = f"{first + 1} to {last}" if last > first + 1 else f"{last}"
            positions[name] = losses[first:last].sum().item() / counts[first:last].sum().item()
    return {
        "tokens": count,
        "bytes": size,
        "loss": total / count,
        "perplexity": math.exp(min(total / count, 700)),
        "bits_per_byte": total / math.log(2) / size if size else None,
        "accuracy": right / count,
        "loss_by_position": positions,
    }


def show(figures):
    """Print the figures, and the loss by position as a table."""
    print(f"loss {figures['loss']:.4f} nats per token, perplexity {figures['perplexity']:.2f}")
    if figures["bits_per_byte"]:
        print(f"{figures['bits_per_byte']:.4f} bits per byte of {figures['bytes']:,} bytes")
    print(f"{figures['accuracy']:.2%} of {figures['tokens']:,} tokens guessed right")
    print("loss by position in the context:")
    for name, loss in figures["loss_by_position"].items():
        print(f"  {name:>14}  {loss:.4f}")


@one_line_errors
def main(config):
    runtime = start_runtime(device, dtype, False)
    model, tokenizer, trained_on = load(init_from, out_dir, checkpoint_file, runtime.device)
    path, ids = read_tokens(model, tokenizer, trained_on)
    lengths = np.zeros(model.config.vocab_size, dtype=np.int64)  # padding has none
    for token in range(min(tokenizer.vocab_size, len(lengths))):
        lengths[token] = len(tokenizer.decode_bytes([token])) * (token != tokenizer.eot)
    if fast_parts:
        use_fast_parts(model, runtime.device)
    print(f"{path}: {len(ids):,} tokens, in windows of {model.config.block_size}")
    figures = evaluate(model.eval(), ids, lengths, runtime)
    show(figures)
    if figures_file:
        content = json.dumps({"file": str(path), **figures}, indent=2)
        with user_error(figures_file, OSError), atomic(user_path(figures_file)) as file:
            file.write(content.encode())


if __name__ == "__main__":
    main(configure(globals()))
