"""What only a GPU can show: nccl, 16 bits, compilation, pinned copies, memory, exact resume."""

import os
import re
import subprocess

import pytest
import torch
from conftest import RECIPE, ROOT, TEXT, TINY, TORCHRUN, assert_equal, load, losses

import bench
import sample
import train
from data.tokenizer import CharTokenizer, make_meta
from data.tokens import write_dataset
from engine.process import UserError
from engine.runtime import choose_device
from model import GPT, GPTConfig

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("default"),  # compilers warn of much that depends on the GPU
]
ON_GPU = [*TINY, "--device=cuda", "--lr_decay_iters=8"]


@pytest.fixture(autouse=True)
def precision():
    """Leave the settings of PyTorch that a run on a GPU changes as they were."""
    before = torch.get_float32_matmul_precision()
    torch._dynamo.reset()  # graphs of another precision
    yield
    torch.set_float32_matmul_precision(before)
    torch.use_deterministic_algorithms(False)


def test_the_gpu_is_chosen_and_a_missing_one_is_refused():
    assert choose_device("auto") == torch.device("cuda", 0)
    with pytest.raises(UserError, match="^device=cuda:99 cannot be used, --device=cpu works: "):
        choose_device("cuda:99")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_recipe_on_a_gpu_learns_the_same_as_on_the_cpu(launch, tiny, compiled):
    """Muon too multiplies in bfloat16 there."""
    launch(train, *TINY, *RECIPE, "--lr_decay_iters=8", "--max_iters=8", "--out_dir=cpu")
    options = *ON_GPU, *RECIPE, f"--compile={compiled}", "--dtype=bfloat16", "--max_iters=8"
    launch(train, *options, "--out_dir=gpu")
    assert losses("gpu") == pytest.approx(losses("cpu"), rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_on_a_gpu_learns_the_same_as_on_the_cpu(launch, tiny, dtype, compiled):
    launch(train, *TINY, "--lr_decay_iters=8", "--max_iters=8", "--out_dir=cpu")
    options = *ON_GPU, f"--dtype={dtype}", f"--compile={compiled}", "--max_iters=8"
    out = launch(train, *options, "--out_dir=gpu")
    assert "hardware: 1 x " in out and dtype in out and "not compiled" not in out[: 200 * compiled]
    assert losses("gpu") == pytest.approx(losses("cpu"), rel=1e-3 if dtype == "float32" else 0.03)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stopping_and_resuming_on_a_gpu(launch, tiny, dtype, deterministic, compiled):
    """The bits of never stopping if deterministic, else the losses up to rounding; T = 1024."""
    meta = make_meta("char", [TEXT])
    ids = CharTokenizer(meta).encode(TEXT * 9)
    write_dataset(tiny / "data" / "tiny", meta, train=[ids], val=[ids])
    options = *ON_GPU, f"--dtype={dtype}", "--dropout=0.2", f"--compile={compiled}"
    options += "--block_size=1024", f"--deterministic={deterministic}"
    launch(train, *options, "--max_iters=8", "--out_dir=straight")
    launch(train, *options, "--max_iters=4", "--out_dir=resumed")
    launch(train, "--init_from=resume", "--max_iters=8", "--out_dir=resumed")
    if deterministic:
        assert_equal(load("straight/ckpt.pt"), load("resumed/ckpt.pt"))
    assert losses("straight") == pytest.approx(losses("resumed"), rel=1e-3)


def test_the_compiled_loss_takes_no_more_memory_than_the_logits():
    """Inductor fuses it: less than the bfloat16 logits twice and the float32 logits once."""
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=64, bias=False)
    model = torch.compile(GPT(shape).cuda())
    idx = torch.zeros(12, 1024, dtype=torch.long, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        model(idx, idx, loss_only=True).backward()
    assert torch.cuda.max_memory_allocated() < 8 * idx.numel() * shape.vocab_size


GROUP = """
import copy
import dataclasses

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from engine.runtime import gather, start_runtime, unshard
from model import GPT, GPTConfig

settings = {"device": "cuda", "dtype": "float32", "backend": "nccl", "timeout": 60}
runtime = start_runtime(settings)
dist.init_process_group("cpu:gloo,cuda:nccl")
alone = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32)).cuda()
sharded, averaged = copy.deepcopy(alone), copy.deepcopy(alone)
weights = {name: tensor.cpu() for name, tensor in alone.state_dict().items()}
for part in (*sharded.transformer.h, sharded):
    fully_shard(part)
for name, tensor in gather(sharded.state_dict(), 0).items():
    assert torch.equal(tensor, weights[name]), name
several = dataclasses.replace(runtime, world_size=2)
assert several.reduce("sum", 3) == 3
tokens = torch.randint(40, (4, 17), device="cuda")
for model in (alone, sharded, torch.nn.parallel.DistributedDataParallel(averaged)):
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


def test_the_benchmark_and_the_samples_run_on_a_gpu(launch, tiny, monkeypatch):
    few = "--device=cuda", "--dtype=bfloat16", "--compile=False"
    out = launch(bench, *TINY, *few, "--steps=2", "--seconds=1")
    assert re.search(r"^peak memory: \d\.\d\d GiB on the GPU$", out, re.MULTILINE)
    launch(train, *TINY, *few, "--max_iters=1")
    sampling = "--device=cuda", "--dtype=bfloat16"
    drawn = launch(sample, *sampling, "--start=1", "--num_samples=2", "--max_new_tokens=20")
    texts = drawn.split("\n---------------\n")
    assert [len(text) for text in texts] == [21, 21, 0] and texts[0] != texts[1]
