"""Byte-pair encodings (BPE), from tiktoken or trained on the text of a dataset."""

import urllib.request
from reprlib import repr as short  # bounds nested values

import tiktoken.load

from engine.process import UserError, reason

# A BPE trained on the text joins bytes only within these pieces: a word with the space before it,
# up to 3 digits, punctuation, a line break with the blanks before it, blanks. The longer pieces of
# cl100k_base gave 1.949 bits per byte instead of 1.900 (Python source, 2,048 tokens, 2026-11-25).
# Changing this changes the meaning of existing datasets.
WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*\n|\s+(?!\S)|\s+"


def download(url):
    """Return the content at `url`. OSError after 10 seconds without progress."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read()


tiktoken.load.read_file = download  # tiktoken's own would wait for a silent server for ever


def named_encoding(meta):
    """Return the encoding of tiktoken that `meta` names; tiktoken may have to download it."""
    try:
        return tiktoken.get_encoding(meta["tokenizer"])
    except (OSError, ValueError) as fault:
        raise UserError(
            f"no tokenizer {short(meta['tokenizer'])}: {reason(fault)}; offline, set "
            f"TIKTOKEN_CACHE_DIR to a folder that tiktoken has filled on another machine"
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
