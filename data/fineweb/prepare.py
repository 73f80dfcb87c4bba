"""FineWeb-Edu, a sample of 10 billion tokens in GPT-2's tokens; or documents of your own.

    python data/fineweb/prepare.py
    python data/fineweb/prepare.py --limit=100000 --dataset=fineweb_small  # reads no more than that
    python data/fineweb/prepare.py --input=docs/ --dataset=mine            # .parquet, .jsonl, .txt

Needs `pip install -e '.[documents]'`, and 20 GB for the sample. Of the files on the hub only the
text is read, as a stream, and not kept. Stop it when you like: the same command goes on with the
first part that is missing (data/documents.py). The commit that `revision` named at the first start
is printed, recorded, and read to the end, wherever the branch moves meanwhile: that is what pins
the data.

A document is a row of .parquet or a line of .jsonl, with its text in `text`, or a .txt file. An
end-of-text token follows each, and empty ones are skipped. One in 2,000 is held out to validate on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure  # noqa: E402
from data.documents import prepare_documents  # noqa: E402
from engine.process import UserError, one_line_errors  # noqa: E402

# Input
input: str | None = None            # local .parquet, .jsonl or .txt instead, a file or a folder
revision = "main"                   # branch or commit of the hub
limit: int | None = None            # take only the first documents
# Output
dataset = ""                        # name of another dataset, a folder made in data/
tokenizer = "gpt2"                  # bytes, bpe:SIZE, gpt2, or another of tiktoken's encodings
num_proc: int | None = None         # threads that encode; None: one per core

RANGES = {"limit": (2, 2**31), "num_proc": (1, 2**15)}
FOLDER = Path(__file__).resolve().parent
DATA = FOLDER.parent
REPOSITORY, PATTERN = "HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"


@one_line_errors
def main(config):
    folder = DATA / dataset if dataset else FOLDER
    if dataset and (folder.resolve().parent != DATA or (folder / "prepare.py").exists()):
        raise UserError(f"--dataset={dataset}: give a new name, of a folder to be made in {DATA}")
    prepare_documents(folder, config, REPOSITORY, PATTERN)


if __name__ == "__main__":
    main(configure(globals()))
