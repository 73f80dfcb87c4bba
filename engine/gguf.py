"""A GPT in the file format of llama.cpp, GGUF, from plain dicts. Knows no model class of ours.

llama.cpp names the parts of a GPT-2 as below, wants a bias in each linear and normalisation layer,
and reads vectors and positions in float32 only.
"""

from engine.huggingface import GPT2_SHAPE, to_gpt2
from engine.process import UserError, import_extra

NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_f": "output_norm",
}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def save_gguf(path, shape, weights, dtype, tokens, merges, eot):
    """Write a model and its tokenizer to the file `path`.

    `shape` holds the fields of GPTConfig, `weights` nanoGPT's names; dtype is a key of DTYPES. The
    `tokens` of the vocabulary stand in order: as bytes where `merges` is None, and then the longest
    that fits is taken; else as byte-level BPE writes them, with its merges, pairs of such. `eot` is
    the id of end-of-text, or None. Raises UserError where llama.cpp has no model of this shape.
    """
    library = import_extra("gguf", "gguf")
    for name, value in GPT2_SHAPE.items():
        if shape[name] != value:
            raise UserError(f"{name}={shape[name]}: llama.cpp's GPT-2 has no such thing")
    table = "transformer.wte.weight"
    weights = {**weights, table: weights[table][: len(tokens)]}  # without padding
    writer = library.GGUFWriter(path, "gpt2")
    writer.add_context_length(shape["block_size"])
    writer.add_embedding_length(shape["n_embd"])
    writer.add_feed_forward_length(4 * shape["n_embd"])
    writer.add_block_count(shape["n_layer"])
    writer.add_head_count(shape["n_head"])
    writer.add_layer_norm_eps(1e-5)
    add_tokenizer(writer, tokens, merges, eot, library.TokenType)
    for name, tensor in to_gpt2(shape, weights)[1].items():
        name, tensor, is_matrix = to_llama_cpp(name, tensor.detach())
        kind = library.GGMLQuantizationType[DTYPES[dtype] if is_matrix else "F32"]
        data = library.quants.quantize(tensor.float().contiguous().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def to_llama_cpp(name, tensor):
    """Return llama.cpp's name and tensor for one of a GPT2LMHeadModel, and if it is a matrix."""
    part, kind = name.removeprefix("transformer.").rsplit(".", 1)
    prefix = ""
    if part.startswith("h."):
        _, layer, part = part.split(".", 2)
        prefix = f"blk.{layer}."
    if tensor.dim() == 2 and prefix:
        tensor = tensor.t()  # transformers' Conv1D holds its matrix the other way round
    return f"{prefix}{NAMES[part]}.{kind}", tensor, tensor.dim() == 2 and part != "wpe"


def add_tokenizer(writer, tokens, merges, eot, types):
    if merges is None:
        writer.add_tokenizer_model("rwkv")  # the longest token that fits, and no end-of-text
        writer.add_token_list(["".join(f"\\x{byte:02x}" for byte in token) for token in tokens])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_bos_token_id(eot)
        writer.add_eos_token_id(eot)
        writer.add_add_bos_token(False)
    writer.add_token_types(
        [types.CONTROL if token == eot else types.NORMAL for token in range(len(tokens))]
    )
