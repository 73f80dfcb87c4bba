"""Documents into token files: nanoGPT's split, parts, restarts after kills and full disks."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, losses

import train
from data import corpus as rooms
from data import documents
from data.corpus import in_pieces
from data.tokenizer import GPT2, BPETokenizer, make_tokenizer, read_meta
from data.tokens import TokenFile, open_dataset

fineweb = importlib.import_module("data.fineweb.prepare")
TEXTS = [f"Document {n}: {n} plus {n} makes {n + n}.\n\nIt ends." for n in range(60)]
KILLS = 25


@pytest.fixture
def prepare(launch, tmp_path, monkeypatch):
    """Run data/fineweb/prepare.py in bytes, with `tmp_path`/data in place of data/, in parts."""
    monkeypatch.setattr(fineweb, "DATA", tmp_path / "data")
    monkeypatch.setattr(rooms, "PART", 500)

    def run(*arguments, tokenizer="bytes", dataset="own"):
        options = f"--dataset={dataset}", f"--tokenizer={tokenizer}"
        return launch(fineweb, *options, *arguments)

    return run


@pytest.fixture
def source(tmp_path):
    """Write the documents as a .jsonl file; return its option."""
    write_lines(tmp_path / "docs.jsonl", TEXTS)
    return f"--input={tmp_path}/docs.jsonl"


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_parquet(path, texts, rows=7):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, path, row_group_size=rows)


def contents(folder):
    """Return the bytes of the files of a dataset, by name."""
    return {name: (folder / name).read_bytes() for name in documents.dataset_files(folder)}


def texts_of(folder, split):
    """Return the documents of a split, in order; `folder` is a dataset in bytes."""
    tokens = TokenFile(folder / f"{split}.bin", read_meta(folder), 1)
    text = make_tokenizer(tokens.meta).decode_bytes(tokens.ids[:].tolist()).decode()
    assert text.endswith("<|endoftext|>")
    return text.split("<|endoftext|>")[:-1]


def refused(prepare, *arguments, **options):
    """Return the one line with which a preparation ends."""
    with pytest.raises(SystemExit) as stop:
        prepare(*arguments, **options)
    assert "\n" not in stop.value.code
    return stop.value.code


# --- which documents, in which order -------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 40, 1999, 2000, 2001, 30_000])
def test_the_documents_held_out_are_those_of_train_test_split(count):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"number": range(count)})
    split = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    found = documents.held_out(count)
    assert found == split["test"]["number"]
    assert len(split["train"]) == count - len(found)


def test_val_has_nanogpts_order_and_train_the_corpus(prepare, source, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "HELD_OUT", 0.2)
    out = prepare(source)
    numbers = np.random.default_rng(2357).permutation(60)[:12].tolist()
    assert texts_of(tmp_path / "data" / "own", "val") == [TEXTS[number] for number in numbers]
    others = [text for number, text in enumerate(TEXTS) if number not in numbers]
    assert texts_of(tmp_path / "data" / "own", "train") == others
    size = sum(map(len, TEXTS))
    assert "documents: 60, of which 0 empty ones were skipped\n" in out
    assert f"text: {size:,} bytes\n" in out
    tokens = size + 60 - sum(len(TEXTS[number]) + 1 for number in numbers)
    assert f"own/train_*.bin, 8 files: {tokens:,} tokens" in out


@pytest.mark.parametrize("part", [1, 90, 500, 10**6])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_parts_and_kinds_of_files_give_the_same_tokens(
    prepare, source, tmp_path, monkeypatch, kind, part
):
    monkeypatch.setattr(rooms, "PART", 10**6)
    prepare(source)
    monkeypatch.setattr(rooms, "PART", part)
    folder = tmp_path / "in"
    folder.mkdir()
    for begin in range(0, 60, 20):  # three files
        some = TEXTS[begin : begin + 20]
        if kind == "jsonl":
            write_lines(folder / f"{begin:02}.jsonl", some)
        elif kind == "parquet":
            write_parquet(folder / f"{begin:02}.parquet", some)
        for number, text in enumerate(some if kind == "txt" else ()):
            (folder / f"{begin + number:02}.txt").write_text(text)
    prepare(f"--input={folder}", dataset="other")
    one, other = (contents(tmp_path / "data" / name) for name in ("own", "other"))
    many = [other[name] for name in sorted(other) if name.startswith("train")]
    assert (len(many) == 1) == (part == 10**6) and b"".join(many) == one["train.bin"]
    assert other["val.bin"] == one["val.bin"] and other["meta.pkl"] == one["meta.pkl"]


def test_a_limit_takes_the_first_documents(prepare, source, tmp_path):
    prepare(source, "--limit=25")
    write_lines(tmp_path / "first.jsonl", TEXTS[:25])
    prepare(f"--input={tmp_path}/first.jsonl", dataset="first")
    own, first = (contents(tmp_path / "data" / name) for name in ("own", "first"))
    assert own == first


def test_gpt2_tokens_are_those_of_whole_documents(
    prepare, source, tmp_path, monkeypatch, gpt2_files
):
    prepare(source, tokenizer="gpt2")
    monkeypatch.setattr(rooms, "PIECE", 9)
    prepare(source, tokenizer="gpt2", dataset="cut")
    own, cut = (contents(tmp_path / "data" / name) for name in ("own", "cut"))
    assert own == cut and "meta.pkl" not in own
    encode, ids = BPETokenizer(GPT2).encode, []
    for name in sorted(own):
        ids += np.frombuffer(own[name], "<u2").tolist() if name.startswith("train") else []
    held_out = np.random.default_rng(2357).permutation(60)[0]
    others = [text for number, text in enumerate(TEXTS) if number != held_out]
    assert ids == [i for text in others for i in [*encode(text), 50256]]


# --- text ----------------------------------------------------------------------------------------


def test_marks_at_the_begin_and_windows_line_ends_are_dropped(prepare, tmp_path):
    (tmp_path / "in").mkdir()
    for name, content in (("a", "\ufeffone\r\ntwo\r\n"), ("b", "three\n")):
        (tmp_path / "in" / f"{name}.txt").write_bytes(content.encode())
    prepare(f"--input={tmp_path}/in")
    line = json.dumps({"text": "one\r\ntwo\r\n"})
    (tmp_path / "docs.jsonl").write_bytes(f'\ufeff{line}\r\n\r\n{{"text": "three\\n"}}'.encode())
    prepare(f"--input={tmp_path}/docs.jsonl", dataset="lines")
    for name in ("own", "lines"):
        found = [texts_of(tmp_path / "data" / name, split) for split in ("train", "val")]
        assert sorted(sum(found, [])) == ["one\ntwo\n", "three\n"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_empty_documents_are_skipped_and_counted(prepare, tmp_path, kind):
    texts = ["one", "", " \n\t", None, "two", "\u2003", "three", "four"]
    write = write_lines if kind == "jsonl" else write_parquet
    write(tmp_path / f"docs.{kind}", texts)
    out = prepare(f"--input={tmp_path}/docs.{kind}")
    assert "documents: 8, of which 4 empty ones were skipped\ntext: 15 bytes\n" in out
    found = [texts_of(tmp_path / "data" / "own", split) for split in ("train", "val")]
    assert sorted(sum(found, [])) == sorted(["one", "two", "three", "four"])


def test_half_a_character_in_json_becomes_a_question_mark(prepare, tmp_path):
    write_lines(tmp_path / "docs.jsonl", ["\ud83d!", "\ud83d!"])
    prepare(f"--input={tmp_path}/docs.jsonl")
    assert texts_of(tmp_path / "data" / "own", "val") == ["?!"]


LONG = "word and " * 10**5, "a" * 10**6, " " * (2**20 + 5) + "a", "中文。" * 10**5


@pytest.mark.parametrize("text", LONG, ids=["words", "letters", "spaces", "Chinese"])
def test_a_long_document_is_encoded_in_pieces_that_are_not_too_long(text, gpt2_files):
    found = list(in_pieces(text))
    assert "".join(piece for piece, _ in found) == text
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    assert all(0 < len(piece) <= 2**18 for piece, _ in found)
    ids = BPETokenizer(GPT2).encode_corpus(piece for piece, _ in found)
    assert BPETokenizer(GPT2).decode_bytes(np.concatenate(list(ids)).tolist()).decode() == text


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("a.txt", b"one\ntwo\nCaf\xe9", "a.txt, line 3: not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b\n', "a.jsonl, line 3: no JSON in UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "a.jsonl, line 2: no JSON in UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', "a.jsonl, line 2: no `text` that is a string"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 7}', "a.jsonl, line 2: no `text` that is a string"),
        ("a.jsonl", b'{"text": "a"}\n["text"]', "a.jsonl, line 2: no `text` that is a string"),
        ("a.jsonl", b'{"text": "a"}\n', "error: 1 documents cannot be split; give at least 2"),
        ("a.jsonl", b"", "error: 0 documents cannot be split; give at least 2"),
        ("a.parquet", b"PAR1 garbage", "error: cannot read "),
        ("a.csv", b"text\n", "give .parquet, .jsonl or .txt files of one kind"),
        ("a.jsonl", b'{"text": " "}\n{"text": "a"}\n', "a split is empty, for too many documents"),
    ],
)
def test_a_broken_file_gets_a_line(prepare, tmp_path, name, content, line):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    if name == "a.txt":
        (tmp_path / "in" / "b.txt").write_text("fine")
    assert line in refused(prepare, f"--input={tmp_path}/in")
    assert not list(tmp_path.rglob("*.bin"))


def test_a_parquet_file_without_text_names_what_it_has(prepare, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2], "url": ["a", "b"]}), tmp_path / "a.parquet")
    line = refused(prepare, f"--input={tmp_path}/a.parquet")
    assert line.endswith("no column `text` of strings but text (int64), url (string)")


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--tokenizer=char"], "error: tokenizer=char has no end-of-text token; take gpt2, "),
        (["--tokenizer=gpt7"], "error: no tokenizer gpt7: "),
        (["--dataset=../x"], "error: --dataset=../x: give a new name, of a folder to be made in "),
        (["--input="], "error: --input=: give .parquet, .jsonl or .txt files of one kind"),
        (["--input=no.jsonl"], "error: --input=no.jsonl: give .parquet, .jsonl or .txt files of "),
        (["--limit=1"], "error: limit=1"),
    ],
)
def test_a_mistake_gets_a_line(prepare, source, tmp_path, arguments, line):
    assert refused(prepare, source, *arguments).startswith(line)
    assert not (tmp_path / "data").exists()


# --- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Put a hub in memory in place of the real one; it notes what is opened and read."""
    library = pytest.importorskip("huggingface_hub")
    memory = pytest.importorskip("fsspec.implementations.memory")
    parquet = pytest.importorskip("pyarrow.parquet")

    class Hub(memory.MemoryFileSystem):
        store, pseudo_dirs, cachable = {}, [""], False
        commits, opened, row_groups = ["a" * 40], [], []

        def _open(self, path, mode="rb", **options):
            if mode == "rb":
                self.opened.append(path.rpartition("/")[2])
            return super()._open(path, mode, **options)

        def dataset_info(self, repository, revision):
            assert (repository, revision) == ("HuggingFaceFW/fineweb-edu", "main")
            return type("Info", (), {"sha": self.commits[-1]})

    read = parquet.ParquetFile.iter_batches

    def spy(self, size, row_groups, columns):
        Hub.row_groups.extend((Hub.opened[-1], group, *columns) for group in row_groups)
        return read(self, size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", spy)
    monkeypatch.setattr(library, "HfFileSystem", Hub)
    monkeypatch.setattr(library, "HfApi", Hub)
    return Hub


@pytest.fixture
def sample(hub, tmp_path):
    """Put two files of 30 documents each, in row groups of 7, on that hub."""
    for number in range(2):
        write_parquet(tmp_path / "part.parquet", TEXTS[30 * number : 30 * (number + 1)])
        path = f"datasets/HuggingFaceFW/fineweb-edu@{'a' * 40}/sample/10BT/00{number}.parquet"
        hub().pipe_file(path, (tmp_path / "part.parquet").read_bytes())
    return hub


def test_the_hub_gives_what_a_file_gives(prepare, source, sample, tmp_path):
    out = prepare()
    assert f"HuggingFaceFW/fineweb-edu, main: commit {'a' * 40}" in out
    prepare(source, dataset="local")
    hub, local = (tmp_path / "data" / name for name in ("own", "local"))
    for split in ("train", "val"):
        assert texts_of(hub, split) == texts_of(local, split)


def test_a_limit_reads_the_row_groups_it_needs_and_their_text_alone(prepare, sample, tmp_path):
    prepare("--limit=16")
    assert sample.row_groups == [("000.parquet", group, "text") for group in range(3)]
    assert "001.parquet" not in sample.opened
    prepare("--limit=31", dataset="more")
    assert sample.row_groups[3:] == [
        *(("000.parquet", group, "text") for group in range(5)),
        ("001.parquet", 0, "text"),
    ]
    found = [texts_of(tmp_path / "data" / "own", split) for split in ("train", "val")]
    assert sorted(sum(found, [])) == sorted(TEXTS[:16])


def test_a_restart_reads_the_commit_it_began_with(prepare, sample, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_part(patch, 3)
        assert refused(prepare) == "error: stopped"
    sample.commits.append("b" * 40)  # the branch has moved; it has no files there
    out = prepare()
    assert f"commit {'a' * 40}" in out and "3 of 10 parts are there" in out
    assert sorted(texts_of(tmp_path / "data" / "own", "train"))[0] == TEXTS[0]
    assert "is prepared already" in prepare()  # and so later, too
    assert refused(prepare, f"--revision={'c' * 40}").startswith("error: cannot read Hugging")
    assert "has no files sample" in refused(prepare, dataset="new")


def test_without_network_the_hub_names_the_way_out(prepare, sample, monkeypatch):
    def unreachable(self, *arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(sample, "dataset_info", unreachable)
    line = "error: cannot read HuggingFaceFW/fineweb-edu on the hub (ConnectionError: no network)"
    assert refused(prepare) == f"{line}; offline, give --input=PATH"


def test_a_network_that_goes_away_says_how_to_go_on(prepare, sample, monkeypatch):
    real, opened = sample._open, sample.opened

    def failing(self, path, mode="rb", **options):
        if len(opened) > 5:
            raise ConnectionError("no route")
        return real(self, path, mode, **options)

    monkeypatch.setattr(sample, "_open", failing)
    line = refused(prepare)
    assert line.endswith("0.parquet (ConnectionError: no route); start again to go on")
    monkeypatch.undo()


# --- stops, kills, full disks --------------------------------------------------------------------


def stop_in_part(patch, number):
    """Let a preparation stop in the middle of the part with this number, counted from 0."""
    part, count = rooms.Corpus.documents, [0]

    def stopped(self, documents):
        found = list(part(self, documents))
        yield from found[: len(found) // 2]
        if count[0] == number:
            raise documents_stop()
        yield from found[len(found) // 2 :]
        count[0] += 1

    patch.setattr(rooms.Corpus, "documents", stopped)


def documents_stop():
    return rooms.UserError("stopped")


def test_two_interruptions_change_no_byte(prepare, source, tmp_path, monkeypatch):
    prepare(source, dataset="straight")
    for number in (2, 1):
        with monkeypatch.context() as patch:
            stop_in_part(patch, number)
            assert refused(prepare, source) == "error: stopped"
        assert not list((tmp_path / "data" / "own").glob("*.bin"))
        assert not list(tmp_path.rglob("*.tmp"))
    out = prepare(source)
    assert "unfinished: 3 of 8 parts are there" in out
    straight, own = (contents(tmp_path / "data" / name) for name in ("straight", "own"))
    assert straight == own and len(own) == 10
    assert sorted(path.name for path in (tmp_path / "data" / "own").iterdir()) == sorted(
        [*own, ".lock", "prepare.json"]
    )


def test_byte_pairs_of_its_own_are_made_once(prepare, source, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    with monkeypatch.context() as patch:
        patch.setattr(documents, "write_part", lambda *arguments: refuse())
        assert refused(prepare, source, tokenizer="bpe:300") == "error: stopped"
    before = (tmp_path / "data" / "own" / "unfinished" / "meta.pkl").read_bytes()
    make = documents.make_meta
    monkeypatch.setattr(
        documents, "make_meta", lambda name, texts: make(name, texts) if texts == [""] else refuse()
    )
    prepare(source, tokenizer="bpe:300")
    assert (tmp_path / "data" / "own" / "meta.pkl").read_bytes() == before
    assert read_meta(tmp_path / "data" / "own")["vocab_size"] == 300


def refuse():
    raise documents_stop()


def test_an_older_dataset_stays_until_the_new_one_is_whole(prepare, source, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "own"
    prepare(source, "--limit=30")
    before = contents(folder)
    with monkeypatch.context() as patch:
        stop_in_part(patch, 2)
        assert refused(prepare, source) == "error: stopped"
    assert contents(folder) == before
    prepare(source)
    prepare(source, dataset="straight")
    assert contents(folder) == contents(tmp_path / "data" / "straight") != before


def test_another_preparation_does_not_wipe_out_the_parts_of_one(
    prepare, source, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_in_part(patch, 2)
        refused(prepare, source)
    line = refused(prepare, source, "--limit=30")
    work = tmp_path / "data" / "own" / "unfinished"
    assert line == (
        f"error: {work} holds 2 parts of another preparation, not of the same limit; "
        f"start that one again to end it, or delete the folder"
    )
    write_lines(tmp_path / "docs.jsonl", [TEXTS[0], *TEXTS[:59]])
    assert "not of the same sources" in refused(prepare, source)
    assert len(list(work.glob("train*.bin"))) == 2


def test_an_unfinished_dataset_is_named_as_such(prepare, source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_part(patch, 2)
        refused(prepare, source)
    with pytest.raises(ValueError, match="own is half prepared; start its preparation again"):
        TokenFile(tmp_path / "data" / "own" / "train.bin", {"vocab_size": 257}, 4)


@pytest.mark.parametrize("old", [["--limit=30"], ["--limit=2"], ["--tokenizer=gpt2"]])
def test_a_kill_at_any_point_of_the_last_moves_loses_nothing(
    prepare, source, tmp_path, monkeypatch, gpt2_files, old
):
    """Each unlink and rename is the last once; what is there is then one dataset, or none."""
    folder, copy = tmp_path / "data" / "own", tmp_path / "copy"
    prepare(source, *old)
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(documents, "put_in_place", lambda folder: None)
        patch.setattr(documents, "report", lambda folder: None)
        prepare(source)
    expected, at, was_killed = contents(folder / "finished"), 0, True
    while was_killed:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        with monkeypatch.context() as patch:
            calls = iter(range(at, -1, -1))  # the 0 among them is the kill
            patch.setattr(os, "replace", mortal(os.replace, calls))
            patch.setattr(Path, "unlink", mortal(Path.unlink, calls))
            patch.setattr(shutil, "rmtree", mortal(shutil.rmtree, calls))
            was_killed = is_killed(documents.put_in_place, copy)
        assert_one_of(copy, expected, before)
        documents.put_in_place(copy)
        assert contents(copy) == expected and not (copy / "finished").exists()
        at += 1
    print(f"killed at {at - 1} points")
    assert at > len(expected) + len(before)


def mortal(function, calls):
    """Return the function, which kills where the next of `calls` is 0."""

    def call(*arguments, **options):
        if next(calls) == 0:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return call


def is_killed(function, *arguments):
    try:
        function(*arguments)
    except KeyboardInterrupt:
        return True
    return False


def assert_one_of(folder, expected, before):
    """Require that what can be opened in `folder` is one of two datasets."""
    try:
        tokens = open_dataset(folder, 1)
    except ValueError:
        return
    found = {split: b"".join(map(bytes, tokens[split].mappings)) for split in tokens}
    found |= {name: text for name, text in contents(folder).items() if name == "meta.pkl"}
    assert found in [joined(expected), joined(before)]


def joined(dataset):
    """Return the contents of a dataset with those of each split as one."""
    found = {name: text for name, text in dataset.items() if name == "meta.pkl"}
    for split in ("train", "val"):
        found[split] = b"".join(dataset[name] for name in sorted(dataset) if split in name)
    return found


def test_a_full_disk_gets_a_line_and_the_next_start_goes_on(prepare, tmp_path, file_limit):
    texts = [*(["short"] * 90), "long " * 500, *(["short"] * 90)]
    write_lines(tmp_path / "docs.jsonl", texts)
    file_limit(4000)
    line = refused(prepare, f"--input={tmp_path}/docs.jsonl")
    folder = tmp_path / "data" / "own"
    assert line == f"error: cannot write to {folder}; start again to go on: File too large"
    assert list(folder.rglob("train_0000.bin")) and not list(tmp_path.rglob("*.tmp"))
    assert "parts are there" in prepare(f"--input={tmp_path}/docs.jsonl")
    prepare(f"--input={tmp_path}/docs.jsonl", dataset="straight")
    assert contents(folder) == contents(tmp_path / "data" / "straight")


def test_a_second_preparation_at_once_is_refused(prepare, source, tmp_path):
    fcntl, folder = pytest.importorskip("fcntl"), tmp_path / "data" / "own"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        line = refused(prepare, source)
    assert line == f"error: {folder} is in use by another process; wait for it to end"


DRIVER = """
import sys, time, importlib, pathlib
sys.path.insert(0, {root!r})
from configurator import configure
from data import corpus
script = importlib.import_module("data.fineweb.prepare")
script.DATA, corpus.PART = pathlib.Path("data").resolve(), 500
read = corpus.Corpus.documents
def slowly(self, part):
    for each in read(self, part):
        time.sleep(0.004)
        yield each
if "--slowly" in sys.argv:
    sys.argv.remove("--slowly")
    corpus.Corpus.documents = slowly
script.main(configure(vars(script)))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_of_a_preparation_changes_no_byte(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    write_lines(tmp_path / "docs.jsonl", [f"{text} {n}" for n in range(20) for text in TEXTS])
    command = [sys.executable, "driver.py", "--input=docs.jsonl", "--tokenizer=bytes"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    subprocess.run([*command, "--dataset=straight"], check=True, **pipes)
    moments, kills, in_write, found = random.Random(1), 0, 0, set()
    while kills < KILLS:
        process = subprocess.Popen([*command, "--dataset=own", "--slowly"], **pipes)
        process.stdout.readline()  # it counts the documents
        time.sleep(moments.uniform(0, 0.3))
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        in_write += bool(list(tmp_path.rglob("*.tmp")))
        found.add(len(list((tmp_path / "data" / "own").rglob("train_*.bin"))))
    print(f"{in_write} of {kills} kills in a write, {len(found)} numbers of parts found")
    subprocess.run([*command, "--dataset=own"], check=True, **pipes)
    own, straight = (contents(tmp_path / "data" / name) for name in ("own", "straight"))
    assert own == straight and len(own) > 100
    assert in_write >= KILLS // 4 and len(found) >= KILLS // 3


# --- training ------------------------------------------------------------------------------------


def test_training_on_many_files_is_training_on_one(prepare, source, launch, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "HELD_OUT", 0.2)
    prepare(source, dataset="many")
    monkeypatch.setattr(rooms, "PART", 10**6)
    prepare(source, dataset="one")
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(contents(tmp_path / "data" / "many")) > len(contents(tmp_path / "data" / "one")) == 3
    options = "--max_iters=4", "--eval_interval=2", "--eval_iters=3"
    for name in ("many", "one"):
        launch(train, *TINY, f"--dataset={name}", *options, f"--out_dir=out-{name}")
    assert losses("out-many") == losses("out-one") and len(losses("out-one")) == 4
    # The digests are the same, so that a run goes on.
    options = "--init_from=resume", "--out_dir=out-many", "--max_iters=5"
    assert "steps: 4 to 5" in launch(train, *options, "--dataset=one")
