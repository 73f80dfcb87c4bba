"""The model against references: a GPT written out plainly, transformers, and formulas."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from engine import kernels
from engine.process import UserError
from model import GPT, GPTConfig, next_token

SMALL = {"block_size": 16, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 32}
RECIPE = {"position": "rotary", "rms_norm": True, "tied": False, "bias": False}
SHAPES = [{}, {"position": "rotary"}, {"rms_norm": True}, {"tied": False}, RECIPE]
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(shape) or "gpt2")
SIZES = {
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}


def build(**changes):
    """Return a model whose weights are large enough for distinct logits."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **changes})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def token_ids(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


def all_logits(model, tokens):
    return model(tokens, tokens)[0]


# --- layers and loss -----------------------------------------------------------------------------


def plain_gpt(state, tokens):
    """Return the logits of a GPT-2 with the weights `state`, computed as nanoGPT computes them."""
    B, T = tokens.shape
    C, H = 32, 2

    def weights(name):
        return state[f"transformer.{name}.weight"], state.get(f"transformer.{name}.bias")

    x = weights("wte")[0][tokens] + weights("wpe")[0][:T]
    for layer in ("h.0", "h.1"):
        y = F.layer_norm(x, (C,), *weights(f"{layer}.ln_1"))
        q, k, v = F.linear(y, *weights(f"{layer}.attn.c_attn")).split(C, dim=2)
        q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / math.sqrt(C // H)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = (scores.softmax(dim=3) @ v).transpose(1, 2).reshape(B, T, C)
        x = x + F.linear(y, *weights(f"{layer}.attn.c_proj"))
        y = F.layer_norm(x, (C,), *weights(f"{layer}.ln_2"))
        y = F.gelu(F.linear(y, *weights(f"{layer}.mlp.c_fc")))
        x = x + F.linear(y, *weights(f"{layer}.mlp.c_proj"))
    return F.linear(F.layer_norm(x, (C,), *weights("ln_f")), weights("wte")[0])


@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_loss_equal_those_of_a_gpt_written_out(bias):
    model = build(bias=bias)
    tokens, targets = token_ids(2, 16), token_ids(2, 16).flip(0)
    targets[0, :5] = -1
    logits, loss = model(tokens, targets)
    expected = plain_gpt(model.state_dict(), tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    picked = expected.log_softmax(2).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(loss, -picked[targets >= 0].mean())
    last, nothing = model(tokens)
    assert nothing is None
    torch.testing.assert_close(last, logits[:, -1:])


@EACH_SHAPE
@pytest.mark.parametrize("few", [0, 2**22])
def test_the_loss_alone_has_the_value_and_gradients_of_the_loss_with_logits(
    monkeypatch, shape, few
):
    monkeypatch.setattr(kernels, "FEW_LOGITS", few)
    monkeypatch.setattr(kernels, "CHUNK", 5)
    model, tokens = build(**shape), token_ids(3, 16)
    targets = tokens.roll(1, 0).masked_fill(tokens < 5, -1)
    expected = model(tokens, targets)[1]
    expected_gradients = torch.autograd.grad(expected, model.parameters())
    loss = model(tokens, targets, loss_only=True)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(
        torch.autograd.grad(loss, model.parameters()), expected_gradients, strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_the_recipe_is_transformers_nanochat():
    transformers = pytest.importorskip("transformers")
    model = build(**RECIPE)
    config = transformers.NanoChatConfig(
        vocab_size=40, hidden_size=32, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        final_logit_softcapping=None, rms_norm_eps=1e-6, hidden_act="gelu",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.NanoChatForCausalLM(config).eval()
    weights = {"model.embed_tokens.weight": model.transformer.wte.weight}
    weights["lm_head.weight"] = model.lm_head.weight
    for index, block in enumerate(model.transformer.h):
        names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        matrices = [*zip(names, block.attn.c_attn.weight.chunk(3), strict=True)]
        matrices += [("self_attn.o_proj", block.attn.c_proj.weight)]
        matrices += [("mlp.fc1", block.mlp.c_fc.weight), ("mlp.fc2", block.mlp.c_proj.weight)]
        weights |= {f"model.layers.{index}.{name}.weight": matrix for name, matrix in matrices}
    theirs.load_state_dict(weights)
    tokens = token_ids(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            all_logits(model, tokens), theirs(tokens).logits, atol=1e-4, rtol=0
        )


@EACH_SHAPE
def test_a_later_token_never_changes_an_earlier_logit(shape):
    model, tokens = build(**shape), token_ids(2, 16)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 40
    before, after = all_logits(model, tokens), all_logits(model, changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-5, rtol=0)
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@EACH_SHAPE
def test_activation_checkpointing_changes_no_gradient_and_keeps_one_tensor_per_block(shape):
    tokens = token_ids(4, 16)

    def run(n_layer, recompute):
        model, sizes = build(**shape, n_layer=n_layer, dropout=0.1).train(), {}
        model.activation_checkpointing = recompute
        pack = lambda x: sizes.update({x.data_ptr(): x.numel()}) or x  # noqa: E731
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(tokens, tokens, loss_only=True)
        return sum(sizes.values()), torch.autograd.grad(loss, model.parameters())

    kept, gradients = run(3, False)
    recomputed, same_gradients = run(3, True)
    assert all(map(torch.equal, gradients, same_gradients))
    assert recomputed - run(2, True)[0] == 4 * 16 * 32
    assert kept - run(2, False)[0] > 10 * 4 * 16 * 32


# --- nanoGPT's interface -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_gpt2_has_its_number_of_parameters(name):
    n_layer, n_head, n_embd, count = SIZES[name]
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.get_num_params(non_embedding=False) == count
    assert model.get_num_params() == count - 1024 * n_embd


def test_parameter_names_and_order_are_those_of_nanogpt():
    layer = ["ln_1.weight", "attn.c_attn.weight", "attn.c_proj.weight", "ln_2.weight"]
    layer += ["mlp.c_fc.weight", "mlp.c_proj.weight"]
    expected = ["wte.weight", "wpe.weight", *(f"h.{i}.{name}" for i in range(2) for name in layer)]
    expected = [f"transformer.{name}" for name in [*expected, "ln_f.weight"]]
    model = build(bias=False)
    assert [name for name, _ in model.named_parameters()] == expected
    assert list(model.state_dict()) == [*expected, "lm_head.weight"]
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    order = [p for group in optimizer.param_groups for p in group["params"]]
    named = list(model.parameters())
    assert order == [p for p in named if p.dim() >= 2] + [p for p in named if p.dim() < 2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_the_initial_loss_is_that_of_guessing_and_each_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=1000, n_layer=4, n_head=4, n_embd=64))
    tokens = torch.randint(1000, (8, 33))
    loss = model(tokens[:, :-1], tokens[:, 1:], loss_only=True)
    loss.backward()
    assert abs(loss.item() - math.log(1000)) < 0.1
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_cropping_the_context_keeps_the_rest():
    model = build()
    before = all_logits(model, token_ids(2, 8))
    model.crop_block_size(8)
    torch.testing.assert_close(all_logits(model, token_ids(2, 8)), before)
    assert model.config.block_size == 8 and model.transformer.wpe.weight.shape == (8, 32)


def test_weights_are_loaded_in_float32_tied_and_only_if_they_fit():
    model = build()
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    loaded = GPT.from_state(model.config, state)
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in loaded.parameters())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    with pytest.raises(UserError, match="the weights do not fit the model: "):
        GPT.from_state(GPTConfig(**{**SMALL, "n_embd": 64}), state)


@EACH_SHAPE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_computes_and_generates(shape, dtype):
    model, tokens = build(**shape), token_ids(2, 16)
    expected = all_logits(model, tokens)
    model.to(dtype)
    assert (
        all_logits(model, tokens).float() - expected
    ).abs().mean() < 0.05 * expected.abs().mean()
    assert model.generate(tokens, 3).shape == (2, 19)


def test_a_model_can_be_copied_and_pickled():
    model, tokens = build(**RECIPE), token_ids(2, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(all_logits(other, tokens), all_logits(model, tokens))


# --- generation ----------------------------------------------------------------------------------


@EACH_SHAPE
def test_the_cache_changes_no_token(shape):
    """Within block_size; beyond it the last half of the context is read again."""
    model, tokens = build(**shape), token_ids(3, 4)
    for _ in range(60):
        if tokens.size(1) <= 16:
            context = tokens
        likeliest = all_logits(model, context)[:, -1].argmax(dim=1, keepdim=True)
        tokens = torch.cat((tokens, likeliest), dim=1)
        context = torch.cat((context, likeliest), dim=1)
        context = context if context.size(1) <= 16 else context[:, -8:]
    assert model.generate(token_ids(3, 4), 60, temperature=0).tolist() == tokens.tolist()


def test_a_long_prompt_counts_with_its_end():
    model, prompt = build(), token_ids(1, 40)
    expected = model.generate(prompt[:, 24:], 3, temperature=0)[0, 16:]
    assert model.generate(prompt, 3, temperature=0)[0, 40:].tolist() == expected.tolist()


def test_a_row_is_drawn_the_same_alone_and_among_others():
    model = build()

    def draw(rows):
        generators = [torch.Generator().manual_seed(row) for row in range(rows)]
        prompts = token_ids(1, 4).expand(rows, 4)
        return model.generate(prompts, 20, generators=generators).tolist()

    assert draw(1) == draw(5)[:1]
    assert len({tuple(row) for row in draw(5)}) == 5


def test_padding_is_never_drawn():
    drawn = build().generate(torch.zeros(4, 1, dtype=torch.long), 100, 5.0, vocab_size=20)
    assert drawn.max() < 20


def test_weights_that_are_not_finite_end_the_generation():
    model = build()
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="the logits are not finite"):
        model.generate(token_ids(1, 4), 3)


def draw_tokens(count, **options):
    """Return tokens drawn from the probabilities 0.5, 0, 0.3 and 0.2."""
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 1e-30, 0.3, 0.2]).log()
    return next_token(logits.expand(count, 4), **options).flatten()


