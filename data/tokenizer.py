"""Tokenizers turn text into token ids and back.

A dataset and a checkpoint describe their tokenizer by a dict, its `meta`: the vocabulary size, and
either nanoGPT's tables of characters `stoi` and `itos`, or `tokenizer`, the name of an encoding of
tiktoken, or `pairs`, the tokens of a byte-pair encoding (BPE) trained on the text itself, in the
order in which they were learned. A dataset keeps it in meta.pkl; without that file it is GPT2.
"""

import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tiktoken

from engine.process import UserError, reason, user_error

GPT2 = {"tokenizer": "gpt2", "vocab_size": 50304}  # 50,257 padded to a multiple of 64 for speed
# A BPE trained on the text joins bytes only within these pieces: a word with the space before it,
# up to 3 digits, punctuation, a line break with the blanks before it, blanks. Longer pieces gave
# higher losses (docs/course.md, step 2). Changing this changes the meaning of existing datasets.
WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*\n|\s+(?!\S)|\s+"
# Pieces of at most 262,144 characters, because tiktoken's stack overflows at a million spaces. No
# token of WORDS or tiktoken crosses the end of a piece: it lies before a space that follows a
# visible character, or before a blank that follows a letter. Without such a place it is anywhere.
PIECE = re.compile(r"(?s).{1,262144}(?:(?<=\S)(?= )|(?<=[^\W\d_])(?=\s)|\Z)|.{1,262144}")


class DataUnpickler(pickle._Unpickler):  # the C version takes gigabytes for a damaged memo index
    """Reads numbers, strings and containers; refuses to run anything."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


def read_meta(folder):
    """Return the meta of the dataset in `folder`. UserError if its meta.pkl is damaged."""
    path = folder / "meta.pkl"
    if not path.exists():
        return GPT2
    try:
        with open(path, "rb") as file:
            meta = DataUnpickler(file).load()
        if type(meta["vocab_size"]) is not int or not 0 < meta["vocab_size"] < 2**32:
            raise UserError(f"its vocab_size is {meta['vocab_size']!r:.80}")
        if "stoi" in meta or "pairs" in meta:
            make_tokenizer(meta)  # checks its tables
        return meta
    except Exception as fault:  # damage can raise anything
        raise UserError(
            f"{path} describes no dataset ({reason(fault)}); prepare it again"
        ) from None


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
        """Yield the ids of each text as an array, computed on all cores. No text may be empty."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from pool.map(self.encode_ordinary, texts)

    def encode_ordinary(self, text):
        """Return the ids of a text as an array, without special tokens."""
        return np.concatenate(
            [
                self.encoding.encode_to_numpy(piece, disallowed_special=())
                for piece in PIECE.findall(text)
            ]
        )

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)


def named_encoding(meta):
    """Return the encoding of tiktoken that `meta` names; tiktoken may have to download it."""
    try:
        return tiktoken.get_encoding(meta["tokenizer"])
    except (OSError, ValueError) as fault:
        raise UserError(
            f"no tokenizer {meta['tokenizer']}: {reason(fault)}; offline, set TIKTOKEN_CACHE_DIR "
            f"to a folder that tiktoken has filled on another machine"
        ) from None


def trained_encoding(meta):
    """Return the encoding with the 256 bytes, the `pairs` of `meta` and <|endoftext|>."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [token.encode("latin-1") for token in meta["pairs"]]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) + 1 != meta["vocab_size"]:
        raise UserError("its vocab_size does not match its tokens, or a token appears twice")
    end = {"<|endoftext|>": len(tokens)}
    return tiktoken.Encoding("own", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=end)


def train_bpe(texts, size):
    """Return the meta of a BPE with at most `size` tokens, trained on `texts`, an iterable of str.

    Repeatedly, the two tokens that are neighbours most often become one (Sennrich et al. 2016,
    arXiv:1508.07909), on bytes, so that every text can be encoded (GPT-2).
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    # A long word takes minutes to learn from, so it is cut.
    pattern = Regex(WORDS.replace("+", "{1,256}").replace("*", "{0,256}"))
    words = pre_tokenizers.Split(pattern, behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,  # without <|endoftext|>
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    byte_of = {character: chr(byte) for byte, character in bytes_to_unicode().items()}
    learned = sorted(ids, key=ids.get)[256:]  # behind the bytes, each byte written as a character
    pairs = ["".join(map(byte_of.get, token)) for token in learned]  # latin-1, so plain data
    return {"tokenizer": "own", "pairs": pairs, "vocab_size": 256 + len(pairs) + 1}


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
    if "tokenizer" in meta:
        return BPETokenizer(meta)
    if "stoi" in meta:
        return CharTokenizer(meta)
    raise UserError("meta.pkl names no tokenizer and holds no characters")
