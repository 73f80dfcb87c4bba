"""A checkpoint as a folder, of which each rank writes and reads its share.

ckpt.dcp holds what ckpt.pt would hold, for states that do not fit one host. It is written with
torch.distributed.checkpoint:

    __0_0.distcp ...    tensors, or pieces of them, as torch.save writes them: a file of each rank
    rest.pt             all that is no tensor, and the table of the pieces: plain data
    .metadata           PyTorch's table of the pieces, for its own tools: a pickle, so it stays shut

To import this module takes more than a second: that is left to where a folder is at hand.
"""

import io
import math
import shutil
import uuid
import warnings
import zipfile
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from engine.disk import beside, check_files, os_errors, put, read_file, reading, remove
from engine.parallel import shard_like
from engine.process import UserError, atomic, link

REST = "rest.pt"


# --- writing -------------------------------------------------------------------------------------


def save_folder(path, content, runtime):
    """Write the content of a checkpoint as the folder `path`. Every rank must call it.

    Sharded tensors are written by the ranks that hold them, others in turn by one of the ranks.
    Raises OSError on every rank if one fails; what was called `path` is then still there.
    """
    new = beside(path, "new")
    # Its files may be links to those of another folder, so they must not be written over.
    on_rank_0(runtime, remove, new)
    writer = Writer(new, overwrite=False)
    try:
        with plain_errors():
            dcp.save(
                named_tensors(content),
                storage_writer=writer,
                planner=dcp.DefaultSavePlanner(False, False),  # nothing is nested in there
            )
        on_rank_0(runtime, finish, writer, path, content)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)  # so that a full disk has room again
        raise


def link_folder(source, path, runtime):
    """Let the folder `source` also be called `path`. Every rank must call it; see save_folder."""

    def link_files(new):
        remove(new)
        new.mkdir()
        for file in source.iterdir():
            link(file, new / file.name)
        put(new, path)

    on_rank_0(runtime, link_files, beside(path, "new"))


def on_rank_0(runtime, act, *arguments):
    """Let rank 0 call act(*arguments). Every rank must call this, and raises OSError if it does."""
    fault = None
    if runtime.rank == 0:
        try:
            with os_errors():
                act(*arguments)
        except OSError as found:
            fault = found
    if runtime.reduce("max", fault is not None):
        raise fault or OSError("rank 0 could not write")


def finish(writer, path, content):
    """Add what is no tensor to the folder whose tensors `writer` has written; call it `path`."""
    check_files(writer.path, writer.table)  # the folder of another machine may be another
    rest = {key: value for key, value in content.items() if key not in ("model", "optimizer")}
    rest["optimizer"] = {"param_groups": content["optimizer"]["param_groups"]}
    rest["shards"] = {"id": uuid.uuid4().hex, "table": writer.table}
    with atomic(writer.path / REST) as file:
        torch.save(rest, file)
    put(writer.path, path)


def named_tensors(content):
    """Return {name: tensor} of the model and the optimizer, a tied head left out."""
    tensors = {}
    for name, tensor in content["model"].items():
        if name != "lm_head.weight" or not content["model_args"].get("tied", True):
            tensors[f"model.{name}"] = tensor
    for index, moments in content["optimizer"]["state"].items():
        for name, moment in moments.items():
            tensors[f"optimizer.{index}.{name}"] = moment
    return tensors


@contextmanager
def plain_errors():
    """Raise what PyTorch wraps in an error about ranks; no warning that a process works alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except dcp.CheckpointException as fault:
            rank, (why, _) = min(fault.failures.items())
            if rank and isinstance(why, OSError):
                raise OSError(f"rank {rank}: {why}") from None
            raise why from fault


class Writer(dcp.FileSystemWriter):
    """Writes the pieces of a rank; on rank 0 it then has a table of all."""

    def write_data(self, plan, planner):
        with os_errors():
            return super().write_data(plan, planner)

    def finish(self, metadata, results):
        super().finish(metadata, results)
        places = {piece.index: piece.storage_data for rank in results for piece in rank}
        self.table = plain_table(metadata.state_dict_metadata, places)


# --- the table of the pieces ---------------------------------------------------------------------


def plain_table(tensors, places):
    """Return PyTorch's tables as one, {name: (dtype, shape, pieces)}, of plain data.

    A piece is (its offsets in the tensor, its shape, where it lies: file, offset and length).
    """
    table = {}
    for name, tensor in tensors.items():
        pieces = []
        for chunk in tensor.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            where = place.relative_path, place.offset, place.length
            pieces.append((tuple(chunk.offsets), tuple(chunk.sizes), where))
        table[name] = tensor.properties.dtype, tuple(tensor.size), pieces
    return table


def pytorch_table(table):
    """Return `table`, of plain_table(), as PyTorch's Metadata."""
    tensors, places = {}, {}
    for name, (dtype, shape, pieces) in table.items():
        chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s, _ in pieces]
        properties = TensorProperties(dtype=dtype)
        tensors[name] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
        for offsets, _, (file, offset, length) in pieces:
            places[MetadataIndex(name, offsets)] = SimpleNamespace(
                relative_path=file, offset=offset, length=length, transform_descriptors=None
            )
    return Metadata(tensors, storage_data=places)