@pytest.mark.parametrize("power", [1, 2])
def test_tokens_are_drawn_by_their_probability(power):
    expected = torch.tensor([0.5, 0.0, 0.3, 0.2]) ** power
    found = draw_tokens(20_000, temperature=1 / power).bincount(minlength=4) / 20_000
    torch.testing.assert_close(found, expected / expected.sum(), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "options, allowed",
    [
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 100}, {0, 2, 3}),
        ({"top_k": 0}, {0, 2, 3}),
        ({"top_p": 0.4}, {0}),
        ({"top_p": 0.6}, {0, 2}),
        ({"top_p": 1.0}, {0, 2, 3}),
        ({"top_p": 1e-300}, {0}),
        ({"top_k": 1, "top_p": 0.9}, {0}),
        ({"temperature": 0}, {0}),
        ({"temperature": 1e-300}, {0}),
    ],
)
def test_top_k_and_top_p_allow_the_most_likely(options, allowed):
    assert set(draw_tokens(500, **options).tolist()) == allowed


@pytest.mark.parametrize("vocab_size", [20, 50304])
def test_a_growing_batch_is_compiled_twice(vocab_size):
    """Once for its first size, once for all others; evaluation has a third graph."""
    torch._dynamo.reset()
    counter = CompileCounter()
    shape = GPTConfig(block_size=128, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=8)
    model = torch.compile(GPT(shape), backend=counter)
    idx = torch.zeros(12, 128, dtype=torch.long)
    for size in (12, *range(2, 12)):
        model(idx[:size], idx[:size], loss_only=True)
    assert counter.frame_count == 2
