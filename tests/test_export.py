"""tools/export.py: transformers writes the same text, and the model comes back unchanged."""

from unittest.mock import Mock

import pytest
import tiktoken
import transformers
from conftest import TEXT, TINY

import sample
import train
from data.tokenizer import GPT2, make_meta, make_tokenizer
from tools import export

RECIPE = "--position=rotary", "--rms_norm=True", "--tied=False"
DRAW = "--device=cpu", "--dtype=float32", "--temperature=0", "--num_samples=1", "--max_new_tokens=8"


@pytest.fixture
def trained(launch, tiny):
    """Return a function that trains a tiny model in `out`."""
    return lambda *options: launch(train, *TINY, "--max_iters=20", "--learning_rate=3e-3", *options)


@pytest.mark.parametrize("recipe", [(), RECIPE], ids=["gpt2", "nanochat"])
def test_transformers_and_sample_write_the_same_text(launch, trained, recipe):
    trained(*recipe)
    launch(export, "--folder=hf")
    ours = launch(sample, "--start=3 plus", *DRAW).split("\n----")[0]
    assert launch(sample, "--start=3 plus", *DRAW, "--init_from=hf").split("\n----")[0] == ours
    write = transformers.pipeline("text-generation", "hf")
    [theirs] = write("3 plus", max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert theirs["generated_text"] == ours


def tokenizers():
    """Return one tokenizer of each kind; the last has a gap before its special tokens."""
    another = make_tokenizer(GPT2)
    another.encoding = tiktoken.Encoding(
        "another",
        pat_str=r"\p{L}{1,4}|\p{N}{1,3}|\s+|[^\p{L}\p{N}\s]+",
        mergeable_ranks=another.encoding._mergeable_ranks,
        special_tokens={"<|endoftext|>": 50300, "<|more|>": 50310},
    )
    metas = [make_meta(name, [TEXT, "é東 <|endoftext|>"]) for name in ("char", "bpe:300", "gpt2")]
    return [*map(make_tokenizer, metas), another]


@pytest.mark.parametrize("number", range(4))
def test_transformers_reads_a_text_as_the_same_ids(tmp_path, gpt2_files, number):
    tokenizer = tokenizers()[number]
    export.save_tokenizer(tmp_path, tokenizer, 1024)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "3 plus  é 東 12345 makes\n\n 2<|endoftext|>maps"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text


def test_a_failed_export_leaves_nothing_and_deletes_nothing(launch, trained, tiny, monkeypatch):
    trained()
    (tiny / "hf.tmp").mkdir()
    before = set(tiny.iterdir())
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(export, "save_tokenizer", Mock(side_effect=full))
    with pytest.raises(SystemExit, match="error: hf: No space left on device"):
        launch(export, "--folder=hf")
    assert set(tiny.iterdir()) == before


@pytest.mark.parametrize(
    "arguments, line",
    [
        ([], "folder=: give a new folder"),
        (["--folder=out"], "folder=out: give a new folder"),
        (
            ["--folder=hf", "--dtype=int8"],
            "dtype='int8': choose one of .'float32', 'bfloat16', 'float16'.",
        ),
        (["--folder=hf", "--out_dir=mixed"], "rms_norm=False: transformers has no such model"),
    ],
)
def test_a_mistake_gets_its_line(launch, trained, arguments, line):
    trained("--max_iters=1")
    trained("--max_iters=1", "--position=rotary", "--out_dir=mixed")
    with pytest.raises(SystemExit, match=f"^error: {line}"):
        launch(export, *arguments)