# --- reading -------------------------------------------------------------------------------------


def open_folder(path):
    """Return the checkpoint in the folder `path`, its tensors not yet read.

    Until load_shares() or read_tensors() they have their shape, take no memory, and are NaN.
    """
    rest = read_file(path / REST)
    shards = rest["shards"]
    check_files(path, shards["table"])
    shards["path"] = path
    blanks = {
        name: torch.full((), math.nan, dtype=dtype).expand(shape)
        for name, (dtype, shape, _) in shards["table"].items()
    }
    return nested(blanks, rest)


def nested(tensors, rest):
    """Return `rest` with what named_tensors() took apart put together again."""
    weights, state = {}, {}
    for name, tensor in tensors.items():
        part, _, name = name.partition(".")
        if part == "model":
            weights[name] = tensor
        else:
            index, _, name = name.partition(".")
            state.setdefault(int(index), {})[name] = tensor
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    return {**rest, "model": weights, "optimizer": {**rest["optimizer"], "state": state}}


def read_tensors(saved):
    """Return the checkpoint `saved`, of open_folder(), with its tensors whole on the CPU."""
    rest = {key: value for key, value in saved.items() if key != "shards"}
    tensors = {name: tensor.clone() for name, tensor in named_tensors(saved).items()}
    fill(tensors, saved["shards"])
    return nested(tensors, rest)


def load_shares(saved, model, optimizer, runtime):
    """Fill `model` and `optimizer` from the folder of `saved`; each rank reads only its share.

    Every rank must call it. Raises UserError where a piece is damaged, and ends the other ranks.
    """
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    table, fault = saved["shards"]["table"], ""
    tensors = named_tensors({**saved, **content})
    whole = {  # of a position table that was cropped since, and its moments
        name: torch.empty(table[name][1])
        for name, tensor in tensors.items()
        if table[name][1] != tuple(tensor.shape)
    }
    try:
        fill(tensors | whole, saved["shards"])
    except UserError as found:
        fault = str(found)
    if runtime.reduce("max", bool(fault)):
        raise UserError(fault) if fault else SystemExit(1)
    for name, tensor in whole.items():
        cropped = tensor[: len(tensors[name])].to(runtime.device)
        tensors[name].copy_(shard_like(tensors[name], cropped))


def fill(tensors, shards):
    """Read `tensors`, {name: tensor}, whole or sharded, from the folder that `shards` describes."""
    path, reader = shards["path"], Reader(shards["path"], shards["table"])
    with reading(path):
        with plain_errors():
            dcp.load(
                tensors,
                storage_reader=reader,
                planner=dcp.DefaultLoadPlanner(False, False),
                no_dist=True,  # a rank needs no other to read
            )
        if read_file(path / REST)["shards"]["id"] != shards["id"]:
            raise UserError("another was saved while it was read; start again")


class Reader(dcp.FileSystemReader):
    """Reads the pieces in `table`, each after a look at its checksum; nothing in them can run."""

    def __init__(self, path, table):
        super().__init__(path)
        self.table = table

    def read_metadata(self, *arguments, **options):
        return pytorch_table(self.table)

    def _slice_file(self, file, place):
        file.seek(place.offset)
        piece = io.BytesIO(file.read(place.length))
        if zipfile.ZipFile(piece).testzip():  # torch.load ignores checksums
            raise UserError(f"{place.relative_path} in it is damaged")
        piece.seek(0)
        return piece
