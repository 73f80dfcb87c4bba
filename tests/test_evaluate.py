"""tools/evaluate.py: exact figures of a model on a text, against plain formulas and train.py."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import TEXT, TINY

import sample
import train
from data.tokenizer import make_meta, make_tokenizer
from data.tokens import write_dataset
from tools import evaluate, export

CPU = "--device=cpu", "--dtype=float32"


@pytest.fixture
def trained(launch, tiny, monkeypatch):
    """Return a function that trains on data/tiny or on data/bytes, and returns its output."""
    monkeypatch.setattr(evaluate, "ROOT", tiny)
    meta = make_meta("bytes", [])
    ids = make_tokenizer(meta).encode(TEXT)
    write_dataset(tiny / "data" / "bytes", meta, train=[ids], val=[ids])
    return lambda *options: launch(train, *TINY, "--max_iters=20", "--eval_iters=1000", *options)


@pytest.fixture
def measure(launch, tiny):
    """Return a function that returns the figures of the model in `out` on a text."""

    def run(text):
        (tiny / "text.txt").write_text(text, encoding="utf-8")
        return json.loads(launch(evaluate, *CPU, "--text=text.txt"))

    return run


def test_every_token_but_the_first_counts_once(trained, measure):
    trained()
    figures = measure(TEXT[:200])  # 12 windows of 16 tokens and a shorter one
    settings = {"init_from": "resume", "out_dir": "out", "checkpoint_file": None}
    model, tokenizer, _ = sample.load_model(settings, torch.device("cpu"))
    ids = torch.tensor(tokenizer.encode(TEXT[:200]))
    windows = [ids[start : start + 17] for start in range(0, 199, 16)]
    logits = torch.cat([model(window[None, :-1], window[None, 1:])[0][0] for window in windows])
    losses = F.cross_entropy(logits, ids[1:], reduction="none")
    mean = losses.mean().item()
    expected = {
        "tokens": 199,
        "bytes": 199,
        "loss": mean,
        "perplexity": math.exp(mean),
        "bits_per_byte": mean / math.log(2),
        "accuracy": (logits.argmax(1) == ids[1:]).sum().item() / 199,
    }
    assert figures == pytest.approx(expected, rel=1e-5)


def test_a_split_has_the_loss_that_train_printed(trained, launch):
    printed = trained("--block_size=13")  # 30 complete windows
    [loss] = re.findall(r"^step 20: .* val loss ([\d.]+)", printed, re.M)
    figures = json.loads(launch(evaluate, *CPU, "--split=val"))
    assert figures["loss"] == pytest.approx(float(loss), abs=1e-4)


def test_bytes_are_those_of_the_text_without_end_of_text(trained, measure):
    trained("--dataset=bytes", "--max_iters=1")
    figures = measure("é<|endoftext|>é")  # five tokens, the first of them not predicted
    assert (figures["tokens"], figures["bytes"]) == (4, 3)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--text=nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--text=short.txt"], "short.txt has 1 tokens; give at least 2"),
        (["--text=strange.txt"], "strange.txt: 1 unknown characters: 'é'"),
        (["--dataset=bytes"], "dataset bytes uses a different tokenizer than the model"),
    ],
)
def test_a_mistake_gets_its_line(launch, trained, tiny, arguments, line):
    trained("--max_iters=1")
    (tiny / "short.txt").write_text("1")
    (tiny / "strange.txt").write_text("plus é", encoding="utf-8")
    with pytest.raises(SystemExit, match=f"^error: {line}$"):
        launch(evaluate, *CPU, *arguments)


TASK = """
task: pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {0}/pages.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.mark.slow
def test_lm_eval_measures_the_same_on_the_exported_folder(launch, trained, measure, tiny):
    trained("--dataset=bytes")
    launch(export, "--folder=hf")
    page = TEXT[:160]  # ten windows; lm_eval gives a shorter last one more context
    (tiny / "pages.jsonl").write_text(json.dumps({"page": page}))
    (tiny / "pages.yaml").write_text(TASK.format(tiny))
    model = "--model hf --model_args pretrained=hf,dtype=float32 --device cpu"
    options = f"{model} --tasks pages.yaml --output_path results".split()
    subprocess.run([sys.executable, "-m", "lm_eval", *options], check=True)
    [results] = (tiny / "results").rglob("*.json")
    theirs = json.loads(results.read_text())["results"]["pages"]["bits_per_byte,none"]
    ours = measure(f"<|endoftext|>{page}")["bits_per_byte"]
    assert ours == pytest.approx(theirs, rel=1e-4)
