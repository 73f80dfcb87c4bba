"""Draw text from a trained model, or from GPT-2.

    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5
"""

import codecs
from pathlib import Path

import torch

import runtime
from configurator import configure
from data.tokens import GPT2, make_tokenizer, read_meta
from model import GPT, GPTConfig, read_checkpoint

# Model
init_from = "resume"            # resume: the checkpoint in out_dir; or gpt2, gpt2-xl, a folder
out_dir = "out"                 # folder of the checkpoint, which is all that is needed
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
device = "auto"                 # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                  # auto, float32, bfloat16, float16
compile: bool | str = "auto"    # True: torch.compile; auto: off, it takes longer than most samples

ROOT = Path(__file__).resolve().parent


def load(run):
    """Return the model and the tokenizer that `init_from` names."""
    if init_from != "resume":
        return GPT.from_pretrained(init_from, device=run.device), make_tokenizer(GPT2)
    best, newest = Path(out_dir, "ckpt.pt"), Path(out_dir, "last.pt")
    saved = read_checkpoint(best if best.exists() or not newest.exists() else newest)
    model = GPT.from_state(GPTConfig.restored(saved["model_args"]), saved["model"], run.device)
    folder = ROOT / "data" / str(saved["config"].get("dataset"))  # what nanoGPT's files name
    return model, make_tokenizer(saved.get("tokenizer") or read_meta(folder))


def read_prompt(tokenizer, block_size):
    """Return the ids of the prompt."""
    try:  # an argument may hold any bytes too
        text = Path(start[5:]).read_text("utf-8") if start[:5] == "FILE:" else start
        text.encode()
    except (OSError, UnicodeError) as fault:
        raise ValueError(f"the prompt cannot be read as UTF-8 text: {fault}") from None
    ids = tokenizer.encode(text or "\n") if text or tokenizer.eot is None else [tokenizer.eot]
    if len(ids) > block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model reads {block_size} at most")
    return ids


class Sample:
    """The text of one sample, in bytes: a token may hold half a character."""

    def __init__(self, prompt):
        self.content, self.prompt, self.shown, self.done = bytearray(prompt), len(prompt), 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece):
        """Append `piece`, up to where `stop` begins; nothing after that."""
        begin = max(self.prompt, len(self.content) - len(stop.encode()))
        self.content += b"" if self.done else piece
        if stop and stop.encode() in self.content[begin:]:
            self.done = True
            del self.content[self.content.index(stop.encode(), begin) :]

    def show(self, final):
        """Print what is new, but before the end nothing that may yet turn out to be `stop`."""
        end = max(self.shown, len(self.content) - (0 if final else len(stop.encode()[1:])))
        print(self.decoder.decode(self.content[self.shown : end], final), end="", flush=True)
        self.shown = end


def check_settings():
    least = {"num_samples": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0}
    wrong = [name for name in least if (globals()[name] or 0) < least[name]]
    faults = [f"{name}={globals()[name]} must be at least {least[name]}" for name in wrong]
    faults += [f"top_p={top_p} must be between 0 and 1"] * (not 0 <= (top_p or 0) <= 1)
    if faults:
        raise ValueError("\n".join(faults))


@runtime.one_line_errors()
def main(config):
    check_settings()
    run = runtime.start(device, dtype, False if compile == "auto" else compile)
    model, tokenizer = load(run)
    if tokenizer.vocab_size > (known := model.config.vocab_size):
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {known}")
    prompt = read_prompt(tokenizer, model.config.block_size)
    idx = torch.tensor([prompt] * num_samples, device=run.device)
    samples = [Sample(tokenizer.decode_bytes(prompt) if start else b"") for _ in range(num_samples)]
    draws = [torch.Generator().manual_seed(seed % 2**39 * 2**24 + k) for k in range(num_samples)]
    more = {"vocab_size": tokenizer.vocab_size, "generators": draws}
    runtime.compile_model(model.cast_matrices(run.dtype), run, lambda: model.generate(idx, 3))
    with run.autocast():
        for drawn in model.stream(idx, max_new_tokens, temperature, top_k, top_p, **more):
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
