"""The source of Python's standard library, one token per character: data that every machine has.

    python data/stdlib_char/prepare.py

The modules are sorted by name. Tests and files that are not plain ASCII are left out, so that one
Python version gives the same bytes everywhere. Every tenth file is for validation, so the model is
judged on modules that it has not seen.
"""

import hashlib
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data.tokenizer import CharTokenizer, make_meta
from data.tokens import write_dataset
from engine.process import UserError, one_line_errors, user_path

# Input
input: str | None = None  # folder of a standard library; None: the running interpreter's

FOLDER = Path(__file__).resolve().parent
# Distributions of Python split the first line off or leave it out. The second holds megabytes of
# tables, from which a model learns no Python.
LEFT_OUT = {
    "ensurepip", "idlelib", "lib2to3", "distutils", "tkinter", "turtledemo", "turtle",
    "encodings", "pydoc_data",
}
TESTS = {"test", "tests", "idle_test"}


def sources(folder):
    """Yield the text of each module file of the standard library in `folder`, sorted by path."""
    for name in sorted(sys.stdlib_module_names - LEFT_OUT):
        paths = [*folder.glob(f"{name}.py"), *(folder / name).rglob("*.py")]
        for path in sorted(paths, key=Path.as_posix):
            text = path.read_text(encoding="utf-8", errors="replace")  # line ends become \n
            parts = path.relative_to(folder).with_suffix("").parts
            if text.isascii() and not TESTS & set(parts):
                yield text


@one_line_errors()
def main(config):
    folder = user_path(input or sysconfig.get_paths()["stdlib"])
    texts = list(sources(folder))
    if len(texts) < 100:
        raise UserError(f"{folder} has only {len(texts)} module files; give a standard library")
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()
    print(f"{len(texts)} modules of Python {platform.python_version()}, SHA-256 {digest[:16]}")
    meta = make_meta("char", texts)
    encode = CharTokenizer(meta).encode
    val = texts[9::10]
    del texts[9::10]
    write_dataset(FOLDER, meta, train=map(encode, texts), val=map(encode, val))


if __name__ == "__main__":
    main(configure(globals()))
