"""A loss that rises and stays: noticed, undone, and all of it as repeatable as a step."""

import errno
import math
import os
import random
import re
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY, assert_equal, at_step, load, log, losses

import train
from data.batches import Batches
from engine import folder, health
from engine.health import LossWatch

slow = pytest.mark.slow


def watch(values):
    """Return a LossWatch that has seen `values`, and the steps at which a rise was known first."""
    seen, known = LossWatch(), []
    for step, value in enumerate(values):
        before = seen.began
        seen.add(step, value)
        if seen.began is not None and before is None:
            known.append(step)
    return seen, known


def noise(size, spread):
    return np.random.default_rng(1).normal(0, spread, size)


@pytest.mark.parametrize("spread", [0, 0.05, 0.3])
@pytest.mark.parametrize("steps", [1, 100])
def test_a_rise_that_stays_is_known_with_the_step_where_it_began(spread, steps):
    """From 3 to 5 within `steps`."""
    climb = np.interp(np.arange(2000), [0, 1000, 1200, 1200 + steps], [6, 3, 3, 5])
    seen, known = watch(climb + noise(2000, spread))
    assert len(known) == 1 and 1200 < known[0] <= 1200 + steps + health.WINDOW
    assert 1190 <= seen.began <= 1201 + steps / 2
    assert seen.lowest == pytest.approx(3, abs=0.1 + spread)


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.5, 1.0])
def test_noise_a_few_bad_batches_and_a_small_rise_are_none(spread):
    calm = np.interp(np.arange(20_000), [0, 3000, 20_000], [8, 3, 2.5]) + noise(20_000, spread)
    calm[5000:5010] += 4
    calm[9000:9300] += 0.2
    calm[12_000] = math.nan
    assert watch(calm)[1] == []


def test_a_loss_that_came_back_may_rise_again():
    values = np.repeat([3.0, 5.0, 3.0, 5.0], 200)
    assert [step // 200 for step in watch(values)[1]] == [1, 3]


# --- in a run ------------------------------------------------------------------------------------

RUN = [*TINY, "--learning_rate=1e-2", "--decay_lr=False", "--eval_interval=20", "--eval_iters=2"]
RUN += ["--max_iters=80", "--dropout=0.1", "--always_save_checkpoint=False"]

BAD = range(44, 50)  # batches that are noise, of each hundred

# A script that trains on them.
PLANTED = """
import train
from configurator import configure
from data.batches import Batches
from engine import health
from test_health import BAD, plant

health.WINDOW = 8
Batches.draw = plant(Batches.draw, BAD)
train.main(configure(vars(train)))
"""


def plant(draw, bad):
    """Return `draw`, which gives noise instead of text for the batches whose number is in `bad`."""

    def planted(self, place):
        found = draw(self, place)
        if place % 100 in bad:
            places = torch.arange(self.block_size + 1) ** 3
            return [((batch.long() * 5 + places) % 21).to(batch.dtype) for batch in found]
        return found

    return planted


@pytest.fixture
def planted(monkeypatch):
    """Let some batches be noise, and 8 losses be enough to see it."""
    monkeypatch.setattr(health, "WINDOW", 8)
    monkeypatch.setattr(Batches, "draw", plant(Batches.draw, BAD))


def told(out):
    return [line for line in out.splitlines() if "the loss rose" in line]


def assert_same_run(left, right):
    for name in ("ckpt.pt", "last.pt"):
        assert_equal(load(f"{left}/{name}"), load(f"{right}/{name}"))
        assert load(f"{left}/{name}")["watch"] == load(f"{right}/{name}")["watch"]
    assert losses(left) == losses(right)


def test_a_rise_is_told_in_one_line_and_the_run_goes_on(launch, tiny, planted):
    [line] = told(launch(train, *RUN))
    assert line.startswith("step 50: from step 44 the loss rose, ")
    assert line.endswith("; --rollbacks=3 would undo it")
    assert load("out/last.pt")["iter_num"] == 80


def test_a_rollback_is_the_best_state_on_other_batches(launch, tiny, planted):
    [line] = told(launch(train, *RUN, "--rollbacks=2"))
    assert line.endswith("; rollback 1 of 2, to step 40 and other batches")
    # The same without it: a run to step 40, whose batches go on at 50.
    launch(train, *RUN, "--max_iters=40", "--out_dir=plain")
    for name in ("ckpt.pt", "last.pt"):
        saved = load(f"plain/{name}")
        saved["watch"] |= {"skipped": 10, "rollbacks": 1}
        torch.save(saved, f"plain/{name}")
    launch(train, "--init_from=resume", "--out_dir=plain", "--max_iters=80")
    assert_same_run("plain", "out")
    assert [entry["skipped"] for entry in log("out") if "skipped" in entry] == [10]


def test_a_rollback_from_a_folder_is_that_from_a_file(launch, tiny, planted):
    launch(train, *RUN, "--rollbacks=2", "--out_dir=files")
    launch(train, *RUN, "--rollbacks=2", "--out_dir=folders", "--sharded_save=True")
    assert losses("files") == losses("folders")
    assert len(losses("files")) == 80


def test_a_rise_that_was_told_is_undone_by_a_resume_that_asks_for_it(
    launch, tiny, monkeypatch, planted
):
    monkeypatch.setattr(Batches, "draw", plant(Batches.draw, range(44, 60)))
    assert len(told(launch(train, *RUN, "--max_iters=55"))) == 1
    [line] = told(launch(train, "--init_from=resume", "--max_iters=80", "--rollbacks=1"))
    assert line.startswith("step 60: ") and "; rollback 1 of 1, to step 40 and other" in line


def test_other_data_are_watched_anew(launch, tiny, planted):
    launch(train, *RUN, "--max_iters=40")
    assert load("out/last.pt")["watch"]["lowest"] < math.inf
    size = os.path.getsize("data/tiny/train.bin") // 4 * 2
    os.truncate("data/tiny/train.bin", size)
    launch(train, "--init_from=resume", "--max_iters=42", "--new_data=True")
    assert load("out/last.pt")["watch"]["lowest"] == math.inf


def test_without_a_best_model_a_rise_is_only_told(launch, tiny, monkeypatch, planted):
    monkeypatch.setattr(train, "evaluate", lambda *a: {"train": 1.0, "val": math.inf})
    monkeypatch.setattr(folder.Keeper, "save", lambda *a: True)
    [line] = told(launch(train, *RUN, "--rollbacks=1"))
    assert line.endswith("; no state is kept to go back to")


def test_more_rises_than_rollbacks_end_the_run(launch, tiny, monkeypatch, planted):
    monkeypatch.setattr(Batches, "draw", plant(Batches.draw, range(44, 100)))
    with pytest.raises(SystemExit) as stop:
        launch(train, *RUN, "--rollbacks=2")
    line = str(stop.value.code)
    assert line.startswith("error: step 50: from step ")
    end = "after 2 rollbacks; out keeps the checkpoint of step 40; lower --learning_rate"
    assert line.endswith(end)
    assert load("out/last.pt")["watch"]["rollbacks"] == 2


@pytest.mark.parametrize("steps", [[43], [49], [47, 48], [41, 45, 48, 55]])
def test_a_stop_at_any_step_changes_no_rollback(launch, tiny, monkeypatch, planted, steps):
    launch(train, *RUN, "--rollbacks=2", "--out_dir=straight")
    waiting = set(steps)

    def stop(step):
        if step in waiting:
            waiting.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)

    at_step(monkeypatch, {step: partial(stop, step) for step in steps})
    for _ in steps:
        with pytest.raises(SystemExit) as end:
            launch(train, *RUN, "--rollbacks=2", "--auto_resume=True")
        assert end.value.code == 128 + signal.SIGTERM
    launch(train, *RUN, "--rollbacks=2", "--auto_resume=True")
    assert not waiting
    assert_same_run("straight", "out")


