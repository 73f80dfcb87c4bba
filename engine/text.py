"""Text around sampling: prompts from a file or a terminal, samples that grow, the file of them."""

import codecs
import json
import os
import sys
from collections import namedtuple
from contextlib import suppress

from engine.process import UserError, atomic, user_error, user_path

Prompt = namedtuple("Prompt", "text ids")
LINE = "\n---------------\n"  # after each sample

# --- prompts -------------------------------------------------------------------------------------


def read_prompts(start, path, tokenizer, block_size):
    """Return the Prompt that `start` is or names, or those in the file at `path` if that is given.

    Raises UserError where one of them cannot be read, written with the tokenizer's ids, or held in
    block_size of them.
    """
    if path:
        return [*prompts_in_file(user_path(path), tokenizer, block_size)]
    with user_error("the prompt cannot be read as UTF-8 text", OSError, UnicodeError):
        file = user_path(start.removeprefix("FILE:"))
        text = file.read_text("utf-8") if start.startswith("FILE:") else start
    return [make_prompt(text, tokenizer, block_size)]


def prompts_in_file(path, tokenizer, block_size):
    """Yield the Prompt of each line of a UTF-8 file that is not blank."""
    with user_error(f"{path} cannot be read as UTF-8 text", OSError, UnicodeError):
        text = path.read_text("utf-8-sig")  # Windows' line ends become \n
    if not text.strip():
        raise UserError(f"{path} holds no prompt; write one in a line")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with user_error(f"{path}, line {number}", UserError):
                prompt = make_prompt(line, tokenizer, block_size)
            yield prompt


def make_prompt(text, tokenizer, block_size):
    """Return the Prompt of a text; an empty one begins as the tokenizer lets texts begin."""
    with user_error("the prompt cannot be read as UTF-8 text", UnicodeError):
        text.encode()  # raises where an argument or a terminal gave no UTF-8
    if text == "\n" and tokenizer.eot is None:  # which a vocabulary may lack
        text = ""
    ids = tokenizer.encode(text) or [tokenizer.opening]
    if len(ids) > block_size:
        raise UserError(f"the prompt has {len(ids)} tokens, the model reads {block_size} at most")
    return Prompt(text, ids)


def typed_prompts(tokenizer, block_size):
    """Yield the Prompt of each line of standard input; print what is wrong with the others."""
    for line in typed_lines():
        try:
            prompt = make_prompt(line, tokenizer, block_size)
        except UserError as fault:
            print(f"error: {fault}", file=sys.stderr)
        else:
            yield prompt


def typed_lines():
    """Yield the lines of standard input; a terminal is asked for each with "> "."""
    if sys.stdin is None:  # it was closed from outside
        return
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        with suppress(ImportError):
            import readline  # noqa: F401  input() then knows the arrow keys
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # make_prompt() tells what is not UTF-8
    try:
        while True:
            yield input("> " if asks else "")
    except EOFError:
        return
    finally:
        if asks:
            print()  # what follows, perhaps the shell, begins a line


# --- samples -------------------------------------------------------------------------------------


class Sample:
    """Sample `number` of a Prompt: its text, and what is drawn after it.

    It ends after `most` tokens, at the token `end`, or before the text `stop`. It is held in bytes:
    a token may be half a character.
    """

    def __init__(self, prompt, number, most, end, stop):
        self.prompt, self.number = prompt, number
        self.most, self.end, self.stop = most, end, stop.encode()
        self.content, self.done = bytearray(prompt.text.encode()), False
        self.given, self.shown = len(self.content), 0  # bytes of the prompt, and those printed
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, place, token, piece):
        """Append `piece`, which the token at this place stands for, if it belongs to the sample."""
        drawn = place - len(self.prompt.ids)  # tokens before this one
        if self.done or drawn < 0:
            return
        self.done = drawn + 1 == self.most or token == self.end
        if token == self.end:
            return
        begin = max(self.given, len(self.content) - len(self.stop))
        self.content += piece
        if self.stop and self.stop in self.content[begin:]:
            self.done = True
            del self.content[self.content.index(self.stop, begin) :]

    def show(self, final=False):
        """Print what is new, but before the end nothing that may yet turn out to be `stop`."""
        held_back = 0 if final else len(self.stop)
        end = max(self.shown, len(self.content) - held_back)
        print(self.decoder.decode(self.content[self.shown : end], final), end="", flush=True)
        self.shown = end
        if final:
            print(LINE, end="", flush=True)

    def as_text(self):
        return self.content.decode("utf-8", "replace") + LINE

    def as_json(self):
        drawn = self.content[self.given :].decode("utf-8", "replace")
        fields = {"prompt": self.prompt.text, "sample": self.number, "text": drawn}
        return json.dumps(fields, ensure_ascii=False) + "\n"


def check_file(path, setting):
    """Raise UserError unless a file can be written at `path`, perhaps in place of another."""
    if path.exists() and not path.is_file():
        raise UserError(f"{setting}={path} is not a file; name one")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UserError(f"{setting}={path}: {path.parent} is not a folder that can be written to")


def save_samples(path, samples):
    """Write the samples to a file, as they were printed, or as lines of JSON if it ends in .jsonl.

    There, "text" is what was drawn after "prompt".
    """
    as_json = path.suffix == ".jsonl"
    texts = [sample.as_json() if as_json else sample.as_text() for sample in samples]
    with user_error(path, OSError), atomic(path) as file:
        file.write("".join(texts).encode())
