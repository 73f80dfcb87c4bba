"""Turn a checkpoint that is a file into one that is a folder, or back: the names say which.

    python tools/convert.py --input=out/ckpt.dcp --output=out/model.pt
    python tools/convert.py --input=out/ckpt.pt --output=elsewhere/ckpt.dcp

One process does it, without a GPU, and holds the whole state in its memory. sample.py, the other
tools and a resumed run read both forms as they are; what reads only nanoGPT's ckpt.pt needs this.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configurator import configure  # noqa: E402
from engine.checkpoint import read_checkpoint  # noqa: E402
from engine.disk import os_errors  # noqa: E402
from engine.process import (  # noqa: E402
    UserError,
    atomic,
    check_writable,
    one_line_errors,
    user_error,
    user_path,
)
from engine.runtime import start_runtime  # noqa: E402
from engine.sharded import read_tensors, save_folder  # noqa: E402

input = ""                        # checkpoint to read: a file, or a folder NAME.dcp
output = ""                       # checkpoint to write: NAME.dcp is a folder, NAME.pt a file


def check_paths(source, target):
    """Raise UserError unless there is a checkpoint to read, and nothing is in the way."""
    if not (input and output):
        raise UserError("give --input=NAME.dcp and --output=NAME.pt, or the other way round")
    if target.suffix not in (".pt", ".dcp"):
        raise UserError(f"output={output}: let it end in .pt for a file or .dcp for a folder")
    if target.exists():
        raise UserError(f"--output={output} exists already; give a new name")
    check_writable(target.parent, "output")


def read_whole(path):
    """Return the checkpoint at `path`, a file or a folder, with all tensors."""
    saved = read_checkpoint(path)
    return read_tensors(saved) if "shards" in saved else saved


@one_line_errors
def main(config):
    source, target = user_path(input), user_path(output)
    check_paths(source, target)
    runtime = start_runtime("cpu", "float32", compile=False)
    if runtime.world_size > 1:
        raise UserError("one process converts a checkpoint: start it without torchrun")
    saved = read_whole(source)
    if "optimizer" not in saved:
        raise UserError(f"{source} holds no optimizer state; sample.py reads it as it is")
    with user_error(output, OSError), os_errors():
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".dcp":
            save_folder(target, saved, runtime)
        else:
            with atomic(target) as file:
                torch.save(saved, file)
    print(f"{target}: the state of step {saved['iter_num']}")


if __name__ == "__main__":
    main(configure(globals()))
