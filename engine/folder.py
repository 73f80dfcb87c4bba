"""The folder of a run: it has one owner, keeps the newest and the best state, and an older run.

    always_save_checkpoint    newest     best
    True                      ckpt.pt    best.pt
    False                     last.pt    ckpt.pt

With sharded_save they are folders of the same names, ckpt.dcp and so on.
"""

import math
import os
import shutil
import time
from contextlib import suppress

import torch

from engine.checkpoint import NAMES, read_checkpoint
from engine.disk import existing, os_errors, recover, remove
from engine.lock import lock
from engine.log import Log
from engine.parallel import unshard
from engine.process import UserError, atomic, catch_signals, link, user_error, user_path


def claim(folder, runtime):
    """Make this run the owner of `folder`, made if need be. Every rank must call it.

    Raises UserError on rank 0, and ends the others, where another run owns it.
    """
    fault = ""
    if runtime.rank == 0:
        try:
            with user_error(folder, OSError):
                lock(folder, "give another --out_dir, or wait")
                for name in (*NAMES, "log.jsonl"):  # what a kill in a save left
                    (folder / f"{name}.tmp").unlink(missing_ok=True)
                    recover(folder / name)
        except UserError as found:
            fault = str(found)
    if runtime.reduce("max", bool(fault)):
        raise UserError(fault) if fault else SystemExit(1)


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

    def __init__(self, folder, config, runtime):
        self.folder, self.config, self.runtime = folder, config, runtime
        always_save = config["always_save_checkpoint"]
        self.newest, self.best = ("ckpt.pt", "best.pt") if always_save else ("last.pt", "ckpt.pt")
        self.step, self.saved_at = None, time.monotonic()  # of the newest file
        self.best_step, self.best_val_loss = 0, math.inf  # of the best

    def resume(self, step, newest=True):
        """Go on from `step` with what is in the folder, under the names it has there.

        Where always_save_checkpoint has changed since, the names stay: both states are kept anyway.
        Raises UserError if `step` was read as the `newest` and another run has saved since.
        """
        if newest and steps_in(self.folder) != step:
            raise UserError(f"another run has just saved to {self.folder}; start this one again")
        if existing(self.folder / "last.pt").exists():
            self.newest, self.best = "last.pt", "ckpt.pt"
        elif existing(self.folder / "best.pt").exists():
            self.newest, self.best = "ckpt.pt", "best.pt"
        self.step, path = step, existing(self.folder / self.best)
        best_step, best_val_loss = 0, math.inf
        if self.runtime.rank == 0 and path.exists():
            saved = read_checkpoint(path)
            # By itself a ckpt.pt may be a newest state, whose best model was not kept.
            alone = path.stem == "ckpt" and not existing(self.folder / self.newest).exists()
            if not (alone and saved["config"].get("always_save_checkpoint", True)):
                best_val_loss = float(saved.get("best_val_loss", math.inf))
                best_step = saved["iter_num"]
        self.best_val_loss = self.runtime.reduce("min", best_val_loss)
        self.best_step = int(self.runtime.reduce("max", best_step))

    def save(self, state, step, losses):
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
        if self.config["eval_only"] or not names:
            return True
        best_val_loss = min(val_loss, self.best_val_loss)
        content = state.collect(step, best_val_loss, self.config, self.runtime)
        saved = True
        if self.config["sharded_save"] or self.runtime.rank == 0:
            saved = self.write(names, content)
        saved = self.runtime.reduce("min", saved)
        self.best_val_loss = self.runtime.reduce("min", self.best_val_loss)
        if self.best in names and self.best_val_loss == val_loss:
            self.best_step = step
        if saved:
            self.step, self.saved_at = step, time.monotonic()
        return bool(saved)

    def is_due(self):
        """Return whether save_interval has passed since the last save. Every rank must call it."""
        minutes = self.config["save_interval"]
        if not minutes:
            return False
        return bool(self.runtime.reduce("max", time.monotonic() - self.saved_at >= 60 * minutes))

    def out_of_patience(self, step):
        """Return whether the best model is `patience` evaluations older than `step`."""
        patience = self.config["patience"] * self.config["eval_interval"]  # in steps
        return bool(patience) and step - self.best_step >= patience

    def write(self, names, content):
        """Write a checkpoint under each of `names`; return False, once it is said, if one fails.

        Rank 0 must call it, with sharded_save every rank.
        """
        form, other = (".dcp", ".pt") if self.config["sharded_save"] else (".pt", ".dcp")
        first = (self.folder / names[0]).with_suffix(form)
        for name in names:
            path = (self.folder / name).with_suffix(form)
            try:
                with os_errors():
                    self.put(path, first, content)
                    if self.runtime.rank == 0:
                        remove(path.with_suffix(other))  # of before the setting changed
            except OSError as why:
                step = content["iter_num"]
                self.runtime.say(f"step {step} is not saved: {why}; {self.what_is_kept()}")
                return False
            if name == self.best:
                self.best_val_loss = content["best_val_loss"]
        return True

    def put(self, path, first, content):
        """Write a checkpoint to `path`, as a link to `first` where that is another."""
        if self.config["sharded_save"]:
            from engine.sharded import link_folder, save_folder  # here: it takes a second to import

            if path == first:
                save_folder(path, content, self.runtime)
            else:
                link_folder(first, path, self.runtime)
        elif path == first:
            with atomic(path) as file:
                torch.save(content, file)
        else:
            link(first, path)

    def read_best(self):
        return read_checkpoint(existing(self.folder / self.best))

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
    folder = user_path(config["out_dir"])
    keeper, log = Keeper(folder, config, runtime), Log(state.model, config, runtime)
    if config["eval_only"]:
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
