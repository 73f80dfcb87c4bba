"""tools/evaluate.py: exact figures of a model on a text, against plain formulas and train.py."""

import json
import math
import re

import pytest
import torch
from conftest import TEXT, TINY

import sample
import train
from tools import evaluate


@pytest.fixture
def trained(launch, tiny, monkeypatch):
    """Train a tiny model in `out`; return what train.py printed."""
    monkeypatch.setattr(sample, "ROOT", tiny)
    monkeypatch.setattr(evaluate, "ROOT", tiny)
    return launch(train, *TINY, "--max_iters=20", "--eval_interval=20", "--eval_iters=100000")


def figures(launch, *arguments):
    launch(evaluate, "--device=cpu", "--dtype=float32", *arguments, "--figures_file=figures.json")
    with open("figures.json", encoding="utf-8") as file:
        return json.load(file)


def plain(content):
    """Return the loss of each character after the first, window by window, by the plain model."""
    model, tokenizer, _ = sample.load("resume", "out", None, torch.device("cpu"))
    ids, T, losses, right = torch.tensor(tokenizer.encode(content)), 16, [], 0
    for start in range(0, len(ids) - 1, T):
        piece = ids[start : start + T + 1]
        with torch.no_grad():
            logits, _ = model.eval()(piece[None, :-1], piece[None, 1:])
        each = -logits[0].log_softmax(1).gather(1, piece[1:, None])[:, 0]
        right += (logits[0].argmax(1) == piece[1:]).sum().item()
        losses.append(each)
    return torch.cat(losses), right


@pytest.mark.parametrize("parts", ["--batch_size=1", "--batch_size=3"])
def test_every_token_but_the_first_counts_once(launch, trained, tiny, monkeypatch, parts):
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 200)  # a few rows of logits at a time
    content = TEXT[:200]  # the last window is shorter
    (tiny / "text.txt").write_text(content, encoding="utf-8")
    found, (losses, right) = figures(launch, "--text=text.txt", parts), plain(content)
    assert found["tokens"] == found["bytes"] == 199
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(losses.mean().item() / math.log(2), rel=1e-5)
    assert found["accuracy"] == right / 199
    names = [name for name in found if name.startswith("loss at position ")]
    assert [name[17:] for name in names] == ["1 to 1", "2 to 2", "3 to 4", "5 to 8", "9 to 16"]
    assert found[names[1]] == pytest.approx(losses[1::16].mean().item(), rel=1e-5)
    last = torch.cat([losses[at : at + 8] for at in range(8, 199, 16)])
    assert found[names[4]] == pytest.approx(last.mean().item(), rel=1e-5)


def test_on_a_split_it_says_what_training_said(launch, trained, tiny):
    val = figures(launch)  # of the dataset that the checkpoint names
    losses, _ = plain(TEXT[len(TEXT) * 9 // 10 :])
    assert val["tokens"] == len(losses)
    assert val["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    whole = losses[: len(losses) // 16 * 16].mean().item()  # train.py leaves out a shorter last one
    printed = re.findall(r"^step 20: .* val loss ([\d.]+)", trained, re.M)
    assert [float(each) for each in printed] == [pytest.approx(whole, abs=1e-4)]
    [bits] = re.findall(r"^step 20: .* ([\d.]+) bits per byte", trained, re.M)
    assert float(bits) == pytest.approx(whole / math.log(2), abs=1e-3)  # a byte per character
    shown = launch(evaluate, "--device=cpu", "--dataset=tiny", "--split=train")
    assert "train.bin: " in shown and "loss at position 9 to 16" in shown


def test_bits_per_byte_do_not_count_characters(launch, tiny, monkeypatch):
    """The same model and losses on text of two bytes per character: half the bits per byte."""
    from data.tokenizer import char_meta
    from data.tokens import write_dataset

    monkeypatch.setattr(sample, "ROOT", tiny)
    found = {}
    for name, letters in (("one", "abc"), ("two", "äöü")):
        ids = [0, 1, 2, 0, 2, 1] * 30
        write_dataset(tiny / "data" / name, char_meta(letters), train=[ids], val=[ids])
        options = [*TINY, "--max_iters=3", f"--dataset={name}", f"--out_dir={name}"]
        launch(train, *options)
        (tiny / "text.txt").write_text("".join(sorted(letters)) * 20, encoding="utf-8")
        found[name] = figures(launch, f"--out_dir={name}", "--text=text.txt")
    assert found["two"]["loss"] == found["one"]["loss"]
    assert found["two"]["bytes"] == 2 * found["one"]["bytes"]
    assert found["two"]["bits_per_byte"] == pytest.approx(found["one"]["bits_per_byte"] / 2)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--out_dir=nowhere"], "no ckpt.pt in nowhere"),
        (["--text=nowhere.txt"], "nowhere.txt cannot be read as UTF-8 text: No such file"),
        (["--text=short.txt"], "short.txt holds 1 tokens; give at least 2"),
        (["--text=strange.txt"], "1 unknown characters: 'é'"),
        (["--split=test"], "split=test: choose train or val"),
        (["--dataset=other"], "dataset other is encoded unlike the model's; give another"),
        (["--figures_file=short.txt/a"], "the folder of figures_file=short.txt: {}/short"),
        (["--text=short.txt", "--dataset=tiny"], "give one of --text, --dataset and --tasks"),
    ],
)
def test_a_mistake_gets_its_line(launch, trained, tiny, arguments, line):
    from data.tokenizer import char_meta
    from data.tokens import write_dataset

    write_dataset(tiny / "data" / "other", char_meta("xyz"), train=[[0, 1]], val=[[0, 1, 2]])
    (tiny / "short.txt").write_text("1", encoding="utf-8")
    (tiny / "strange.txt").write_text("plus é", encoding="utf-8")
    with pytest.raises(SystemExit) as fault:
        launch(evaluate, "--device=cpu", "--dtype=float32", *arguments)
    assert str(fault.value).startswith(f"error: {line.replace('{}', str(tiny))}")
