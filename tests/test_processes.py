"""Several processes on one machine against one: gradients, evaluation, sharding, stops, errors."""

import os
import signal
import time

import pytest
from conftest import TINY, assert_equal, load, log, losses, workers

import train

slow = pytest.mark.slow


def gradients(folder):
    """Return the gradients of the first step, from AdamW's mean of them: 1 - beta1 times each."""
    state = load(f"{folder}/ckpt.pt")["optimizer"]["state"]
    return {index: moments["exp_avg"] / 0.1 for index, moments in state.items()}


@pytest.mark.parametrize("accumulation", [1, pytest.param(4, marks=slow), 5])
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
    process = start(*options, "--init_from=auto", processes=2, options=restarts)
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


@slow
def test_an_error_of_one_rank_is_shown_with_its_rank(finish, tiny):
    script = "import os, train\nfrom configurator import configure\nload = train.load_data\n"
    script += "def load_data():\n    if os.environ['RANK'] == '1':\n"
    script += "        raise ValueError('no disk here')\n    return load()\n"
    script += "train.load_data = load_data\ntrain.main(configure(vars(train)))\n"
    (tiny / "alone.py").write_text(script)
    err = finish(*TINY, processes=2, status=1, script="alone.py")
    assert errors(err).count("error: rank 1: no disk here") == 1
    assert not (tiny / "out").exists()


@slow
def test_machines_that_do_not_share_a_folder_are_told(launch, finish, tiny):
    launch(train, *TINY, "--max_iters=2", "--out_dir=0")
    script = "import os, train\nfrom configurator import configure\nconfig = configure(vars(train))"
    script += "\ntrain.out_dir = config['out_dir'] = os.environ['RANK']\ntrain.main(config)\n"
    (tiny / "apart.py").write_text(script)
    err = finish(*TINY, "--init_from=auto", processes=2, status=1, script="apart.py")
    line = "machines resume from different steps: they must share out_dir"
    assert len(errors(err)) <= 2 and all(line in error for error in errors(err))


@slow
def test_a_compiler_that_fails_on_one_rank_is_left_out_by_all(finish, tiny):
    script = "import os, train\nfrom configurator import configure\ntry_step = train.try_step\n"
    script += "def failing(*arguments):\n    if os.environ['RANK'] == '1':\n"
    script += "        raise RuntimeError('no compiler')\n    try_step(*arguments)\n"
    (tiny / "half.py").write_text(
        script + "train.try_step = failing\ntrain.main(configure(vars(train)))"
    )
    out = finish(*TINY, "--compile=True", "--max_iters=2", processes=2, script="half.py")
    assert "not compiled, which is slower: another rank failed" in out
    assert load("out/ckpt.pt")["iter_num"] == 2


@slow
def test_a_last_save_that_fails_ends_all_ranks_with_status_1(finish, tiny):
    script = "import train\nfrom configurator import configure\ndef atomic(path):\n"
    script += "    raise OSError(28, 'No space left on device')\ntrain.atomic = atomic\n"
    script += "train.trim = lambda *arguments: None\ntrain.main(configure(vars(train)))"
    (tiny / "full.py").write_text(script)
    err = finish(*TINY, "--max_iters=2", processes=2, status=1, script="full.py")
    assert errors(err) == [] and "exitcode: -" not in err
