"""Draw text from a trained model, or from GPT-2.

    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5
    python sample.py --out_dir=out-shakespeare-char --prompts=prompts.txt --out=samples.jsonl
    python sample.py --out_dir=out-shakespeare-char --interactive=True
"""

from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from configurator import configure
from data.tokenizer import GPT2, check_fits, make_tokenizer, read_meta
from engine.checkpoint import find_checkpoint, model_config
from engine.fast import use_fast_parts
from engine.process import UserError, one_line_errors, user_path
from engine.runtime import compile_model, start_runtime
from engine.text import Sample, check_file, read_prompts, save_samples, typed_prompts
from model import GPT, GPTConfig

# Model
init_from = "resume"            # resume: the checkpoint in out_dir; or gpt2, gpt2-xl, a folder
out_dir = "out"                 # folder of the checkpoint, which is all that is needed
checkpoint_file: str | None = None  # such as best.pt or last.pt; None: ckpt.pt
# Text
start = "\n"                    # the prompt, or FILE:PATH; empty: end-of-text, or a newline
prompts = ""                    # instead, a file with a prompt in each line that is not blank
interactive = False             # instead, prompts that are typed, with one sample of each
num_samples = 10                # of each prompt; a single one appears as it is drawn
batch_size = 64                 # samples drawn side by side at most
max_new_tokens = 500            # length of each
end_of_text = True              # end a sample at the end-of-text token, where there is one
stop = ""                       # end a sample before this text, such as "ROMEO:"
out = ""                        # file for the samples too; .jsonl: a line of JSON for each
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
    "batch_size": (1, 2**31),
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


def check_settings(config):
    """Raise UserError where settings exclude one another, or `out` cannot be written."""
    if [start != "\n", prompts != "", interactive].count(True) > 1:
        raise UserError("--start, --prompts and --interactive exclude one another; give one")
    if interactive and (out or "num_samples" in config.flags):
        raise UserError("--interactive prints a sample per line; leave out --num_samples and --out")
    if out:
        check_file(user_path(out), "out")


def make_sample(prompt, number, tokenizer):
    """Return a sample with nothing drawn yet. Its number chooses what will be."""
    return Sample(prompt, number, max_new_tokens, tokenizer.eot if end_of_text else None, stop)


def draw(samples, model, tokenizer, runtime):
    """Let the samples grow side by side, each to its end, and print them."""
    rows = [torch.tensor(sample.prompt.ids) for sample in samples]
    idx = pad_sequence(rows, batch_first=True, padding_value=-1).to(runtime.device)
    generators = [  # each seed has 2**24 numbers of its own, below 2**63
        torch.Generator().manual_seed(seed % 2**39 * 2**24 + sample.number) for sample in samples
    ]
    with runtime.autocast():
        stream = model.stream(
            idx, max_new_tokens, temperature, top_k, top_p,
            vocab_size=tokenizer.vocab_size, generators=generators,
        )  # fmt: skip
        for place, drawn in enumerate(stream, min(map(len, rows))):
            for sample, [token] in zip(samples, drawn.tolist(), strict=True):
                sample.add(place, token, tokenizer.decode_bytes([token]))
            if len(samples) == 1:
                samples[0].show()
            if all(sample.done for sample in samples):
                break
    for sample in samples:
        sample.show(final=True)


@one_line_errors
def main(config):
    check_settings(config)
    runtime = start_runtime(device, dtype, False if compile == "auto" else compile)
    model, tokenizer, _ = load(init_from, out_dir, checkpoint_file, runtime.device)
    check_fits(tokenizer, model.config.vocab_size)
    size = model.config.block_size
    given = [] if interactive else read_prompts(start, prompts, tokenizer, size)
    samples = [make_sample(prompt, k, tokenizer) for prompt in given for k in range(num_samples)]
    model.cast_matrices(runtime.dtype)
    if fast_parts:
        use_fast_parts(model, runtime.device)
    rows = max(1, min(batch_size, len(samples)))
    idx = torch.zeros(rows, 1, dtype=torch.long, device=runtime.device)
    compile_model(model, runtime, lambda: model.generate(idx, 3))
    for at in range(0, len(samples), batch_size):
        draw(samples[at : at + batch_size], model, tokenizer, runtime)
    if out:
        save_samples(user_path(out), samples)
    if interactive:
        for k, prompt in enumerate(typed_prompts(tokenizer, size)):
            try:
                draw([make_sample(prompt, k, tokenizer)], model, tokenizer, runtime)
            except KeyboardInterrupt:  # it ends a sample, and at the prompt the program
                print()


if __name__ == "__main__":
    main(configure(globals()))
