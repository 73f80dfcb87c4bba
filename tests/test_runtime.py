"""Where a run computes: the device it chooses, and several processes against one."""

import os
import signal
import time

import pytest
import torch
from conftest import TINY, assert_equal, load, log, losses, workers

import train
from engine import parallel, runtime
from engine.process import UserError

slow = pytest.mark.slow

# --- hardware ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, dtype",
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)],
)
def test_a_gpu_computes_in_what_its_hardware_has(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runtime.choose_dtype("auto", torch.device("cuda", 0))[0] == dtype


@pytest.mark.parametrize("amx, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bfloat16_where_that_is_fast(monkeypatch, amx, dtype):
    capabilities = {"amx_bf16": amx, "avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
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
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA RTX A1000", torch.bfloat16, None),
        ("NVIDIA RTX A6000", torch.bfloat16, 155),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, dtype, tera):
    found = runtime.Runtime(torch.device("cuda", 0), dtype, False, 0, 1, name, "")
    assert found.peak_flops() == (tera and tera * 1e12)
    unknown = runtime.Runtime(torch.device("cpu"), dtype, False, 0, 1, "cpu", "")
    assert unknown.peak_flops() is None


def accelerator(monkeypatch, kind, count):
    """Let PyTorch say that this machine has `count` devices of a kind."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_a_gpu_that_cannot_be_used_leaves_the_cpu_and_its_reason(monkeypatch):
    def broken(name):
        raise RuntimeError("CUDA error: no kernel image for it. And much more\nin lines")

    accelerator(monkeypatch, "cuda", 1)
    monkeypatch.setattr(runtime, "open_device", broken)
    why = "cuda cannot be used: RuntimeError: CUDA error: no kernel image for it"
    assert runtime.choose_device("auto") == (torch.device("cpu"), f" ({why})")
    with pytest.raises(UserError) as fault:
        runtime.choose_device("cuda")
    assert str(fault.value) == f"device={why}; try --device=auto"
    fallen_back = runtime.choose_device("cuda", fall_back=True)
    assert fallen_back == (torch.device("cpu"), f" (device={why})")


def test_more_processes_than_gpus_compute_on_the_cpu(monkeypatch):
    accelerator(monkeypatch, "cuda", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    why = " (4 processes for 2 GPUs; lower --nproc_per_node)"
    assert runtime.choose_device("auto") == (torch.device("cpu"), why)


@pytest.mark.parametrize("kind", ["xpu", "mtia", "privateuseone"])
def test_an_accelerator_that_this_pytorch_cannot_open_leaves_the_cpu_and_its_reason(
    monkeypatch, kind
):
    accelerator(monkeypatch, kind, 1)
    found = runtime.start_runtime("auto", "auto", "auto")
    assert found.device == torch.device("cpu") and "\n" not in found.about
    assert found.about.startswith(f"1 x cpu ({kind} cannot be used: ")


def test_each_process_has_a_device_of_its_own(monkeypatch):
    """A fake one: only a tensor would show that it is not there."""
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    for kind in ("cuda", "xpu"):
        accelerator(monkeypatch, kind, 4)
        assert runtime.choose_device("auto") == (torch.device(kind, 3), "")
    assert runtime.choose_device("xpu:1") == (torch.device("xpu", 1), "")
    accelerator(monkeypatch, "mps", 1)
    assert runtime.choose_device("auto") == (torch.device("cpu"), "")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert runtime.choose_device("auto") == (torch.device("mps"), "")


@pytest.mark.parametrize("has, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_an_xpu_computes_in_bfloat16_where_it_can(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda: has)
    assert runtime.choose_dtype("auto", torch.device("xpu", 0))[0] == dtype


def test_the_backend_of_a_device_is_pytorchs_and_on_cuda_the_setting():
    kinds = {"cpu": "gloo", "mps": "gloo", "cuda": "cpu:gloo,cuda:x", "xpu": "cpu:gloo,xpu:xccl"}
    for kind, backend in kinds.items():
        assert runtime.choose_backend(torch.device(kind), "x") == backend
    with pytest.raises(UserError, match="^device=mtia on several processes: Default backend not"):
        runtime.choose_backend(torch.device("mtia"), "x")


def test_a_compiler_that_fails_is_done_without_and_one_line_says_so(launch, tiny, monkeypatch):
    def broken(self):
        def call(*arguments, **options):
            raise RuntimeError("no Triton")

        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    options = *TINY, "--max_iters=3", "--eval_interval=2"
    out = launch(train, *options, "--compile=True")
    assert out.count("not compiled, which is slower: RuntimeError: no Triton") == 1
    assert log("out")[0]["settings"]["compile"] is False
    launch(train, *options, "--compile=False", "--out_dir=plain")
    assert_equal(load("plain/ckpt.pt"), load("out/ckpt.pt"))


# --- gradients and evaluation --------------------------------------------------------------------


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
def test_evaluation_gives_the_same_on_1_2_and_4_processes(launch, finish, tiny):
    found = []
    for processes in (1, 2, 4):
        for windows in (1000, 20):  # of 24, with 4 in a batch
            bound = f"--eval_iters={windows // 4}", f"--out_dir=out{processes}-{windows}"
            finish(*TINY, *bound, "--max_iters=1", processes=processes)
            found += [entry for entry in log(bound[1][10:]) if "val/loss" in entry][:1]
    for entry, other in zip(found[:2] * 2, found[2:], strict=True):
        assert entry == pytest.approx(other, rel=1e-7)


# --- sharding ------------------------------------------------------------------------------------


def test_a_sharded_run_equals_an_unsharded_one(launch, finish, tiny):
    options = *TINY, "--max_iters=4", "--gradient_accumulation_steps=3", "--eval_interval=2"
    launch(train, *options, "--out_dir=one")
    finish(*options, "--fsdp=True", "--out_dir=sharded", processes=2)
    one, sharded = load("one/ckpt.pt"), load("sharded/ckpt.pt")
    assert one["model"].keys() == sharded["model"].keys()
    assert_equal(one, sharded, atol=1e-5, rtol=0)
    assert losses("one") == pytest.approx(losses("sharded"), rel=1e-6)
    saved = sharded["model"]
    tied = saved["lm_head.weight"], saved["transformer.wte.weight"]
    assert tied[0].untyped_storage().data_ptr() == tied[1].untyped_storage().data_ptr()


@slow
def test_one_process_ddp_and_fsdp_resume_each_other(launch, finish, tiny):
    options = [*TINY, "--lr_decay_iters=14", "--gradient_accumulation_steps=2"]
    launch(train, *options, "--max_iters=14", "--out_dir=straight")
    launch(train, *options, "--max_iters=2")
    ways = [(2, True), (2, False), (2, True), (1, True), (2, False), (1, False)]
    for step, (processes, sharded) in zip(range(4, 15, 2), ways, strict=True):
        on = f"--max_iters={step}", "--init_from=resume", f"--fsdp={sharded}"
        finish(*on, processes=processes)
    assert losses("out") == pytest.approx(losses("straight"), rel=1e-6)
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"), atol=1e-5, rtol=0)


@slow
def test_a_sharded_run_resumes_exactly(finish, tiny):
    options = [*TINY, "--fsdp=True", "--dropout=0.2", "--lr_decay_iters=8"]
    finish(*options, "--max_iters=8", "--out_dir=straight", processes=2)
    finish(*options, "--max_iters=4", processes=2)
    finish("--init_from=resume", "--max_iters=8", processes=2)
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"))
    assert losses("straight") == losses("out")


SHARES = """
import os

import torch

from engine.parallel import gather_on_rank_0, make_mesh, make_model
from engine.runtime import start_runtime
from model import GPT, GPTConfig

runtime = start_runtime("cpu", "float32", False)
os.environ["LOCAL_WORLD_SIZE"] = "2"
recipe = {"position": "rotary", "rms_norm": True, "tied": False, "bias": False}
for changes in ({}, recipe, {"position": "alibi", "n_embd": 12}):
    shape = GPTConfig(16, 21, 2, 2, **{"n_embd": 32, **changes})
    torch.manual_seed(7)
    whole = GPT(shape).state_dict()
    for fsdp in (True, "hybrid"):
        mesh = make_mesh(fsdp, 60, runtime)
        for weights in (None, whole):
            model = make_model(GPT, shape, weights, 7, runtime.device, mesh)
            for name, tensor in model.named_parameters():
                rows = -(-len(tensor) // mesh.size(-1))  # of a rank, rounded up
                held = tensor.to_local().untyped_storage().nbytes()
                assert held <= 4 * rows * tensor[0].numel(), name
            tied = model.lm_head.weight is model.transformer.wte.weight
            assert tied == shape.tied
            found = gather_on_rank_0(model.state_dict(), runtime)
            assert found.keys() == whole.keys()
            for name in found if runtime.rank == 0 else ():
                assert torch.equal(found[name], whole[name]), name
"""


@slow
def test_the_weights_of_a_sharded_model_are_those_of_one_process_and_held_in_shares(finish, tiny):
    (tiny / "shares.py").write_text(SHARES)
    finish(processes=4, script="shares.py")


def test_what_cannot_be_kept_in_shares_is_told(monkeypatch):
    """A parameter that is changed in place after nn.init has filled it."""

    class Scaled(torch.nn.Linear):
        def __init__(self, shape):
            super().__init__(2, 2)
            self.weight.data.mul_(3)

    monkeypatch.setattr(parallel, "share", lambda tensor, mesh: tensor)
    with pytest.raises(AssertionError, match="aten.mul_"):
        parallel.draw_shares(Scaled, None, None)


# Two machines of two processes: what torchrun would say there.
MACHINES = """
import os

os.environ["LOCAL_WORLD_SIZE"] = "2"
import train
from configurator import configure

train.main(configure(vars(train)))
"""


@slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_shards_within_machines_and_copies_over_them_equal_one_process(
    launch, finish, tiny, optimizer
):
    (tiny / "machines.py").write_text(MACHINES)
    options = [*TINY, f"--optimizer={optimizer}", "--lr_decay_iters=6", "--health_interval=1"]
    options += ["--gradient_accumulation_steps=2", "--bias=True"]
    launch(train, *options, "--max_iters=6", "--out_dir=one")
    finish(*options, "--fsdp=hybrid", "--max_iters=2", processes=4, script="machines.py")
    finish("--init_from=resume", "--max_iters=4")
    finish("--init_from=resume", "--max_iters=6", processes=4, script="machines.py")
    assert losses("one") == pytest.approx(losses("out"), rel=1e-5)
    assert_equal(load("one/ckpt.pt"), load("out/ckpt.pt"), atol=1e-4, rtol=0)
    norms = [[e[k] for e in log(d) for k in e if "norm/" in k] for d in ("one", "out")]
    assert len(norms[0]) > 0 and norms[0] == pytest.approx(norms[1], rel=1e-3, abs=1e-6)


@slow
def test_machines_of_unequal_size_are_told_so(finish, tiny):
    unequal = MACHINES.replace('"2"', 'str(1 + int(os.environ["RANK"]))')
    (tiny / "machines.py").write_text(unequal)
    options = *TINY, "--fsdp=hybrid", "--gradient_accumulation_steps=2"
    err = finish(*options, processes=2, script="machines.py", status=1)
    need = "as many processes on each machine, not 1 to 2; give each the same --nproc_per_node"
    line = f"fsdp=hybrid needs {need}"
    assert errors(err) in ([f"error: {line}"], [f"error: rank 1: {line}"])


def test_another_word_for_sharding_gets_the_known_ones(launch, tiny):
    with pytest.raises(SystemExit, match="error: fsdp=full: choose True, False or hybrid"):
        launch(train, *TINY, "--fsdp=full")


@slow
def test_a_sharded_run_crops_its_context_on_resume(finish, tiny):
    finish(*TINY, "--max_iters=2", "--fsdp=True", processes=2)
    out = finish("--init_from=resume", "--block_size=8", "--max_iters=3", processes=2)
    assert "block_size: 16 -> 8" in out and "iter 2: loss" in out
    assert load("out/ckpt.pt")["model"]["transformer.wpe.weight"].shape == (8, 32)


# --- stops ---------------------------------------------------------------------------------------


def wait_for(process, start):
    """Read what a process prints up to a line that begins like this."""
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
    assert f"{name}: out keeps the checkpoint of step {saved}; go on with" in out
    assert process.returncode == 1  # torchrun's own
    finish("--init_from=resume", f"--max_iters={saved + 5}", processes=2)
    finish(*options, f"--max_iters={saved + 5}", "--out_dir=straight", processes=2)
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"))


@slow
def test_a_signal_to_one_rank_stops_all_at_one_step(start, tiny):
    process = start(*TINY, "--max_iters=100000", "--log_interval=10", processes=2)
    wait_for(process, "iter 20")
    os.kill(workers(process)[-1], signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and f"exitcode: {128 + signal.SIGTERM}" in err
    assert f"SIGTERM: out keeps the checkpoint of step {load('out/ckpt.pt')['iter_num']};" in out


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


# --- errors --------------------------------------------------------------------------------------


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_an_error_of_all_ranks_is_shown_once(finish, tiny):
    err = finish(*TINY, "--batch_size=3", processes=2, status=1)
    step = "batch_size * gradient_accumulation_steps = 3 sequences per step"
    assert errors(err) == [f"error: {step} divide among 1, 3 processes, not among 2"]


ALONE = """
import os
import train
from configurator import configure
from engine.process import UserError

load = train.load_data

def load_data(*arguments):
    if os.environ["RANK"] == "1":
        raise UserError("no disk here")
    return load(*arguments)

train.load_data = load_data
train.main(configure(vars(train)))
"""


@slow
def test_an_error_of_one_rank_is_shown_with_its_rank(finish, tiny):
    (tiny / "alone.py").write_text(ALONE)
    err = finish(*TINY, processes=2, status=1, script="alone.py")
    assert errors(err).count("error: rank 1: no disk here") == 1
    assert not (tiny / "out").exists()


APART = """
import os
import train
from configurator import configure

config = configure(vars(train))
train.out_dir = config["out_dir"] = os.environ["RANK"]
train.main(config)
"""


@slow
@pytest.mark.parametrize("other", ["behind", "without"])
def test_machines_that_do_not_share_a_folder_are_told_once(launch, finish, tiny, other):
    launch(train, *TINY, "--max_iters=2", "--out_dir=0")
    if other == "behind":
        launch(train, *TINY, "--max_iters=1", "--out_dir=1")
    (tiny / "apart.py").write_text(APART)
    err = finish(*TINY, "--auto_resume=True", processes=2, status=1, script="apart.py")
    line = "machines resume from different steps: they must share out_dir"
    told = [f"error: {line}"], [f"error: rank 1: {line}"]
    assert errors(err) in told


HALF_COMPILED = """
import os
import torch
import train
from configurator import configure

compile = torch.nn.Module.compile

def failing(module):
    if os.environ["RANK"] == "1":
        raise RuntimeError("no compiler")
    compile(module)

torch.nn.Module.compile = failing
train.main(configure(vars(train)))
"""


@slow
def test_a_compiler_that_fails_on_one_rank_is_left_out_by_all(finish, tiny):
    (tiny / "half.py").write_text(HALF_COMPILED)
    out = finish(*TINY, "--compile=True", "--max_iters=2", processes=2, script="half.py")
    assert out.count("not compiled, which is slower: another rank failed") == 1
    finish(*TINY, "--max_iters=2", "--out_dir=plain", processes=2)
    assert_equal(load("plain/ckpt.pt"), load("out/ckpt.pt"))


FULL_DISK = """
import train
from configurator import configure
from engine import folder

def atomic(path):
    raise OSError(28, "No space left on device")

folder.atomic = atomic
train.main(configure(vars(train)))
"""


@slow
def test_a_last_save_that_fails_ends_all_ranks_with_status_1(finish, tiny):
    (tiny / "full.py").write_text(FULL_DISK)
    err = finish(*TINY, "--max_iters=2", processes=2, status=1, script="full.py")
    assert errors(err) == [] and err.count("exitcode: 1") >= 1 and "exitcode: -" not in err
