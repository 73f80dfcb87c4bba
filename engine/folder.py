"""The folder of a run: it has one owner, keeps the newest and the best state, and an older run.

    always_save_checkpoint    newest     best
    True                      ckpt.pt    best.pt
    False                     last.pt    ckpt.pt

With sharded_save they are folders of the same names, ckpt.dcp and so on.
"""

import math
import time
from contextlib import suppress

import torch

from engine.checkpoint import NAMES, read_checkpoint
from engine.disk import existing, os_errors, recover, remove
from engine.health import steps_of
from engine.lock import lock
from engine.log import Log
from engine.parallel import unshard
from engine.previous import set_aside, steps_in
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


class Keeper:
    """Keeps the newest and the best state of one run in `folder`."""

    def __init__(self, folder, config, runtime):
        self.folder, self.config, self.runtime = folder, config, runtime
        always_save = config["always_save_checkpoint"]
        self.newest, self.best = ("ckpt.pt", "best.pt") if always_save else ("last.pt", "ckpt.pt")
        self.step, self.tried_at = None, time.monotonic()  # of the newest file; the last save
        self.best_step, self.best_val_loss = 0, math.inf  # of the best
        self.is_behind = False  # the newest file is of a run that this one does not go on with
        self.gave_up = False  # patience is at its end

    def resume(self, steps, newest=True):
        """Go on from `steps` with what is in the folder, under the names it has there.

        Where always_save_checkpoint has changed since, the names stay: both states are kept anyway.
        Raises UserError if they were read as the `newest` and another run has saved since.
        """
        if newest and steps_in(self.folder) != steps:
            raise UserError(f"another run has just saved to {self.folder}; start this one again")
        step, self.is_behind = steps[1], not newest
        if existing(self.folder / "last.pt").exists():
            self.newest, self.best = "last.pt", "ckpt.pt"
        elif existing(self.folder / "best.pt").exists():
            self.newest, self.best = "ckpt.pt", "best.pt"
        self.step, path = step, existing(self.folder / self.best)
        best_step, best_val_loss = step, math.inf
        if self.runtime.rank == 0 and path.exists():
            saved = read_checkpoint(path)
            # By itself a ckpt.pt may be a newest state, whose best model was not kept.
            alone = path.stem == "ckpt" and not existing(self.folder / self.newest).exists()
            if not (alone and saved["config"].get("always_save_checkpoint", True)):
                best_val_loss = float(saved.get("best_val_loss", math.inf))
                best_step = saved["iter_num"]
        self.best_val_loss = self.runtime.reduce("min", best_val_loss)
        self.best_step = int(self.runtime.reduce("min", best_step))

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
        elif losses and self.config["patience"]:
            patience = self.config["patience"] * self.config["eval_interval"]  # in steps
            self.gave_up = self.best_step + patience <= step < self.config["max_iters"]
        if self.is_behind or step != self.step:
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
        self.tried_at = time.monotonic()
        if saved:
            self.step, self.is_behind = step, False
        return bool(saved)

    def is_due(self):
        """Return whether save_interval is over since the last save. Every rank must call it."""
        minutes = self.config["save_interval"]
        if not minutes:
            return False
        return bool(self.runtime.reduce("max", time.monotonic() - self.tried_at >= 60 * minutes))

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
            except OSError as why:
                step = content["iter_num"]
                self.runtime.say(f"step {step} is not saved: {why}; {self.what_is_kept()}")
                return False
            if name == self.best:
                self.best_val_loss = content["best_val_loss"]
            with suppress(OSError):
                if self.runtime.rank == 0:
                    remove(path.with_suffix(other))  # of before the setting changed
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
        keeper.resume(steps_of(saved), newest=config["checkpoint_file"] is None)
    else:
        set_aside(folder, runtime)
    log.open(folder / "log.jsonl", state.step, config)
    catch_signals()
    return keeper, log