def test_a_rollback_without_room_is_made_again_by_a_resume(launch, tiny, monkeypatch, planted):
    """The state before it stays the newest on the disk, and leads there once more."""
    launch(train, *RUN, "--rollbacks=2", "--out_dir=straight")
    save = torch.save

    def full(content, file):
        if content["watch"]["rollbacks"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    launched = iter([None, KeyboardInterrupt])  # when step 43 comes again

    def leave():
        if fault := next(launched):
            raise fault

    at_step(monkeypatch, {43: leave})
    with pytest.raises(SystemExit):
        launch(train, *RUN, "--rollbacks=2")
    assert load("out/last.pt")["watch"]["rollbacks"] == 0
    monkeypatch.undo()
    monkeypatch.setattr(train, "ROOT", tiny)
    monkeypatch.chdir(tiny)
    monkeypatch.setattr(health, "WINDOW", 8)
    monkeypatch.setattr(Batches, "draw", plant(Batches.draw, BAD))
    launch(train, *RUN, "--rollbacks=2", "--auto_resume=True")
    assert_same_run("straight", "out")


@slow
def test_kill_9_at_any_moment_changes_no_rollback(start, finish, tiny):
    """Kill at 20 random moments of a run that rolls back again and again."""
    (tiny / "planted.py").write_text(PLANTED)
    options = [*RUN, "--rollbacks=20", "--max_iters=400", "--eval_interval=5"]
    how = {"script": "planted.py"}
    finish(*options, "--out_dir=straight", **how)
    assert load(tiny / "straight" / "last.pt")["watch"]["rollbacks"] > 2
    moments = random.Random(1)
    for _ in range(20):
        process = start(*options, "--auto_resume=True", "--save_interval=0.001", **how)
        process.stdout.readline()  # it is about to train
        time.sleep(moments.uniform(0, 1))
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(*options, "--auto_resume=True", **how)
    assert_same_run("straight", "out")


@slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_roll_back_as_one(launch, finish, tiny, planted, fsdp):
    (tiny / "planted.py").write_text(PLANTED)
    options = [*RUN, "--dropout=0.0", "--rollbacks=2"]
    alone = told(launch(train, *options, "--out_dir=one"))
    out = finish(*options, f"--fsdp={fsdp}", "--out_dir=two", processes=2, script="planted.py")
    assert [re.sub(r"[\d.]+ to [\d.]+;", "", line) for line in told(out) + alone] == 2 * [
        "step 50: from step 44 the loss rose,  rollback 1 of 2, to step 40 and other batches"
    ]
    assert losses("two") == pytest.approx(losses("one"), abs=0.05)  # rounding grows with training
    finish("--init_from=resume", "--out_dir=two", "--max_iters=84")
    assert load("two/last.pt")["watch"]["skipped"] == 10
