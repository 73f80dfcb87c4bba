"""A checkpoint: the state of a run, put into nanoGPT's ckpt.pt with more keys, and read from it."""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin

import torch

from engine.disk import missing_parts, read_file, reading
from engine.health import LossWatch, read_watch, steps_of
from engine.parallel import gather_on_rank_0, shard_like
from engine.process import UserError, check_writable, reason, user_path

NANOGPTS = "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"
# engine/folder.py says which is when, engine/sharded.py what .dcp is, engine/disk.py what .dcp.old.
NAMES = [f"{stem}.{form}" for stem in ("ckpt", "last", "best") for form in ("pt", "dcp", "dcp.old")]


# --- reading -------------------------------------------------------------------------------------


def read_checkpoint(path):
    """Return what the file holds, on the CPU; tensors are read from it when they are first used.

    Those of a folder are not read yet: see open_folder(). Weights have nanoGPT's names without the
    prefix that torch.compile gave them there. Runs no code, whatever the file holds. Raises
    UserError if it is no checkpoint or damaged.
    """
    with reading(path):
        if path.is_dir():
            from engine.sharded import open_folder  # here, because it takes a second to import

            saved = open_folder(path)
        else:
            saved = read_file(path)
        lacks = missing_parts(saved)
    if lacks:
        raise UserError(f"{path} is no checkpoint: it lacks {', '.join(lacks)}")
    if "tokenizer" not in saved:  # nanoGPT's: it names the machine that wrote it, not a wish
        for name in ("device", "dtype", "compile", "backend"):
            saved["config"].pop(name, None)
    weights = {name.removeprefix("_orig_mod."): w for name, w in saved["model"].items()}
    mask = ".attn.bias"  # of nanoGPT with PyTorch before 2.0
    saved["model"] = {name: w for name, w in weights.items() if not name.endswith(mask)}
    return saved


def find_checkpoint(folder, name=None, newest=False, whole=True):
    """Return a checkpoint in `folder`, with its tensors if `whole`; UserError where there is none.

    The file called `name`; else the `newest`, to go on from; else ckpt.pt, or another where there
    is none: it stands for the run where that is evaluated or sampled from. After a rollback, which
    skips batches, steps count anew.
    """
    known = [folder / known for known in NAMES if os.path.exists(folder / known)]
    paths = [folder / name] if name else known
    if not paths:
        raise UserError(f"no ckpt.pt in {folder}; name the folder of a run with --out_dir")
    found = map(read_checkpoint, paths if newest else paths[:1])
    saved = max(found, key=steps_of)
    if whole and "shards" in saved:
        from engine.sharded import read_tensors

        return read_tensors(saved)
    return saved


def checkpoint_to_resume(config):
    """Return the checkpoint that a run with these settings goes on from, None for a new run."""
    folder, name = user_path(config["out_dir"]), config["checkpoint_file"]
    if not config["eval_only"]:
        check_writable(folder)
    if config["init_from"] == "auto":
        raise UserError("init_from=auto: say what to start from, and add --auto_resume=True")
    begun = any(os.path.exists(folder / known) for known in NAMES)
    if config["init_from"] != "resume" and not (config["auto_resume"] and begun):
        return None
    saved = find_checkpoint(folder, name, newest=not config["eval_only"], whole=False)
    if "optimizer" not in saved:
        raise UserError(f"the checkpoint in {folder} holds no optimizer state to resume with")
    return saved


def model_config(config_class, saved, settings=None):
    """Return the config of the saved model, a `config_class`, with the dropout of `settings`.

    Raises UserError unless it is of that kind, possible, as `settings` has it, and of as many
    layers as there are weights for: to build a false million of them would take hours.
    """
    settings = settings or {}
    fields = {**dataclasses.asdict(config_class()), "gelu_tanh": saved.get("gelu_tanh", False)}
    fields |= {**saved["model_args"], "dropout": settings.get("dropout", 0.0)}
    kinds = {field.name: field.type for field in dataclasses.fields(config_class)}
    possible = all(is_of_kind(value, kinds.get(name)) for name, value in fields.items())
    possible = possible and all(0 < v < 2**31 for v in fields.values() if type(v) is int)
    if not possible or fields["n_embd"] % fields["n_head"]:
        raise UserError(f"the checkpoint is of another kind of model: {saved['model_args']}")
    layers = sum(name.endswith(".attn.c_attn.weight") for name in saved["model"])
    if layers != fields["n_layer"]:
        raise UserError(f"the weights have {layers} layers, the model {fields['n_layer']}")
    for name in ("n_layer", "n_head", "n_embd", "bias", "position", "rms_norm", "tied"):
        if settings.get(name, fields[name]) != fields[name]:
            raise UserError(f"the checkpoint has {name}={fields[name]}; leave --{name} out")
    return config_class(**fields)


def check_shape(name, shape, settings):
    """Raise UserError if `settings` ask for another shape than the model called `name` has.

    That is where they differ from it, and from GPT-2's.
    """
    for key in ("position", "rms_norm", "tied"):
        if settings[key] not in (getattr(shape, key), getattr(type(shape), key)):
            has = f"init_from={name} has {key}={getattr(shape, key)}"
            raise UserError(f"{has}; leave --{key}={settings[key]} out")


