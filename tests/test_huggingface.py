"""Loading GPT-2 in Hugging Face's format: logits equal transformers', other models are refused."""

import json

import pytest
import torch
from conftest import save_pretrained

from data.tokenizer import GPT2, BPETokenizer
from engine.huggingface import load_pretrained
from model import GPT


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """Save a random model of GPT-2's real shape."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    source = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    for name, parameter in source.named_parameters():
        if name.endswith("bias"):  # else all zero
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("gpt2")
    source.save_pretrained(folder)
    return folder, source


def test_logits_equal_those_of_transformers(gpt2_folder):
    folder, source = gpt2_folder
    model = GPT.from_pretrained(str(folder), dropout=0.1).eval()
    tokens = torch.randint(50257, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = model(tokens, tokens)[0] - source(tokens).logits
    assert difference.abs().max() < 1e-4
    assert model.config.gelu_tanh and model.transformer.drop.p == 0.1


def test_a_model_of_another_kind_is_refused(gpt2_folder, tmp_path):
    import transformers

    transformers.GPT2Config(n_layer=1, n_inner=100).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no GPT-2: its n_inner is 100"):
        GPT.from_pretrained(str(tmp_path))


def test_weights_that_are_missing_are_named(gpt2_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = gpt2_folder
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = load_file(folder / "model.safetensors")
    state.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: transformer\.h\.1\.mlp\.c_fc\.weight"):
        GPT.from_pretrained(str(tmp_path))


def test_an_unreachable_hub_gets_one_line(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("transformers")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    with pytest.raises(ValueError) as fault:
        GPT.from_pretrained("nobody/gpt2-nothing")
    assert str(fault.value) == (
        "cannot get nobody/gpt2-nothing from the hub (ConnectionError: no route); "
        "save the model to a folder elsewhere and give --init_from=FOLDER"
    )


def write_tokenizer(folder, tokens):
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    content = {"version": "1.0", "model": model, "added_tokens": [], "pre_tokenizer": None}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def in_two(token, ranks):
    """Return the two tokens that `token` is merged from: bytes, as all that follow."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def write_gpt2_tokenizer(folder):
    """Write vocab.json and merges.txt as OpenAI published them, from what tiktoken makes of them.

    In these files 188 bytes stand for themselves, the other 68 are characters from 256 on.
    """
    encoding = BPETokenizer(GPT2).encoding
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(50256)}
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}

    def spell(token):
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): number for token, number in ranks.items()}
    vocabulary["<|endoftext|>"] = 50256
    merged = [token for token in ranks if len(token) > 1]
    merges = [" ".join(map(spell, in_two(token, ranks))) for token in merged]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *merges, ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return vocabulary


def test_a_folder_with_gpt2s_own_tokenizer_is_accepted(tmp_path, gpt2_files):
    save_pretrained(tmp_path, vocab_size=50257)
    vocabulary = write_gpt2_tokenizer(tmp_path)
    assert load_pretrained(str(tmp_path))[0]["vocab_size"] == 50257
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(ValueError, match="has a tokenizer of its own"):
        load_pretrained(str(tmp_path))


def test_a_model_that_reads_other_tokens_is_refused(tmp_path):
    save_pretrained(tmp_path)
    config, _ = load_pretrained(str(tmp_path))  # without one it is taken for GPT-2's
    assert config["vocab_size"] == 21
    write_tokenizer(tmp_path, "abcdefghijklmnopqrstu")
    with pytest.raises(ValueError) as fault:
        load_pretrained(str(tmp_path))
    advice = "take a model with GPT-2's tokens"
    assert str(fault.value) == f"{tmp_path} has a tokenizer of its own; {advice}"


def test_weights_are_contiguous(tmp_path):
    save_pretrained(tmp_path)
    assert all(tensor.is_contiguous() for tensor in load_pretrained(str(tmp_path))[1].values())
