"""Draw text from a trained model, or from GPT-2.

    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5
"""

import codecs
from pathlib import Path

import torch

from configurator import configure
from data.tokenizer import GPT2, check_fits, make_tokenizer, read_meta
from engine.checkpoint import find_checkpoint, model_config
from engine.fast import use_fast_parts
from engine.process import UserError, one_line_errors, user_error, user_path
from engine.runtime import compile_model, start_runtime
from model import GPT, GPTConfig

# Model
init_from = "resume"            # resume: the checkpoint in out_dir; or gpt2, gpt2-xl, a folder
out_dir = "out"                 # folder of the checkpoint, which is all that is needed
checkpoint_file: str | None = None  # such as best.pt or last.pt; None: ckpt.pt
# Text
start = "\n"                    # the prompt, or FILE:PATH; empty: end-of-text, or a newline
num_samples = 10                # drawn side by side; a single one appears as it is drawn
max_new_tokens = 500            # length of each
stop = ""                       # end a sample before this text, such as "<|endoftext|>"
# Choice of tokens
temperature = 0.8               # below 1 more predictable, above 1 more random; 0 the likeliest
top_k: int | None = 200         # choose among the k likeliest; 0 or None: all
top_p: float | None = None      # choose among the likeliest that reach p together; None: all
seed = 1337                     # sample k of a seed is the same however many are drawn
# System
fast_parts = True               # compute with engine/fast.py; False: as PyTorch does
device = "auto"                 # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                  # auto, float32, bfloat16, float16
compile: bool | str = "auto"    # True: torch.compile; auto: off, it takes longer than most samples

RANGES = {  # setting -> the least, and what it must stay below
    "num_samples": (1, 2**31),
    "max_new_tokens": (1, 2**31),
    "temperature": (0, float("inf")),
    "top_k": (0, float("inf")),
    "top_p": (0, 1.01),
    "seed": (0, float("inf")),
}
ROOT = Path(__file__).resolve().parent


def load(init_from, out_dir, checkpoint_file, device):
    """Return the model that these settings name, its tokenizer, and the dataset of its training.

    That is "" where it is not known.
    """
    if init_from != "resume":
        meta = read_meta(user_path(init_from))  # GPT-2's, unless a folder has its own
        return (
            GPT.from_pretrained(init_from, device=device),
            make_tokenizer(meta),
            "openwebtext" if meta == GPT2 else "",
        )
    saved = find_checkpoint(user_path(out_dir), checkpoint_file)
    dataset = str(saved["config"].get("dataset"))  # all that nanoGPT's files name
    meta = saved.get("tokenizer") or read_meta(ROOT / "data" / dataset)
    return (
        GPT.from_state(model_config(GPTConfig, saved), saved["model"], device),
        make_tokenizer(meta),
        dataset,
    )


def read_prompt(tokenizer, block_size):
    """Return the ids of the prompt, and its bytes, which are printed before what is drawn."""
    with user_error("the prompt cannot be read as UTF-8 text", OSError, UnicodeError):
        path = user_path(start.removeprefix("FILE:"))
        text = path.read_text("utf-8") if start.startswith("FILE:") else start
        text.encode()  # raises where an argument holds no UTF-8
    if not text or (text == "\n" and tokenizer.eot is None):  # which a vocabulary may lack
        return [tokenizer.opening], b""
    ids = tokenizer.encode(text)
    if len(ids) > block_size:
        raise UserError(f"the prompt has {len(ids)} tokens, the model reads {block_size} at most")
    return ids, tokenizer.decode_bytes(ids)


class Sample:
    """The text of one sample, in bytes: a token may hold half a character."""

    def __init__(self, prompt):
        self.content = bytearray(prompt)
        self.prompt, self.shown = len(prompt), 0  # bytes that were given, and that are printed
        self.done, self.ending = False, stop.encode()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece):
        """Append `piece`, up to where the ending begins; nothing after that."""
        if self.done:
            return
        begin = max(self.prompt, len(self.content) - len(self.ending))
        self.content += piece
        if self.ending and self.ending in self.content[begin:]:
            self.done = True
            del self.content[self.content.index(self.ending, begin) :]

    def show(self, final):
        """Print what is new, but before the end nothing that may yet turn out to be the ending."""
        held_back = 0 if final else len(self.ending)
        end = max(self.shown, len(self.content) - held_back)
        print(self.decoder.decode(self.content[self.shown : end], final), end="", flush=True)
        self.shown = end


@one_line_errors
def main(config):
    runtime = start_runtime(device, dtype, False if compile == "auto" else compile)
    model, tokenizer, _ = load(init_from, out_dir, checkpoint_file, runtime.device)
    check_fits(tokenizer, model.config.vocab_size)
    prompt, shown = read_prompt(tokenizer, model.config.block_size)
    idx = torch.tensor([prompt] * num_samples, device=runtime.device)
    samples = [Sample(shown) for _ in range(num_samples)]
    generators = [  # each seed has 2**24 numbers of its own, below 2**63
        torch.Generator().manual_seed(seed % 2**39 * 2**24 + k) for k in range(num_samples)
    ]
    model.cast_matrices(runtime.dtype)
    if fast_parts:
        use_fast_parts(model, runtime.device)
    compile_model(model, runtime, lambda: model.generate(idx, 3))
    with runtime.autocast():
        for drawn in model.stream(
            idx, max_new_tokens, temperature, top_k, top_p,
            vocab_size=tokenizer.vocab_size, generators=generators,
        ):  # fmt: skip
            for sample, [token] in zip(samples, drawn.tolist(), strict=True):
                sample.add(tokenizer.decode_bytes([token]))
            if num_samples == 1:
                samples[0].show(final=False)
            if all(sample.done for sample in samples):
                break
    for sample in samples:
        sample.show(final=True)
        print("\n---------------")


if __name__ == "__main__":
    main(configure(globals()))
