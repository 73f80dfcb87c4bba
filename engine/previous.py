"""What an older run left in the folder of a new one: it is kept, in the folder `previous`."""

import os
import shutil
from contextlib import suppress

from engine.checkpoint import NAMES, read_checkpoint
from engine.health import steps_of
from engine.process import UserError


def steps_in(folder):
    """Return steps_of() the newest whole checkpoint in `folder`, (0, -1) where there is none."""
    steps = [(0, -1)]
    for name in NAMES:
        with suppress(UserError):
            steps.append(steps_of(read_checkpoint(folder / name)))
    return max(steps)


def set_aside(folder, runtime):
    """Move what an older run left in `folder` to its `previous`, in place of a run kept there.

    The longer of the two is kept, so that false starts do not cost a good run. Rank 0 acts.
    """
    if runtime.rank > 0:
        return
    old = [folder / name for name in (*NAMES, "log.jsonl") if (folder / name).exists()]
    aside, previous = folder / "previous.new", folder / "previous"
    only_a_log = [path.name for path in old] == ["log.jsonl"]  # nothing was ever saved
    if (not old or only_a_log) and not aside.exists():  # it is there after a kill right here
        return
    aside.mkdir(exist_ok=True)
    for path in old:
        os.replace(path, aside / path.name)
    if sum(steps_in(aside)) < sum(steps_in(previous)):  # a batch skipped took a step as well
        shutil.rmtree(aside)
        runtime.say(f"deleted the older run in {folder}: {previous} keeps a longer one")
        return
    shutil.rmtree(previous, ignore_errors=True)
    aside.rename(previous)
    runtime.say(f"moved the older run in {folder} to {previous}")
