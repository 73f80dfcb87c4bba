"""The folder of a run: its lock, its newest and its best state, and how a run resumes from them.

    ckpt.pt      the newest state, in nanoGPT's format with more keys
    best.pt      the state with the lowest validation loss; often a second name of the same file
    step-100/    with sharded_save: the state after 100 steps, written by all ranks
    log.jsonl    every figure of the run
    previous/1   an older run, or states from which this run did not continue; never deleted
    .lock        locked by the process that trains here

A save writes a temporary file, syncs it and renames it to ckpt.pt, or to best.pt, which then gets
the second name ckpt.pt. After a kill at any moment, each name belongs to a complete state.
"""

import math
import os
import re
import zipfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count

import torch

from engine.process import UserError, atomic, link, reason, user_error, user_path
from engine.runtime import gather, shard_like, unshard
from engine.sharded import load_sharded, save_sharded, step_folders

NANOGPTS = "block_size vocab_size n_layer n_head n_embd dropout bias".split()
FIXED = "vocab_size n_layer n_head n_embd bias position rms_norm tied".split()
HISTORY = {"best_val_loss": float, "best_step": int, "bad_steps": int, "wandb_id": str}
TEMPORARY = "*.[0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f].tmp"
# A resumed run takes these settings from its command and all others from the checkpoint. wandb's
# are among them, because the checkpoint of a stranger must not send anything.
OF_THE_COMMAND = (
    "out_dir init_from eval_only auto_resume checkpoint_file new_data "
    "wandb_log wandb_project wandb_run_name"
).split()



# --- reading -------------------------------------------------------------------------------------


def read_checkpoint(path):
    """Return the checkpoint in the file or step folder `path`, a dict. Never runs code from it.

    Tensors are read from the file when they are first used. Weights have nanoGPT's names, without
    the prefix of torch.compile. UserError if it is damaged or no checkpoint.
    """
    file = path / "rest.pt" if path.is_dir() else path
    with user_error(f"{path} cannot be read as a checkpoint", Exception):
        if not file.is_file():
            names = os.listdir(file.parent)
            raise UserError(f"no such file; there are {names}")
        if zipfile.ZipFile(file).testzip():  # 0.35 s per GB; torch.load() ignores damage
            raise UserError("it is damaged")
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(file):
            raise UserError(
                f"it holds {unsafe}; if you trust the file, load it with weights_only=False, "
                f"turn this object into a number or a text, and save it again"
            )
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if "itos" in saved.get("tokenizer", {}):  # DCP's tool turns the ids into text
            itos = saved["tokenizer"]["itos"].items()
            saved["tokenizer"]["itos"] = {int(index): character for index, character in itos}
        if "tokenizer" not in saved:  # nanoGPT wrote it, perhaps on another machine
            for name in "device dtype compile backend".split():
                saved["config"].pop(name, None)
        saved["model"] = {
            re.sub(r"^(module\.|_orig_mod\.)+", "", name): weight.cpu()  # fails without content
            for name, weight in saved["model"].items()
            if not name.endswith(".attn.bias")  # a causal mask that nanoGPT saved in 2022
        }
        saved["model_args"]["gelu_tanh"] = saved.get("gelu_tanh", False)
        saved |= {name: kind(saved[name]) for name, kind in HISTORY.items() if saved.get(name)}
    return {**saved, "path": path}


def find_checkpoint(folder, name=None):
    """Return the checkpoint `name` in `folder`, by default best.pt or else ckpt.pt."""
    default = "best.pt" if (folder / "best.pt").exists() else "ckpt.pt"
    return read_checkpoint(folder / (name or default))


def take_over(config, saved):
    """Fill `config` with the settings of the checkpoint; return a line for each changed setting.

    A flag of this command overrides the setting in the checkpoint `saved`.
    """
    changes = []
    settings = {
        "position": "learned", "rms_norm": False, "tied": True,  # nanoGPT saves no such names
        **saved["config"], **saved["model_args"],
    }  # fmt: skip
    for name in settings.keys() & config.keys() - {*OF_THE_COMMAND}:
        if name not in config.flags:
            config.assign(name, settings[name])
        elif config[name] != settings[name]:
            changes.append(f"{name}: {settings[name]} -> {config[name]}")
            if name in FIXED:
                raise UserError(f"the checkpoint has {name}={settings[name]}; leave --{name} out")
    return changes


