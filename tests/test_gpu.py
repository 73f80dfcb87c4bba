"""What only a GPU can show: nccl, 16 bits, compilation, pinned copies, memory, exact resume."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, assert_equal, load, losses

import train
from data.tokens import Batches, TokenFile, read_meta
from engine.fast import use_fast_parts
from engine.runtime import start_runtime
from model import GPT, GPTConfig

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
ON_GPU = [*TINY, "--device=cuda", "--lr_decay_iters=8"]


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_on_a_gpu_learns_what_one_on_the_cpu_does(launch, tiny, dtype, compiled):
    launch(train, *TINY, "--lr_decay_iters=8", "--max_iters=8", "--out_dir=cpu")
    options = *ON_GPU, f"--dtype={dtype}", f"--compile={compiled}", "--max_iters=8"
    out = launch(train, *options, "--out_dir=gpu")
    assert "hardware: 1 x " in out and dtype in out and "not compiled, which" not in out
    assert losses("gpu") == pytest.approx(losses("cpu"), rel=1e-3 if dtype == "float32" else 0.03)


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stopping_and_resuming_on_a_gpu_equals_going_on(launch, tiny, dtype):
    options = *ON_GPU, f"--dtype={dtype}", "--dropout=0.2", "--compile=False"
    launch(train, *options, "--max_iters=8", "--out_dir=straight")
    launch(train, *options, "--max_iters=4", "--out_dir=resumed")
    launch(train, "--init_from=resume", "--max_iters=8", "--out_dir=resumed")
    assert_equal(load("straight/ckpt.pt"), load("resumed/ckpt.pt"))
    assert losses("straight") == losses("resumed")


GROUP = """
import torch
import torch.distributed as dist

dist.init_process_group("cpu:gloo,cuda:nccl")
x = torch.ones(3, device="cuda")
dist.all_reduce(x)
assert x.sum() == 3
dist.destroy_process_group()
"""


@needs_gpu
def test_nccl_trains_on_one_gpu(launch, tiny):
    """A process group of one rank, as torchrun makes it; two ranks would need two GPUs."""
    launch(train, *ON_GPU, "--max_iters=4", "--dtype=float32", "--out_dir=alone")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    (tiny / "group.py").write_text(GROUP)
    subprocess.run([*torchrun, "group.py"], cwd=tiny, check=True, timeout=300)
    options = *ON_GPU, "--max_iters=4", "--dtype=float32", "--out_dir=group"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    (tiny / "train.py").write_text((ROOT / "train.py").read_text(encoding="utf-8"))
    subprocess.run([*torchrun, "train.py", *options], cwd=tiny, env=env, check=True, timeout=300)
    assert losses("group") == losses("alone")


@needs_gpu
def test_batches_are_pinned_and_the_optimizer_is_fused(tiny):
    runtime = start_runtime("cuda", "float32", False)
    folder = tiny / "data" / "tiny"
    tokens = TokenFile(folder / "train.bin", read_meta(folder), 16)
    assert all(ids.is_pinned() for ids in Batches(tokens, 1, 4, 16, 0, runtime)(0))
    model = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8)).cuda()
    assert model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda").defaults["fused"]


@needs_gpu
def test_the_loss_without_logits_takes_less_memory_and_gives_the_same():
    config = GPTConfig(block_size=512, vocab_size=50304, n_layer=1, n_head=2, n_embd=64)
    torch.manual_seed(0)
    plain = GPT(config).cuda()
    quick = GPT(config).cuda()
    quick.load_state_dict(plain.state_dict())
    use_fast_parts(quick, torch.device("cuda"))
    tokens = torch.randint(50304, (8, 513), device="cuda")
    found = []
    for model in (plain, quick):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = model(tokens[:, :-1], tokens[:, 1:], loss_only=True)
        loss.backward()
        found.append((torch.cuda.max_memory_allocated() - before, loss.item()))
    assert found[1][0] < found[0][0] / 2
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


@needs_gpu
def test_a_compiler_that_fails_is_left_out(launch, tiny, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    out = launch(train, *ON_GPU, "--compile=True", "--max_iters=2")
    assert "not compiled, which is slower: RuntimeError: no compiler" in out
