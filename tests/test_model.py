"""The model against references: a GPT written out naively, and itself without a cache."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from engine import fast
from engine.fast import recompute_activations, use_fast_parts
from model import GPT, GPTConfig, next_token

SMALL = GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32)
SIZES = {
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}


def build(config):
    torch.manual_seed(0)
    small = GPT(config).eval()
    for parameter in small.parameters():  # weights large enough for distinct logits
        torch.nn.init.normal_(parameter, std=0.3)
    return small


@pytest.fixture
def model():
    return build(SMALL)


def ids(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SMALL.vocab_size, shape, generator=generator)


def all_logits(model, tokens):
    return model(tokens, tokens)[0]


def naive(state, config, tokens, targets):
    """Return logits and loss of a GPT, computed from its weights as nanoGPT's model does."""
    B, T = tokens.shape
    C, H = config.n_embd, config.n_head
    future = torch.ones(T, T).triu(1).bool()

    def weight(name):
        return state[f"transformer.{name}.weight"], state.get(f"transformer.{name}.bias")

    x = weight("wte")[0][tokens] + weight("wpe")[0][:T]
    for layer in (f"h.{index}" for index in range(config.n_layer)):
        y = F.layer_norm(x, (C,), *weight(f"{layer}.ln_1"))
        q, k, v = F.linear(y, *weight(f"{layer}.attn.c_attn")).split(C, dim=2)
        q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(2, 3) / math.sqrt(C // H)).masked_fill(future, -math.inf)
        y = (scores.softmax(dim=3) @ v).transpose(1, 2).reshape(B, T, C)
        x = x + F.linear(y, *weight(f"{layer}.attn.c_proj"))
        y = F.layer_norm(x, (C,), *weight(f"{layer}.ln_2"))
        y = F.gelu(F.linear(y, *weight(f"{layer}.mlp.c_fc")))
        x = x + F.linear(y, *weight(f"{layer}.mlp.c_proj"))
    logits = F.linear(F.layer_norm(x, (C,), *weight("ln_f")), weight("wte")[0])
    picked = logits.log_softmax(2).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return logits, -picked[targets >= 0].mean()


@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_loss_equal_those_of_a_gpt_written_out(model, bias):
    if not bias:
        model = GPT(GPTConfig(**{**vars(SMALL), "bias": False})).eval()
    targets = ids(2, 16).flip(0)
    targets[0, :5] = -1
    logits, loss = model(ids(2, 16), targets)
    expected_logits, expected_loss = naive(model.state_dict(), SMALL, ids(2, 16), targets)
    assert logits.shape == (2, 16, 40)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, expected_loss)
    assert torch.equal(model(ids(2, 16), targets, loss_only=True), loss)
    last, nothing = model(ids(2, 16))
    assert nothing is None
    torch.testing.assert_close(last, logits[:, -1:])


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
        recompute_activations(model.transformer.h if recompute else [], 0.0, torch.device("cpu"))

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

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


def test_weights_of_another_size_are_refused(model):
    other = GPTConfig(**{**vars(SMALL), "n_embd": 64})
    with pytest.raises(RuntimeError, match="size mismatch for transformer.wte.weight"):
        GPT.from_state(other, model.state_dict())


def test_weights_are_loaded_in_float32_contiguous_and_tied(model):
    state = {name: tensor.bfloat16().t() for name, tensor in model.state_dict().items()}
    state = {name: tensor.t() for name, tensor in state.items()}  # transposed views
    loaded = GPT.from_state(SMALL, state)
    for parameter in loaded.parameters():
        assert parameter.is_contiguous() and parameter.dtype == torch.float32
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


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

    def spy(self, idx, cache, past):
        seen.append(past + idx.size(1))
        return forward(self, idx, cache=cache, past=past)

    monkeypatch.setattr(GPT, "forward", spy)
    model.generate(ids(1, 10), 50)
    assert seen[:7] == [10, 11, 12, 13, 14, 15, 16] and seen[7:16] == list(range(8, 17))
    assert min(seen[7:]) == 8 and max(seen) == 16


def test_a_long_prompt_counts_with_its_end(model):
    long = ids(1, 40)
    cut = long[:, 24:]
    drawn, expected = model.generate(long, 3, 0)[0, 40:], model.generate(cut, 3, 0)[0, 16:]
    assert drawn.tolist() == expected.tolist()


def test_a_row_is_drawn_the_same_alone_and_among_others(model):
    def draw(rows):
        generators = [torch.Generator().manual_seed(row) for row in range(rows)]
        return model.generate(ids(1, 4).expand(rows, 4), 20, generators=generators).tolist()

    assert draw(1) == draw(5)[:1]
    assert len({tuple(row) for row in draw(5)}) == 5


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("fast_parts", [False, True])
@pytest.mark.parametrize("position", ["learned", "rotary", "alibi"])
def test_prompts_of_different_lengths_go_on_together_as_each_alone(
    monkeypatch, position, fast_parts, temperature
):
    """Far beyond block_size, from where all rows read the last half of the context anew."""
    model = build(replace(SMALL, position=position))
    monkeypatch.setattr(fast, "LARGE_MATRIX", 0)
    if fast_parts:
        use_fast_parts(model, torch.device("cpu"))
    logits = []
    model.register_forward_hook(lambda module, given, found: logits.append(found[0]))
    prompts = [ids(1, length).flip(1)[0] for length in (5, 16, 1, 5, 9, 2, 3, 4)]
    together = pad_sequence(prompts, batch_first=True, padding_value=-1)

    def draw(idx, rows):
        logits.clear()
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return model.generate(idx, 40, temperature, generators=generators), torch.cat(logits, dim=1)

    drawn, scores = draw(together, range(8))
    assert drawn.shape == (8, 16 + 40)
    for row, prompt in enumerate(prompts):
        alone, expected = draw(prompt[None], [row])
        end = len(alone[0])
        assert drawn[row, :end].tolist() == alone[0].tolist()
        assert drawn[row, : len(prompt)].tolist() == prompt.tolist()
        found = scores[row, len(prompt) - 1 : end - 1]
        torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=0)


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
