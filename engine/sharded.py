"""Checkpoints in which each rank writes its own shards, by torch.distributed.checkpoint (DCP).

The folder step-100 holds a file of each rank, DCP's table of them, and rest.pt: everything but the
tensors, written last, so that it marks the folder as complete. PyTorch can convert it to a ckpt.pt:

    python -m torch.distributed.checkpoint.format_utils dcp_to_torch out/step-100 out/ckpt.pt
"""

import io
import pickle
import shutil
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist

from engine.process import UserError, atomic, user_error

# The classes in DCP's table; it is a pickle, which could otherwise run any code.
TABLE_CLASSES = {
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "MetadataIndex", "StorageMeta", "_StorageInfo", "_MEM_FORMAT_ENCODING",
    "Size", "float32", "bfloat16", "float16", "int64", "strided", "_get_layout", "PosixPath",
}  # fmt: skip


class TableUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if module.split(".")[0] not in ("torch", "pathlib") or name not in TABLE_CLASSES:
            raise pickle.UnpicklingError(f"it asks to run {module}.{name}")
        return super().find_class(module, name)


def step_folders(folder):
    """Return the complete step folders in `folder`, the newest first."""
    return sorted(
        (marker.parent for marker in folder.glob("step-*/rest.pt")),
        key=lambda path: (len(path.name), path.name),  # as numbers
        reverse=True,
    )


@contextmanager
def import_dcp():
    """Yield DCP's module, and raise the error of a rank instead of DCP's summary.

    Also silences DCP's warnings about a single process and about an incomplete folder.
    """
    import torch.distributed.checkpoint as dcp  # slow, and needed only here

    warnings.filterwarnings("ignore", "torch.distributed is disabled|Detected an existing")
    try:
        yield dcp
    except dcp.CheckpointException as fault:
        raise fault.failures[min(fault.failures)][0] from None


def save_sharded(folder, content):
    """Write the content of a checkpoint to a new step folder of `folder`. Collective.

    Afterwards only the newest and the best step remain. Raises the same error on every rank.
    """
    path = folder / f"step-{content['iter_num']}"
    with import_dcp() as dcp:
        dcp.save(content, checkpoint_id=path)
    if not dist.is_initialized() or dist.get_rank() == 0:
        with atomic(path / "rest.pt") as file:
            optimizer = content["optimizer"] | {"state": {}}
            torch.save(content | {"model": {}, "optimizer": optimizer}, file)
        for older in step_folders(folder)[1:]:
            if older.name != f"step-{content['best_step']}":
                shutil.rmtree(older)


def check_table(path):
    """Raise an error if DCP's table of the step folder `path` could run code or lacks a shard."""
    with user_error(f"{path}/.metadata", Exception):
        table = TableUnpickler(io.BytesIO((path / ".metadata").read_bytes())).load()
        for name, entry in table.state_dict_metadata.items():
            present = sum(chunk.sizes.numel() for chunk in getattr(entry, "chunks", []))
            if present < torch.Size(getattr(entry, "size", [0])).numel():
                raise UserError(f"it lacks a shard of {name}")


def load_sharded(path, model, optimizer):
    """Fill `model` and `optimizer` from the step folder `path`; each rank reads its shards."""
    state = {"model": model.state_dict()}
    if path.name != "step-0":  # before the first update the optimizer has no state
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the state; the weights that it changes are loaded below
        state["optimizer"] = {"state": optimizer.state_dict()["state"]}
    check_table(path)
    with import_dcp() as dcp:
        dcp.load(state, checkpoint_id=path, no_dist=True)
