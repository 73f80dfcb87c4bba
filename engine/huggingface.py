"""A GPT-2 of the Hugging Face format, from the hub or a folder, as plain dicts.

Knows no model class. Runs no code that a folder brings, whatever it holds.
"""

import hashlib
from pathlib import Path

import torch

from engine.process import UserError, reason

# SHA-256 of GPT-2's vocabulary, as vocabulary_digest() makes it; OpenAI's 50,257 tokens.
GPT2_VOCABULARY = "008896c0378935c44df27a0e8b00465c3b4834daf74e801c12cd7633fee3deb9"


def load_gpt2(name):
    """Return the config and the weights of the GPT-2-shaped model called `name`, two dicts.

    `name`: gpt2, gpt2-medium, gpt2-large, gpt2-xl, another hub name, or a folder that holds
    config.json and the weights. The keys are nanoGPT's; matrices are float32 and contiguous, as
    nn.Linear holds them. Raises UserError if it cannot be had, has another shape or another
    tokenizer than GPT-2's.
    """
    if not Path(name).is_dir() and "/" not in name and "gpt2" not in name:
        known = "scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/NAME or a folder"
        raise UserError(f"init_from={name}: choose {known}")
    source = open_model(name)
    if name not in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        check_vocabulary(name)
    theirs = source.config
    config = {
        "block_size": theirs.n_positions,
        "vocab_size": theirs.vocab_size,
        "n_layer": theirs.n_layer,
        "n_head": theirs.n_head,
        "n_embd": theirs.n_embd,
        "bias": True,
        "gelu_tanh": theirs.activation_function != "gelu",
    }
    weights = {}
    for key, tensor in source.state_dict().items():
        if key.endswith((".attn.bias", ".attn.masked_bias")):  # masks of older files
            continue
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.t()  # transformers' Conv1D holds its matrix the other way round
        weights[key] = tensor.contiguous()
    return config, weights


def open_model(name):
    """Return the transformers model called `name`; UserError says why there is none to use."""
    try:
        from huggingface_hub import HfApi
        from transformers import logging
    except ImportError:
        raise UserError("loading GPT-2 needs transformers: pip install -e '.[gpt2]'") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return read_model(name, local_files_only=True)  # a folder, or in the cache of the hub
    except OSError:
        pass
    try:
        HfApi().model_info(name, timeout=5)  # one attempt; the loader retries for half a minute
    except Exception as fault:
        advice = "save the model to a folder elsewhere and give --init_from=FOLDER"
        raise UserError(f"cannot get {name} from the hub ({reason(fault)}); {advice}") from None
    return read_model(name)


def read_model(name, **where):
    """Return the transformers model; OSError where a hub name is not there, else UserError."""
    from transformers import AutoConfig, GPT2LMHeadModel

    try:  # the default of trust_remote_code is to ask whether to run a folder's code
        check_shape(AutoConfig.from_pretrained(name, trust_remote_code=False, **where))
        options = {"dtype": torch.float32, "output_loading_info": True}
        model, info = GPT2LMHeadModel.from_pretrained(name, **options, **where)
    except Exception as fault:  # damage can raise anything
        if isinstance(fault, OSError) and not Path(name).is_dir():
            raise
        raise UserError(f"{name}: {reason(fault)}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name} lacks weights: {', '.join(missing[:3])}")
    return model


def check_shape(theirs):
    """Raise UserError if `theirs`, a transformers config, is of a model that is no GPT-2."""
    wanted = {
        "model_type": ["gpt2"],
        "activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu"],
        "n_inner": [None, 4 * getattr(theirs, "n_embd", 0)],
        "layer_norm_epsilon": [1e-5],
        "scale_attn_weights": [True],
        "scale_attn_by_inverse_layer_idx": [False],
        "tie_word_embeddings": [True],
    }
    for key, allowed in wanted.items():
        if getattr(theirs, key, allowed[0]) not in allowed:
            raise UserError(f"it is no GPT-2: its {key} is {getattr(theirs, key)!r}")


# --- tokenizer -----------------------------------------------------------------------------------


def check_vocabulary(name):
    """Raise UserError if the model called `name` brings another tokenizer than GPT-2's.

    Without a tokenizer it is taken to read GPT-2's tokens.
    """
    from transformers import AutoTokenizer

    if Path(name).is_dir() and not [*Path(name).glob("*token*.json"), *Path(name).glob("vocab.*")]:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        digest = vocabulary_digest(tokenizer.get_vocab())
    except Exception as fault:  # damage can raise anything
        raise UserError(f"{name}: its tokenizer cannot be read: {reason(fault)}") from None
    if digest != GPT2_VOCABULARY:
        raise UserError(f"{name} has a tokenizer of its own; take a model with GPT-2's tokens")


def vocabulary_digest(vocabulary):
    """Return the SHA-256 of a vocabulary, token -> id, whatever its order."""
    lines = (f"{number} {token}\n" for token, number in vocabulary.items())
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
