"""Your own text, from a file or a folder, as a dataset.

    python data/text/prepare.py --input=notes.txt --dataset=notes
    python data/text/prepare.py --input=novels/ --dataset=novels --tokenizer=gpt2
    python data/text/prepare.py --input=code/ --dataset=code --tokenizer=bpe:8192
    python train.py config/train_shakespeare_char.py --dataset=notes --out_dir=out-notes

Characters suit a small model trained from scratch; gpt2 suits finetuning and gigabytes of text.
bpe:8192 learns 8,192 tokens from this text; bytes can encode any character. The last tenth of the
characters is for validation. An end-of-text token follows each of several files, unless the tokens
are characters; <|endoftext|> in a text becomes that token too. A single file must fit into memory.
For documents in .parquet, .jsonl or .csv files, use data/fineweb/prepare.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data.tokenizer import PIECE, make_meta, make_tokenizer
from data.tokens import write_dataset
from engine.checkpoint import lock
from engine.process import UserError, one_line_errors, user_error, user_path

# Input
input = ""                # a UTF-8 text file, or a folder: all .txt and .md files, sorted by path
dataset = ""              # name of the dataset, a folder made in data/
tokenizer = "char"        # char, bytes, bpe:SIZE, gpt2, or another encoding of tiktoken
val_fraction = 0.1        # share of the characters, at the end, that validates

ALLOWED = {"val_fraction": (1e-6, 1)}
DATA = Path(__file__).resolve().parents[1]


def pieces(paths, start, end, ending=""):
    """Yield characters `start` to `end` of all files, in pieces, with `ending` after each file."""
    for path in paths:
        with user_error(f"{path} (give a UTF-8 text file or a folder)", OSError, ValueError):
            text = path.read_text(encoding="utf-8-sig")
        yield from PIECE.findall(text[max(0, start) : max(0, end)])
        start -= len(text)
        end -= len(text)
        yield ending * (start < 0 <= end)  # if the file ends in this range


@one_line_errors()
def main(config):
    folder = DATA / dataset
    if folder.parent != DATA or (folder / "prepare.py").exists():
        raise UserError(f"--dataset={dataset}: give the name of a new folder in data/")
    source = user_path(input or "no input")
    paths = sorted(p for p in source.rglob("*") if p.suffix in (".txt", ".md")) or [source]
    count = sum(map(len, pieces(paths, 0, sys.maxsize)))
    cut = int((1 - val_fraction) * count)
    known = count if tokenizer == "char" else cut
    encoder = make_tokenizer(make_meta(tokenizer, pieces(paths, 0, known)))
    ending = "<|endoftext|>" if len(paths) > 1 and encoder.eot else ""
    train = map(encoder.encode, pieces(paths, 0, cut, ending))
    val = map(encoder.encode, pieces(paths, cut, count, ending))
    with lock(folder, "wait for it to end"):
        write_dataset(folder, encoder.meta, train=train, val=val)


if __name__ == "__main__":
    main(configure(globals()))
