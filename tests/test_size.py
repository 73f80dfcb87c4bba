"""The arithmetic of sizes, against PyTorch's own counts and nanoGPT's notebooks."""

import re

import pytest
import torch
from conftest import TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from engine import size
from model import GPT, GPTConfig
from tools import size as tool

SHAPE = dict(block_size=64, vocab_size=100, n_layer=2, n_head=4, n_embd=64, bias=False)
MODERN = dict(position="rotary", rms_norm=True, tied=False)
SETTINGS = dict(batch_size=4, optimizer="adamw", gradient_accumulation_steps=1, fast_parts=True)
SETTINGS |= dict(activation_checkpointing=False, fsdp=False)


def on_meta(**shape):
    with torch.device("meta"):
        return GPT(GPTConfig(**shape))


def test_nanogpts_sizing_notebook_to_the_last_digit():
    """Its transformer_sizing.ipynb, with GPT-2's vocabulary and no biases."""
    model = on_meta(vocab_size=50257, bias=False)
    counts, flops = size.parameters(model), size.forward_flops(model)
    assert sum(counts.values()) == 124337664
    assert (counts["token table"], counts["position table"]) == (38597376, 786432)
    assert counts["queries, keys, values"] == 12 * 1769472 and counts["MLP, up"] == 12 * 2359296
    assert sum(flops.values()) == 291648307200
    assert (flops["attention scores"], flops["head"]) == (12 * 1610612736, 79047426048)
    assert model.flops_per_token() * 1024 == 875062886400


def test_nanogpts_scaling_notebook():
    """Its scaling_laws.ipynb, which searches a grid for the best sizes."""
    assert size.best_tokens(124e6) == pytest.approx(2.292426e9, rel=1e-6)
    hoffmann, besiroglu = size.LAWS
    assert round(size.predicted_loss(hoffmann, 399.54e6, 14.43e9), 2) == 2.76
    for law in size.LAWS:
        for budget in (1e17, 2.21e19, 1e25):
            count, tokens = size.best_size(law, budget)
            assert 6 * count * tokens == pytest.approx(budget)
            least = size.predicted_loss(law, count, tokens)
            for factor in (0.98, 1.02):  # a little smaller or larger is worse
                assert size.predicted_loss(law, count * factor, tokens / factor) > least
    millions = [size.best_size(besiroglu, budget)[0] / 1e6 for budget in (1e18, 1e19, 1e20)]
    assert [round(each) for each in millions] == [81, 262, 853]


@pytest.mark.parametrize("switches", [{}, MODERN, {"bias": True}])
def test_flops_are_those_that_pytorch_counts(switches):
    model = GPT(GPTConfig(**SHAPE | switches))
    ids = torch.zeros(3, 64, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, ids)
    assert counter.get_total_flops() == 3 * sum(size.forward_flops(model).values())


@pytest.mark.parametrize("low", [4, 2])
@pytest.mark.parametrize(
    "switches",
    [{}, {"position": "rotary"}, {"rms_norm": True}, MODERN, {"position": "alibi"}],
)
def test_a_block_keeps_the_bytes_that_are_counted(switches, low):
    """Also a mask or a number per row, which are left out, and on CPUs attention in float32."""
    kept = []
    for layers in (2, 3):
        model = GPT(GPTConfig(**SHAPE | switches | {"n_layer": layers}))
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        found = {}

        def keep(tensor, own=own, found=found):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        ids = torch.zeros(8, 64, dtype=torch.long)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=low == 2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            model(ids, ids, loss_only=True)
        kept.append(sum(count for count, _ in found.values()))
    copies = 2 * 12 * 64 * 64 if low == 2 else 0  # weights in 16 bits, counted apart
    measured = (kept[1] - kept[0] - copies) / (8 * 64 * 64)
    assert measured == pytest.approx(size.activation_bytes(model.config, low), abs=2.6)


def test_memory_adds_up():
    model = on_meta(**SHAPE)
    count = sum(parameter.numel() for parameter in model.parameters())
    sizes = size.memory(model, SETTINGS, 4)
    assert (sizes["weights"], sizes["optimizer"]) == (4 * count, 8 * count)
    muon = size.memory(model, SETTINGS | {"optimizer": "muon"}, 4)["optimizer"]
    assert muon == 8 * count - 4 * 2 * 12 * 64 * 64
    sharded = size.memory(model, SETTINGS | {"fsdp": True}, 4, world_size=2)
    assert sharded["weights"] == 2 * count
    least = size.memory(model, SETTINGS | {"activation_checkpointing": True}, 4)
    assert least["activations"] == 2 * 4 * 64 * 64 * 4
    shared = size.memory(model, SETTINGS, 4, world_size=4)
    assert shared["activations"] == sizes["activations"] // 4  # a rank has one of four sequences
    accumulated = SETTINGS | {"gradient_accumulation_steps": 2}
    more = size.peak(sizes, accumulated) - size.peak(sizes, SETTINGS)
    assert size.peak(sizes, accumulated) == sum(sizes.values()) and 0 < more <= 4 * count


