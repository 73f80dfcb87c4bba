"""The departures from GPT-2, each against a formula of its own, and in runs that stop and go on."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, assert_equal, load, losses

import sample
import train
from engine import fast
from engine.checkpoint import State
from engine.fast import use_fast_parts
from engine.runtime import Runtime
from model import GPT, GPTConfig, alibi_mask, rotary_table, rotate

CPU = Runtime(torch.device("cpu"), torch.float32, False, 0, 1, "cpu", "")

SIZE = {"block_size": 16, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 32, "bias": False}
MODERN = {"position": "rotary", "rms_norm": True, "tied": False}
EACH = [{name: value} for name, value in MODERN.items()] + [{"position": "alibi"}]
ALL = [MODERN, MODERN | {"position": "alibi"}]
SWITCHES = pytest.mark.parametrize("switches", EACH + ALL, ids=lambda s: "-".join(map(str, s)))


def build(switches):
    """Return a model with weights large enough for distinct logits."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZE, **switches)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def ids(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


def test_the_whole_of_them_is_transformers_nanochat():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("transformers is too old")
    model = build(MODERN)
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
    tokens = ids(3, 16)
    with torch.no_grad():
        ours, logits = model(tokens, tokens)[0], theirs(tokens).logits
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)


def test_rotary_turns_pairs_of_channels_as_complex_numbers():
    x = torch.randn(2, 3, 10, 8, dtype=torch.float64)
    angles = torch.outer(torch.arange(10.0), 10000 ** (-torch.arange(0, 8, 2) / 8)).double()
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), -angles)
    expected = torch.cat((pairs.real, pairs.imag), dim=3)
    turned = rotate(x, *rotary_table(torch.arange(10), 8))
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


def test_rotary_depends_on_distances_only():
    q, k = torch.randn(2, 1, 1, 10, 8)
    tables = [rotary_table(torch.arange(first, first + 10), 8) for first in (0, 7)]
    scores = [rotate(q, *table) @ rotate(k, *table).mT for table in tables]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=0)


def test_alibi_is_a_slope_per_head():
    """Press et al.: for 8 heads the slopes are 1/2, 1/4, ... 1/256."""
    mask = alibi_mask(torch.arange(3, 6), torch.arange(6), 8)
    for head in range(8):
        for row, position in enumerate(range(3, 6)):
            for seen in range(6):
                behind = position - seen
                expected = -behind / 2 ** (head + 1) if behind >= 0 else -math.inf
                assert mask[head, row, seen].item() == expected


