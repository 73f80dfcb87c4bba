"""Two machines: network namespaces joined by a cable, which is cut while they train."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, TINY, TORCHRUN, assert_equal, load, losses

pytestmark = pytest.mark.slow
ADDRESSES = "10.77.0.1", "10.77.0.2"
TIMEOUT = 6  # seconds that processes wait for one another
BOUND = TIMEOUT + 30  # seconds from a cut until both torchrun commands end, on a busy machine
LONG = 120  # seconds for a command that starts, trains and ends
LOST = "another process is gone or out of reach ("
GO_ON = "); --init_from=resume goes on"


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def machines(tiny):
    """Return the names of two namespaces, each with an end of one cable called `wire`, or skip."""
    (tiny / "train.py").write_text((ROOT / "train.py").read_text(encoding="utf-8"))
    names = [f"plaingpt-{os.getpid()}-{rank}" for rank in (0, 1)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ends = "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1]
            ip("link", "add", "wire", *ends)
        except OSError as fault:  # no such command, or no right to
            pytest.skip(f"cannot make network namespaces: {fault}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            clear(name)


def clear(name):
    """End what runs in a namespace, and the namespace."""
    with suppress(OSError):
        for process in ip("netns", "pids", name).split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        ip("netns", "delete", name)


def start(machines, run, *options, processes=1):
    """Start torchrun on both machines; return these two. What train.py prints goes to files."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env["GLOO_SOCKET_IFNAME"] = "wire"  # else gloo offers the host name's address, 127.0.0.1
    started = []
    for rank, name in enumerate(machines):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=2", f"--node_rank={rank}", "--redirects=3"]
        command += [f"--nproc_per_node={processes}"]
        command += [f"--master_addr={ADDRESSES[0]}", "--master_port=29500"]
        command += [f"--log_dir={run}/{rank}", "train.py"]
        command += [option.replace("RANK", str(rank)) for option in options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, env=env, **quiet))
    return started


def printed(run, rank, stream="stdout"):
    """Return the lines that train.py has printed, without the log lines of torch's C++ side."""
    logs = Path(run, str(rank)).rglob(f"{stream}.log")
    lines = "".join(log.read_text(encoding="utf-8") for log in logs).splitlines()
    return [line for line in lines if not re.match(r"(\[rank\d+\]:)?\[[WE]\d{4} ", line)]


def steps(run):
    return sum(line.startswith("iter ") for line in printed(run, 0))


def statuses(processes, within=LONG):
    """Return how the commands ended; one that takes longer than so many seconds is an error."""
    limit = time.monotonic() + within
    return [process.wait(max(0, limit - time.monotonic())) for process in processes]


def unplug(machines):
    ip("-n", machines[0], "link", "set", "wire", "down")


def plug_in(machines):
    ip("-n", machines[0], "link", "set", "wire", "up")


def lose_packets(machines):
    """Let no packet arrive, with both ends of the cable up, as a dead switch does."""
    nobody = "lladdr", "02:00:00:00:00:01", "nud", "permanent"
    for name, other in zip(machines, reversed(ADDRESSES), strict=True):
        ip("-n", name, "neighbour", "replace", other, *nobody, "dev", "wire")


def find_again(machines):
    for name, other in zip(machines, reversed(ADDRESSES), strict=True):
        ip("-n", name, "neighbour", "delete", other, "dev", "wire")


def test_a_cut_link_ends_both_machines_with_a_line_each_and_the_run_resumes_exactly(machines):
    endless = "--max_iters=1000000", "--lr_decay_iters=1000", f"--timeout={TIMEOUT}"
    options = [*TINY, *endless, "--eval_interval=20", "--eval_iters=2"]
    fresh, resume = [*options, "--out_dir=outRANK"], ["--init_from=resume", "--out_dir=out0"]
    cuts = {"unplugged": (unplug, plug_in), "silent": (lose_packets, find_again)}
    for run, (cut, mend) in cuts.items():
        processes = start(machines, run, *(fresh if run == "unplugged" else resume))
        limit = time.monotonic() + LONG
        while steps(run) < 50:
            fine = time.monotonic() < limit and not any(p.poll() for p in processes)
            assert fine, [printed(run, rank, "stderr") for rank in (0, 1)]
            time.sleep(0.05)
        cut(machines)
        assert statuses(processes, within=BOUND) == [1, 1]
        for rank, prefix in enumerate(("error: ", "error: rank 1: ")):
            (line,) = printed(run, rank, "stderr")
            assert line.startswith(prefix + LOST) and line.endswith(GO_ON)
        assert not any(ip("netns", "pids", name) for name in machines)
        assert printed(run, 1) == [] and not Path("out1").exists()  # only rank 0 prints and writes
        mend(machines)
    last = load("out0/ckpt.pt")["iter_num"] + 20
    assert statuses(start(machines, "mended", *resume, f"--max_iters={last}")) == [0, 0]
    resumed = f"steps: {last - 20} to {last}, of 64 tokens each, "
    assert any(line.startswith(resumed) for line in printed("mended", 0))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "--nproc_per_node=2", "train.py", *options, f"--max_iters={last}"]
    subprocess.run([*command, "--out_dir=straight"], env=env, check=True, timeout=LONG)
    assert_equal(load("straight/ckpt.pt"), load("out0/ckpt.pt"))
    assert losses("straight") == losses("out0") and len(losses("out0")) == last


