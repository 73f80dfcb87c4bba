"""Tiny Shakespeare, one token per character: 1,003,854 to train on and 111,540 to validate.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=PATH    # a copy, if there is no network
"""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data.bpe import download
from data.tokenizer import CharTokenizer, make_meta
from data.tokens import write_dataset
from engine.process import UserError, atomic, one_line_errors, user_error, user_path

# Input
input: str | None = None  # a copy of the corpus; None: input.txt in this folder, or a download

FOLDER = Path(__file__).resolve().parent
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_corpus(path, folder):
    """Return Tiny Shakespeare from `path`, or else from input.txt in `folder`, or a download."""
    source = user_path(path or folder / "input.txt")
    if not path and not source.exists():
        advice = f"offline, put a copy at {source} or give --input=PATH"
        with user_error(f"cannot download {URL} ({advice})", Exception):
            content = checked(download(URL), URL)
        with atomic(source) as file:
            file.write(content)
    return checked(source.read_bytes(), source).decode()


def checked(content, source):
    """Return `content`. UserError if it is not the corpus, but an error page or a part of it."""
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{source} is not Tiny Shakespeare: its SHA-256 is not {SHA256}")
    return content


@one_line_errors()
def main(config):
    text = read_corpus(input, FOLDER)
    meta = make_meta("char", [text])
    print(f"vocabulary: {meta['vocab_size']} characters")
    ids = CharTokenizer(meta).encode(text)
    cut = int(0.9 * len(ids))
    write_dataset(FOLDER, meta, train=[ids[:cut]], val=[ids[cut:]])


if __name__ == "__main__":
    main(configure(globals()))
