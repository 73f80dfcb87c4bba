"""Your own text, from a file or a folder, as a dataset.

    python data/text/prepare.py --input=notes.txt --dataset=notes
    python data/text/prepare.py --input=novels/ --dataset=novels --tokenizer=gpt2
    python data/text/prepare.py --input=code/ --dataset=code --tokenizer=bpe:8192
    python train.py config/train_shakespeare_char.py --dataset=notes --out_dir=out-notes

Characters suit a small model trained from scratch; gpt2 suits finetuning and gigabytes. bpe:8192
makes byte pairs for this text, 8,192 tokens, and stores them in the dataset; bytes needs no file of
anyone's, and no character is unknown to it. Text may be larger than memory. Its end, a tenth, is
for validation. Documents in .parquet or .jsonl files: data/fineweb/prepare.py.
"""

import re
import sys
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure  # noqa: E402
from data.tokenizer import CUT, make_meta, make_tokenizer  # noqa: E402
from data.tokens import write_dataset  # noqa: E402
from engine.process import UserError, one_line_errors, user_error, user_path  # noqa: E402

# Input
input = ""                # a UTF-8 text file, or a folder: all .txt and .md files, sorted by path
dataset = ""              # name of the dataset, a folder made in data/
tokenizer = "char"        # char, bytes, bpe:SIZE, gpt2, or another of tiktoken's encodings
val_fraction = 0.1        # share of the characters, at the end, that validates

DATA = Path(__file__).resolve().parents[1]
PIECE = 2**18  # characters read at once; tiktoken overflows its stack at a million blanks


def pieces(paths):
    """Yield the files as (text of about PIECE characters, whether it is the last of its file)."""
    cut = re.compile("(?s).") if tokenizer == "char" else CUT
    for path in paths:
        rest = ""
        with (
            user_error(f"{path} is not UTF-8 text", UnicodeDecodeError),
            user_error(path, OSError),
            open(path, encoding="utf-8-sig") as file,
        ):
            while text := file.read(PIECE):
                rest += text
                ends = [match.end() for match in cut.finditer(rest, max(0, len(rest) - 1000))]
                if ends or len(rest) >= 2**19:  # else the piece grows
                    end = ends[-1] if ends else len(rest)
                    yield rest[:end], False
                    rest = rest[end:]
        yield rest, True


def parts(paths, start, end, ends):
    """Yield the text of all files, put end to end, from character `start` to `end`, in pieces.

    To the list `ends` goes, for each piece, whether one of several files ends with it.
    """
    position = 0
    for text, last in pieces(paths):
        if position > end:
            return
        begin, position = position, position + len(text)
        ends.append(last and len(paths) > 1 and start < position <= end)
        yield text[max(0, start - begin) : max(0, end - begin)]


def encoded(paths, encoder, start, end):
    """Yield the ids of the characters from `start` to `end` of all files, put end to end.

    Each of several files is followed by the end-of-text token, if the encoder has one.
    """
    ends = deque()  # for each part, whether that token follows
    for ids in encoder.encode_corpus(parts(paths, start, end, ends)):
        yield ids
        if ends.popleft() and encoder.eot is not None:
            yield [encoder.eot]


@one_line_errors
def main(config):
    folder, source = DATA / dataset, user_path(input or "no input")
    paths = sorted(p for p in source.rglob("*") if p.suffix in (".txt", ".md")) or [source]
    if not paths[0].is_file():
        raise UserError(f"--input={input}: give a text file, or a folder with .txt or .md files")
    if folder.resolve().parent != DATA or (folder / "prepare.py").exists():
        raise UserError(f"--dataset={dataset}: give a new name, of a folder to be made in {DATA}")
    make_meta(tokenizer, [""])  # for its errors, before the text is read
    count = sum(len(text) for text, _ in pieces(paths))
    print(f"{len(paths)} files, {count:,} characters")
    cut = int((1 - val_fraction) * count)
    if not 0 < cut < count:
        raise UserError(f"val_fraction={val_fraction} of {count} characters leaves a split empty")
    # Characters are collected from both splits, byte pairs from the one to train on.
    known = parts(paths, 0, count if tokenizer == "char" else cut, [])
    encoder = make_tokenizer(make_meta(tokenizer, known))
    write_dataset(
        folder,
        encoder.meta,
        train=encoded(paths, encoder, 0, cut),
        val=encoded(paths, encoder, cut, count),
    )


if __name__ == "__main__":
    main(configure(globals()))
