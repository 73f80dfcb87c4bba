"""OpenWebText in GPT-2's tokens: about 9.04 billion to train on and 4.43 million to validate.

    python data/openwebtext/prepare.py                                  # 8,013,769 documents
    python data/openwebtext/prepare.py --input=docs.jsonl --limit=1000  # or .parquet, .txt, folder

Needs `pip install -e '.[openwebtext]'`, 55 GB for the download and 18 GB for the tokens. An
end-of-text token follows each document. Split and order of documents are nanoGPT's.
"""

import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure  # noqa: E402
from data.tokenizer import GPT2, BPETokenizer  # noqa: E402
from data.tokens import write_dataset  # noqa: E402
from engine.process import UserError, one_line_errors, user_path  # noqa: E402

# Input
input: str | None = None      # local .parquet, .jsonl or .txt instead, a file or a folder of them
limit: int | None = None      # take only the first documents
num_proc: int | None = None   # threads that encode; None: one per core

FOLDER = Path(__file__).resolve().parent
HUB = "hf://datasets/Skylion007/openwebtext@refs/convert/parquet/plain_text/*/*.parquet"
DOCUMENTS = 8_013_769  # in the whole corpus; the hub also delivers partial conversions
BATCH = 1000  # documents read at once


def load_documents():
    """Return the documents as a memory-mapped datasets.Dataset with a column `text`."""
    try:
        import datasets
    except ImportError:
        raise UserError("this needs datasets: pip install -e '.[openwebtext]'") from None
    if input is None:
        files, kind = [HUB], "parquet"
    else:
        source = user_path(input)
        files = [path for path in [source, *source.rglob("*")] if path.is_file()]
        kinds = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}
        found = {kinds.get(path.suffix) for path in files}
        if len(found) != 1 or None in found:
            raise UserError(f"--input={input}: give .parquet, .jsonl or .txt files of one kind")
        files, kind = sorted(map(str, files)), found.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        documents = datasets.load_dataset(kind, data_files=files, split="train", **options)
    except Exception as fault:  # no network, a broken file: all sorts
        fault = fault.__cause__ or fault
        reason = f"{type(fault).__name__}: {fault}".splitlines()[0]
        raise UserError(
            f"cannot read {input or HUB} ({reason}); offline, give --input=PATH"
        ) from None
    if getattr(documents.features.get("text"), "dtype", "") not in ("string", "large_string"):
        raise UserError(f"{input or HUB} has no column `text` of strings but {documents.features}")
    if input is None and len(documents) != DOCUMENTS:
        raise UserError(f"the hub gave {len(documents):,} documents of {DOCUMENTS:,}; try later")
    return documents if limit is None else documents.select(range(min(limit, len(documents))))


def encoded(documents, name, tokenizer):
    """Yield the ids of each document, and end-of-text after it, under a progress bar."""

    def texts():
        for batch in documents.iter(BATCH):
            if None in batch["text"]:
                raise UserError(f"{input or HUB} has a document without text")
            yield from batch["text"]

    with tqdm(total=len(documents), desc=name, unit=" documents", smoothing=0.05) as progress:
        for ids in tokenizer.encode_corpus(texts(), num_proc):
            yield ids
            yield [tokenizer.eot]
            progress.update()


@one_line_errors
def main(config):
    tokenizer = BPETokenizer(GPT2)  # first: without its files all the rest is for nothing
    documents = load_documents()
    if len(documents) < 2:
        raise UserError(f"{len(documents)} documents cannot be split; give at least 2")
    split = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    parts = {"train": split["train"], "val": split["test"]}
    write_dataset(FOLDER, GPT2, **{k: encoded(parts[k], k, tokenizer) for k in parts})


if __name__ == "__main__":
    main(configure(globals()))