def crop(shape, weights, block_size):
    """Return `shape` with a context of `block_size`, and cut the position table in `weights` to it.

    `weights` may be None. Raises UserError if the context would be longer than it is.
    """
    if block_size > shape.block_size:
        raise UserError(
            f"block_size={block_size} exceeds the model's {shape.block_size}; "
            f"lower --block_size"
        )
    table = "transformer.wpe.weight"
    if weights and table in weights:
        weights[table] = weights[table][:block_size]
    return dataclasses.replace(shape, block_size=block_size)


def is_of_kind(value, kind):
    """Return whether `value` is of the type `kind`, or one of the words of a Literal."""
    return value in get_args(kind) if get_origin(kind) is Literal else type(value) is kind


def load_optimizer(optimizer, saved, device):
    """Fill `optimizer` with the moments of `saved`, its state_dict(); the settings stay ours.

    Moments of a position table that was cropped since are cropped too. Raises UserError where
    they do not fit.
    """
    grouped = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    groups, state = saved.get("param_groups"), saved.get("state")
    try:
        for ours, theirs in zip(optimizer.param_groups, groups, strict=True):
            theirs |= {key: value for key, value in ours.items() if key != "params"}
        if len(state) not in (0, len(grouped)):
            raise UserError(f"it has moments of {len(state)} tensors, the model {len(grouped)}")
        for index, moments in state.items():
            parameter, group = grouped[index]
            names = ("momentum_buffer",) if "momentum" in group else ("exp_avg", "exp_avg_sq")
            for name in names:
                moment = moments[name][: len(parameter)]
                if moment.shape != parameter.shape:
                    shapes = f"{tuple(moment.shape)}, not {tuple(parameter.shape)}"
                    raise UserError(f"tensor {index} has {name} of shape {shapes}")
                moments[name] = shard_like(parameter, moment.contiguous()).to(device, copy=True)
            moments["step"] = moments["step"].clone()  # nothing keeps the file mapped
        optimizer.load_state_dict(saved)
    except (LookupError, TypeError, AttributeError, ValueError) as fault:
        why = reason(fault)
        raise UserError(f"the checkpoint's optimizer fits another model: {why}") from None


# --- writing -------------------------------------------------------------------------------------


@dataclass
class State:
    """All that a run is at a step, beside its settings: what a checkpoint saves and restores."""

    model: torch.nn.Module  # the bare one: neither compiled nor wrapped names reach the file
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tokenizer: dict  # the dataset's meta, so that sample.py needs no dataset
    data: dict  # digest of each split, so that a resumed run notices other data
    step: int = 0  # updates made
    wandb_id: str | None = None
    watch: LossWatch = field(default_factory=LossWatch)

    def restore(self, saved, config, runtime):
        """Take over what the checkpoint `saved` holds beside the weights; None changes nothing.

        Every rank must call it. Raises UserError if the run would go on with other data than it was
        trained on, or ranks from different steps.
        """
        step = saved["iter_num"] if saved else -1  # a new run is at none
        if runtime.reduce("min", step) != runtime.reduce("max", step):
            raise UserError("machines resume from different steps: they must share out_dir")
        if saved is None:
            return
        dataset = config["dataset"]
        if saved.get("tokenizer", self.tokenizer) != self.tokenizer:
            raise UserError(f"dataset {dataset} is encoded unlike the checkpoint's; give another")
        asked_for = config["new_data"] or dataset != saved["config"].get("dataset")
        for split, was in saved.get("data", {}).items():
            if was != self.data[split] and not (asked_for or config["eval_only"]):
                raise UserError(
                    f"{split}.bin of dataset {dataset} has changed: it had {was}, and has "
                    f"{self.data[split]}; --new_data=True goes on with it"
                )
        was = saved["config"].get("optimizer", "adamw")  # nanoGPT knows no other
        if was != config["optimizer"]:
            raise UserError(f"the checkpoint has optimizer={was}; leave --optimizer out")
        load_optimizer(self.optimizer, saved["optimizer"], runtime.device)
        if "shards" in saved:
            from engine.sharded import load_shares

            load_shares(saved, self.model, self.optimizer, runtime)
        if saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.wandb_id = saved["iter_num"], saved.get("wandb_id")
        self.watch = read_watch(saved)
        if saved.get("data", self.data) != self.data:  # of which other losses are to be expected
            self.watch = LossWatch(rollbacks=self.watch.rollbacks, skipped=self.watch.skipped)

    def collect(self, step, best_val_loss, config, runtime):
        """Return the content of a checkpoint: whole on rank 0, or with sharded_save as it lies.

        Every rank must call it.
        """
        weights = self.model.state_dict()
        if self.model.config.tied:
            del weights["lm_head.weight"]  # the same as the token table; put together once
        state = {"model": weights, "optimizer": self.optimizer.state_dict()}
        if not config["sharded_save"]:
            state = gather_on_rank_0(state, runtime)
        state["model"].setdefault("lm_head.weight", state["model"]["transformer.wte.weight"])
        shape, gpt2 = self.model.config, type(self.model.config)()
        model_args = {  # nanoGPT refuses an argument that it does not know
            name: value
            for name, value in dataclasses.asdict(shape).items()
            if name in NANOGPTS or value != getattr(gpt2, name)
        }
        return {
            **state,
            "scaler": self.scaler.state_dict(),
            "gelu_tanh": model_args.pop("gelu_tanh", False),  # so a finetuned GPT-2 loads there
            "model_args": model_args,
            "iter_num": step,
            "best_val_loss": best_val_loss,
            "config": dict(config),
            "tokenizer": self.tokenizer,
            "data": self.data,
            "wandb_id": self.wandb_id,
            "watch": self.watch.examine(runtime),
        }
