"""The model against references: naive attention, Hugging Face, itself without a cache."""

import math
import time

import pytest
import torch
import torch.nn.functional as F

import runtime
from model import GPT, GPTConfig, next_token, read_checkpoint

SMALL = GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32)
SIZES = {
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    small = GPT(SMALL).eval()
    for parameter in small.parameters():  # weights large enough for distinct logits
        torch.nn.init.normal_(parameter, std=0.3)
    return small


def ids(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SMALL.vocab_size, shape, generator=generator)


def all_logits(model, tokens):
    """Return the logits (B, T, V) of all positions, which training never holds."""
    return model.lm_head(model.hidden(tokens))


def test_attention_equals_the_naive_one(model):
    attention, x = model.transformer.h[0].attn, torch.randn(3, 16, 32)
    B, T, C, H = 3, 16, 32, 2
    q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in attention.c_attn(x).split(C, dim=2))
    scores = q @ k.transpose(2, 3) / math.sqrt(C // H)
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    expected = (scores.softmax(dim=3) @ v).transpose(1, 2).reshape(B, T, C)
    torch.testing.assert_close(attention(x), attention.c_proj(expected))


def test_attention_inside_bfloat16_is_that_of_float32(model):
    attention, x = model.transformer.h[0].attn, torch.randn(3, 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = attention.c_attn(x).chunk(3, dim=2)
        heads = [t.view(3, 16, 2, 16).transpose(1, 2) for t in (q, k, v)]
        y = F.scaled_dot_product_attention(*(t.float().double() for t in heads), is_causal=True)
        expected = attention.c_proj(y.float().transpose(1, 2).reshape(3, 16, 32))
        assert q.dtype == torch.bfloat16 and torch.equal(attention(x), expected)


def test_a_later_token_never_changes_an_earlier_logit(model):
    tokens = ids(2, 16)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 40
    before, after = all_logits(model, tokens), all_logits(model, changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_the_initial_loss_is_that_of_guessing():
    torch.manual_seed(0)
    tokens = torch.randint(1000, (8, 33))
    model = GPT(GPTConfig(block_size=32, vocab_size=1000, n_layer=4, n_head=4, n_embd=64))
    assert abs(model(tokens[:, :-1], tokens[:, 1:])[1].item() - math.log(1000)) < 0.1


def test_activation_checkpointing_keeps_one_tensor_per_block():
    def saved(n_layer, recompute):
        sizes, tokens = [], torch.randint(64, (4, 33))
        model = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=n_layer, n_head=2, n_embd=32))
        runtime.recompute(model.transformer.h if recompute else [])
        pack = lambda tensor: (sizes.append(tensor.numel()), tensor)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens[:, :-1], tokens[:, 1:])
        return sum(sizes)

    assert saved(5, True) - saved(4, True) == 4 * 32 * 32
    assert saved(5, False) - saved(4, False) > 10 * 4 * 32 * 32


@pytest.mark.parametrize("name", SIZES)
def test_gpt2_has_its_number_of_parameters(name):
    n_layer, n_head, n_embd, count = SIZES[name]
    config = GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    with torch.device("meta"):
        model = GPT(config)
    assert model.get_num_params(non_embedding=False) == count
    assert model.get_num_params() == count - 1024 * n_embd


def test_flops_per_token_are_those_of_palm():
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=False))
    assert model.flops_per_token() == 6 * 123_587_328 + 12 * 12 * 768 * 1024
    assert model.estimate_mfu(1000, 2.0, 1e12) == model.flops_per_token() * 500 / 1e12
    assert model.estimate_mfu(1000, 2.0, None) is None