def test_weights_sharded_within_machines_train_as_one_process_does(machines):
    """Two processes on each of two machines, one process, and again the four."""
    options = [*TINY, "--lr_decay_iters=6", "--gradient_accumulation_steps=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, "train.py"]
    straight = [*alone, *options, "--max_iters=6", "--out_dir=straight"]
    subprocess.run(straight, env=env, check=True, timeout=LONG)
    fresh, resume = [*options, "--fsdp=hybrid", "--max_iters=2"], "--init_from=resume"
    assert statuses(start(machines, "fresh", *fresh, processes=2)) == [0, 0]
    subprocess.run([*alone, resume, "--max_iters=4"], env=env, check=True, timeout=LONG)
    assert statuses(start(machines, "on", resume, "--max_iters=6", processes=2)) == [0, 0]
    assert "hardware: 4 x cpu, " in printed("on", 0)[1]
    assert losses("out") == pytest.approx(losses("straight"), rel=1e-5)
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"), atol=1e-5, rtol=0)


def test_a_silent_link_ends_machines_that_share_weights_in_the_time_that_timeout_sets(machines):
    endless = "--max_iters=1000000", "--lr_decay_iters=1000", f"--timeout={TIMEOUT}"
    options = *TINY, *endless, "--eval_interval=1000000", "--gradient_accumulation_steps=2"
    processes = start(machines, "silent", *options, "--fsdp=hybrid", processes=2)
    limit = time.monotonic() + LONG
    while steps("silent") < 5:
        fine = time.monotonic() < limit and not any(p.poll() for p in processes)
        assert fine, [printed("silent", rank, "stderr") for rank in (0, 1)]
        time.sleep(0.05)
    lose_packets(machines)
    assert statuses(processes, within=BOUND) == [1, 1]
    for rank in (0, 1):
        lines = printed("silent", rank, "stderr")
        assert lines and all(LOST in line and line.endswith(GO_ON) for line in lines)


def test_a_mistake_that_one_rank_makes_is_told_by_it(machines, tiny):
    options = [*TINY, "--max_iters=2", f"--timeout={TIMEOUT}"]
    Path("data/tiny").rename("data/set0")
    assert statuses(start(machines, "alone", *options, "--dataset=setRANK")) == [1, 1]
    mistake = f"error: rank 1: no train.bin in {tiny}/data/set1; make it: "
    (line,) = printed("alone", 1, "stderr")
    assert line.startswith(mistake)
    (line,) = printed("alone", 0, "stderr")
    assert line.startswith("error: " + LOST) and line.endswith(GO_ON)


@pytest.mark.parametrize("late", [0, 8])
def test_a_mistake_of_all_ranks_ends_the_second_machine_though_the_first_is_gone(
    machines, tiny, late
):
    code = (tiny / "train.py").read_text(encoding="utf-8")
    wait = f"import os, time\n\ntime.sleep({late} * int(os.environ['RANK']))\n"
    (tiny / "train.py").write_text(wait + code)
    assert statuses(start(machines, "alike", *TINY, "--n_head=3")) == [1, 1]
    mistake = "n_embd=32 is no multiple of n_head=3"
    assert printed("alike", 0, "stderr") == [f"error: {mistake}"]
    # The first machine keeps what was said. Where it has ended, the second says it once more.
    assert printed("alike", 1, "stderr") in ([], [f"error: rank 1: {mistake}"])
