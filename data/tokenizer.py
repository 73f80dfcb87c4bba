"""Read texts from files, and turn text into token ids and back.

A dataset and a checkpoint describe their tokenizer by a dict, its `meta`: the vocabulary size, and
either nanoGPT's tables of characters `stoi` and `itos`, or `tokenizer`, the name of an encoding of
tiktoken, or `pairs`, the tokens of a byte-pair encoding (BPE) trained on the text itself, in the
order in which they were learned. A dataset keeps it in meta.pkl; without that file it is GPT2.
"""

import io
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from reprlib import repr as short  # bounds nested values

from data.bpe import named_encoding, train_bpe, trained_encoding
from engine.process import UserError, reason, user_error, user_path

META = "vocab_size", "tokenizer", "stoi", "itos", "pairs"  # the keys of a meta
GPT2 = {"tokenizer": "gpt2", "vocab_size": 50304}  # 50,257 padded to a multiple of 64 for speed
# Pieces of at most 262,144 characters, because tiktoken's stack overflows at a million spaces. No
# token of WORDS or tiktoken crosses the end of a piece: it lies before a space that follows a
# visible character, or before a blank that follows a letter. Without such a place it is anywhere.
PIECE = re.compile(r"(?s).{1,262144}(?:(?<=\S)(?= )|(?<=[^\W\d_])(?=\s)|\Z)|.{1,262144}")
# The codes of tuples, frozen sets and bytearrays in a pickle.
REFUSED = b"t\x85\x86\x87\x91\x96"


# --- texts ---------------------------------------------------------------------------------------


def find_files(source, is_wanted):
    """Return the paths of the wanted files in the folder `source`, sorted, or of the file itself.

    is_wanted() takes the name of a file. Hidden files and linked folders are left out; a line says
    how many. UserError if no file remains.
    """
    root = user_path(source or "no input").resolve(strict=True)
    files, left_out = [], []
    for path in sorted(root.rglob("*")) or [root]:
        name = path.relative_to(root)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and is_wanted(path.name) and not is_hidden:
            files.append(path)
        elif path.is_file() or path.is_symlink() or not os.access(path, os.R_OK):
            left_out.append(str(name))
    if left_out:
        print(f"{source}: left out {len(left_out)} files, such as {', '.join(left_out[:3])}")
    if not files:
        raise UserError(f"--input={source}: no file in it has one of the endings to read")
    return files


def read_text(path):
    """Return the text of a UTF-8 file, without a byte order mark and with \\n as line end.

    UserError if it is not UTF-8 or has NUL characters, as UTF-16 has.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
        fault = content.find(b"\0")
    except UnicodeDecodeError as error:
        fault = error.start
    if fault >= 0:
        encoding = "utf-16" if b"\0" in content else "latin1"
        raise UserError(
            f"{path} is not UTF-8 text in line {content.count(10, 0, fault) + 1}; "
            f"convert it: iconv -f {encoding} -t utf-8 {path} > NEW_FILE"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- the meta of a dataset -----------------------------------------------------------------------


class DataUnpickler(pickle._Unpickler):  # the C version takes gigabytes for a damaged memo index
    """Reads numbers, strings, lists and dicts; refuses to run anything.

    A few bytes could ask for gigabytes, or for tuples within tuples that take years to hash.
    """

    dispatch = {c: load for c, load in pickle._Unpickler.dispatch.items() if c not in REFUSED}

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


def read_meta(folder):
    """Return the meta of the dataset in `folder`. UserError if its meta.pkl is damaged."""
    path = folder / "meta.pkl"
    if not path.exists():
        return GPT2
    try:
        if not path.is_file() or path.stat().st_size > 2**26:
            raise UserError("it is not a file of at most 64 MiB")
        saved = DataUnpickler(io.BytesIO(path.read_bytes())).load()
        meta = {name: saved[name] for name in META if name in saved}
        if type(meta["vocab_size"]) is not int or not 0 < meta["vocab_size"] < 2**32:
            raise UserError(f"its vocab_size is {short(meta['vocab_size'])}")
        if "stoi" in meta or "pairs" in meta:
            make_tokenizer(meta)  # checks its tables
        return meta
    except Exception as fault:  # damage can raise anything
        raise UserError(
            f"{path} describes no dataset ({reason(fault)}); prepare it again"
        ) from None


# --- tokenizers ----------------------------------------------------------------------------------


class CharTokenizer:
    """One id per character, by the tables of `meta`. UserError if they contradict each other."""

    def __init__(self, meta):
        self.meta = meta
        self.stoi = meta["stoi"]
        self.itos = meta["itos"]
        self.vocab_size = meta["vocab_size"]
        self.eot = None  # there is no end-of-text token
        self.opening = self.stoi.get("\n", 0)  # the first token of an empty prompt
        inverse = {index: character for character, index in self.stoi.items()}
        is_text = all(isinstance(character, str) for character in self.stoi)
        if not is_text or self.itos != inverse or sorted(inverse) != [*range(self.vocab_size)]:
            raise UserError("its characters and ids do not match")

    def encode(self, text):
        if unknown := sorted(set(text) - self.stoi.keys()):
            raise UserError(f"{len(unknown)} unknown characters: {''.join(unknown)!r:.80}")
        return [self.stoi[character] for character in text]

    def decode_bytes(self, ids):
        return "".join(self.itos[index] for index in ids).encode()


class BPETokenizer:
    """Byte pairs: an encoding of tiktoken, or one trained on the text of the dataset."""

    def __init__(self, meta):
        self.meta = meta
        self.encoding = trained_encoding(meta) if "pairs" in meta else named_encoding(meta)
        self.vocab_size = self.encoding.n_vocab
        self.eot = self.opening = self.encoding.eot_token

    def encode(self, text, special=frozenset({"<|endoftext|>"})):
        """Return the ids of a text, in which the names of the tokens `special` stand for them."""
        ids = []
        for piece in PIECE.findall(text):
            ids += self.encoding.encode(piece, allowed_special=special, disallowed_special=())
        return ids

    def encode_batch(self, texts):
        """Yield the ids of each text, computed on all cores, without special tokens."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from pool.map(partial(self.encode, special=frozenset()), texts)

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)


def make_meta(name, texts):
    """Return the meta of a dataset of these texts, an iterable of str, for the tokenizer `name`.

    `name` is char, bytes, bpe:SIZE, gpt2 or another encoding of tiktoken.
    """
    if name == "gpt2":
        return GPT2
    if name == "char":
        itos = dict(enumerate(sorted(set().union(*map(set, texts)))))
        stoi = {character: index for index, character in itos.items()}
        return {"vocab_size": len(itos), "itos": itos, "stoi": stoi}
    if name == "bytes":
        return train_bpe([], 257)
    if name.startswith("bpe:"):
        with user_error(f"tokenizer={name}, give a size such as bpe:8192", ValueError):
            return train_bpe(texts, int(name[4:]))
    return {"tokenizer": name, "vocab_size": named_encoding({"tokenizer": name}).n_vocab}


def make_tokenizer(meta):
    """Return the tokenizer that the meta of a dataset or of a checkpoint describes."""
    damage = LookupError, TypeError, AttributeError, OverflowError
    with user_error("the description of the tokenizer", *damage):
        return CharTokenizer(meta) if "stoi" in meta else BPETokenizer(meta)