def test_alibi_is_added_to_the_scores():
    model = build({"position": "alibi"})
    attention, x = model.transformer.h[0].attn, torch.randn(2, 16, 32)
    q, k, v = (t.view(2, 16, 2, 16).transpose(1, 2) for t in attention.c_attn(x).split(32, dim=2))
    mask = alibi_mask(torch.arange(16), torch.arange(16), 2)
    scores = q @ k.mT / 4 + mask
    expected = attention.c_proj((scores.softmax(3) @ v).transpose(1, 2).reshape(2, 16, 32))
    found = attention(x, mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@SWITCHES
def test_the_cache_and_the_fast_parts_change_nothing(monkeypatch, switches):
    """Also past block_size."""
    model = build(switches)
    prompts, tokens = ids(3, 5), ids(3, 16)
    plain = model.generate(prompts, 30, temperature=0, use_cache=False)
    assert torch.equal(model.generate(prompts, 30, temperature=0), plain)
    loss = model(tokens, tokens)[1]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(fast, "FEW_LOGITS", 1)
    use_fast_parts(model, torch.device("cpu"))
    ours = model(tokens, tokens, loss_only=True)
    ours.backward()
    torch.testing.assert_close(ours, loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


@SWITCHES
def test_a_later_token_never_changes_an_earlier_logit(switches):
    model, tokens = build(switches), ids(2, 16)
    changed = tokens.clone()
    changed[:, 9] = (tokens[:, 9] + 1) % 40
    before, after = model(tokens, tokens)[0], model(changed, changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-5, rtol=0)
    assert not torch.equal(before[:, 9:], after[:, 9:])


@SWITCHES
def test_a_run_stops_goes_on_and_is_sampled_from(launch, tiny, monkeypatch, switches):
    monkeypatch.setattr(sample, "ROOT", tiny, raising=False)
    flags = [f"--{name}={value}" for name, value in switches.items()]
    options = [*TINY, *flags, "--lr_decay_iters=6", "--optimizer=muon", "--dropout=0.1"]
    launch(train, *options, "--max_iters=6", "--out_dir=straight")
    launch(train, *options, "--max_iters=3", "--out_dir=resumed")
    launch(train, "--init_from=resume", "--out_dir=resumed", "--max_iters=6")
    assert_equal(load("straight/ckpt.pt"), load("resumed/ckpt.pt"))
    assert losses("straight") == losses("resumed")
    asked = "--out_dir=straight", "--num_samples=2", "--max_new_tokens=40", "--device=cpu"
    assert launch(sample, *asked, "--start=1")
    launch(train, "--init_from=resume", "--out_dir=straight", "--block_size=8", "--max_iters=7")


def test_rms_norm_is_the_plain_formula_wherever_it_stands():
    model = build({"rms_norm": True, "position": "rotary"})

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    x = torch.randn(2, 16, 32)
    attention = model.transformer.h[0].attn
    for place in (model.transformer.ln_e, model.transformer.ln_f, model.transformer.h[0].ln_1):
        torch.testing.assert_close(place(x), norm(x))
    q, k, v = (t.view(2, 16, 2, 16).transpose(1, 2) for t in attention.c_attn(x).split(32, dim=2))
    expected = F.scaled_dot_product_attention(norm(q), norm(k), v, is_causal=True)
    expected = attention.c_proj(expected.transpose(1, 2).reshape(2, 16, 32))
    torch.testing.assert_close(attention(x), expected)


def test_an_untied_head_counts_as_parameters_and_the_table_not_as_flops():
    tied, untied = (GPT(GPTConfig(**SIZE, position="rotary", tied=tied)) for tied in (True, False))
    assert untied.get_num_params() - tied.get_num_params() == 40 * 32
    assert untied.flops_per_token() == tied.flops_per_token()


def test_gpt2_stays_gpt2():
    """A checkpoint of a GPT-2-shaped model has no model_args but nanoGPT's."""
    names = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"}
    model = GPT(GPTConfig(**SIZE))
    optimizer = model.configure_optimizers(0.0, 1.0, (0.9, 0.9), "cpu")
    state = State(model, optimizer, torch.amp.GradScaler("cpu"), {}, {})
    config = {"sharded_save": False}
    saved = state.collect(0, 0.0, config, CPU)
    assert saved["model_args"].keys() == names
    modern = State(GPT(GPTConfig(**SIZE, **MODERN)), optimizer, state.scaler, {}, {})
    saved = modern.collect(0, 0.0, config, CPU)
    assert saved["model_args"].keys() == names | MODERN.keys()


GROWING = [*TINY, *"--gradient_accumulation_steps=2 --batch_ramp_iters=5".split()]
GROWING += "--batch_ramp_start=0.3 --lr_decay_iters=8 --log_interval=1".split()


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_a_run_whose_batch_grows_goes_on_exactly(launch, tiny, sampling):
    options = *GROWING, "--dropout=0.1", f"--sampling={sampling}"
    launch(train, *options, "--max_iters=8", "--out_dir=straight")
    launch(train, *options, "--max_iters=3", "--out_dir=resumed")
    launch(train, "--init_from=resume", "--out_dir=resumed", "--max_iters=8")
    assert_equal(load("straight/ckpt.pt"), load("resumed/ckpt.pt"))
    assert losses("straight") == losses("resumed")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_growing_batch_is_the_same_on_2_processes(launch, finish, tiny, fsdp):
    launch(train, *GROWING, "--max_iters=8", "--out_dir=one")
    finish(*GROWING, "--max_iters=8", f"--fsdp={fsdp}", "--out_dir=two", processes=2)
    assert losses("one") == pytest.approx(losses("two"), rel=1e-5)
    assert_equal(load("one/ckpt.pt"), load("two/ckpt.pt"), atol=1e-4, rtol=0)


def test_the_linear_schedule_holds_then_falls_to_zero(monkeypatch):
    settings = dict(lr_schedule="linear", learning_rate=1.0, warmup_iters=10, max_iters=110)
    settings |= dict(constant_share=0.4, decay_lr=True, lr_decay_iters=None, min_lr=None)
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)
    rates = [train.learning_rate_at(step) for step in (0, 10, 50, 80, 110, 200)]
    assert rates == pytest.approx([1 / 11, 1, 1, 0.5, 0, 0])
    monkeypatch.setattr(train, "min_lr", 0.2)
    assert train.learning_rate_at(80) == pytest.approx(0.6)
    monkeypatch.setattr(train, "lr_schedule", "cosine")
    assert [train.learning_rate_at(step) for step in (50, 80, 110)] == pytest.approx([1, 0.6, 0.2])


@pytest.mark.parametrize(
    "options, line",
    [
        ("--position=relative", "position=relative: choose learned, rotary or alibi"),
        (
            "--n_embd=30 --position=rotary",
            "position=rotary needs an even n_embd / n_head, not 15",
        ),
        ("--lr_schedule=wsd", "lr_schedule=wsd: choose cosine or linear"),
        (
            "--init_from=gpt2 --position=rotary",
            "init_from=gpt2 has position=learned; leave --position=rotary out",
        ),
    ],
)
def test_a_mistake_gets_its_line(launch, tiny, options, line):
    with pytest.raises(SystemExit, match=f"^error: {line}$"):
        launch(train, *TINY, *options.split())


def test_a_checkpoint_keeps_its_switches(launch, tiny):
    launch(train, *TINY, "--max_iters=1", "--position=rotary", "--rms_norm=True")
    for name, value in (("position", "alibi"), ("rms_norm", "False"), ("tied", "False")):
        with pytest.raises(SystemExit, match=f"the checkpoint has {name}=.*; leave --{name} out"):
            launch(train, "--init_from=resume", "--max_iters=2", f"--{name}={value}")
    saved = load("out/ckpt.pt")
    saved["model_args"]["position"] = "compass"
    torch.save(saved, "out/ckpt.pt")
    with pytest.raises(SystemExit, match="the checkpoint is of another kind of model: .*compass"):
        launch(sample, "--out_dir=out")


@SWITCHES
def test_blocks_computed_twice_give_the_same_run(launch, tiny, switches):
    options = [*TINY, *(f"--{name}={value}" for name, value in switches.items()), "--max_iters=3"]
    launch(train, *options, "--out_dir=kept")
    launch(train, *options, "--activation_checkpointing=True", "--out_dir=twice")
    assert_equal(load("kept/ckpt.pt"), load("twice/ckpt.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("switches", ALL, ids=["rotary", "alibi"])
def test_2_processes_train_it_like_1(launch, finish, tiny, fsdp, switches):
    options = [*TINY, *(f"--{name}={value}" for name, value in switches.items()), "--max_iters=6"]
    options += ["--gradient_accumulation_steps=2", "--optimizer=muon", "--log_interval=1"]
    launch(train, *options, "--out_dir=one")
    finish(*options, f"--fsdp={fsdp}", "--out_dir=two", processes=2)
    assert losses("one") == pytest.approx(losses("two"), rel=1e-4)
    assert_equal(load("one/ckpt.pt"), load("two/ckpt.pt"), atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler warns of its own
@pytest.mark.parametrize("switches", ALL, ids=["rotary", "alibi"])
def test_compiled_it_computes_the_same(switches):
    model, tokens = build(switches), ids(3, 16)
    expected, _ = model(tokens, tokens)
    prompts = tokens[:, :5]
    drawn = model.generate(prompts, 20, temperature=0)
    try:
        model.compile()
        found, _ = model(tokens, tokens)
    except RuntimeError as fault:
        pytest.skip(f"no compiler: {fault}")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(prompts, 20, temperature=0), drawn)
