"""Tiny Shakespeare in GPT-2's tokens: 301,966 to train on and 36,059 to validate. For finetuning.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=PATH    # a copy, if there is no network
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data.shakespeare_char.prepare import read_corpus
from data.tokenizer import GPT2, BPETokenizer
from data.tokens import write_dataset
from engine.process import one_line_errors

# Input
input: str | None = None  # a copy of the corpus; None: input.txt in this folder, or a download

FOLDER = Path(__file__).resolve().parent


@one_line_errors()
def main(config):
    text = read_corpus(input, FOLDER)
    cut = int(0.9 * len(text))
    encode = BPETokenizer(GPT2).encode
    write_dataset(FOLDER, GPT2, train=[encode(text[:cut])], val=[encode(text[cut:])])


if __name__ == "__main__":
    main(configure(globals()))