def load_optimizer(optimizer, saved):
    """Fill `optimizer` with the moments of the checkpoint `saved`; its settings stay as they are.

    UserError if the checkpoint has another kind of optimizer, or none.
    """
    with user_error("the checkpoint has no state for this optimizer", Exception):
        before = saved["optimizer"]
        # DCP's tool turns the numbers of the parameters into text.
        state = {int(index): moments for index, moments in before["state"].items()}
        for ours, theirs in zip(optimizer.param_groups, before["param_groups"], strict=True):
            for parameter, index in zip(ours["params"], theirs["params"], strict=True):
                for name, moment in state.get(index, {}).items():
                    optimizer.state[parameter][name] = fit_moment(moment, parameter)


def fit_moment(moment, parameter):
    """Return a copy of `moment` on the device and with the sharding of `parameter`.

    Moments of a position table that is shorter now are cut too. RuntimeError for other shapes.
    """
    moment = moment.to(parameter.device, copy=True)
    if moment.dim() == 0:  # the number of updates
        return moment
    return shard_like(parameter, moment[: len(parameter)].view(parameter.shape))


# --- the state of a run --------------------------------------------------------------------------


@dataclass
class State:
    """Everything that changes in a run: a checkpoint saves and restores it."""

    model: torch.nn.Module  # neither compiled nor wrapped, so that names are nanoGPT's
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tokenizer: dict  # the dataset's meta, so that sample.py needs no dataset
    data: dict  # the digest of each split
    step: int = 0  # updates made
    best_val_loss: float = math.inf
    best_step: int = 0
    bad_steps: int = 0  # without a finite gradient, in a row
    wandb_id: str = ""

    def restore(self, saved, config):
        """Take over the checkpoint `saved`, except the weights. Return whether the data are new.

        Collective. UserError if the data have changed and no setting allows it.
        """
        if saved.get("tokenizer", self.tokenizer) != self.tokenizer:
            raise UserError(f"{config['dataset']} uses a different tokenizer than the checkpoint")
        before = saved.get("data", self.data)
        is_new = before != self.data
        if is_new and not (config["new_data"] or config["eval_only"]):
            raise UserError(
                f"the data have changed from {before} to {self.data}; "
                f"--new_data=True continues with them"
            )
        if saved["path"].is_dir():
            load_sharded(saved["path"], self.model, self.optimizer)
        else:
            load_optimizer(self.optimizer, saved)
        self.scaler.load_state_dict({**self.scaler.state_dict(), **saved.get("scaler", {})})
        self.step = max(0, saved["iter_num"])
        self.best_step = self.step
        for name in HISTORY:
            setattr(self, name, saved.get(name) or getattr(self, name))
        return is_new

    def content(self, config, rank):
        """Return the content of a checkpoint; tensors on rank 0, or sharded. Collective."""
        shape = vars(self.model.config)
        gpt2 = vars(type(self.model.config)())
        arguments = {k: v for k, v in shape.items() if k in NANOGPTS or v != gpt2[k]}
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if not config["sharded_save"]:
            tensors = gather(tensors, rank)
        return {
            **tensors,
            **{name: getattr(self, name) for name in HISTORY},
            "scaler": self.scaler.state_dict(),
            "gelu_tanh": arguments.pop("gelu_tanh", False),  # nanoGPT knows no such argument
            "model_args": arguments,
            "iter_num": self.step,
            "config": dict(config),
            "tokenizer": self.tokenizer,
            "data": self.data,
        }


# --- the folder of a run -------------------------------------------------------------------------


