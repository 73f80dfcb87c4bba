"""Sampling, run as a user runs it."""

import pytest
import torch
from conftest import TEXT, TINY

import sample
import train
from data.tokenizer import char_meta
from data.tokens import write_dataset


@pytest.fixture
def trained(launch, tiny, monkeypatch):
    """Train a little model in out/ and remove its dataset: the checkpoint must be enough."""
    launch(train, *TINY, "--max_iters=40", "--learning_rate=1e-2")
    for path in (tiny / "data" / "tiny").iterdir():
        path.unlink()
    monkeypatch.setattr(sample, "ROOT", tiny)
    exact = "--device=cpu", "--dtype=float32"  # in 16 bits, rows of a batch may round differently
    return lambda script, *arguments: launch(script, *exact, *arguments)


def texts(out):
    parts = out.split("\n---------------\n")
    assert parts.pop() == ""
    return parts


def test_samples_continue_the_prompt_and_are_apart(trained):
    drawn = texts(trained(sample, "--start=1 plus", "--num_samples=3", "--max_new_tokens=30"))
    assert len(drawn) == 3 and len(set(drawn)) == 3
    assert all(text.startswith("1 plus") and len(text) == 36 for text in drawn)
    assert all(set(text) <= set(TEXT) for text in drawn)


def test_a_sample_does_not_depend_on_how_many_are_drawn(trained):
    options = "--max_new_tokens=40", "--seed=5"
    five = texts(trained(sample, "--num_samples=5", *options))
    assert texts(trained(sample, "--num_samples=1", *options)) == five[:1]
    assert texts(trained(sample, "--num_samples=2", *options)) == five[:2]
    assert texts(trained(sample, "--num_samples=2", "--max_new_tokens=40", "--seed=6")) != five[:2]


def test_temperature_0_repeats_itself(trained):
    drawn = texts(trained(sample, "--temperature=0", "--num_samples=2", "--max_new_tokens=30"))
    assert drawn[0] == drawn[1]
    assert texts(trained(sample, "--top_k=1", "--num_samples=2", "--max_new_tokens=30")) == drawn
    assert texts(trained(sample, "--top_p=1e-6", "--num_samples=2", "--max_new_tokens=30")) == drawn


@pytest.mark.parametrize("count", [1, 3])
def test_a_sample_ends_before_stop(trained, count):
    options = f"--num_samples={count}", "--max_new_tokens=60", "--start=2 plus"
    free = texts(trained(sample, *options))
    stopped = texts(trained(sample, *options, "--stop=ma"))
    assert stopped == [text[: at if (at := text.find("ma")) >= 0 else None] for text in free]
    assert any("ma" in text for text in free)
    assert all(text.startswith("2 plus") for text in texts(trained(sample, *options, "--stop=s")))


def test_a_prompt_may_come_from_a_file_or_be_empty(trained, tiny):
    (tiny / "prompt.txt").write_text("3 plus 4", encoding="utf-8")
    options = "--num_samples=1", "--max_new_tokens=5"
    assert trained(sample, "--start=FILE:prompt.txt", *options).startswith("3 plus 4")
    assert len(texts(trained(sample, "--start=", *options))[0]) == 5


@pytest.mark.parametrize("start", ["\n", ""])
def test_a_vocabulary_without_a_newline_can_be_sampled(launch, tiny, start):
    ids = [n % 7 for n in range(200)]
    write_dataset(tiny / "data" / "tiny", char_meta("abcdefg"), train=[ids], val=[ids])
    launch(train, *TINY, "--max_iters=1")
    few = "--num_samples=1", "--max_new_tokens=5", "--device=cpu"
    (text,) = texts(launch(sample, f"--start={start}", *few))
    assert set(text) <= set("abcdefg") and len(text) == 5


def test_the_best_and_the_newest_can_be_sampled_by_name(trained):
    few = "--num_samples=1", "--max_new_tokens=5"
    assert trained(sample, "--checkpoint_file=best.pt", *few) == trained(sample, *few)


def test_sampling_leaves_the_optimizer_state_on_the_disk(trained, tiny, monkeypatch):
    checkpoint = torch.load("out/ckpt.pt", weights_only=True)
    for moments in checkpoint["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(2**22)  # 16 MiB each, were they read
    torch.save(checkpoint, "out/ckpt.pt")
    opened, find = [], sample.find_checkpoint

    def spy(*arguments):
        opened.append(find(*arguments))
        return opened[0]

    monkeypatch.setattr(sample, "find_checkpoint", spy)
    trained(sample, "--num_samples=1", "--max_new_tokens=5")
    storage = opened[0]["optimizer"]["state"][0]["exp_avg"].untyped_storage()
    with open("/proc/self/smaps") as file:
        maps = file.read().split("ckpt.pt\n")[1:]
    resident = sum(int(part.split("Rss:")[1].split()[0]) for part in maps)
    assert storage.nbytes() == 2**24 and resident < 4096  # KiB
