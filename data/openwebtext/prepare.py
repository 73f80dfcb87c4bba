"""OpenWebText in GPT-2's tokens: about 9.04 billion to train on and 4.43 million to validate.

    python data/openwebtext/prepare.py                               # all 8,013,769 documents
    python data/openwebtext/prepare.py --limit=1000                  # reads only the first 1,000
    python data/openwebtext/prepare.py --input=FOLDER_OR_FILE        # a local copy

Needs 18 GB. The files on the hub are read as a stream and not kept. You can stop at any time: the
same command continues. The hub's branch may change, so its commit at the first start is printed,
and used until the end.

The same documents as in nanoGPT are held out for validation. Both splits keep the order of the
corpus; nanoGPT shuffles them.
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data.documents import prepare_documents
from engine.process import one_line_errors

# Input
input: str | None = None            # .parquet, .jsonl, .json, .csv or .txt files instead of the hub
column = "text"                     # the column that holds the text
revision = "refs/convert/parquet"   # branch or commit of the hub, which makes this branch itself
limit = 8_013_769                   # take only the first documents; the default is all of them
# Output
tokenizer = "gpt2"                  # bytes, bpe:SIZE, gpt2, or another encoding of tiktoken

ALLOWED = {"limit": (2, 2**31 - 1)}
FOLDER = Path(__file__).resolve().parent
REPOSITORY = "Skylion007/openwebtext"
PATTERN = "plain_text/*/*.parquet"


def nanogpt_held_out(count):
    """Return the numbers of the documents that nanoGPT holds out of `count` for validation.

    The library `datasets` holds out the same with train_test_split(test_size=0.0005, seed=2357).
    """
    order = np.random.default_rng(2357).permutation(count)
    return set(order[: math.ceil(0.0005 * count)].tolist())


@one_line_errors()
def main(config):
    record = prepare_documents(FOLDER, config, REPOSITORY, PATTERN, nanogpt_held_out(limit))
    if record.rows < limit:
        print(f"note: there are only {record.rows:,} of {limit:,} documents")


if __name__ == "__main__":
    main(configure(globals()))
