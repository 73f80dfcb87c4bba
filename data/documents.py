"""Documents into token files, part by part, so that a preparation can be stopped and started again.

A dataset in the making lies in data/NAME/unfinished: a file of tokens for each part of the corpus,
and prepare.json, which says of what, from which commit of the hub, and how. Each file appears whole
or not at all. A start with the same settings goes on with the first part that is missing, and ends
with the bytes of a preparation that was never stopped; one with other settings is refused while
parts of this one lie there. What is whole takes its place at the end, and that of an older dataset.

A document is held out to validate on, or not, by its number in the corpus, as in nanoGPT; val.bin
has them in nanoGPT's order. Documents to train on stay in the corpus's order, not shuffled: windows
are drawn at random or as a permutation anyway, and a part depends on no other part.
"""

import json
import math
import os
import pickle
import re
import shutil
from collections import defaultdict, deque
from contextlib import suppress
from io import BytesIO

import numpy as np
from tqdm import tqdm

from data.corpus import hub_corpus, in_pieces, local_corpus
from data.tokenizer import make_meta, make_tokenizer, read_meta
from data.tokens import id_dtype
from engine.lock import lock
from engine.process import UserError, atomic, sync_folder, user_error

HELD_OUT, SEED = 0.0005, 2357  # nanoGPT's
LEARNED_FROM = 10**8  # characters that byte pairs of one's own are made for
RECORD = "prepare.json"


def prepare_documents(folder, config, repository, pattern, expected=None):
    """Make the dataset in `folder` of a dataset repository of the hub, or of local files.

    `config` has the settings input, limit, tokenizer, revision and num_proc. Raises UserError where
    the whole repository has not the `expected` number of documents.
    """
    check_tokenizer(config["tokenizer"])  # first: without its files all the rest is for nothing
    if config["input"] is None:
        commit = known_commit(folder, repository, pattern, config["revision"])
        corpus = hub_corpus(repository, pattern, config["revision"], commit)
    else:
        corpus = local_corpus(config["input"])
    with user_error(f"cannot write to {folder}; start again to go on", OSError):
        lock(folder, "wait for it to end")
        put_in_place(folder)
        plan = make_plan(corpus, config, expected)
        record = read_record(folder)
        if record.get("plan") == plan and record["files"] == dataset_files(folder):
            print(f"{folder} is prepared already")
        else:
            write_parts(folder / "unfinished", corpus, plan, config["num_proc"])
            finish(folder, plan)
    report(folder)


def check_tokenizer(name):
    """Raise UserError unless the tokenizer can be made, and can end a document."""
    if make_tokenizer(make_meta(name, [""])).eot is None:
        raise UserError(f"tokenizer={name} has no end-of-text token; take gpt2, bytes or bpe:SIZE")


# --- what is to be made, and of what -------------------------------------------------------------


def make_plan(corpus, config, expected):
    """Return what a preparation depends on, as plain data. UserError where it cannot be split."""
    plan = {"tokenizer": config["tokenizer"], "limit": config["limit"]}
    plan |= {"origin": corpus.origin, "sources": corpus.sources}
    print(f"{len(corpus.paths):,} {corpus.kind} to read; counting documents")
    plan["parts"] = corpus.parts(config["limit"])
    plan["documents"] = count = sum(part["documents"] for part in plan["parts"])
    if expected and corpus.origin and config["limit"] is None and count != expected:
        raise UserError(f"the hub gave {count:,} documents of {expected:,}; try later")
    if count < 2:
        raise UserError(f"{count} documents cannot be split; give at least 2")
    return plan


def held_out(count):
    """Return which of `count` documents validate, in order: as train_test_split draws for nanoGPT.

    That is a function of the library `datasets`.
    """
    order = np.random.default_rng(SEED).permutation(count)
    return order[: math.ceil(HELD_OUT * count)].tolist()


def read_record(folder):
    """Return what prepare.json in `folder` says, {} where there is none."""
    with suppress(OSError, ValueError):
        record = json.loads((folder / RECORD).read_bytes())
        if isinstance(record, dict):
            return record
    return {}


def write_json(path, content):
    with atomic(path) as file:
        file.write(json.dumps(content).encode())


def known_commit(folder, repository, pattern, revision):
    """Return the commit that an earlier start took, None where there was none.

    A branch moves on, and a dataset of two commits would be none.
    """
    wanted = {"repository": repository, "pattern": pattern, "revision": revision}
    for place in ("unfinished", "finished", "."):
        origin = read_record(folder / place).get("plan", {}).get("origin", {})
        if wanted.items() <= origin.items():
            return origin["commit"]


# --- the parts -----------------------------------------------------------------------------------


def write_parts(work, corpus, plan, num_proc):
    """Write those token files to the folder `work` that are not there yet."""
    begin(work, plan)
    apart, parts = set(held_out(plan["documents"])), plan["parts"]
    encoder = open_tokenizer(work, corpus, plan, apart)
    with tqdm(total=plan["documents"], unit=" documents", smoothing=0.05) as progress:
        for number, part in enumerate(parts):
            path = work / ("train.bin" if len(parts) == 1 else f"train_{number:04}.bin")
            if path.exists():
                progress.update(part["documents"])
            else:
                documents = corpus.documents(part)
                write_part(path, documents, apart, encoder, num_proc, progress)


