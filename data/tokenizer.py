"""Tokenizers: text to ids and back, as the `meta` of a dataset or of a checkpoint describes.

Beside its token files a dataset has a meta.pkl, nanoGPT's too: the size of the vocabulary, and for
characters the tables `stoi` and `itos`; for byte pairs of its own (BPE) the list `pairs`, tokens in
the order in which they were made. Without that file it is in GPT-2's BPE.
"""

import json
import os
import pickle
import re
import tempfile
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from engine.process import UserError, import_extra, reason, user_error

GPT2 = {"tokenizer": "gpt2", "vocab_size": 50304}  # 50,257 padded to a multiple of 64 for speed
# The pieces within which a BPE of one's own joins bytes: a word with the space before it, up to 3
# digits, marks, a line break with the blanks before it, blanks. Longer pieces were learned worse:
# docs/course.md, step 2. To change it would change what existing datasets and checkpoints mean.
WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*\n|\s+(?!\S)|\s+"
# Where no token of this BPE or of any of tiktoken's encodings goes on: a space after a word, number
# or mark, and any white space after a letter.
CUT = re.compile(r"\S(?= )|[^\W\d_](?=\s)")


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
        if "pairs" in meta:
            open_encoding(meta)
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


def bpe_meta(pairs):
    """Return the meta of a dataset in a BPE of its own: the bytes, then `pairs`, then the end."""
    tokens = [token.decode("latin-1") for token in pairs]  # plain data for meta.pkl and ckpt.pt
    return {"tokenizer": "own", "pairs": tokens, "vocab_size": 256 + len(pairs) + 1}


def train_bpe(texts, size):
    """Return the meta of a BPE of at most `size` tokens, made for `texts`, an iterable of str.

    The two tokens that stand side by side most often become one, again and again (Sennrich et al.
    2016, arXiv:1508.07909), on bytes, so that no text is unknown (GPT-2).
    """
    library = import_extra("tokenizers", "bpe")
    words = library.pre_tokenizers.Split(library.Regex(WORDS), behavior="isolated")
    level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.Sequence([words, level])
    options = {"initial_alphabet": level.alphabet(), "show_progress": False}
    made.train_from_iterator(texts, library.trainers.BpeTrainer(vocab_size=size - 1, **options))
    # The library writes a byte as a character: itself where that can be printed, else one beyond.
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printed]
    byte_of = {chr(byte): byte for byte in printed}
    byte_of |= {chr(256 + place): byte for place, byte in enumerate(hidden)}
    merges = json.loads(made.to_str())["model"]["merges"]
    return bpe_meta([bytes(byte_of[each] for each in "".join(pair)) for pair in merges])


def open_encoding(meta):
    """Return tiktoken's encoding that `meta` names, or that of a BPE of its own."""
    import tiktoken  # here, because characters need neither it nor its files

    if "pairs" not in meta:
        try:
            return tiktoken.get_encoding(meta["tokenizer"])
        except (OSError, ValueError) as fault:  # no network, no such encoding
            why = str(fault).partition("\n")[0].partition("(")[0]
            raise UserError(
                f"no tokenizer {meta['tokenizer']}: {why}; offline, set TIKTOKEN_CACHE_DIR to a "
                f"folder that tiktoken filled elsewhere"
            ) from None
    tokens = [bytes([byte]) for byte in range(256)]
    with user_error("its pairs", TypeError, AttributeError, UnicodeError):
        tokens += [token.encode("latin-1") for token in meta["pairs"]]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) + 1 != meta["vocab_size"]:
        raise UserError("its vocab_size does not fit its tokens, or one of them is there twice")
    end = {"<|endoftext|>": len(tokens)}
    return tiktoken.Encoding("own", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=end)


class BPETokenizer:
    """The tiktoken encoding that `meta` names, or one of its own."""

    def __init__(self, meta):
        self.encoding = open_encoding(meta)
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


def make_meta(name, texts):
    """Return the meta of a dataset of these texts, an iterable of str, in the tokenizer `name`.

    That is char, bytes, bpe:SIZE, gpt2 or another of tiktoken's encodings.
    """
    kind, _, size = name.partition(":")
    if name == "char":
        return char_meta(chain.from_iterable(texts))
    if name == "bytes":
        return bpe_meta([])
    if kind == "bpe":
        if not (size.isdecimal() and 257 < int(size) <= 2**20):
            raise UserError(f"tokenizer={name}: give a size above 257, as in bpe:8192")
        return train_bpe(texts, int(size))
    meta = {"tokenizer": name, "vocab_size": 0}
    return GPT2 if name == "gpt2" else {**meta, "vocab_size": make_tokenizer(meta).vocab_size}


def make_tokenizer(meta):
    """Return the tokenizer that `meta`, of a dataset or a checkpoint, describes."""
    if not meta.keys() & {"tokenizer", "stoi"}:
        raise UserError("meta.pkl names no tokenizer and holds no characters")
    return BPETokenizer(meta) if "tokenizer" in meta else CharTokenizer(meta)


def at_hand(meta):
    """Return whether the tokenizer of `meta` can be made, probably without a download."""
    if meta.keys() & {"stoi", "pairs"}:
        return True
    usual = Path(tempfile.gettempdir(), "data-gym-cache")  # where tiktoken keeps what it fetched
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", usual)
    return "tokenizer" in meta and bool(cache) and Path(cache).is_dir()


def bytes_per_id(tokenizer, vocab_size):
    """Return how many bytes of text each of vocab_size ids stands for, a list.

    End-of-text and what the tokenizer does not have, padding, stand for none.
    """
    pieces = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
    if tokenizer.eot is not None:
        pieces[tokenizer.eot] = b""
    padding = [0] * (vocab_size - len(pieces))
    return [len(piece) for piece in pieces] + padding