def test_a_run_says_where_its_memory_will_not_do(launch, tiny, monkeypatch):
    assert "memory: " not in launch(train, *TINY, "--max_iters=1")
    monkeypatch.setattr(size, "device_memory", lambda device: 10**6)
    monkeypatch.setattr(train, "train_step", lambda *_: torch.empty(2**60))  # 4 exabytes
    with pytest.raises(SystemExit) as fault:
        launch(train, *TINY, "--max_iters=1")
    line = "a step takes about 0.35 GB, the cpu has 0.00 GB; try --batch_size=2 "
    assert str(fault.value).startswith(f"error: out of memory: {line}")
    shown = launch(train, *TINY, "--eval_only", "--max_iters=1")
    assert f"memory: {line}" in shown


# --- tools/size.py -------------------------------------------------------------------------------


@pytest.fixture
def ask(launch):
    """Run tools/size.py with these arguments; return what it prints."""
    return lambda *arguments: launch(tool, *arguments)


def test_the_tool_plans_gpt2(ask):
    shown = ask("config/train_gpt2.py", "--gpus=8", "--gpu=H100", "--price=2.5")
    assert "parameters: 124,373,760, 123,587,328 without the position table" in shown
    assert "FLOPs: 854,770,176 per token" in shown and "checkpoint: 1.49 GB" in shown
    assert "tokens: 294,912,000,000 in 600,000 steps" in shown
    growing = ask("config/train_gpt2.py", "--batch_ramp_iters=600000", "--batch_ramp_start=0.5")
    assert "tokens: 221,490,954,240 in" in growing  # three quarters of it
    hours = 294912000000 * 854770176 / (0.4 * 8 * 989e12) / 3600
    assert f"time: {hours:.2f} hours at 40% of 8 x 989 TFLOP/s" in shown
    assert f"price {hours * 8 * 2.5:.2f}" in shown
    assert "DOES NOT FIT" not in shown
    assert "DOES NOT FIT" in ask("--n_embd=4800", "--gpu=T4")


def test_the_tool_knows_the_dataset(ask, tiny, monkeypatch):
    monkeypatch.setattr(tool, "ROOT", tiny)
    shown = ask(*TINY, "--max_iters=100", "--gpu=cpu")
    count = (tiny / "data" / "tiny" / "train.bin").stat().st_size // 2
    assert f"{100 * 4 * 16 / count:.2f} epochs of tiny" in shown and "time:" not in shown
    ids = (tiny / "data" / "tiny" / "train.bin").rename(tiny / "data" / "tiny" / "train_0000.bin")
    ids.with_name("train_0001.bin").write_bytes(ids.read_bytes())
    assert f"{100 * 4 * 16 / count / 2:.2f} epochs" in ask(*TINY, "--max_iters=100", "--gpu=cpu")
    assert re.search(r"at most, as set +0.35 GB\n", shown)  # hardly more than PyTorch itself


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--gpu=RTX"], "gpu=RTX: choose cpu or one of B200, "),
        (["--init_from=resume"], "init_from=resume: give --n_layer, --n_head, --n_embd instead"),
        (["--init_from=gpt2"], "init_from=gpt2: give --n_layer, --n_head, --n_embd instead"),
        (["--mfu=1.5"], "mfu=1.5 must be below 1"),
        (["--n_head=5"], "n_embd=768 is no multiple of n_head=5"),
        (["--picture=nowhere/a.png"], "nowhere/a.png: No such file or directory"),
    ],
)
def test_a_mistake_gets_its_line(ask, arguments, line):
    with pytest.raises(SystemExit) as fault:
        ask(*arguments)
    assert str(fault.value).startswith(f"error: {line}")


def test_the_picture_is_drawn(ask, tmp_path):
    pytest.importorskip("matplotlib")
    ask("config/train_gpt2.py", f"--picture={tmp_path / 'laws.png'}")
    assert (tmp_path / "laws.png").read_bytes().startswith(b"\x89PNG")
