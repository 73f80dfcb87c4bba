"""OpenWebText in GPT-2's tokens: about 9.04 billion to train on and 4.43 million to validate.

    python data/openwebtext/prepare.py                                  # 8,013,769 documents
    python data/openwebtext/prepare.py --limit=1000                     # reads no more than these
    python data/openwebtext/prepare.py --input=docs.jsonl --limit=1000  # or .parquet, .txt, folder

Needs `pip install -e '.[openwebtext]'` and 18 GB. Of the files on the hub only the text is read, as
a stream, and not kept. Stop it when you like: the same command goes on with the first part that is
missing (data/documents.py). The commit that `revision` named at the first start is printed,
recorded, and read to the end, wherever the branch moves meanwhile: that is what pins the data.

An end-of-text token follows each document. The documents to validate on and their order are
nanoGPT's; those to train on are nanoGPT's too, in the order of the corpus.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure  # noqa: E402
from data.documents import prepare_documents  # noqa: E402
from engine.process import one_line_errors  # noqa: E402

# Input
input: str | None = None            # local .parquet, .jsonl or .txt instead, a file or a folder
revision = "refs/convert/parquet"   # branch or commit of the hub; the branch is made by the hub
limit: int | None = None            # take only the first documents
# Output
tokenizer = "gpt2"                  # bytes, bpe:SIZE, gpt2, or another of tiktoken's encodings
num_proc: int | None = None         # threads that encode; None: one per core

RANGES = {"limit": (2, 2**31), "num_proc": (1, 2**15)}
FOLDER = Path(__file__).resolve().parent
REPOSITORY, PATTERN = "Skylion007/openwebtext", "plain_text/*/*.parquet"
DOCUMENTS = 8_013_769  # in the whole corpus; the hub also delivers partial conversions


@one_line_errors
def main(config):
    prepare_documents(FOLDER, config, REPOSITORY, PATTERN, expected=DOCUMENTS)


if __name__ == "__main__":
    main(configure(globals()))
