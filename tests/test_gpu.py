"""What only a GPU can show: nccl, 16 bits, compilation, pinned copies, memory, exact resume."""

import copy
import os
import re
import subprocess

import pytest
import torch
from conftest import ROOT, TINY, TORCHRUN, assert_equal, load, losses

import bench
import sample
import train
from data.batches import Batches
from data.tokenizer import read_meta
from data.tokens import TokenFile, send
from engine.fast import use_fast_parts
from engine.process import UserError
from engine.runtime import choose_device, start_runtime
from model import GPT, GPTConfig

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("default"),  # compilers warn of much that depends on the GPU
]
ON_GPU = [*TINY, "--device=cuda", "--lr_decay_iters=8"]


@pytest.fixture(autouse=True)
def precision():
    """Leave the precision of float32 products, which a run on a GPU lowers, as it was."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_the_gpu_is_chosen_and_one_that_is_not_there_is_refused():
    assert choose_device("auto") == (torch.device("cuda", 0), "")
    with pytest.raises(UserError) as fault:
        choose_device("cuda:99")
    assert str(fault.value).startswith("device=cuda:99 cannot be used: ")
    assert str(fault.value).endswith("; try --device=auto")


@pytest.mark.parametrize("position", ["rotary", "alibi"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_recipe_on_a_gpu_learns_what_it_does_on_the_cpu(launch, tiny, position, compiled):
    """Muon computes in bfloat16 there."""
    switches = f"--optimizer=muon --position={position} --rms_norm=True --tied=False".split()
    launch(train, *TINY, *switches, "--lr_decay_iters=8", "--max_iters=8", "--out_dir=cpu")
    options = *ON_GPU, *switches, f"--compile={compiled}", "--dtype=bfloat16", "--max_iters=8"
    out = launch(train, *options, "--out_dir=gpu")
    assert "not compiled, which" not in out
    assert losses("gpu") == pytest.approx(losses("cpu"), rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_on_a_gpu_learns_what_one_on_the_cpu_does(launch, tiny, dtype, compiled):
    launch(train, *TINY, "--lr_decay_iters=8", "--max_iters=8", "--out_dir=cpu")
    options = *ON_GPU, f"--dtype={dtype}", f"--compile={compiled}", "--max_iters=8"
    out = launch(train, *options, "--out_dir=gpu")
    assert "hardware: 1 x " in out and dtype in out and "not compiled, which" not in out
    assert losses("gpu") == pytest.approx(losses("cpu"), rel=1e-3 if dtype == "float32" else 0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stopping_and_resuming_on_a_gpu_equals_going_on(launch, tiny, dtype):
    options = *ON_GPU, f"--dtype={dtype}", "--dropout=0.2", "--compile=False"
    launch(train, *options, "--max_iters=8", "--out_dir=straight")
    launch(train, *options, "--max_iters=4", "--out_dir=resumed")
    launch(train, "--init_from=resume", "--max_iters=8", "--out_dir=resumed")
    assert_equal(load("straight/ckpt.pt"), load("resumed/ckpt.pt"))
    assert losses("straight") == losses("resumed")


GROUP = """
import copy
import dataclasses

import torch
import torch.distributed as dist

from engine.parallel import gather_on_rank_0, shard, unshard, wrap
from engine.runtime import start_runtime
from model import GPT, GPTConfig

runtime = start_runtime("cuda", "float32", False)
dist.init_process_group("cpu:gloo,cuda:nccl")
alone = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32)).cuda()
sharded, averaged = copy.deepcopy(alone), copy.deepcopy(alone)
weights = {name: tensor.cpu() for name, tensor in alone.state_dict().items()}
shard(sharded, sharded.transformer.h, dist.init_device_mesh("cuda", (1,)))
for name, tensor in gather_on_rank_0(sharded.state_dict(), runtime).items():
    assert torch.equal(tensor, weights[name]), name
