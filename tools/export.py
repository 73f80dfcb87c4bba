"""Write a trained model for others: for transformers, for llama.cpp, or a checkpoint to share.

    python tools/export.py --out_dir=out-shakespeare-char --folder=hf
    python tools/export.py --out_dir=out --folder=hf --dtype=bfloat16
    python tools/export.py --out_dir=out --checkpoint=model.pt --dtype=bfloat16
    python tools/export.py --out_dir=out --gguf=model.gguf --dtype=float16

The folder holds config.json, generation_config.json, model.safetensors, tokenizer.json and
tokenizer_config.json, for AutoModelForCausalLM and AutoTokenizer, and no code. A model of GPT-2's
shape becomes a GPT2LMHeadModel; with rotary positions, rms_norm and a head of its own it becomes a
NanoChatForCausalLM. train.py and sample.py take it back with --init_from=FOLDER: a meta.pkl beside
the rest tells them a tokenizer that is not GPT-2's. transformers drops a character that the
vocabulary lacks without a word, where sample.py names it. The checkpoint is a ckpt.pt without the
optimizer's state; sample.py and tools/evaluate.py read it. The GGUF file is for llama.cpp, which
has a model of GPT-2's shape, and computes GELU from a table of the tanh form in 16 bits: logits
differ by about a thousandth of their size, whichever form the model was trained with. Give it a
context of at most block_size; a character that the vocabulary lacks ends it.
"""

import dataclasses
import json
import pickle
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402
from configurator import configure  # noqa: E402
from data.tokenizer import GPT2, check_fits  # noqa: E402
from engine.checkpoint import find_checkpoint  # noqa: E402
from engine.gguf import save_gguf  # noqa: E402
from engine.huggingface import save_model  # noqa: E402
from engine.process import (  # noqa: E402
    UserError,
    atomic,
    import_extra,
    one_line_errors,
    user_error,
    user_path,
)

# Model
init_from = "resume"                # resume: the checkpoint in out_dir; or gpt2, gpt2-xl, a folder
out_dir = "out"                     # folder of the checkpoint
checkpoint_file: str | None = None  # such as best.pt or last.pt; None: ckpt.pt
# Output
folder = ""                         # write a folder for transformers, new or empty
checkpoint = ""                     # write a checkpoint without the optimizer
gguf = ""                           # write a file for llama.cpp
dtype = "float32"                   # of the weights: float32, bfloat16, float16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_folder(path):
    """Write the model and its tokenizer for transformers to the folder `path`."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--folder={folder} holds something already; give a new one")
    model, tokenizer, _ = sample.load(init_from, out_dir, checkpoint_file, torch.device("cpu"))
    check_fits(tokenizer, model.config.vocab_size)
    shape, size = dataclasses.asdict(model.config), tokenizer.vocab_size
    unfinished = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with user_error(path, OSError):
            unfinished.mkdir(parents=True)
            save_model(unfinished, shape, model.state_dict(), size, tokenizer.eot, DTYPES[dtype])
            save_tokenizer(unfinished, tokenizer, model.config.block_size)
            if tokenizer.meta != GPT2:
                (unfinished / "meta.pkl").write_bytes(pickle.dumps(tokenizer.meta))
            unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{path}: {', '.join(sorted(each.name for each in path.iterdir()))}")


def save_tokenizer(folder, tokenizer, block_size):
    """Write tokenizer.json and tokenizer_config.json for a tokenizer of data/tokenizer.py."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    if hasattr(tokenizer, "stoi"):  # characters
        made = Tokenizer(models.BPE(tokenizer.stoi, merges=[]))
        made.decoder = decoders.Fuse()  # else decoding puts spaces between them
    else:
        vocabulary, merges = bpe_tables(tokenizer.encoding)
        special = tokenizer.encoding._special_tokens
        made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
        words = pre_tokenizers.Split(Regex(tokenizer.encoding._pat_str), behavior="isolated")
        numbers = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([words, numbers])
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
        config |= {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    config["clean_up_tokenization_spaces"] = False
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def bpe_tables(encoding):
    """Return the vocabulary, token -> id, and the merges of a tiktoken encoding, byte-level."""
    import_extra("transformers", "gpt2")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter()
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks
    vocabulary, merges = converter.extract_vocab_merges_from_model(None)
    return vocabulary | encoding._special_tokens, merges


def export_gguf(path):
    """Write the model and its tokenizer to a file for llama.cpp."""
    model, tokenizer, _ = sample.load(init_from, out_dir, checkpoint_file, torch.device("cpu"))
    check_fits(tokenizer, model.config.vocab_size)
    if hasattr(tokenizer, "stoi"):
        tokens = [character.encode() for _, character in sorted(tokenizer.itos.items())]
        merges = None
    elif tokenizer.meta == GPT2:
        vocabulary, merges = bpe_tables(tokenizer.encoding)
        tokens = sorted(vocabulary, key=vocabulary.get)
    else:
        name = tokenizer.meta["tokenizer"]
        raise UserError(f"tokenizer={name}: --gguf takes characters or GPT-2's tokens")
    shape, weights = dataclasses.asdict(model.config), model.state_dict()
    with user_error(path, OSError), atomic(path) as file:  # the library opens it once more
        save_gguf(file.name, shape, weights, dtype, tokens, merges, tokenizer.eot)
    print(f"{path}: {path.stat().st_size:,} bytes")


def export_checkpoint(path):
    """Write the checkpoint without the optimizer's state."""
    if init_from != "resume":
        raise UserError(f"init_from={init_from}: --checkpoint needs one of ours, in --out_dir")
    _, tokenizer, _ = sample.load(init_from, out_dir, checkpoint_file, torch.device("cpu"))
    saved = find_checkpoint(user_path(out_dir), checkpoint_file)
    kept = {name: value for name, value in saved.items() if name not in ("optimizer", "scaler")}
    weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in saved["model"].items()}
    if saved["model_args"].get("tied", True):  # stored once
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    kept |= {"model": weights, "tokenizer": tokenizer.meta}  # nanoGPT's files name only a dataset
    with user_error(path, OSError), atomic(path) as file:
        torch.save(kept, file)
    print(f"{path}: {path.stat().st_size:,} bytes")


@one_line_errors
def main(config):
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: choose float32, bfloat16 or float16")
    if not (folder or checkpoint or gguf):
        raise UserError("give --folder=FOLDER, --checkpoint=FILE or --gguf=FILE to write to")
    for name in ("checkpoint", "gguf"):
        if config[name] and user_path(config[name]).exists():
            raise UserError(f"--{name}={config[name]} exists already; give a new name")
    if gguf:
        import_extra("gguf", "gguf")  # for its error, before the folder is written
    if folder:
        export_folder(user_path(folder))
    if checkpoint:
        export_checkpoint(user_path(checkpoint))
    if gguf:
        export_gguf(user_path(gguf))


if __name__ == "__main__":
    main(configure(globals()))
