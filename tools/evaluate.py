"""How good a model is on a text: loss, perplexity, bits per byte, and whether it uses its context.

    python tools/evaluate.py --out_dir=out-shakespeare-char
    python tools/evaluate.py --out_dir=out-shakespeare-char --text=play.txt --figures_file=play.json
    python tools/evaluate.py --init_from=gpt2 --dataset=openwebtext --split=val
    python tools/evaluate.py --init_from=gpt2 --tasks=lambada_openai,hellaswag,wikitext

Every token but the first is predicted once, in windows of block_size tokens that do not overlap;
the last one may be shorter. Losses and bits are exact means over all of them. Compare models with
different tokenizers by bits per byte, which do not depend on how long tokens are. Tasks are those
of EleutherAI's lm-evaluation-harness, or YAML files that describe one (tools/harness.py).
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configurator import configure  # noqa: E402
from data.tokenizer import bytes_per_id, check_fits, read_meta  # noqa: E402
from data.tokens import TokenFile, id_dtype, send  # noqa: E402
from engine.fast import LOGITS_AT_ONCE, use_fast_parts  # noqa: E402
from engine.process import (  # noqa: E402
    UserError,
    atomic,
    check_writable,
    import_extra,
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
# Tasks
tasks = ""                          # of lm-evaluation-harness, such as lambada_openai,hellaswag
examples = 0                        # of each task at most; 0: all
# Output
figures_file = ""                   # file for the figures, as JSON
# System
batch_size = 8                      # windows at once
device = "auto"                     # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                      # auto, float32, bfloat16, float16

RANGES = {"batch_size": (1, 2**31), "examples": (0, 2**31)}


def open_tokens(tokenizer, vocab_size, trained_on):
    """Return the TokenFile to evaluate on: that of a dataset, or one made of a text."""
    if text:
        path = user_path(text)
        with user_error(f"{path} cannot be read as UTF-8 text", OSError, UnicodeError):
            content = path.read_text("utf-8")
        ids = np.array(tokenizer.encode(content), id_dtype(tokenizer.meta))
        if len(ids) < 2:
            raise UserError(f"{path} holds {len(ids)} tokens; give at least 2")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder, path.name)
            ids.tofile(path)
            return TokenFile(path, tokenizer.meta, 1)
    folder = ROOT / "data" / (dataset or trained_on)
    meta = read_meta(folder)
    file = TokenFile(folder / f"{split}.bin", meta, 1)
    if meta != tokenizer.meta:
        raise UserError(f"dataset {folder.name} is encoded unlike the model's; give another")
    file.limit(vocab_size)
    return file


def windows(tokens, length):
    """Return a list of (places where rows begin, ids in a row): a row begins where another ended.

    Each is a batch. The very last row may be shorter.
    """
    whole, rest = divmod(len(tokens.ids) - 1, length)
    starts = np.arange(whole) * length
    batches = [(starts[at : at + batch_size], length + 1) for at in range(0, whole, batch_size)]
    if rest:
        batches.append((np.array([whole * length]), rest + 1))
    return batches


def judge(model, ids, runtime):
    """Return the loss of each id but the first of a row, and whether the likeliest was right."""
    rows_at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    losses, right = [], []
    with runtime.autocast():
        x = model.hidden(ids[:, :-1]).flatten(0, 1)
        targets = ids[:, 1:].flatten()
        for part, target in zip(x.split(rows_at_once), targets.split(rows_at_once), strict=True):
            logits = model.lm_head(part).float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            right.append(logits.argmax(1) == target)
    return [torch.cat(each).view(len(ids), -1).cpu() for each in (losses, right)]


@torch.inference_mode()
def evaluate(model, tokens, lengths, runtime):
    """Return the figures of `model` on `tokens`, a dict; `lengths` are the bytes of each token."""
    T = model.config.block_size
    losses, counts = np.zeros(T), np.zeros(T, dtype=np.int64)  # by position in the window
    right = size = 0
    for starts, length in tqdm(windows(tokens, T), unit=" batches", leave=False, disable=None):
        ids = send(tokens.windows(starts, length), runtime.device)
        each, hits = judge(model, ids, runtime)
        losses[: length - 1] += each.double().sum(0).numpy()
        counts[: length - 1] += len(each)
        right += hits.sum().item()
        size += lengths[ids[:, 1:].cpu()].sum().item()
    total, count = losses.sum().item(), counts.sum().item()
    if not math.isfinite(total):
        raise UserError("the loss is not finite; try another checkpoint")
    figures = {
        "tokens": count,
        "bytes": size,
        "loss": total / count,
        "perplexity": math.exp(min(total / count, 700)),
        "bits_per_byte": total / math.log(2) / max(1, size),
        "accuracy": right / count,
    }
    edges = [0, *(2**power for power in range(T.bit_length())), T]
    for first, last in zip(edges, edges[1:], strict=False):
        if counts[first:last].any():
            name = f"loss at position {first + 1} to {last}"
            figures[name] = (losses[first:last].sum() / counts[first:last].sum()).item()
    return figures


def judge_text(model, tokenizer, trained_on, runtime):
    """Return the figures of the model on a split or on a text."""
    if not (text or dataset or trained_on):
        raise UserError("give --dataset=NAME or --text=FILE")
    tokens = open_tokens(tokenizer, model.config.vocab_size, trained_on)
    print(f"{text or tokens.path}: {len(tokens.ids):,} tokens")
    lengths = torch.tensor(bytes_per_id(tokenizer, model.config.vocab_size))
    return evaluate(model, tokens, lengths, runtime)


@one_line_errors
def main(config):
    if split not in ("train", "val"):
        raise UserError(f"split={split}: choose train or val")
    if sum(map(bool, (text, dataset, tasks))) > 1:
        raise UserError("give one of --text, --dataset and --tasks")
    if figures_file:
        check_writable(user_path(figures_file).parent, "the folder of figures_file")
    if tasks:
        import_extra("lm_eval", "eval")
        from tools.harness import run_tasks
    runtime = start_runtime(device, dtype, False)
    model, tokenizer, trained_on = load(init_from, out_dir, checkpoint_file, runtime.device)
    check_fits(tokenizer, model.config.vocab_size)
    use_fast_parts(model.eval(), runtime.device)
    figures = (
        run_tasks(model, tokenizer, runtime, tasks.split(","), batch_size, examples)
        if tasks
        else judge_text(model, tokenizer, trained_on, runtime)
    )
    for name, value in figures.items():
        print(f"{name.rjust(max(map(len, figures)))}  {round(value, 4):,}")
    if figures_file:
        with user_error(figures_file, OSError), atomic(user_path(figures_file)) as file:
            file.write(json.dumps(figures, indent=2).encode())


if __name__ == "__main__":
    main(configure(globals()))