def test_every_parameter_gets_a_gradient(model):
    model(ids(2, 16), ids(2, 16))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_parameter_names_and_order_are_those_of_nanogpt():
    layer = ["ln_1.weight", "attn.c_attn.weight", "attn.c_proj.weight", "ln_2.weight"]
    layer += ["mlp.c_fc.weight", "mlp.c_proj.weight"]
    expected = ["wte.weight", "wpe.weight", *(f"h.{i}.{name}" for i in range(2) for name in layer)]
    expected = [f"transformer.{name}" for name in [*expected, "ln_f.weight"]]
    model = GPT(GPTConfig(**{**vars(SMALL), "bias": False}))
    assert [name for name, _ in model.named_parameters()] == expected
    assert list(model.state_dict()) == [*expected, "lm_head.weight"]


def test_matrices_decay_and_vectors_do_not(model):
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decayed, plain = optimizer.param_groups
    assert all(p.dim() >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert all(p.dim() == 1 for p in plain["params"]) and plain["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert optimizer.defaults["fused"]


def test_cropping_the_context_keeps_what_is_left_of_it(model):
    before = all_logits(model, ids(2, 8))
    model.crop_block_size(8)
    torch.testing.assert_close(all_logits(model, ids(2, 8)), before)
    assert model.config.block_size == 8 and model.transformer.wpe.weight.shape == (8, 32)


def test_weights_load_with_the_prefix_and_the_masks_of_old_files(model):
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    loaded = GPT.from_state(SMALL, state).eval()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    torch.testing.assert_close(loaded(ids(2, 16))[0], model(ids(2, 16))[0])


def test_weights_of_another_size_are_refused(model):
    other = GPTConfig(**{**vars(SMALL), "n_embd": 64})
    with pytest.raises(ValueError, match="the weights do not fit the model: .*size mismatch"):
        GPT.from_state(other, model.state_dict())


# --- Hugging Face --------------------------------------------------------------------------------


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
        difference = all_logits(model, tokens) - source(tokens).logits
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


def test_an_unreachable_hub_gets_one_line_soon(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("transformers")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    began = time.monotonic()
    with pytest.raises(ValueError) as fault:
        GPT.from_pretrained("nobody/gpt2-nothing")
    assert time.monotonic() - began < 30
    assert str(fault.value) == (
        "cannot get 'nobody/gpt2-nothing' from the hub (ConnectionError: no route); "
        "save the model to a folder elsewhere and give --init_from=FOLDER"
    )


def test_a_misspelt_model_gets_the_choices():
    with pytest.raises(ValueError, match="^init_from=scrach: choose scratch, resume, auto, gpt2, "):
        GPT.from_pretrained("scrach")


# --- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("new_tokens", [12, 60])  # within block_size, and far beyond it
def test_the_cache_changes_no_token(model, temperature, new_tokens):
    prompt = ids(3, 4)
    drawn = [
        model.generate(
            prompt, new_tokens, temperature, top_k=10, use_cache=use_cache,
            generators=[torch.Generator().manual_seed(row) for row in range(3)],
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert drawn[0].shape == (3, 4 + new_tokens)
    assert drawn[0].tolist() == drawn[1].tolist()


def test_greedy_generation_takes_the_likeliest_token_of_the_whole_context(model):
    tokens = ids(2, 4)
    for _ in range(12):
        likeliest = all_logits(model, tokens)[:, -1].argmax(dim=1, keepdim=True)
        tokens = torch.cat((tokens, likeliest), dim=1)
    assert model.generate(ids(2, 4), 12, temperature=0).tolist() == tokens.tolist()


def test_the_context_never_falls_below_half_of_block_size(model, monkeypatch):
    seen, forward = [], GPT.forward

    def spy(self, idx, targets=None, cache=None, past=0):
        seen.append(past + idx.size(1))
        return forward(self, idx, targets, cache, past)

    monkeypatch.setattr(GPT, "forward", spy)
    model.generate(ids(1, 10), 50)
    assert seen[:7] == [10, 11, 12, 13, 14, 15, 16] and seen[7:16] == list(range(8, 17))
    assert min(seen[7:]) == 8 and max(seen) == 16


def test_a_long_prompt_counts_with_its_end(model):
    long = ids(1, 40)
    assert model.generate(long, 3, 0)[0, 40:].tolist() == model.generate(long[:, 24:], 3, 0)[0, 16:].tolist()  # noqa: E501 # fmt: skip


def test_a_row_is_drawn_the_same_alone_and_among_others(model):
    def draw(rows):
        generators = [torch.Generator().manual_seed(row) for row in range(rows)]
        return model.generate(ids(1, 4).expand(rows, 4), 20, generators=generators).tolist()

    assert draw(1) == draw(5)[:1]
    assert len({tuple(row) for row in draw(5)}) == 5


def test_generation_ends_when_every_row_has_drawn_stop(model):
    stop = model.generate(ids(1, 4), 5, temperature=0)[0, 6].item()  # the third token drawn
    drawn = model.generate(ids(1, 4), 50, temperature=0, stop=stop)[0, 4:].tolist()
    assert drawn[-1] == stop and stop not in drawn[:-1] and len(drawn) <= 3
    two = torch.cat((ids(1, 4), ids(1, 4).flip(1)))
    first = model.generate(two, 50, temperature=0, stop=stop)[0, 4:].tolist()
    assert set(first[first.index(stop) :]) == {stop}


def test_padding_is_never_drawn():
    logits = torch.zeros(1, 8)
    logits[0, 5:] = 100.0
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8))
    drawn = model.generate(torch.zeros(4, 1, dtype=torch.long), 100, 5.0, vocab_size=50)
    assert drawn.max() < 50


def draw(logits, count, **options):
    draws = 1 - torch.rand(count, 1, generator=torch.Generator().manual_seed(0))
    return next_token(logits.expand(count, -1), draws, **options).flatten()


def test_tokens_are_drawn_by_their_probability():
    probabilities = torch.tensor([[0.5, 0.0, 0.3, 0.2]])
    share = draw(probabilities.log(), 20_000).bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, probabilities[0], atol=0.015, rtol=0)
    sharper = (probabilities**2 / (probabilities**2).sum())[0]
    share = draw(probabilities.log(), 20_000, temperature=0.5).bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, sharper, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "options, allowed",
    [
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 100}, {0, 2, 3}),
        ({"top_k": 0}, {0, 2, 3}),
        ({"top_k": None}, {0, 2, 3}),
        ({"top_p": 0.4}, {0}),
        ({"top_p": 0.6}, {0, 2}),
        ({"top_p": 1.0}, {0, 2, 3}),
        ({"top_p": 0}, {0, 2, 3}),
        ({"top_k": 1, "top_p": 0.9}, {0}),
        ({"temperature": 0}, {0}),
    ],
)
def test_top_k_and_top_p_allow_the_likeliest(options, allowed):
    probabilities = torch.tensor([[0.5, 0.0, 0.3, 0.2]])
    assert set(draw(probabilities.log(), 500, **options).tolist()) == allowed


def test_the_largest_draw_is_a_token_of_some_probability():
    logits = torch.full((1, 50304), -math.inf)
    logits[0, :50257] = torch.randn(50257, generator=torch.Generator().manual_seed(0))
    assert next_token(logits, torch.ones(1, 1)).item() < 50257
    assert next_token(logits.flip(1), torch.full((1, 1), 2.0**-24)).item() >= 47


# --- checkpoints ---------------------------------------------------------------------------------


class Payload:
    """Code that a pickle would run: it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_holds_code_is_refused_and_runs_nothing(tmp_path):
    path, proof = tmp_path / "ckpt.pt", tmp_path / "proof"
    torch.save({"model": Payload(proof)}, path)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint_gets_one_line(tmp_path, content):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"ckpt\.pt cannot be read as a checkpoint") as fault:
        read_checkpoint(path)
    assert "\n" not in str(fault.value)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="is no checkpoint: it lacks model_args, iter_num, config"):
        read_checkpoint(path)