def lock(folder, advice):
    """Lock `folder` for this process and return the open lock file; UserError if it is in use.

    The lock ends with the process, or when the file is closed. It has no effect on Windows and on
    file systems without locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Refuse a link, which could lead to another's file, and do not wait for a named pipe.
    flags = os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    file = os.fdopen(os.open(folder / ".lock", flags, 0o666))
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{folder} is in use by another process; {advice}") from None
    except (ImportError, OSError):
        pass
    return file


class RunFolder(AbstractContextManager):
    """The folder of a run, locked on rank 0 before anything in it is read."""

    def __init__(self, config):
        self.path = user_path(config["out_dir"])
        self.config = config
        self.states = []  # found here at the start, the newest first
        self.saved_step = None  # of the newest state here that belongs to this run
        self.is_branch = False  # the run does not continue from the newest state here
        self.lock_file = None
        if os.environ.get("RANK", "0") == "0" and not config["eval_only"]:
            self.lock_file = lock(self.path, "wait, or give another --out_dir")
            for temporary in self.path.glob(TEMPORARY):
                temporary.unlink()  # a killed run left it

    def __exit__(self, *_):
        if self.lock_file:
            self.lock_file.close()

    def checkpoint_to_resume(self):
        """Return the checkpoint from which the run continues, None for a new run."""
        config = self.config
        name = config["checkpoint_file"]
        files = self.path / "ckpt.pt", self.path / "best.pt"
        self.states = [*step_folders(self.path), *filter(os.path.exists, files)]
        if config["init_from"] != "resume" and not (config["auto_resume"] and self.states):
            return None
        if self.states and not config["eval_only"]:
            name = name or self.states[0].name
        saved = find_checkpoint(self.path, name)
        self.is_branch = saved["path"] not in self.states[:1]
        self.saved_step = saved["iter_num"]
        return saved

    def set_aside(self, state, is_new, runtime):
        """Keep the older states here in previous/ if the run does not continue from the newest.

        Files leave their places only after the run has saved its first state, so a kill at any
        moment loses nothing. Collective. SystemExit if the disk has no room for that state.
        """
        is_sharded = self.config["sharded_save"]
        is_other = is_new or self.is_branch or self.states[0].is_dir() != is_sharded
        states = self.states if runtime.rank == 0 else []
        if not runtime.reduce("max", is_other and len(states)):
            return
        if runtime.rank == 0:
            previous = link_to_previous(self.path, states)
            runtime.say(f"kept the older run in {previous}")
        state.best_val_loss = math.inf
        state.wandb_id = ""
        if not is_sharded and not self.save(state, math.inf, runtime):
            raise SystemExit(1)
        for path in states:
            if path.name != "ckpt.pt" or is_sharded:
                path.unlink(missing_ok=True)

    def save(self, state, val_loss, runtime):
        """Save the newest state, also as the best if `val_loss` is the lowest so far.

        Returns whether that succeeded; if not, it has printed why. Collective. UserError if the
        loss or a weight is not finite.
        """
        norm = unshard(torch.nn.utils.get_total_norm(state.model.parameters()))
        if math.isnan(val_loss) or not norm.isfinite():
            raise UserError(
                f"step {state.step}: the loss or a weight is not finite; "
                f"resume with a lower --learning_rate"
            )
        best = state.best_val_loss, state.best_step
        is_best = val_loss < state.best_val_loss
        if is_best:
            state.best_val_loss, state.best_step = val_loss, state.step
        content = state.content(self.config, runtime.rank)
        written = 2
        if runtime.rank == 0 or self.config["sharded_save"]:
            written = self.write(content, is_best, runtime)
        written = runtime.reduce("min", written)
        if not written:
            state.best_val_loss, state.best_step = best
        if written == 2:
            self.saved_step = state.step
        return written == 2

    def write(self, content, is_best, runtime):
        """Write a checkpoint; return 2, or print why not and return 1 if best.pt is new, else 0."""
        written = 0
        try:
            if self.lock_file and not os.path.samefile(
                self.path / ".lock", self.lock_file.fileno()
            ):
                raise OSError("it is not the folder in which this run began")
            if self.config["sharded_save"]:
                save_sharded(self.path, content)
                return 2
            path = self.path / ("best.pt" if is_best else "ckpt.pt")
            with atomic(path) as file:
                torch.save(content, file)
            written = 1
            if is_best:
                link(path, self.path / "ckpt.pt")  # last, because a resume continues from it
            written = 2
        except (UserError, OSError, RuntimeError) as fault:
            fault = fault.__context__ or fault  # torch.save() hides an OSError behind its own error
            runtime.say(
                f"step {content['iter_num']} is not saved: {reason(fault)}; "
                f"the newest saved step is {self.saved_step}"
            )
        return written


def link_to_previous(folder, states):
    """Give `states` and the log second names in a new folder of previous/; return the folder.

    Step folders are moved.
    """
    folders = (folder / f"previous/{number}" for number in count(1))
    previous = next(path for path in folders if not path.exists())
    previous.mkdir(parents=True)
    for path in [*states, folder / "log.jsonl"]:
        if path.is_dir():
            os.replace(path, previous / path.name)
        elif path.exists():
            link(path, previous / path.name)
    return previous
