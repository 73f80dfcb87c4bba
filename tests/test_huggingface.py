"""Models of transformers, both ways: equal logits, equal weights, a line for a foreign model."""

import json
from unittest.mock import Mock

import pytest
import torch
import transformers
from conftest import save_pretrained
from safetensors.torch import load_file, save_file

from data.tokenizer import GPT2, make_meta, make_tokenizer
from engine.huggingface import find_model, load_pretrained, save_model
from model import GPT, GPTConfig
from tools.export import save_tokenizer

NANOCHAT = {"position": "rotary", "rms_norm": True, "tied": False, "bias": False}
SHAPES = [
    {"bias": False},
    {"bias": True},
    {"bias": True, "gelu_tanh": True},
    NANOCHAT,
    NANOCHAT | {"gelu_tanh": True},
]


def randomize(model):
    """Draw all parameters, biases too, so large that the logits differ clearly."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_a_loaded_gpt2_has_the_logits_of_transformers(tmp_path):
    theirs = randomize(save_pretrained(tmp_path))
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    ids = torch.randint(21, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, ids)[0], theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_saved_model_has_equal_logits_and_comes_back_bit_for_bit(tmp_path, shape):
    sizes = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 45}
    ours = randomize(GPT(GPTConfig(**sizes, **shape)))
    save_model(tmp_path, vars(ours.config), ours.state_dict(), 40, None, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(40, (3, 16))
    with torch.no_grad():  # 5 ids are padding and left out
        logits = ours(ids, ids)[0][..., :40]
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-4, rtol=0)
    config, weights = find_model(str(tmp_path))
    assert GPTConfig(**config, dropout=0.0) == GPTConfig(**sizes | shape | {"vocab_size": 40})
    for name, tensor in weights.items():
        assert torch.equal(tensor, ours.state_dict()[name][: len(tensor)]), name
    assert all(tensor.is_contiguous() for tensor in weights.values())


@pytest.mark.parametrize(
    "config, line",
    [
        (transformers.LlamaConfig(), "its model_type is 'llama'; gpt2 and nanochat are allowed"),
        (transformers.GPT2Config(n_inner=100), "its n_inner is 100; 3072 is allowed"),
        (transformers.GPT2Config(layer_norm_epsilon=0.1), "its layer_norm_epsilon is 0.1; 1e-05"),
        (transformers.NanoChatConfig(), "its hidden_act is 'relu2'; 'gelu_pytorch_tanh'"),
    ],
    ids=["llama", "n_inner", "epsilon", "nanochat"],
)
def test_a_model_of_another_shape_is_refused_by_its_field(tmp_path, config, line):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: {line}"):
        load_pretrained(str(tmp_path))


def test_a_missing_weight_is_named(tmp_path):
    save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("transformer.h.0.mlp.c_fc.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks weights: transformer\.h\.0\.mlp\.c_fc\.weight"):
        load_pretrained(str(tmp_path))


def test_code_in_a_folder_is_not_run(tmp_path):
    save_pretrained(tmp_path)
    proof = tmp_path / "proof"
    (tmp_path / "code.py").write_text(f"open({str(proof)!r}, 'w').close()")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_pretrained(str(tmp_path))
    assert not proof.exists()


def test_a_model_that_the_hub_does_not_give_gets_one_line(monkeypatch):
    no_route = Mock(side_effect=ConnectionError("no route"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_route)
    line = r"^cannot get nobody/gpt2 from the hub \(or give --init_from=FOLDER\): no route$"
    with pytest.raises(ValueError, match=line):
        load_pretrained("nobody/gpt2")


def test_another_tokenizer_than_gpt2s_needs_a_meta_pkl(tmp_path, gpt2_files):
    save_pretrained(tmp_path)
    for meta in (GPT2, make_meta("bytes", [])):
        save_tokenizer(tmp_path, make_tokenizer(meta), 32)
        assert load_pretrained(str(tmp_path))[0]["vocab_size"] == 21
    (tmp_path / "meta.pkl").unlink()
    with pytest.raises(ValueError, match="has another tokenizer than GPT-2; use a model with"):
        load_pretrained(str(tmp_path))
