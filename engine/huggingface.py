"""Read GPTs of Hugging Face transformers from a folder or the hub, and write them to a folder.

The two model types are GPT-2 and NanoChat (rotary positions, RMSNorm, an untied head). A model is
two dicts, GPTConfig's fields and the weights by nanoGPT's names, because this module does not
import model.py. Code in a folder is never run.
"""

import re
from pathlib import Path

import torch

from engine.process import UserError, reason, user_error, user_path

# GPTConfig's fields -> transformers' fields. GPT2Config maps them to n_positions, n_embd and so on.
FIELDS = dict(
    block_size="max_position_embeddings",
    vocab_size="vocab_size",
    n_layer="num_hidden_layers",
    n_head="num_attention_heads",
    n_embd="hidden_size",
    bias="bias",  # transformers ignores it
)
SHAPES = {  # model type -> the fields of GPTConfig that it fixes
    "gpt2": dict(position="learned", rms_norm=False, tied=True),
    "nanochat": dict(position="rotary", rms_norm=True, tied=False, bias=False),
}
NAMES = {  # part of a weight's name in NanoChat -> in nanoGPT; GPT-2's names are nanoGPT's
    "model.embed_tokens": "transformer.wte",
    "model.layers": "transformer.h",
    "self_attn.[qkv]_proj": "attn.c_attn",  # three matrices (C, C) are one, (3C, C)
    "self_attn.o_proj": "attn.c_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OPENAI = "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"  # hub names


def transformers_config(config):
    """Return transformers' fields for a model with the shape `config`, GPTConfig's fields.

    UserError if transformers has no model of this shape.
    """
    kind = "nanochat" if config["position"] == "rotary" else "gpt2"
    for name, value in SHAPES[kind].items():
        if config[name] != value:
            raise UserError(f"{name}={config[name]}: transformers has no such model with the rest")
    fields = {theirs: config[ours] for ours, theirs in FIELDS.items()}
    fields["model_type"] = kind
    if kind == "nanochat":
        return fields | dict(
            attention_bias=False,
            hidden_act="gelu_pytorch_tanh" if config["gelu_tanh"] else "gelu",
            intermediate_size=4 * config["n_embd"],
            num_key_value_heads=config["n_head"],
            final_logit_softcapping=None,
            rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
            tie_word_embeddings=False,
        )
    return fields | dict(
        activation_function="gelu_new" if config["gelu_tanh"] else "gelu",
        n_inner=4 * config["n_embd"],
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
        n_ctx=config["block_size"],  # llama.cpp reads it
    )


def our_name(name):
    """Return nanoGPT's name for a weight of transformers."""
    for theirs, ours in NAMES.items():
        name = re.sub(theirs, ours, name)
    return name


def transpose(name, tensor):
    """Return the tensor, transposed if it is a matrix of GPT-2's blocks: those are (in, out)."""
    if ".h." in name and tensor.dim() == 2:
        return tensor.t()
    return tensor


# --- read ----------------------------------------------------------------------------------------


def load_pretrained(name):
    """Return GPTConfig's fields and the float32 weights of the model `name`, two dicts.

    `name` is gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/NAME on the hub, or a folder. UserError
    if it cannot be read, if a GPT cannot have its shape, or if its tokenizer is neither GPT-2's nor
    described by a meta.pkl of ours.
    """
    name = str(user_path(name))
    config, weights = find_model(name)
    if name not in OPENAI and not Path(name, "meta.pkl").exists():
        check_tokenizer(name)
    return config, weights


def find_model(name):
    """Return the fields and the weights of a folder, or of a hub name, from its cache if possible.

    UserError if there is no such model or a GPT cannot have its shape.
    """
    from huggingface_hub import HfApi

    try:
        return read_model(name, local_files_only=True)
    except Exception as fault:  # a damaged file can raise anything
        if Path(name).is_dir() or not isinstance(fault, OSError):
            raise UserError(f"{name}: {reason(fault)}") from None
    with user_error(f"cannot get {name} from the hub (or give --init_from=FOLDER)", Exception):
        HfApi().model_info(name, timeout=5)  # from_pretrained would retry for half a minute
        return read_model(name)


def read_model(name, **options):
    """Return the fields and the weights of the model `name`. OSError if it is not found."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    options["trust_remote_code"] = False  # the default asks whether to run code from the folder
    theirs = AutoConfig.from_pretrained(name, **options)
    config = read_config(theirs)
    options |= {"dtype": torch.float32, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(name, **options)
    if info["missing_keys"]:
        raise UserError(f"it lacks weights: {min(info['missing_keys'])}")
    return config, read_weights(model.state_dict(), config["bias"])


def read_config(theirs):
    """Return GPTConfig's fields for a config of transformers. UserError if GPT lacks its shape."""
    kind = theirs.model_type
    if kind not in SHAPES:
        raise UserError(f"its model_type is {kind!r}; gpt2 and nanochat are allowed")
    config = {ours: getattr(theirs, field, True) for ours, field in FIELDS.items()}
    config |= SHAPES[kind]
    if not 0 < config["n_layer"] <= 1000:
        raise UserError("it must have from 1 to 1000 layers")
    activation = "hidden_act" if kind == "nanochat" else "activation_function"
    config["gelu_tanh"] = getattr(theirs, activation) != "gelu"
    for field, allowed in transformers_config(config).items():
        value = getattr(theirs, field, None)
        if value not in (None, allowed):  # None is the default
            raise UserError(f"its {field} is {value!r}; {allowed!r} is allowed")
    return config


def read_weights(state, bias):
    """Return transformers' weights by nanoGPT's names, contiguous; without biases if not `bias`."""
    parts = {}  # name -> one tensor, or three: queries, keys, values
    for name, tensor in state.items():
        if bias or not name.endswith(".bias"):
            parts.setdefault(our_name(name), []).append(transpose(name, tensor))
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def check_tokenizer(name):
    """Raise UserError if the model `name` brings another tokenizer than GPT-2's."""
    from transformers import AutoTokenizer

    with user_error(f"{name}: its tokenizer cannot be read", Exception):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        ids = tokenizer.encode("Hello, world!", add_special_tokens=False)  # [] without a tokenizer
    if ids not in ([], [15496, 11, 995, 0]):
        raise UserError(f"{name} has another tokenizer than GPT-2; use a model with GPT-2's tokens")


# --- write ---------------------------------------------------------------------------------------


def save_model(folder, config, weights, vocab_size, eot, dtype):
    """Write config.json, generation_config.json and model.safetensors for transformers.

    `config` holds GPTConfig's fields. Token ids from `vocab_size` on are padding and left out;
    `eot` is the id of end-of-text or None. UserError if transformers has no model of this shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = transformers_config(config)
    options |= dict(vocab_size=vocab_size, bos_token_id=eot, eos_token_id=eot, dtype=dtype)
    options |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # GPT2Config's are 0.1
    with torch.device("meta"):  # no memory for weights that are replaced
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
    state = {}
    for name, empty in model.state_dict().items():
        tensor = write_weight(name, empty.shape, weights)
        state[name] = tensor.to("cpu", dtype).contiguous()
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder)


def write_weight(name, shape, weights):
    """Return transformers' weight `name` with this shape from nanoGPT's, or a bias of 0."""
    ours = our_name(name)
    if ours not in weights:
        return torch.zeros(shape)
    tensor = transpose(name, weights[ours])
    if match := re.search("self_attn.([qkv])_proj", name):
        tensor = tensor.chunk(3)["qkv".index(match[1])]
    return tensor[: shape[0]]  # without padding
