"""Checkpoints in which each rank writes its own shards, by torch.distributed.checkpoint (DCP).

The folder step-100 holds a file of each rank, DCP's table of them, and rest.pt: everything but the
tensors, written last, so that it marks the folder as complete. PyTorch can convert it to a ckpt.pt:

    python -m torch.distributed.checkpoint.format_utils dcp_to_torch out/step-100 out/ckpt.pt
"""

import pickle
import shutil
import warnings
from contextlib import contextmanager

import torch.distributed as dist

from engine.process import atomic, user_error

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
    complete = [path.parent for path in folder.glob("step-*/rest.pt")]
    return sorted(complete, key=lambda path: -int(path.name.removeprefix("step-")))


@contextmanager
def plain_errors():
    """Raise the error of a rank instead of DCP's summary.

    Also silences DCP's warnings about a single process and about an incomplete folder.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled|Detected an existing")
    try:
        yield
    except dist.checkpoint.CheckpointException as fault:
        error, _ = fault.failures[min(fault.failures)]
        raise error from None


def save_sharded(folder, content):
    """Write the content of a checkpoint to a new step folder of `folder`. Collective.

    Afterwards only the newest and the best step remain. Raises the same error on every rank.
    """
    import torch.distributed.checkpoint  # a slow import, needed only here

    path = folder / f"step-{content['iter_num']}"
    with plain_errors():
        dist.checkpoint.save(content, checkpoint_id=path)
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    optimizer = {"param_groups": content["optimizer"]["param_groups"]}
    with atomic(path / "rest.pt") as file:
        torch.save({**content, "model": {}, "optimizer": optimizer}, file)
    for older in step_folders(folder)[1:]:
        if older.name != f"step-{content['best_step']}":
            shutil.rmtree(older)


def load_sharded(path, model, optimizer):
    """Fill `model` and `optimizer` from the step folder `path`; each rank reads its shards."""
    import torch.distributed.checkpoint

    class Reader(dist.checkpoint.FileSystemReader):
        def read_metadata(self, *args, **options):
            with open(path / ".metadata", "rb") as file:
                return TableUnpickler(file).load()

    state = {"model": model.state_dict()}
    if path.name != "step-0":  # before the first update the optimizer has no state
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # an update by nothing makes the state that is to be filled
        state["optimizer"] = {"state": optimizer.state_dict()["state"]}
    with user_error(f"{path} cannot be read", Exception), plain_errors():
        dist.checkpoint.load(state, storage_reader=Reader(path), no_dist=True)
