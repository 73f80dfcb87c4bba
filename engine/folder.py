"""The folder of a run: it has one owner, keeps the newest and the best state, and an older run.

    always_save_checkpoint    newest     best
    True                      ckpt.pt    best.pt
    False                     last.pt    ckpt.pt
"""

import math
import os
import shutil
import socket
from contextlib import suppress

import torch

from engine.checkpoint import NAMES, read_checkpoint
from engine.log import Log
from engine.parallel import unshard
from engine.process import UserError, at_end, atomic, catch_signals, link, user_error, user_path


def check_writable(folder, setting="out_dir"):
    """Raise UserError unless files can be written to `folder`, which need not exist yet."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.exists(p))
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(f"{setting}={folder}: {place} is not a folder that can be written to")


def claim(folder, runtime):
    """Make this run the owner of `folder`, made if need be. Every rank must call it.

    Raises UserError on rank 0, and ends the others, where another run owns it.
    """
    fault = ""
    if runtime.rank == 0:
        try:
            with user_error(folder, OSError):
                lock(folder)
                for name in (*NAMES, "log.jsonl"):  # what a kill in a save left
                    (folder / f"{name}.tmp").unlink(missing_ok=True)
        except UserError as found:
            fault = str(found)
    if runtime.reduce("max", bool(fault)):
        raise UserError(fault) if fault else SystemExit(1)


def lock(folder):
    """Lock `folder` until main() or the process ends; UserError if another process holds it.

    The system frees it however the process ends. Where files cannot be locked, nothing happens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        return
    file = open(folder / ".lock", "a+", encoding="utf-8")
    at_end.append(file.close)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(200) or "another process"
        raise UserError(f"{folder} is in use by {owner}; give another --out_dir, or wait") from None
    except OSError:  # a file system without locks
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def steps_in(folder):
    """Return the steps of the newest whole checkpoint in `folder`, -1 where there is none."""
    steps = [-1]
    for name in NAMES:
        with suppress(UserError):
            steps.append(read_checkpoint(folder / name)["iter_num"])
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
    if steps_in(aside) < steps_in(previous):
        shutil.rmtree(aside)
        runtime.say(f"deleted the older run in {folder}: {previous} keeps a longer one")
        return
    shutil.rmtree(previous, ignore_errors=True)
    aside.rename(previous)
    runtime.say(f"moved the older run in {folder} to {previous}")


class Keeper:
    """Keeps the newest and the best state of one run in `folder`."""

    def __init__(self, folder, always_save, runtime, writes=True):
        self.folder, self.runtime, self.writes = folder, runtime, writes
        self.newest, self.best = ("ckpt.pt", "best.pt") if always_save else ("last.pt", "ckpt.pt")
        self.step, self.best_val_loss = None, math.inf  # of the newest file; of the best

    def resume(self, step, newest=True):
        """Go on from `step` with what is in the folder, under the names it has there.

        Where always_save_checkpoint has changed since, the names stay: both states are kept anyway.
        Raises UserError if `step` was read as the `newest` and another run has saved since.
        """
        if newest and steps_in(self.folder) != step:
            raise UserError(f"another run has just saved to {self.folder}; start this one again")
        if (self.folder / "last.pt").exists():
            self.newest, self.best = "last.pt", "ckpt.pt"
        elif (self.folder / "best.pt").exists():
            self.newest, self.best = "ckpt.pt", "best.pt"
        self.step, path = step, self.folder / self.best
        best_val_loss = math.inf
        if self.runtime.rank == 0 and path.exists():
            saved = read_checkpoint(path)
            # By itself a ckpt.pt may be a newest state, whose best model was not kept.
            alone = path.name == "ckpt.pt" and not (self.folder / self.newest).exists()
            if not (alone and saved["config"].get("always_save_checkpoint", True)):
                best_val_loss = float(saved.get("best_val_loss", math.inf))
        self.best_val_loss = self.runtime.reduce("min", best_val_loss)

    def save(self, state, step, losses, config):
        """Write the state of `step` where it is new or the best; return whether that worked.

        `losses` are those of an evaluation, or empty. Every rank must call it; rank 0 writes. The
        best comes first: the newest knows its loss too, so a kill in between costs nothing. Raises
        UserError rather than save a loss or a weight that is not finite.
        """
        size = unshard(torch.nn.utils.get_total_norm(state.model.parameters()))
        if not math.isfinite(sum(losses.values()) + size.item()):
            kept = self.what_is_kept()
            raise UserError(f"step {step}: the loss or a weight is not finite; {kept}")
        names, val_loss = [], losses.get("val", math.inf)
        if val_loss < self.best_val_loss:
            names.append(self.best)
        if step != self.step:
            names.append(self.newest)
        if not self.writes or not names:
            return True
        best_val_loss = min(val_loss, self.best_val_loss)
        content = state.collect(step, best_val_loss, config, self.runtime)
        saved = True
        if self.runtime.rank == 0:
            saved = self.write(names, content)
        saved = self.runtime.reduce("min", saved)
        self.best_val_loss = self.runtime.reduce("min", self.best_val_loss)
        if saved:
            self.step = step
        return bool(saved)

    def write(self, names, content):
        """Write a checkpoint under each of `names`; return False, once it is said, if one fails."""
        for name in names:
            try:
                if name == names[0]:
                    with atomic(self.folder / name) as file:
                        torch.save(content, file)
                else:
                    link(self.folder / names[0], self.folder / name)
            except (OSError, RuntimeError) as fault:
                why = fault if isinstance(fault, OSError) else fault.__context__  # torch hides it
                if not isinstance(why, OSError):
                    raise
                step = content["iter_num"]
                self.runtime.say(f"step {step} is not saved: {why}; {self.what_is_kept()}")
                return False
            if name == self.best:
                self.best_val_loss = content["best_val_loss"]
        return True

    def what_is_kept(self):
        """Return a phrase on what there is to resume from."""
        if self.step is None:
            return "none was saved yet"
        return f"{self.folder} keeps the checkpoint of step {self.step}"


def take_folder(saved, state, config, runtime):
    """Return a Keeper and a Log for out_dir, made this run's own. Every rank must call it.

    `saved` is the checkpoint that the run resumes from, None for a new run. From here on a signal
    does not end the process but the loop.
    """
    folder, writes = user_path(config["out_dir"]), not config["eval_only"]
    keeper = Keeper(folder, config["always_save_checkpoint"], runtime, writes)
    log = Log(state.model, config["max_iters"], runtime)
    if not writes:
        return keeper, log
    claim(folder, runtime)
    if config["wandb_log"]:
        state.wandb_id = log.open_wandb(folder, state.wandb_id, config)
    if saved:
        keeper.resume(saved["iter_num"], newest=config["checkpoint_file"] is None)
    else:
        set_aside(folder, runtime)
    log.open(folder / "log.jsonl", state.step, config)
    catch_signals()
    return keeper, log
