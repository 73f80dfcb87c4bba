"""Tiny Shakespeare in GPT-2's tokens: 301,966 to train on and 36,059 to validate. For finetuning.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=PATH    # a copy, where there is no network
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure  # noqa: E402
from data.shakespeare_char.prepare import read_corpus  # noqa: E402
from data.tokenizer import GPT2, BPETokenizer  # noqa: E402
from data.tokens import write_dataset  # noqa: E402
from engine.process import one_line_errors  # noqa: E402

# Input
input: str | None = None  # a copy of the corpus; None: input.txt in this folder, else downloaded

FOLDER = Path(__file__).resolve().parent


@one_line_errors
def main(config):
    text = read_corpus(input, FOLDER)
    tokenizer, cut = BPETokenizer(GPT2), int(0.9 * len(text))
    train, val = tokenizer.encode_corpus([text[:cut], text[cut:]])
    write_dataset(FOLDER, GPT2, train=[train], val=[val])


if __name__ == "__main__":
    main(configure(globals()))