several = dataclasses.replace(runtime, world_size=2)  # else wrap() has nothing to do
assert several.reduce("sum", 3) == 3
tokens = torch.randint(40, (4, 17), device="cuda")
for model in (alone, sharded, wrap(averaged, several)):
    model(tokens[:, :-1], tokens[:, 1:], loss_only=True).backward()
for model in (sharded, averaged):
    for (name, one), other in zip(alone.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(unshard(other.grad), one.grad, msg=name)
dist.destroy_process_group()
"""


def test_nccl_gives_the_gradients_of_one_process(tiny):
    """In a process group of one rank, as torchrun makes it; two ranks would need two GPUs."""
    (tiny / "group.py").write_text(GROUP)
    torchrun = [*TORCHRUN, "--nproc_per_node=1", "group.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(torchrun, cwd=tiny, env=env, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_2_processes_share_a_gpu_by_gloo(launch, finish, tiny):
    options = *ON_GPU, "--device=cuda:0", "--dtype=float32", "--compile=False", "--max_iters=4"
    launch(train, *options, "--out_dir=one")
    finish(*options, "--backend=gloo", "--out_dir=two", processes=2)
    assert losses("one") == pytest.approx(losses("two"), rel=1e-3)


def test_batches_are_pinned_and_arrive_as_on_the_cpu(tiny):
    gpu, cpu = (start_runtime(name, "float32", False) for name in ("cuda", "cpu"))
    folder = tiny / "data" / "tiny"
    tokens = TokenFile(folder / "train.bin", read_meta(folder), 16)
    config = dict(batch_size=4, gradient_accumulation_steps=2, block_size=16, seed=0)
    config |= dict(batch_ramp_iters=0, batch_ramp_start=0.5, max_iters=1, sampling="random")
    ours, plain = (Batches(tokens, config, runtime)(0) for runtime in (gpu, cpu))
    for ids, expected in zip(ours, plain, strict=True):
        assert ids.is_pinned() and not expected.is_pinned()
        sent = send(ids, gpu.device)
        assert sent.is_cuda and torch.equal(sent.cpu(), send(expected, cpu.device))


def test_the_fused_optimizer_makes_the_update_of_the_cpu_and_none_of_a_bad_gradient():
    torch.manual_seed(0)
    cpu = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8))
    gpu = copy.deepcopy(cpu).cuda()
    optimizers = {}
    for model, device in ((cpu, "cpu"), (gpu, "cuda")):
        optimizers[device] = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizers[device].step()
    assert optimizers["cuda"].defaults["fused"]
    after = [parameter.detach().clone() for parameter in gpu.parameters()]
    for mine, theirs in zip(after, cpu.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs.detach())
    optimizers["cuda"].found_inf = torch.ones((), device="cuda")  # as train_step() says it
    optimizers["cuda"].step()
    assert all(map(torch.equal, after, gpu.parameters()))


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


def test_a_compiler_that_fails_is_left_out(launch, tiny, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    out = launch(train, *ON_GPU, "--compile=True", "--max_iters=2")
    assert "not compiled, which is slower: RuntimeError: no compiler" in out


def test_the_benchmark_and_the_samples_run_on_a_gpu(launch, tiny, monkeypatch):
    few = "--device=cuda", "--dtype=bfloat16", "--compile=False"
    out = launch(bench, *TINY, *few, "--steps=2", "--seconds=1", "--baseline=True")
    assert out.count(" tokens, median ") == 2 and "nanoGPT's way takes " in out
    assert re.search(r"^peak memory: \d\.\d\d GiB$", out, re.MULTILINE)
    launch(train, *TINY, *few, "--max_iters=1")
    drawn = launch(sample, *few, "--start=1", "--num_samples=2", "--max_new_tokens=20")
    texts = drawn.split("\n---------------\n")
    assert [len(text) for text in texts] == [21, 21, 0] and texts[0] != texts[1]
