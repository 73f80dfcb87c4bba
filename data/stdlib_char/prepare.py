"""The source of Python's standard library, one token per character: data that every machine has.

    python data/stdlib_char/prepare.py

Modules are taken whole and in order of their names, without tests and without files that are not
plain ASCII, so that one Python version gives the same bytes everywhere. Every tenth file is held
out to validate on: the model is judged on modules it has not seen.
"""

import hashlib
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure  # noqa: E402
from data.tokenizer import CharTokenizer, char_meta  # noqa: E402
from data.tokens import write_dataset  # noqa: E402
from engine.process import UserError, one_line_errors, user_path  # noqa: E402

# Input
input: str | None = None  # folder of a standard library; None: the running interpreter's

FOLDER = Path(__file__).resolve().parent
# Distributions of Python split these off or leave them out.
OPTIONAL = {"ensurepip", "idlelib", "lib2to3", "distutils", "tkinter", "turtledemo", "turtle"}
TABLES = {"encodings", "pydoc_data"}  # megabytes of data, from which a model learns no Python
TESTS = {"test", "tests", "idle_test"}


def sources(folder):
    """Yield the text of each module file of the standard library in `folder`, sorted by path."""
    names = sys.stdlib_module_names - OPTIONAL - TABLES
    paths = [*folder.glob("*.py"), *(p for name in names for p in (folder / name).rglob("*.py"))]
    for path in sorted(paths, key=lambda path: path.relative_to(folder).as_posix()):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[0] in names and not TESTS & set(parts):
            text = path.read_text(encoding="utf-8", errors="replace")  # newlines become \n
            if text.isascii():
                yield text


@one_line_errors
def main(config):
    folder = user_path(input or sysconfig.get_paths()["stdlib"])
    texts = list(sources(folder))
    if len(texts) < 100:
        raise UserError(f"{folder} is no standard library: it holds {len(texts)} module files")
    meta = char_meta(set().union(*texts))
    tokenizer = CharTokenizer(meta)
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()
    print(f"{len(texts)} modules of Python {platform.python_version()}, SHA-256 {digest[:16]}")
    train = (tokenizer.encode(text) for index, text in enumerate(texts) if index % 10 != 9)
    write_dataset(FOLDER, meta, train=train, val=map(tokenizer.encode, texts[9::10]))


if __name__ == "__main__":
    main(configure(globals()))
