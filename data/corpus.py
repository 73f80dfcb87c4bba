"""Where documents come from: files in a folder here, or in a dataset repository of the hub.

A .parquet or .jsonl file holds many documents, each with its text in a column `text`; a .txt file
is one. The files are counted and cut into parts without reading more than that takes: of a parquet
file its footer, and later, of each part, only the column with the text.
"""

import json
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from data.tokenizer import CUT
from engine.process import UserError, import_extra, reason, user_path

# Bytes in a part, of parquet those of all columns; more where a row group or a document has more.
PART = 2**28
ROWS = 1000  # documents of a parquet file in memory at once
PIECE = 2**18  # characters encoded at once; tiktoken overflows its stack at a million spaces
KINDS = ".parquet", ".jsonl", ".txt"


@contextmanager
def reading(what, advice=""):
    """Turn whatever goes wrong in the block into a UserError: no network, a broken file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as fault:  # of the network and of pyarrow: all sorts
        raise UserError(f"cannot read {what} ({reason(fault)}){advice}") from fault


def local_corpus(input):
    """Return the Corpus of a file, or of the files of one kind anywhere in a folder."""
    source = user_path(input or "no input").resolve()
    paths = [path for path in [source, *source.rglob("*")] if path.suffix in KINDS]
    paths = [path for path in paths if path.is_file()]
    if len({path.suffix for path in paths}) != 1:
        raise UserError(f"--input={input}: give .parquet, .jsonl or .txt files of one kind")
    return Corpus(LocalFileSystem(), map(str, paths))


def hub_corpus(repository, pattern, revision, commit=None):
    """Return the Corpus of the files that match in a dataset repository of the hub.

    They are those of `commit`; None: of the commit that `revision` names now.
    """
    library = import_extra("huggingface_hub", "documents")
    with reading(f"{repository} on the hub", "; offline, give --input=PATH"):
        if commit is None:
            commit = library.HfApi().dataset_info(repository, revision=revision).sha
        print(f"{repository}, {revision}: commit {commit}")
        files = library.HfFileSystem()
        paths = files.glob(f"datasets/{repository}@{commit}/{pattern}")
    if not paths:
        raise UserError(f"{repository} has no files {pattern} in commit {commit}")
    origin = {"repository": repository, "pattern": pattern, "revision": revision, "commit": commit}
    return Corpus(files, paths, origin)


class Corpus:
    """Files of documents, all of one kind, in the order of their paths, on a system of fsspec's.

    `sources` tells them from others: [path, bytes, when it was changed, where that is known].
    """

    def __init__(self, files, paths, origin=None):
        self.files, self.paths, self.origin = files, sorted(paths), origin or {}
        self.kind, self.sources = Path(self.paths[0]).suffix, []
        self.advice = "; start again to go on" if origin else ""  # where a network is in between
        for path in self.paths:
            with reading(path):
                about = files.info(path)
                self.sources.append([path, about["size"], about.get("mtime")])

    def open(self, path):
        return self.files.open(path, "rb", cache_type="none")  # exactly the bytes asked for

    def parts(self, limit=None):
        """Return the documents, or the first `limit`, in parts of about PART bytes at most.

        Each is a dict: the number of its first document, how many there are, and the pieces that
        hold them: [number of the file, begin, end], in what `pieces` counts in.
        """
        parts, count, room = [], 0, 0
        for index, path in enumerate(self.paths):
            for begin, end, documents, size in self.pieces(path):
                if limit is not None and count >= limit:
                    return parts
                if room < size or not parts:
                    parts.append({"first": count, "documents": 0, "pieces": []})
                    room = PART
                documents = documents if limit is None else min(documents, limit - count)
                add(parts[-1], index, begin, end, documents)
                count, room = count + documents, room - size
        return parts

    def pieces(self, path):
        """Yield (begin, end, documents, bytes) of whatever of a file can be read by itself.

        That is a row group of a parquet file, a line of a .jsonl file, by its bytes, or all.
        """
        with reading(path), self.open(path) as file:
            if self.kind == ".parquet":
                yield from row_groups(open_parquet(file, path).metadata)
            elif self.kind == ".jsonl":
                yield from lines(file)
            else:
                yield 0, 1, 1, self.files.size(path)

    def documents(self, part):
        """Yield (number, text) of the documents of a part; where there is none, the text is ""."""
        texts = chain.from_iterable(self.texts(*piece) for piece in part["pieces"])
        for number, text in enumerate(islice(texts, part["documents"]), part["first"]):
            yield number, "" if text is None or text.isspace() else text

    def texts(self, index, begin, end):
        """Yield the texts from `begin` to `end` of a file; where one is null, None."""
        path = self.paths[index]
        with reading(path, self.advice), self.open(path) as file:
            if self.kind == ".parquet":
                yield from parquet_texts(open_parquet(file, path), begin, end)
            elif self.kind == ".jsonl":
                yield from json_texts(file, path, begin, end)
            else:
                yield file_text(file.read(), path)

    def beginning(self, parts, apart, most):
        """Yield the first documents, about `most` characters, without those numbered in `apart`."""
        count = 0
        for number, text in chain.from_iterable(map(self.documents, parts)):
            if number not in apart:
                yield from (piece for piece, _ in in_pieces(text))
                count += len(text)
            if count >= most:
                return


def add(part, index, begin, end, documents):
    """Add what lies from `begin` to `end` of a file to a part; what goes on there is one piece."""
    part["documents"] += documents
    pieces = part["pieces"]
    if pieces and pieces[-1][0] == index:
        pieces[-1][2] = end
    else:
        pieces.append([index, begin, end])


def in_pieces(text):
    """Yield (piece, whether it is the last) of `text`, each of at most PIECE characters.

    They end where no token goes on; where there is no such place, as in a long line without spaces,
    anywhere.
    """
    begin = 0
    while len(text) - begin > PIECE:
        end = begin + PIECE
        for match in CUT.finditer(text, begin, end):
            end = match.end()
        yield text[begin:end], False
        begin = end
    yield text[begin:], True


# --- parquet -------------------------------------------------------------------------------------


def open_parquet(file, path):
    """Return an open parquet file. Raises UserError where it has no column `text` of strings."""
    library = import_extra("pyarrow.parquet", "documents")
    opened = library.ParquetFile(file, pre_buffer=True)  # reads ahead, a request per row group
    kinds = {field.name: str(field.type) for field in opened.schema_arrow}
    if kinds.get("text") not in ("string", "large_string"):
        found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise UserError(f"{path} has no column `text` of strings but {found}")
    return opened


def row_groups(metadata):
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        yield number, number + 1, group.num_rows, group.total_byte_size


def parquet_texts(opened, begin, end):
    for batch in opened.iter_batches(ROWS, row_groups=range(begin, end), columns=["text"]):
        yield from batch.column(0).to_pylist()


# --- lines and plain text ------------------------------------------------------------------------


def lines(file):
    begin = 0
    for line in file:
        end = begin + len(line)
        yield begin, end, int(not line.isspace()), len(line)
        begin = end


def json_texts(file, path, begin, end):
    file.seek(begin)
    for line in file:
        if begin >= end:
            return
        if not line.isspace():
            yield json_text(line, file, path, begin)
        begin += len(line)


def json_text(line, file, path, begin):
    """Return the text of the line at byte `begin` of a .jsonl file; None where it is null."""
    try:
        text = json.loads(line.decode("utf-8-sig"))["text"]
    except ValueError:
        raise UserError(f"{path}, line {line_at(file, begin)}: no JSON in UTF-8") from None
    except (TypeError, KeyError):
        text = False
    if not isinstance(text, str | None):
        raise UserError(f"{path}, line {line_at(file, begin)}: no `text` that is a string")
    return text and plain(text)


def line_at(file, begin):
    """Return the number of the line at byte `begin`, counted from 1."""
    file.seek(0)
    number = 1
    while begin > 0:
        begin -= len(file.readline())
        number += 1
    return number


def file_text(content, path):
    """Return the text of a .txt file that holds these bytes."""
    try:
        return plain(content.decode("utf-8-sig"))
    except UnicodeDecodeError as fault:
        number = content.count(b"\n", 0, fault.start) + 1
        raise UserError(f"{path}, line {number}: not UTF-8 text") from None


def plain(text):
    """Return `text` with \n for Windows line ends, and ? for halves of characters in JSON."""
    return text.replace("\r\n", "\n").encode(errors="replace").decode()
