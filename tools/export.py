"""Write a trained model to a folder for Hugging Face transformers.

    python tools/export.py --out_dir=out-shakespeare-char --folder=hf
    python tools/export.py --out_dir=out --folder=hf --dtype=bfloat16

The folder is for AutoModelForCausalLM and AutoTokenizer, and contains no code. A model of GPT-2's
shape becomes a GPT2LMHeadModel; with rotary positions, rms_norm and an untied head it becomes a
NanoChatForCausalLM. train.py and sample.py read the folder with --init_from=FOLDER, and its
meta.pkl if the tokenizer is not GPT-2's. transformers silently drops characters that the vocabulary
lacks.

llama.cpp's convert_hf_to_gguf.py converts the folder of a model with GPT-2's shape and tokens. The
converter refuses other tokenizers and NanoChatForCausalLM (tried in November 2026 with the package
convert-hf-to-gguf 0.1.1).
"""

import dataclasses
import json
import pickle
import secrets
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from configurator import configure
from data.tokenizer import GPT2
from engine.huggingface import save_model
from engine.process import UserError, one_line_errors, user_error, user_path
from sample import load_model

# Model
init_from = "resume"                # resume: the checkpoint in out_dir; or gpt2, gpt2-xl, a folder
out_dir = "out"                     # folder of the checkpoint
checkpoint_file: str | None = None  # file in it; None: best.pt, or else ckpt.pt
# Output
folder = ""                         # new folder for transformers
dtype = "float32"                   # of the weights: float32, bfloat16, float16

ALLOWED = {"dtype": ["float32", "bfloat16", "float16"]}


def export_folder(model, tokenizer):
    """Write the model and its tokenizer for transformers. An export that fails leaves no folder."""
    path = user_path(folder)
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    shape = dataclasses.asdict(model.config)
    try:
        with user_error(folder, OSError):
            unfinished.mkdir(parents=True)
            save_model(
                unfinished, shape, model.state_dict(), tokenizer.vocab_size, tokenizer.eot,
                getattr(torch, dtype),
            )  # fmt: skip
            save_tokenizer(unfinished, tokenizer, model.config.block_size)
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # exists only after an error
    print(f"{folder}: {', '.join(sorted(file.name for file in path.iterdir()))}")


def save_tokenizer(folder, tokenizer, block_size):
    """Write tokenizer.json, tokenizer_config.json, and meta.pkl unless the tokens are GPT-2's."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eot is None:
        theirs = convert_characters(tokenizer)
    else:
        theirs = convert_byte_pairs(tokenizer.encoding)
        config |= {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    theirs.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    if tokenizer.meta != GPT2:
        (folder / "meta.pkl").write_bytes(pickle.dumps(tokenizer.meta))


def convert_characters(tokenizer):
    """Return a tokenizer of the package tokenizers with a token for each character."""
    from tokenizers import Tokenizer, decoders, models

    theirs = Tokenizer(models.BPE(tokenizer.stoi, merges=[]))
    theirs.decoder = decoders.Fuse()  # the default puts spaces between tokens
    return theirs


def convert_byte_pairs(encoding):
    """Return a tokenizer of the package tokenizers with the same ids as an encoding of tiktoken."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(ranks):  # the base class reads them from a file
            return ranks

    special = encoding._special_tokens
    ranks = encoding._mergeable_ranks | {name.encode(): special[name] for name in special}
    return Converter(ranks, encoding._pat_str, extra_special_tokens=special).converted()


@one_line_errors()
def main(config):
    if not folder or user_path(folder).exists():
        raise UserError(f"folder={folder}: give a new folder")
    model, tokenizer, _ = load_model(config, torch.device("cpu"))
    export_folder(model, tokenizer)


if __name__ == "__main__":
    main(configure(globals()))
