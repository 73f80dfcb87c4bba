"""The hardware that is chosen, and several processes against one."""

import os
import signal
import time

import pytest
import torch
from conftest import RECIPE, TINY, assert_equal, load, log, losses, workers

import train
from engine import runtime
from engine.process import UserError

slow = pytest.mark.slow
GPU = torch.device("cuda", 0)


# --- hardware ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, dtype",
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)],
)
def test_a_gpu_computes_in_the_precision_that_its_hardware_has(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runtime.choose_dtype("auto", GPU)[0] == dtype


@pytest.mark.parametrize("amx, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bfloat16_if_it_has_amx(monkeypatch, amx, dtype):
    capabilities = {"amx_bf16": amx, "avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert runtime.choose_dtype("auto", torch.device("cpu"))[0] == dtype
    assert runtime.choose_dtype("auto", torch.device("mps"))[0] == torch.float32


@pytest.mark.parametrize(
    "name, dtype, tera",
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA A100-SXM4-40GB", torch.bfloat16, 312),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 156),
        ("NVIDIA A10G", torch.bfloat16, 70),
        ("Tesla T4", torch.float16, 65),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA RTX A1000", torch.bfloat16, None),
        ("cpu with 2 threads", torch.bfloat16, None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, dtype, tera):
    found = runtime.Runtime(GPU, dtype, False, 0, 1, name, "")
    assert found.peak_flops() == (tera and tera * 1e12)


def pretend_accelerators(monkeypatch, kind, count):
    """Make PyTorch say that this machine has `count` devices of a kind."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_each_process_has_its_own_gpu_or_all_compute_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for kind in ("cuda", "xpu"):
        pretend_accelerators(monkeypatch, kind, 4)
        assert runtime.choose_device("auto") == torch.device(kind, 3)
    assert runtime.choose_device("xpu:1") == torch.device("xpu", 1)
    pretend_accelerators(monkeypatch, "cuda", 2)
    assert runtime.choose_device("auto") == torch.device("cpu")
    pretend_accelerators(monkeypatch, "mps", 1)
    assert runtime.choose_device("auto") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert runtime.choose_device("auto") == torch.device("mps")


def test_a_gpu_that_cannot_be_used_gets_a_line(monkeypatch):
    def broken(size, device):
        raise RuntimeError("CUDA error: no kernel image for it. And much more\nin lines")

    pretend_accelerators(monkeypatch, "cuda", 1)
    monkeypatch.setattr(torch, "zeros", broken)
    with pytest.raises(UserError) as fault:
        runtime.choose_device("auto")
    reason = "CUDA error: no kernel image for it"
    assert str(fault.value) == f"device=cuda cannot be used, --device=cpu works: {reason}"


# --- compilation ---------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("damage", ["no compiler", "damaged cache"])
def test_a_compile_that_fails_at_any_time_prints_a_line(finish, tiny, monkeypatch, damage):
    """Training with a growing batch and evaluation run uncompiled then."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tiny / "cache"))
    options = *TINY, "--max_iters=3", "--batch_ramp_iters=2", "--batch_size=8"
    finish(*options, "--compile=False", "--out_dir=plain")
    finish(*options, "--compile=True", "--out_dir=compiled")
    for library in (tiny / "cache").rglob("*.so"):
        library.write_bytes(b"")
    if damage == "no compiler":
        monkeypatch.setenv("CXX", "/bin/false")
    out = finish(*options, "--compile=True")
    assert out.count("not compiled, which is slower") == 1
    assert losses("plain") == pytest.approx(losses("out"), rel=1e-4)


def test_the_compiler_is_the_choice_of_recent_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: name)
    assert runtime.choose_compile("auto", GPU) is True


# --- several processes ---------------------------------------------------------------------------


def gradients(folder):
    """Return the gradients of the first step, from AdamW's mean of them: 1 - beta1 times each."""
    state = load(f"{folder}/ckpt.pt")["optimizer"]["state"]
    return {index: moments["exp_avg"] / 0.1 for index, moments in state.items()}


@pytest.mark.parametrize("accumulation", [*(pytest.param(n, marks=slow) for n in (1, 4)), 5])
def test_the_gradients_of_2_processes_equal_those_of_1(launch, finish, tiny, accumulation):
    """With 5 micro-batches each process takes 2 and a half."""
    options = [*TINY, f"--gradient_accumulation_steps={accumulation}", "--max_iters=1"]
    options += ["--bias=True", "--grad_clip=0"]
    launch(train, *options, "--out_dir=one")
    out = finish(*options, "--out_dir=two", processes=2)
    assert out.count("hardware: 2 x cpu") == 1 and out.count("iter 0: loss") == 1
    one, two = gradients("one"), gradients("two")
    worst = max((one[k] - two[k]).abs().max() / one[k].abs().max() for k in one)
    assert worst < 1e-5
    assert losses("one") == pytest.approx(losses("two"), rel=1e-6)


@slow
@pytest.mark.parametrize("recipe", [[], RECIPE], ids=["gpt2", "recipe"])
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_growing_batch_trains_alike_on_2_processes(launch, finish, tiny, fsdp, recipe):
    options = [*TINY, *recipe, "--gradient_accumulation_steps=2", "--batch_ramp_iters=5"]
    options += ["--batch_ramp_start=0.3", "--lr_decay_iters=8", "--max_iters=8"]
    launch(train, *options, "--out_dir=one")
    finish(*options, f"--fsdp={fsdp}", "--out_dir=two", processes=2)
    assert losses("one") == pytest.approx(losses("two"), rel=1e-4)
    assert_equal(load("one/ckpt.pt"), load("two/ckpt.pt"), atol=1e-3, rtol=0)
    norms = [
        [entry["grad_norm"] for entry in log(folder) if "loss" in entry]
        for folder in ("one", "two")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


@slow
def test_evaluation_gives_the_same_on_1_2_and_4_processes(launch, finish, tiny):
    found = []
    for processes in (1, 2, 4):
        for windows in (1000, 20):  # of 24, with 4 in a batch
            folder = f"out{processes}-{windows}"
            options = f"--eval_iters={windows // 4}", f"--out_dir={folder}", "--max_iters=1"
            finish(*TINY, *options, processes=processes)
            found += [entry for entry in log(folder) if "val/loss" in entry][:1]
    for entry, other in zip(found[:2] * 2, found[2:], strict=True):
        assert entry == pytest.approx(other, rel=1e-7)


def test_a_sharded_run_equals_an_unsharded_one(launch, finish, tiny):
    options = *TINY, "--max_iters=4", "--gradient_accumulation_steps=3", "--eval_interval=2"
    launch(train, *options, "--out_dir=one")
    finish(*options, "--fsdp=True", "--out_dir=sharded", processes=2)
    one, sharded = load("one/ckpt.pt"), load("sharded/ckpt.pt")
    assert one["model"].keys() == sharded["model"].keys()
    assert_equal(one, sharded, atol=1e-5, rtol=0)
    assert losses("one") == pytest.approx(losses("sharded"), rel=1e-6)


@slow
def test_one_process_ddp_and_fsdp_resume_each_other(launch, finish, tiny):
    options = [*TINY, "--lr_decay_iters=14", "--gradient_accumulation_steps=2"]
    launch(train, *options, "--max_iters=14", "--out_dir=straight")
    launch(train, *options, "--max_iters=2")
    ways = [(2, True), (2, False), (2, True), (1, True), (2, False), (1, False)]
    for step, (processes, sharded) in zip(range(4, 15, 2), ways, strict=True):
        more = f"--max_iters={step}", "--init_from=resume", f"--fsdp={sharded}"
        finish(*more, processes=processes)
    assert losses("out") == pytest.approx(losses("straight"), rel=1e-6)
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"), atol=1e-5, rtol=0)


# Two machines of two processes: torchrun would set this variable there.
MACHINES = """
import os

os.environ["LOCAL_WORLD_SIZE"] = "2"
import train
from configurator import configure

train.main(configure(vars(train)))
"""


@slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharding_within_machines_equals_one_process(launch, finish, tiny, optimizer):
    (tiny / "machines.py").write_text(MACHINES)
    options = [*TINY, f"--optimizer={optimizer}", "--lr_decay_iters=6", "--bias=True"]
    options += ["--gradient_accumulation_steps=2"]
    launch(train, *options, "--max_iters=6", "--out_dir=one")
    finish(*options, "--fsdp=hybrid", "--max_iters=2", processes=4, script="machines.py")
    finish("--init_from=resume", "--max_iters=4")
    finish("--init_from=resume", "--max_iters=6", processes=4, script="machines.py")
    assert losses("one") == pytest.approx(losses("out"), rel=1e-5)
    assert_equal(load("one/ckpt.pt"), load("out/ckpt.pt"), atol=1e-4, rtol=0)


# --- stops ---------------------------------------------------------------------------------------


def wait_for(process, start):
    """Read the output of a process up to a line that begins like this."""
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(process.stderr.read())


@slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_torchrun_stops_all_ranks_at_one_step(start, finish, tiny, name):
    passed_on = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"  # the last only if asked for
    options = [*TINY, "--dropout=0.2", "--lr_decay_iters=100000", "--eval_interval=100000"]
    endless = "--max_iters=100000", "--log_interval=10"
    process = start(*options, *endless, processes=2, options=[passed_on])
    wait_for(process, "iter 20")
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    saved = load("out/ckpt.pt")["iter_num"]
    assert f"out keeps step {saved} and the best" in out
    assert process.returncode == 1  # torchrun's own
    finish("--init_from=resume", f"--max_iters={saved + 5}", processes=2)
    finish(*options, f"--max_iters={saved + 5}", "--out_dir=straight", processes=2)
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"))


@slow
def test_a_group_that_lost_a_worker_restarts_from_its_checkpoint(start, finish, tiny):
    options = [*TINY, "--dropout=0.2", "--max_iters=3000", "--eval_interval=100"]
    options += ["--log_interval=10", "--eval_iters=1"]
    finish(*options, "--out_dir=straight", processes=2)
    restarts = ["--max-restarts=3"]
    process = start(*options, "--auto_resume=True", processes=2, options=restarts)
    for step in (500, 1500):
        wait_for(process, f"step {step}")
        time.sleep(0.2)
        os.kill(workers(process)[step == 500], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"))
    assert losses("straight") == losses("out")


@slow
def test_a_rank_that_is_silent_ends_the_others_after_the_timeout(start, tiny):
    """It is stopped, as if its machine had lost the network."""
    process = start(*TINY, "--max_iters=100000", "--log_interval=10", "--timeout=5", processes=2)
    wait_for(process, "iter 20")
    silent = workers(process)[-1]
    os.kill(silent, signal.SIGSTOP)
    time.sleep(10)
    os.kill(silent, signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: another process has ended or is out of reach" in err
    assert load("out/ckpt.pt")["iter_num"] == 0


# --- errors --------------------------------------------------------------------------------------


def test_a_step_that_cannot_be_shared_gets_a_line(finish, tiny):
    err = finish(*TINY, "--batch_size=3", processes=2, status=1)
    line = (
        "2 processes cannot share 3 sequences or less; change batch_size, "
        "gradient_accumulation_steps or the number of processes"
    )
    assert "error: " in err and line in err
