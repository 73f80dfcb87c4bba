"""Tokenizers: text to ids and back, as the `meta` of a dataset or of a checkpoint describes.

Beside its token files a dataset has a meta.pkl, nanoGPT's too: the size of the vocabulary, and for
characters the tables `stoi` and `itos`. Without that file it is in GPT-2's BPE.
"""

import os
import pickle
import tempfile
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.process import UserError, reason

GPT2 = {"tokenizer": "gpt2", "vocab_size": 50304}  # 50,257 padded to a multiple of 64 for speed


class PlainUnpickler(pickle._Unpickler):  # the C one takes gigabytes for a damaged memo index
    def find_class(self, module, name):  # called for all but numbers, strings and containers
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


def read_meta(folder):
    """Return what tells how the dataset in `folder` was encoded: its meta.pkl, or GPT2."""
    path = folder / "meta.pkl"
    if not path.exists():
        return GPT2
    try:
        with open(path, "rb") as file:
            meta = PlainUnpickler(file).load()
        if type(meta["vocab_size"]) is not int or not 0 < meta["vocab_size"] < 2**32:
            raise UserError(f"its vocab_size is {meta['vocab_size']!r}")
        if "stoi" in meta:
            CharTokenizer(meta)
        return meta
    except Exception as fault:  # garbage can raise anything, but it runs nothing
        why = reason(fault)
        raise UserError(f"{path} describes no dataset ({why}); prepare it again") from None


def check_tokenizer(folder, dataset, meta):
    """Raise UserError if a model in `folder` brings its own meta.pkl, unlike that of a dataset."""
    if (folder / "meta.pkl").exists() and read_meta(folder) != meta:
        raise UserError(f"dataset {dataset} is encoded unlike the model in {folder}; give another")


def check_fits(tokenizer, vocab_size):
    """Raise UserError if a model of `vocab_size` cannot read all that `tokenizer` may write."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; "
            f"prepare its dataset first"
        )


def char_meta(characters):
    """Return the meta of a dataset of these characters."""
    itos = dict(enumerate(sorted(set(characters))))
    return {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}


class CharTokenizer:
    """One id per character, as the tables of `meta` say. UserError if they disagree."""

    def __init__(self, meta):
        self.meta, self.stoi, self.itos = meta, meta["stoi"], meta["itos"]
        self.vocab_size, self.eot = meta["vocab_size"], None  # no end-of-text token
        self.opening = self.stoi.get("\n", 0)  # what an empty prompt begins with
        inverse = {i: c for c, i in self.stoi.items() if isinstance(c, str)}
        if self.itos != inverse or sorted(inverse) != list(range(self.vocab_size)):
            raise UserError("its characters and ids do not match")

    def encode(self, text):
        if unknown := sorted(set(text) - self.stoi.keys()):
            names = ", ".join(f"{c!r} ({unicodedata.name(c, 'unnamed')})" for c in unknown[:8])
            raise UserError(f"{len(unknown)} unknown characters: {names}")
        return [self.stoi[character] for character in text]

    def encode_corpus(self, texts):
        return map(self.encode, texts)

    def decode_bytes(self, ids):
        return "".join(self.itos[i] for i in ids).encode()


class BPETokenizer:
    """The tiktoken encoding that `meta` names."""

    def __init__(self, meta):
        import tiktoken  # here, because characters need neither it nor its files

        try:
            self.encoding = tiktoken.get_encoding(meta["tokenizer"])
        except (OSError, ValueError) as fault:  # no network, no such encoding
            why = str(fault).partition("\n")[0].partition("(")[0]
            raise UserError(
                f"no tokenizer {meta['tokenizer']}: {why}; offline, set TIKTOKEN_CACHE_DIR to a "
                f"folder that tiktoken filled elsewhere"
            ) from None
        self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token
        self.meta, self.opening = meta, self.eot

    def encode(self, text):
        return self.encoding.encode(text, allowed_special={"<|endoftext|>"}, disallowed_special=())

    def encode_corpus(self, texts, threads=None):
        """Yield an array of ids for each text, made on all cores; special tokens are plain text."""
        encode, cores = self.encoding.encode_to_numpy, threads or os.cpu_count()
        with ThreadPoolExecutor(cores) as pool:
            waiting = deque()
            for text in texts:
                waiting.append(pool.submit(encode, text, disallowed_special=()))
                if len(waiting) > 4 * cores:  # however large the corpus
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def decode_bytes(self, ids):
        try:
            return self.encoding.decode_bytes(ids)
        except KeyError:  # newer encodings leave some ids unused
            return b""


def make_tokenizer(meta):
    """Return the tokenizer that `meta`, of a dataset or a checkpoint, describes."""
    if not meta.keys() & {"tokenizer", "stoi"}:
        raise UserError("meta.pkl names no tokenizer and holds no characters")
    return BPETokenizer(meta) if "tokenizer" in meta else CharTokenizer(meta)


def at_hand(meta):
    """Return whether the tokenizer of `meta` can be made without a download."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or Path(tempfile.gettempdir(), "data-gym-cache")
    return "stoi" in meta or ("tokenizer" in meta and Path(cache).is_dir())


def bytes_per_id(tokenizer, vocab_size):
    """Return how many bytes of text each of vocab_size ids stands for, a list.

    End-of-text and what the tokenizer does not have, padding, stand for none.
    """
    pieces = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
    if tokenizer.eot is not None:
        pieces[tokenizer.eot] = b""
    padding = [0] * (vocab_size - len(pieces))
    return [len(piece) for piece in pieces] + padding
