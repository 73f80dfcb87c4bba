"""FineWeb-Edu, the sample of 10 billion tokens, in GPT-2's tokens; or your own documents.

    python data/fineweb/prepare.py
    python data/fineweb/prepare.py --limit=100000 --dataset=fineweb_small  # reads only these
    python data/fineweb/prepare.py --input=docs/ --dataset=mine            # .parquet, .jsonl, ...

Needs 20 GB for the sample. The files on the hub are read as a stream and not kept. You can stop at
any time: the same command continues. The hub's branch may change, so its commit at the first start
is printed, and used until the end.

A document is a row of a .parquet, .jsonl, .json or .csv file, or a complete .txt file. Files may be
compressed (.gz, .bz2, .xz, .zst). Empty documents are skipped; an end-of-text token follows each of
the others. Every tenth of the first 10,000 documents is held out for validation, then every
2,000th, so small and large corpora both have enough. --val_fraction=0.01 holds out every 100th.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data.documents import prepare_documents
from engine.process import UserError, one_line_errors

# Input
input: str | None = None            # a local file or folder instead of the hub
column = "text"                     # the column that holds the text
revision = "main"                   # branch or commit of the hub
limit: int | None = None            # take only the first documents
# Output
dataset = ""                        # name of another dataset, a folder made in data/
tokenizer = "gpt2"                  # bytes, bpe:SIZE, gpt2, or another encoding of tiktoken
val_fraction: float | None = None   # share held out; None: 0.1 of 10,000 documents, then 0.0005

ALLOWED = {"limit": (2, 2**31 - 1), "val_fraction": (1e-6, 0.5)}
FOLDER = Path(__file__).resolve().parent
DATA = FOLDER.parent
REPOSITORY = "HuggingFaceFW/fineweb-edu"
PATTERN = "sample/10BT/*.parquet"


def spread_held_out(val_fraction):
    """Return the numbers of the documents for validation, in a corpus of unknown size.

    Document 0 is always held out, so two documents are enough for two splits.
    """
    if val_fraction:
        return range(0, 10**10, round(1 / val_fraction))
    return {*range(0, 10_000, 10), *range(10_000, 10**9, 2000)}


@one_line_errors()
def main(config):
    folder = DATA / dataset if dataset else FOLDER
    if dataset and (folder.resolve().parent != DATA or (folder / "prepare.py").exists()):
        raise UserError(f"--dataset={dataset}: give a new name, of a folder to be made in {DATA}")
    prepare_documents(folder, config, REPOSITORY, PATTERN, spread_held_out(val_fraction))


if __name__ == "__main__":
    main(configure(globals()))
