"""Corpora of many documents to token files, in steps that can be stopped and continued.

A document is a row of a .parquet, .jsonl, .json or .csv file, or a complete .txt file. The library
`datasets` reads the files as streams, one after another in the order of their paths. Empty
documents are skipped. The others are numbered from 0, and their numbers decide which of them are
for validation. An end-of-text token follows each document.

A preparation works in data/NAME/unfinished. It appends the tokens of 1,000 rows to train.bin and
val.bin, syncs both, and records in prepare.json how far it has come. After a stop at any moment,
the same command cuts both files back to the record and continues, so it ends in the bytes of a
preparation that was never stopped. At the end, the finished files replace the old dataset.
"""

import fnmatch
import glob
import json
import os
import re
import shutil
from itertools import islice
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from data.tokenizer import find_files, make_meta, make_tokenizer
from data.tokens import id_dtype, write_dataset
from engine.checkpoint import lock
from engine.process import UserError, atomic, user_error

# The name of the group that matches a path is the name of its reader in `datasets`.
FILE_NAME = re.compile(
    r"(?i)\.(?:(?P<parquet>parquet)|(?P<json>jsonl?)|(?P<csv>csv)|(?P<text>txt))"
    r"(?:\.(?:gz|bz2|xz|zst))?$"
)


def prepare_documents(folder, config, repository, pattern, held_out):
    """Make the dataset in `folder` from local files or from a dataset repository of the hub.

    config["input"] is a file or a folder; if it is None, the files of the repository that match
    `pattern` are read. `held_out` contains the numbers of the documents for validation. Returns
    the record of the preparation.
    """
    work = folder / "unfinished"
    advice = f"cannot write to {folder}; make room and run the same command again"
    with lock(work, "wait for it to end"):
        record = begin(work, config, repository, pattern)
        with user_error(advice, OSError):
            write_documents(work, record, held_out)
        if not all(record.bytes.values()):
            shutil.rmtree(work)
            raise UserError(
                f"{record.documents} documents leave a split empty; give more, or their "
                f"number with --limit"
            )
        if (work / "train.bin").exists():
            (folder / "val.bin").unlink(missing_ok=True)  # nothing trains without it
        write_dataset(folder, record.meta)
        for name in record.bytes:
            if (work / name).exists():  # else it was moved before a kill
                os.replace(work / name, folder / name)
        shutil.rmtree(work)
    print(f"{record.documents} documents, {record.rows - record.documents} empty ones skipped")
    for name, size in record.bytes.items():
        print(f"{folder / name}: {size // id_dtype(record.meta).itemsize:,} tokens")
    return record


# --- reading -------------------------------------------------------------------------------------


def find_on_hub(repository, pattern, revision):
    """Return the paths of the files of a dataset on the hub, at the commit of `revision` now."""
    from huggingface_hub import HfApi  # takes a second

    with user_error(f"cannot list {repository} on the hub (offline, give --input=PATH)", Exception):
        info = HfApi().dataset_info(repository, revision=revision, timeout=10)
    print(f"{repository}: commit {info.sha}")
    names = fnmatch.filter([file.rfilename for file in info.siblings], pattern)
    return [f"hf://datasets/{repository}@{info.sha}/{name}" for name in sorted(names)]


def read_rows(files, column, first=0, done=0):
    """Yield [number of the file, rows of it that are done] and the text, for each row.

    The `done` rows of file number `first`, and all files before it, are left out.
    """
    for number in range(first, len(files)):
        for text in read_texts(files[number], column, done):
            done += 1
            yield [number, done], text
        done = 0


def read_texts(path, column, done):
    """Yield the text of each row of a file, without the first `done`; "" for null.

    Byte order marks are dropped, and line ends become \\n.
    """
    os.environ |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "DATASETS_VERBOSITY": "critical"}
    from datasets import load_dataset  # takes a second

    reader = FILE_NAME.search(path).lastgroup
    parquet = {"columns": [column], "batch_size": 1000}
    options = {"parquet": parquet, "text": {"sample_by": "document"}}.get(reader, {})
    with user_error(
        f"cannot read {path} (check --column={column}; if the network failed, run this again)",
        Exception,
    ):
        rows = load_dataset(
            reader, data_files=glob.escape(path), split="train", streaming=True, **options
        )
        for row in rows.skip(done):
            text = row.get(column, 0)
            if not isinstance(text, str | None):
                raise ValueError(f"no text in column {column} of {[*row]}")
            yield (text or "").removeprefix("\ufeff").replace("\r\n", "\n")


# --- writing -------------------------------------------------------------------------------------


def begin(work, config, repository, pattern):
    """Return the record of the unfinished preparation in the folder `work`, or a new record."""
    path = work / "prepare.json"
    if path.exists():
        record = json.loads(path.read_bytes())
        if record | config != record:
            raise UserError(
                f"{work} holds another preparation; repeat its command to finish it, or delete it"
            )
        return SimpleNamespace(**record)
    if config["input"] is None:
        files = find_on_hub(repository, pattern, config["revision"])
    else:
        files = [str(path) for path in find_files(config["input"], FILE_NAME.search)]
    rows = islice(read_rows(files, config["column"]), config["limit"])
    texts = (text[:10_000] for _, text in islice(rows, 10_000))  # a trained tokenizer needs no more
    meta = make_meta(config["tokenizer"], texts)
    counts = {"rows": 0, "documents": 0, "bytes": {"train.bin": 0, "val.bin": 0}}
    return SimpleNamespace(files=files, position=[0, 0], meta=meta, **counts, **config)


def write_documents(work, record, held_out):
    """Append all documents that `record` does not count yet to the splits in the folder `work`."""
    tokenizer = make_tokenizer(record.meta)
    if tokenizer.eot is None:
        raise UserError("documents need an end-of-text token: tokenizer=gpt2, bytes or bpe:SIZE")
    rows = read_rows(record.files, record.column, *record.position)
    rows = islice(rows, record.limit and record.limit - record.rows)
    rows = iter(tqdm(rows, total=record.limit, initial=record.rows, unit=" documents"))
    while batch := list(islice(rows, 1000)):
        append(batch, work, record, tokenizer, held_out)


def append(batch, work, record, tokenizer, held_out):
    """Append the tokens of a batch of rows to the splits in `work`, and update the record there."""
    dtype = id_dtype(record.meta)
    contents = {"train.bin": bytearray(), "val.bin": bytearray()}
    texts = [text for _, text in batch if text.strip()]
    for ids in tokenizer.encode_batch(texts):
        name = "val.bin" if record.documents in held_out else "train.bin"
        contents[name] += np.append(ids, tokenizer.eot).astype(dtype).tobytes()
        record.documents += 1
    for name, content in contents.items():
        with open(work / name, "ab") as file:
            file.truncate(record.bytes[name])  # it is longer after a stop
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        record.bytes[name] += len(content)
    record.rows += len(batch)
    record.position = batch[-1][0]
    with atomic(work / "prepare.json") as file:
        file.write(json.dumps(vars(record)).encode())
