"""Measure a model on a text: loss, perplexity, bits per byte and accuracy.

    python tools/evaluate.py --out_dir=out-shakespeare-char
    python tools/evaluate.py --out_dir=out-shakespeare-char --text=play.txt > figures.json
    python tools/evaluate.py --init_from=gpt2 --dataset=openwebtext --split=val

The model predicts every token but the first once, in windows of block_size tokens that do not
overlap; the last window may be shorter. Losses are exact means, in nats per token. Compare models
with different tokenizers by bits per byte. For tasks such as hellaswag, export the model with
tools/export.py and run `lm_eval --model hf --model_args pretrained=FOLDER --tasks hellaswag`.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before PyTorch loads OpenMP: docs/speed.md

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import configure
from data.tokenizer import read_meta, read_text
from data.tokens import TokenFile
from engine.process import UserError, one_line_errors, user_error, user_path
from engine.runtime import start_runtime
from sample import load_model

# Model
init_from = "resume"                # resume: the checkpoint in out_dir; or gpt2, gpt2-xl, a folder
out_dir = "out"                     # folder of the checkpoint
checkpoint_file: str | None = None  # file in it; None: best.pt, or else ckpt.pt
# Text
dataset = ""                        # name of a folder in data/; empty: the one trained on
split = "val"                       # train or val
text = ""                           # a UTF-8 file, instead of a dataset
# System
device = "auto"                     # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                      # auto, float32, bfloat16, float16

ALLOWED = {"split": ["train", "val"]}
ROOT = Path(__file__).resolve().parents[1]


def read_ids(tokenizer, trained_on):
    """Return the ids of the text, or of a split of the dataset, as an array of at least 2."""
    if text:
        content = read_text(user_path(text))
        with user_error(text, ValueError):  # characters that the vocabulary lacks
            ids = np.array(tokenizer.encode(content))
        if len(ids) < 2:
            raise UserError(f"{text} has {len(ids)} tokens; give at least 2")
        return ids
    if not (dataset or trained_on):
        raise UserError("give --dataset=NAME or --text=FILE: the model names no dataset")
    folder = ROOT / "data" / (dataset or trained_on)
    tokens = TokenFile(folder / f"{split}.bin", read_meta(folder), block_size=1)
    if tokens.meta != tokenizer.meta:
        raise UserError(f"dataset {folder.name} uses a different tokenizer than the model")
    tokens.check_ids(tokens.ids())
    return tokens.ids()


@torch.inference_mode()
def evaluate(model, tokenizer, ids, runtime):
    """Return the figures of the model on `ids`, a dict."""
    T = min(model.config.block_size, len(ids) - 1)
    loss = correct = size = 0
    for start in tqdm(range(0, len(ids) - 1, T), unit=" windows", leave=False, disable=None):
        window = torch.from_numpy(ids[start : start + T + 1].astype(np.int64))
        window = window.to(runtime.device)
        targets = window[1:]
        with runtime.autocast():
            logits = model.lm_head(model.hidden(window[None, :-1])[0]).float()  # (T, V)
        loss += F.cross_entropy(logits, targets, reduction="none").cpu().double().sum().item()
        correct += (logits.argmax(1) == targets).sum().item()
        text_ids = [index for index in targets.tolist() if index != tokenizer.eot]
        size += len(tokenizer.decode_bytes(text_ids))
    count = len(ids) - 1
    return {
        "tokens": count,
        "bytes": size,
        "loss": loss / count,
        "perplexity": math.exp(min(loss / count, 99)),
        "bits_per_byte": loss / math.log(2) / max(1, size),
        "accuracy": correct / count,
    }


@one_line_errors("evaluate on the CPU: --device=cpu")
def main(config):
    runtime = start_runtime(config)
    model, tokenizer, trained_on = load_model(config, runtime.device)
    ids = read_ids(tokenizer, trained_on)
    print(json.dumps(evaluate(model, tokenizer, ids, runtime), indent=2))


if __name__ == "__main__":
    main(configure(globals()))
