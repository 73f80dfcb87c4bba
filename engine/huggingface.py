"""A GPT in the Hugging Face format, to and from a folder or from the hub, as plain dicts.

Knows no model class of ours. Runs no code that a folder brings, whatever it holds.
"""

import hashlib
from pathlib import Path

import torch

from engine.process import UserError, import_extra, reason, user_path

# The shapes of GPT2LMHeadModel and NanoChatForCausalLM, and the names of the latter beside ours.
GPT2_SHAPE = {"position": "learned", "rms_norm": False, "tied": True}
NANOCHAT = {"position": "rotary", "rms_norm": True, "tied": False, "bias": False}
ENDS = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
BLOCK = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
# SHA-256 of GPT-2's vocabulary, as vocabulary_digest() makes it; OpenAI's 50,257 tokens.
GPT2_VOCABULARY = "008896c0378935c44df27a0e8b00465c3b4834daf74e801c12cd7633fee3deb9"


def load_pretrained(name):
    """Return the config and the weights of the model called `name`, two dicts.

    `name`: gpt2, gpt2-medium, gpt2-large, gpt2-xl, another hub name, or a folder that holds
    config.json and the weights. The keys are GPTConfig's and nanoGPT's; matrices are float32 and
    contiguous, as nn.Linear holds them. Raises UserError if it cannot be had, has another shape, or
    another tokenizer than GPT-2's and no meta.pkl of ours that describes it.
    """
    if not Path(name).is_dir() and "/" not in name and "gpt2" not in name:
        known = "scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/NAME or a folder"
        raise UserError(f"init_from={name}: choose {known}")
    if name.startswith("~"):
        name = str(user_path(name))
    source = open_model(name)
    named = name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    if not (named or (Path(name) / "meta.pkl").exists()):
        check_vocabulary(name)
    read = from_nanochat if source.config.model_type == "nanochat" else from_gpt2
    config, weights = read(source.config, source.state_dict())
    return config, {key: tensor.contiguous() for key, tensor in weights.items()}


