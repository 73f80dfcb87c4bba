"""tools/size.py: its arithmetic against PyTorch's own counts and nanoGPT's notebooks."""

import pytest
import torch
from conftest import TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import model
from model import GPT, GPTConfig
from tools import size

SHAPE = {"block_size": 64, "vocab_size": 100, "n_layer": 2, "n_head": 4, "n_embd": 64}
MODERN = {"position": "rotary", "rms_norm": True, "tied": False, "bias": False}
SETTINGS = {
    "batch_size": 4,
    "gradient_accumulation_steps": 8,
    "optimizer": "adamw",
    "activation_checkpointing": False,
    "fsdp": False,
    "compile": "auto",
}


def test_gpt2_has_the_figures_of_nanogpts_sizing_notebook():
    with torch.device("meta"):
        gpt = GPT(GPTConfig(vocab_size=50257, bias=False))
    counts = size.parameters(gpt)
    assert sum(counts.values()) == 124337664
    assert counts["transformer.h.attn.c_attn.weight"] == 12 * 1769472
    assert 1024 * gpt.flops_per_token() == 875062886400


@pytest.mark.parametrize("switches", [{}, MODERN], ids=["gpt2", "modern"])
def test_flops_are_those_that_pytorch_counts(switches):
    gpt = GPT(GPTConfig(**SHAPE | {"bias": False} | switches))
    ids = torch.zeros(3, 64, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gpt(ids, ids)
    forward = 3 * 64 * gpt.flops_per_token() / 3  # the backward pass takes twice as many
    assert counter.get_total_flops() == pytest.approx(forward, rel=0.02)


def bytes_kept(shape, dtype):
    """Return the bytes that autograd keeps of a forward pass of 8 sequences, without parameters."""
    gpt = GPT(GPTConfig(**shape))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(8, 64, dtype=torch.long)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        gpt(ids, ids)
    return sum(storages[place].nbytes() for place in storages.keys() - parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", [{}, MODERN], ids=["gpt2", "modern"])
def test_a_block_keeps_the_bytes_that_are_counted(monkeypatch, switches, dtype):
    """Attention as on a GPU: on a CPU it keeps float32 copies."""

    def plain(q, k, v, p, is_causal):
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    monkeypatch.setattr(model, "attention", plain)
    shape = SHAPE | {"bias": False} | switches
    deeper = bytes_kept(shape | {"n_layer": 3}, dtype)
    block = deeper - bytes_kept(shape, dtype)
    if dtype == torch.bfloat16:
        block -= 2 * 12 * 64 * 64  # copies of the weights, which memory() counts apart
    counted = size.activation_bytes(GPTConfig(**shape), dtype.itemsize)
    assert block / (8 * 64 * 64) == pytest.approx(counted, abs=2.6)  # masks, a number per row


def test_memory_adds_up(monkeypatch):
    gpt = GPT(GPTConfig(**SHAPE))
    count = sum(parameter.numel() for parameter in gpt.parameters())
    plain = {"weights": 4 * count, "optimizer": 8 * count}
    assert plain.items() <= size.memory(gpt, SETTINGS, 4).items()
    muon = size.memory(gpt, SETTINGS | {"optimizer": "muon"}, 4)
    assert muon["optimizer"] == 8 * count - 4 * 2 * 12 * 64 * 64
    recomputed = size.memory(gpt, SETTINGS | {"activation_checkpointing": True}, 4)
    assert recomputed["activations"] == 2 * 4 * 64 * 64 * 4
    monkeypatch.setattr(size, "gpus", 2)
    sharded = {"weights": 2 * count, "optimizer": 4 * count}
    assert sharded.items() <= size.memory(gpt, SETTINGS | {"fsdp": True}, 4).items()


def figures(printed):
    """Return {name: number as printed} of a report."""
    return dict(line.strip().rsplit(maxsplit=1) for line in printed.splitlines() if "  " in line)


def test_a_run_of_gpt2_is_planned(launch):
    options = "--gpus=8", "--gpu=H100", "--price=2.5", "--gpu_memory=8"
    shown = launch(size, "config/train_gpt2.py", *options)
    hours = 294912000000 * 854770176 / (0.4 * 8 * 989e12) / 3600
    expected = {
        "FLOPs per token, 6 N + 12 L C T": "854,770,176",
        "tokens": "294,912,000,000",
        "bytes of a checkpoint": "1,492,485,120",
        "hours": f"{hours:.2f}",
        "price": f"{hours * 8 * 2.5:.2f}",
    }
    assert expected.items() <= figures(shown).items()
    assert "10.02 GB, activation_checkpointing=False: DOES NOT FIT 8.0 GB" in shown
    assert "6.40 GB, activation_checkpointing=True: fits 8.0 GB" in shown


def test_epochs_are_those_of_the_prepared_dataset(launch, tiny):
    shown = launch(size, *TINY, "--max_iters=100", "--gpu=cpu")
    count = (tiny / "data" / "tiny" / "train.bin").stat().st_size // 2
    assert figures(shown)["epochs"] == f"{100 * 4 * 16 / count:.2f}"


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--gpu=RTX"], "gpu='RTX': choose one of .'cpu', 'B200', "),
        (["--init_from=gpt2"], "init_from='gpt2': choose one of .'scratch'."),
        (["--gpus=0"], "gpus=0 must be from 1 to 1000000"),
        (["--n_head=5"], "n_embd must be a multiple of n_head"),
    ],
)
def test_a_mistake_gets_its_line(launch, arguments, line):
    with pytest.raises(SystemExit, match=f"^error: {line}"):
        launch(size, *arguments)