def begin(work, plan):
    """Let `work` be the folder of this preparation. UserError if another has parts in it."""
    found, old = list(work.glob("train*.bin")), read_record(work).get("plan", {})
    if old == plan:
        print(f"going on in {work}: {len(found)} of {len(plan['parts'])} parts are there")
        return
    if found:
        differs = next(name for name in plan if plan[name] != old.get(name))
        raise UserError(
            f"{work} holds {len(found)} parts of another preparation, not of the same {differs}; "
            f"start that one again to end it, or delete the folder"
        )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    write_json(work / RECORD, {"plan": plan})


def open_tokenizer(work, corpus, plan, apart):
    """Return the tokenizer. One for this text is made once, of documents not held out."""
    if plan["tokenizer"] != "gpt2" and not (work / "meta.pkl").exists():
        texts = corpus.beginning(plan["parts"], apart, LEARNED_FROM)
        meta = make_meta(plan["tokenizer"], texts)
        with atomic(work / "meta.pkl") as file:
            pickle.dump(meta, file)
    return make_tokenizer(read_meta(work))


def pieces(documents, progress, waiting, counts):
    """Yield the pieces of all documents but empty ones, and count.

    To `waiting` goes, for each piece, the number of its document, and whether that ends there.
    """
    for number, text in documents:
        progress.update()
        counts["skipped"] += not text
        counts["bytes"] += len(text.encode())
        for piece, last in in_pieces(text) if text else ():
            waiting.append((number, last))
            yield piece


def write_part(path, documents, apart, encoder, num_proc, progress):
    """Write a token file, and first, beside it, the documents held out and what was counted."""
    waiting, counts, kept = deque(), {"skipped": 0, "bytes": 0}, defaultdict(BytesIO)
    dtype = id_dtype(encoder.meta)
    end = np.array(encoder.eot, dtype).tobytes()
    with atomic(path) as file:
        texts = pieces(documents, progress, waiting, counts)
        for ids in encoder.encode_corpus(texts, num_proc):
            number, last = waiting.popleft()
            target = kept[number] if number in apart else file
            target.write(np.asarray(ids, dtype).tobytes() + (end if last else b""))
        counts["held_out"] = {number: ids.getvalue().hex() for number, ids in kept.items()}
        write_json(path.with_suffix(".json"), counts)


# --- the end -------------------------------------------------------------------------------------


def finish(folder, plan):
    """Write val.bin, in nanoGPT's order, and put everything in its place."""
    work, ids = folder / "unfinished", {}
    counts = [json.loads(path.read_bytes()) for path in work.glob("train*.json")]
    for each in counts:
        ids |= each["held_out"]
    with atomic(work / "val.bin") as file:
        for number in held_out(plan["documents"]):
            file.write(bytes.fromhex(ids.get(str(number), "")))
    files = dataset_files(work)
    if not files["val.bin"] or not any(files[name] for name in files if "train" in name):
        shutil.rmtree(work)
        raise UserError("a split is empty, for too many documents are; give more")
    record = {"plan": plan, "files": files}
    record |= {name: sum(each[name] for each in counts) for name in ("skipped", "bytes")}
    write_json(work / RECORD, record)
    os.replace(work, folder / "finished")  # from here on it counts as whole
    sync_folder(folder)
    put_in_place(folder)


def dataset_files(folder):
    """Return the sizes of the files of the dataset in `folder`, by name, in alphabetical order."""
    names = re.compile(r"meta\.pkl|(train|val)(_\d+)?\.bin")
    found = sorted(path for path in folder.iterdir() if names.fullmatch(path.name))
    return {path.name: path.stat().st_size for path in found}


def put_in_place(folder):
    """Let the dataset in the folder `finished`, if there is one, take the place of an older one.

    A kill may come at any point, then it goes on at the next start: what lies in both places is the
    older one's in `folder`. val.bin goes first and comes last, and without it nothing is trained.
    """
    finished = folder / "finished"
    if (finished / RECORD).exists():
        made, waiting = read_record(finished)["files"], dataset_files(finished)
        for name in reversed(dataset_files(folder)):
            if name in waiting or name not in made:
                (folder / name).unlink()
        for name in waiting:
            os.replace(finished / name, folder / name)
        sync_folder(folder)
        os.replace(finished / RECORD, folder / RECORD)
    shutil.rmtree(finished, ignore_errors=True)


def report(folder):
    """Print what was counted, and the tokens of each split."""
    record = read_record(folder)
    count, skipped = record["plan"]["documents"], record["skipped"]
    print(f"documents: {count:,}, of which {skipped:,} empty ones were skipped")
    print(f"text: {record['bytes']:,} bytes")
    width = id_dtype(read_meta(folder)).itemsize
    for split in ("train", "val"):
        sizes = [size for name, size in record["files"].items() if split in name]
        name = f"{split}.bin" if len(sizes) == 1 else f"{split}_*.bin, {len(sizes)} files"
        print(f"{folder / name}: {sum(sizes) // width:,} tokens")