def from_gpt2(theirs, state):
    """Return the config and the weights of a GPT2LMHeadModel, as to_gpt2 made it or others."""
    masks = ".attn.bias", ".attn.masked_bias"  # of older files
    state = {key: tensor for key, tensor in state.items() if not key.endswith(masks)}
    config = {
        "block_size": theirs.n_positions,
        **{name: getattr(theirs, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
        "bias": getattr(theirs, "bias", True) is not False,  # so in ours, whose biases are 0
        "gelu_tanh": theirs.activation_function != "gelu",
    }
    weights = {}
    for key, tensor in state.items():
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.t()  # transformers' Conv1D holds its matrix the other way round
        if config["bias"] or not key.endswith(".bias"):
            weights[key] = tensor
    return config, weights


def from_nanochat(theirs, state):
    """Return the config and the weights of a NanoChatForCausalLM."""
    config = {
        "block_size": theirs.max_position_embeddings,
        "vocab_size": theirs.vocab_size,
        "n_layer": theirs.num_hidden_layers,
        "n_head": theirs.num_attention_heads,
        "n_embd": theirs.hidden_size,
        "gelu_tanh": theirs.hidden_act != "gelu",
        **NANOCHAT,
    }
    weights = {ours: state[theirs] for ours, theirs in ENDS.items()}
    for layer in range(config["n_layer"]):
        prefix = f"model.layers.{layer}"
        parts = [state[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"]
        weights[f"transformer.h.{layer}.attn.c_attn.weight"] = torch.cat(parts)
        for ours, name in BLOCK.items():
            weights[f"transformer.h.{layer}.{ours}.weight"] = state[f"{prefix}.{name}.weight"]
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
    from transformers import AutoConfig, AutoModelForCausalLM

    safe = {"trust_remote_code": False}  # the default is to ask whether to run a folder's code
    try:
        check_shape(AutoConfig.from_pretrained(name, **safe, **where))
        options = {"dtype": torch.float32, "output_loading_info": True, **safe}
        model, info = AutoModelForCausalLM.from_pretrained(name, **options, **where)
    except Exception as fault:  # damage can raise anything
        if isinstance(fault, OSError) and not Path(name).is_dir():
            raise
        raise UserError(f"{name}: {reason(fault)}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name} lacks weights: {', '.join(missing[:3])}")
    return model


def check_shape(theirs):
    """Raise UserError if `theirs`, a transformers config, is of a model that GPT cannot be."""
    activations = ["gelu_new", "gelu_pytorch_tanh", "gelu"]
    nanochat = {
        "attention_bias": [False],
        "hidden_act": activations,
        "intermediate_size": [4 * getattr(theirs, "hidden_size", 0)],
        "num_key_value_heads": [getattr(theirs, "num_attention_heads", 0)],
        "final_logit_softcapping": [None],
        "rms_norm_eps": [1e-6],
        "rope_parameters": [ROTARY],
        "tie_word_embeddings": [False],
    }
    gpt2 = {
        "model_type": ["gpt2"],
        "activation_function": activations,
        "n_inner": [None, 4 * getattr(theirs, "n_embd", 0)],
        "layer_norm_epsilon": [1e-5],
        "scale_attn_weights": [True],
        "scale_attn_by_inverse_layer_idx": [False],
        "tie_word_embeddings": [True],
    }
    kind, wanted = ("nanochat", nanochat) if theirs.model_type == "nanochat" else ("GPT-2", gpt2)
    for key, allowed in wanted.items():
        if getattr(theirs, key, allowed[0]) not in allowed:
            raise UserError(f"it is no {kind}: its {key} is {getattr(theirs, key)!r}")


# --- to a folder ---------------------------------------------------------------------------------


def save_model(folder, shape, weights, vocab_size, eot, dtype):
    """Write config.json, generation_config.json and model.safetensors for transformers.

    `shape` holds the fields of GPTConfig, `weights` nanoGPT's names. Ids from `vocab_size` on are
    padding and left out; `eot` is the id of end-of-text, or None. Raises UserError with the name of
    the setting where no model of transformers has this shape.
    """
    transformers = import_extra("transformers", "gpt2")
    transformers.logging.disable_progress_bar()
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in weights.items()}
    for name in ENDS:
        weights[name] = weights[name][:vocab_size]
    ends = {"vocab_size": vocab_size, "bos_token_id": eot, "eos_token_id": eot, "dtype": dtype}
    if choose_kind(shape) == "nanochat":
        kind = transformers.NanoChatForCausalLM
        options, state = to_nanochat(shape, weights)
    else:
        kind = transformers.GPT2LMHeadModel
        options, state = to_gpt2(shape, weights)
    with torch.device("meta"):  # no memory for weights to be replaced
        model = kind(kind.config_class(**options, **ends))
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    missing, unknown = model.load_state_dict(state, strict=False, assign=True)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    model.tie_weights()
    model.save_pretrained(folder)


def choose_kind(shape):
    """Return the model type that has this shape, gpt2 or nanochat; UserError if neither has."""
    wanted = NANOCHAT if shape["position"] == "rotary" else GPT2_SHAPE
    for name, value in wanted.items():
        if shape[name] != value:
            raise UserError(f"{name}={shape[name]}: transformers has no such model with the rest")
    return "nanochat" if wanted is NANOCHAT else "gpt2"


def to_gpt2(shape, weights):
    """Return the options of a GPT2Config and the weights, with biases of 0 where there are none."""
    options = {
        "n_positions": shape["block_size"],
        "n_ctx": shape["block_size"],  # llama.cpp reads it
        **{name: shape[name] for name in ("n_embd", "n_layer", "n_head")},
        "activation_function": "gelu_new" if shape["gelu_tanh"] else "gelu",
        "bias": shape["bias"],  # transformers ignores it; from_gpt2 does not
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }
    state = {}
    for name, tensor in weights.items():
        if name.endswith((".h", "wte.weight", "wpe.weight")):
            state[name] = tensor
        elif name != "lm_head.weight":  # that is the token table
            state.setdefault(name.replace(".weight", ".bias"), tensor.new_zeros(len(tensor)))
            state[name] = tensor.t() if tensor.dim() == 2 else tensor  # Conv1D: the other way round
    return options, state


def to_nanochat(shape, weights):
    """Return the options of a NanoChatConfig and the weights."""
    options = {
        "hidden_size": shape["n_embd"],
        "intermediate_size": 4 * shape["n_embd"],
        "num_hidden_layers": shape["n_layer"],
        "num_attention_heads": shape["n_head"],
        "num_key_value_heads": shape["n_head"],
        "max_position_embeddings": shape["block_size"],
        "hidden_act": "gelu_pytorch_tanh" if shape["gelu_tanh"] else "gelu",
        "final_logit_softcapping": None,
        "rms_norm_eps": 1e-6,
        "rope_parameters": dict(ROTARY),
        "tie_word_embeddings": False,
    }
    state = {theirs: weights[ours] for ours, theirs in ENDS.items()}
    for layer in range(shape["n_layer"]):
        prefix = f"model.layers.{layer}"
        parts = weights[f"transformer.h.{layer}.attn.c_attn.weight"].chunk(3)
        for name, part in zip("qkv", parts, strict=True):
            state[f"{prefix}.self_attn.{name}_proj.weight"] = part
        for ours, name in BLOCK.items():
            state[f"{prefix}.{name}.weight"] = weights[f"transformer.h.{layer}.{ours}.weight"]
    return options, state


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
