"""Tiny Shakespeare, one token per character: 1,003,854 to train on and 111,540 to validate.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=PATH    # a copy, where there is no network
"""

import hashlib
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure  # noqa: E402
from data.tokenizer import CharTokenizer, char_meta  # noqa: E402
from data.tokens import write_dataset  # noqa: E402
from engine.process import UserError, atomic, one_line_errors, user_error, user_path  # noqa: E402

# Input
input: str | None = None  # a copy of the corpus; None: input.txt in this folder, else downloaded

FOLDER = Path(__file__).resolve().parent
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_corpus(path, folder):
    """Return Tiny Shakespeare from `path`, else from input.txt in `folder`, made if needed."""
    kept = folder / "input.txt"
    source = user_path(path) if path else kept
    if not path and not kept.exists():
        try:
            with urllib.request.urlopen(URL, timeout=20) as response:
                content = response.read()
        except (OSError, HTTPException) as fault:  # the second where it is cut off
            advice = f"offline, put a copy at {kept} or give --input=PATH"
            raise UserError(f"cannot download {URL} ({fault}); {advice}") from None
        check(content, URL)
        with atomic(kept) as file:
            file.write(content)
    with user_error(source, OSError):
        content = source.read_bytes()
    check(content, source)
    return content.decode()


def check(content, source):
    """Raise UserError unless the bytes are those of the corpus: not an error page, nor cut."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise UserError(f"{source} is not Tiny Shakespeare: its SHA-256 is {digest}, not {SHA256}")


@one_line_errors
def main(config):
    text = read_corpus(input, FOLDER)
    meta = char_meta(set(text))
    print(f"vocabulary: {meta['vocab_size']} characters")
    tokenizer, cut = CharTokenizer(meta), int(0.9 * len(text))
    splits = {"train": text[:cut], "val": text[cut:]}
    write_dataset(FOLDER, meta, **{name: [tokenizer.encode(splits[name])] for name in splits})


if __name__ == "__main__":
    main(configure(globals()))
