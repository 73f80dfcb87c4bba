"""Each change of the disk that a run makes fails once, or the run is killed at it: nothing is lost.

A process is forked for each case, with the functions that change the disk replaced by versions that
count their calls. The n-th call fails with an error, or the process dies in it.
"""

import builtins
import errno
import io
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_equal, load, losses

import train
from configurator import configure
from engine.checkpoint import read_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
RUN = [*TINY, "--max_iters=4", "--eval_interval=1", "--eval_iters=1", "--auto_resume=True"]
RUN += ["--learning_rate=0.1", "--lr_decay_iters=9"]  # the validation loss also rises
CHANGES = [(os, "fsync"), (os, "replace"), (os, "link"), (Path, "unlink"), (Path, "mkdir")]


class Faults:
    """Counts the changes of the disk, and fails or dies at the one with this number."""

    def __init__(self, number, fault):
        self.number = number
        self.fault = fault  # an error number, or "kill"
        self.count = 0
        for place, name in CHANGES:
            setattr(place, name, self.counted(getattr(place, name)))
        self.open = builtins.open
        builtins.open = self.open_counted

    def happens(self):
        self.count += 1
        return self.count == self.number

    def strike(self):
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.fault, os.strerror(self.fault))

    def counted(self, function):
        def change(*args, **options):
            if self.happens():
                self.strike()
            return function(*args, **options)

        return change

    def open_counted(self, path, mode="r", *args, **options):
        if not set(mode) & set("xaw") or "out" not in Path(str(path)).parts:
            return self.open(path, mode, *args, **options)
        faults = self

        class File(io.FileIO):
            def write(self, content):
                if faults.happens():
                    super().write(content[: len(content) // 2])
                    faults.strike()
                return super().write(content)

        file = io.BufferedWriter(File(path, mode.replace("b", "")), buffer_size=2**16)
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")


def run(arguments, number=0, fault=None):
    """Train in a forked process; return its exit status, negative if killed, and its output."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout = sys.stderr = os.fdopen(write, "w", buffering=1)
        warnings.simplefilter("ignore")
        status = 1
        try:
            faults = Faults(number, fault)
            sys.argv = [train.__file__, *arguments]
            train.main(configure(vars(train)))
            status = 0
        except SystemExit as stop:
            print(stop.code)
        except BaseException as error:
            print("Traceback", repr(error))
        if number == 0:
            print("changes:", faults.count)
        sys.stdout.flush()
        os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        output = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output


@pytest.mark.parametrize("fault", ["kill", errno.EIO, errno.ENOSPC], ids=["kill", "EIO", "ENOSPC"])
@pytest.mark.parametrize("older", [False, True], ids=["fresh", "used"])
def test_a_fault_at_any_change_of_the_disk_loses_nothing(tiny, older, fault):
    """In a used folder, the older run is kept as well."""
    torch.set_num_threads(1)
    first = [*RUN, "--seed=5", "--max_iters=2", "--out_dir=older/out"]
    assert run(first)[0] == 0
    options = [*RUN, "--auto_resume=False"] if older else RUN
    status, output = run([*RUN, "--out_dir=straight/out"])
    assert status == 0, output
    straight = {name: load(f"straight/out/{name}") for name in ("best.pt", "ckpt.pt")}
    changes = int(output.split("changes: ")[1])
    assert changes > 40
    for number in range(1, changes + 1):
        folder = Path(f"{number}")
        if older:
            copy(Path("older/out"), folder / "out")
        status, output = run([*options, f"--out_dir={folder}/out"], number, fault)
        assert "Traceback" not in output and status in (0, 1, -signal.SIGKILL), output
        for path in folder.glob("out/**/*.pt"):
            read_checkpoint(path)
        status, output = run([*RUN, f"--out_dir={folder}/out"])
        assert status == 0, output
        if older and "steps: 2 to 4" in output:
            continue  # it resumed the older run: the new one had not begun
        for name, state in straight.items():
            found = load(folder / "out" / name)
            assert_equal(state, found)
            assert state["best_val_loss"] == found["best_val_loss"], (number, name)
        assert losses(folder / "out") == losses("straight/out")
        if older:
            kept = load(folder / "out" / "previous" / "1" / "ckpt.pt")
            assert_equal(kept, load("older/out/ckpt.pt"))


def copy(source, target):
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
