"""Generate text with a trained model or with GPT-2.

    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5
    python sample.py --out_dir=out-shakespeare-char --prompts=prompts.txt --out=samples.jsonl
    python sample.py --out_dir=out-shakespeare-char --interactive --num_samples=1
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before PyTorch loads OpenMP: docs/speed.md

import json
import random
from contextlib import suppress
from pathlib import Path

import torch

from configurator import configure
from data.tokenizer import make_tokenizer, read_meta, read_text
from engine.checkpoint import find_checkpoint
from engine.process import atomic, one_line_errors, user_error, user_path
from engine.runtime import start_runtime
from model import GPT, GPTConfig

# Model
init_from = "resume"            # resume: the checkpoint in out_dir; or gpt2, gpt2-xl, a folder
out_dir = "out"                 # folder of the checkpoint; nothing else is needed
checkpoint_file: str | None = None  # a file in out_dir; None: best.pt if there is one, else ckpt.pt
# Text
start = "\n"                    # the prompt, or FILE:PATH; empty: end-of-text, or a line break
prompts = ""                    # instead, a file with one prompt in each line
interactive = False             # instead, ask for prompts on the terminal
num_samples = 10                # samples of each prompt; a single one is shown while it grows
max_new_tokens = 500            # length of each
stop = ""                       # end a sample before this text, or before end-of-text
out = ""                        # also write the samples to this file, a JSON object in each line
# Choice of tokens
temperature = 0.8               # below 1 more predictable, above 1 more random; 0: the most likely
top_k: int | None = 200         # choose among the k most likely tokens; 0 or None: all
top_p: float | None = None      # choose among the fewest that sum to probability p; None: all
seed = 1337                     # sample k depends only on the seed and the prompt
# System
device = "auto"                 # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                  # auto, float32, bfloat16, float16
compile = False                 # torch.compile; takes longer than most samples

ALLOWED = {  # setting -> (minimum, maximum)
    "num_samples": (1, 2**31 - 1),
    "max_new_tokens": (1, 2**31 - 1),
    "temperature": (0, float("inf")),
    "top_k": (0, float("inf")),
    "top_p": (0, 1),
    "seed": (0, 2**39 - 1),
}
ROOT = Path(__file__).resolve().parent


def load_model(config, device):
    """Return the model of the settings on `device`, its tokenizer, and its dataset if known."""
    dataset = ""
    if config["init_from"] == "resume":
        saved = find_checkpoint(user_path(config["out_dir"]), config["checkpoint_file"])
        with user_error(f"{saved['path']} cannot be used", TypeError, AttributeError):
            dataset = str(saved["config"].get("dataset", ""))
            shape = GPTConfig(**{**saved["model_args"], "dropout": 0.0})
        model = GPT.from_state(shape, saved["model"])
        meta = saved.get("tokenizer") or read_meta(ROOT / "data" / dataset)  # nanoGPT saves none
    else:
        model = GPT.from_pretrained(config["init_from"])
        meta = read_meta(user_path(config["init_from"]))  # GPT-2's, unless a folder has another
    return model.eval().to(device), make_tokenizer(meta), dataset


def read_prompts():
    """Yield the prompts, as text."""
    with suppress(EOFError), user_error("cannot read the prompt as UTF-8 text", UnicodeError):
        while interactive:
            yield input("prompt, or Ctrl-D to end: ")  # which raises EOFError
        if prompts:
            yield from filter(str.strip, read_text(user_path(prompts)).splitlines())
        elif start.startswith("FILE:"):
            yield read_text(user_path(start[5:]))
        else:
            yield start


def cut_at_end(ids, tokenizer):
    """Return the text of a sample up to `stop` or end-of-text, and whether it has ended there."""
    text = tokenizer.decode_bytes(ids).decode("utf-8", "replace")
    ends = [text.index(end) for end in ("<|endoftext|>", stop) if end and end in text]
    return text[: min(ends, default=len(text))], bool(ends)


def generate(prompt, model, tokenizer):
    """Print num_samples continuations of the prompt, generated together, and return them."""
    ids = tokenizer.encode(prompt) or [tokenizer.opening]
    stream = model.stream(
        torch.tensor([ids] * num_samples, device=model.lm_head.weight.device),
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        vocab_size=tokenizer.vocab_size,
        generators=[
            torch.Generator().manual_seed(random.Random(f"{seed} {k} {prompt}").getrandbits(63))
            for k in range(num_samples)
        ],
    )
    rows = [[] for _ in range(num_samples)]
    shown = 0  # characters already printed; only a single sample is shown while it grows
    for tokens in stream:
        for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
            row.append(token)
        samples = [cut_at_end(row, tokenizer) for row in rows]
        if num_samples == 1:
            text = prompt + samples[0][0].rstrip("\ufffd")  # half a character
            end = max(shown, len(text) - len(stop))  # the rest may turn out to be `stop`
            print(text[shown:end], end="", flush=True)
            shown = end
        if all(has_ended for _, has_ended in samples):
            break
    for text, _ in samples:
        print(f"{(prompt + text)[shown:]}\n---------------")
    return [{"prompt": prompt, "text": text} for text, _ in samples]


@one_line_errors("lower --num_samples: all samples are generated together")
def main(config):
    runtime = start_runtime(config)
    model, tokenizer, _ = load_model(config, runtime.device)
    model.to(runtime.dtype)
    for block in model.transformer.h if runtime.compile else []:
        block.compile()
    samples = []
    for prompt in read_prompts():
        samples += generate(prompt, model, tokenizer)
    if out:
        with atomic(user_path(out).resolve()) as file:
            file.writelines(
                json.dumps(sample, ensure_ascii=False).encode() + b"\n" for sample in samples
            )


if __name__ == "__main__":
    main(configure(globals()))
