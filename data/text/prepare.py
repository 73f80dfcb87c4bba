"""Your own text, from a file or a folder, as a dataset.

    python data/text/prepare.py --input=notes.txt --dataset=notes
    python data/text/prepare.py --input=novels/ --dataset=novels --tokenizer=gpt2
    python data/text/prepare.py --input=src/ --suffixes=.py,.c --dataset=code --tokenizer=bpe:8192
    python train.py config/train_shakespeare_char.py --dataset=notes --out_dir=out-notes

Characters suit a small model trained from scratch; gpt2 suits finetuning and gigabytes of text.
bpe:8192 learns 8,192 tokens from this text; bytes can encode any character. The last tenth of the
characters is for validation. An end-of-text token follows each of several files, unless the tokens
are characters; <|endoftext|> in a text becomes that token too. The text must fit into memory. For
documents in .parquet, .jsonl or .csv files, use data/fineweb/prepare.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data.tokenizer import PIECE, find_files, make_meta, make_tokenizer, read_text
from data.tokens import write_dataset
from engine.process import UserError, one_line_errors, user_path

# Input
input = ""                # a UTF-8 text file, or a folder of them, read in the order of their paths
suffixes = ".txt,.md"     # of the files in a folder; empty: all files
dataset = ""              # name of the dataset, a folder made in data/
tokenizer = "char"        # char, bytes, bpe:SIZE, gpt2, or another encoding of tiktoken
val_fraction = 0.1        # share of the characters, at the end, that validates

ALLOWED = {"val_fraction": (1e-6, 0.9)}
DATA = Path(__file__).resolve().parents[1]


def is_wanted(name):
    return name.lower().endswith(tuple(suffixes.lower().split(",")))


@one_line_errors()
def main(config):
    folder = (DATA / dataset).resolve()
    if folder.parent != DATA or (folder / "prepare.py").exists():
        raise UserError(f"--dataset={dataset}: give the name of a new folder in data/")
    source = user_path(input or "no input")
    paths = find_files(source, is_wanted) if source.is_dir() else [source]
    mark = "\0" if len(paths) > 1 else ""  # ends a file; read_text() refuses it within a file
    text = "".join(read_text(path) + mark for path in paths)
    cut = int((1 - val_fraction) * len(text))
    known = text if tokenizer == "char" else text[:cut]
    meta = make_meta(tokenizer, PIECE.findall(known.replace("\0", "")))
    encoder = make_tokenizer(meta)
    ending = "<|endoftext|>" if encoder.eot else ""
    splits = {}
    for split, part in ("train", text[:cut]), ("val", text[cut:]):
        pieces = PIECE.findall(part.replace("\0", ending))
        splits[split] = map(encoder.encode, pieces)
    write_dataset(folder, meta, **splits)


if __name__ == "__main__":
    main(configure(globals()))
