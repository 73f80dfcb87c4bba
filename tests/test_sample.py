"""Sampling and the benchmark, run as a user runs them."""

import json

import pytest
import torch
from conftest import TEXT, TINY

import bench
import model
import sample
import train
from assets import growth
from data.tokens import char_meta, write_dataset


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


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--start=1+1"], "1 unknown characters: '+' (PLUS SIGN)"),
        (["--start=" + "1" * 17], "the prompt has 17 tokens, the model reads 16 at most"),
        (["--out_dir=no"], "no checkpoint no/ckpt.pt"),
        (["--temperature=-1", "--num_samples=0"], "num_samples=0 must be at least 1\ntemperature=-1.0 must be at least 0"),  # noqa: E501
        (["--top_p=2"], "top_p=2.0 must be between 0 and 1"),
        (["--top_k=-1"], "top_k=-1 must be at least 0"),
    ],
)  # fmt: skip
def test_a_mistake_gets_its_line(trained, arguments, line):
    with pytest.raises(SystemExit) as stop:
        trained(sample, *arguments)
    assert stop.value.code == "\n".join(f"error: {part}" for part in line.splitlines())


def test_sampling_leaves_the_optimizer_state_on_the_disk(trained, tiny, monkeypatch):
    checkpoint = torch.load("out/ckpt.pt", weights_only=True)
    for moments in checkpoint["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(2**22)  # 16 MiB each, were they read
    torch.save(checkpoint, "out/ckpt.pt")
    opened, load = [], model.read_checkpoint
    spy = lambda path: opened.append(load(path)) or opened[0]  # noqa: E731
    monkeypatch.setattr(sample, "read_checkpoint", spy)
    trained(sample, "--num_samples=1", "--max_new_tokens=5")
    storage = opened[0]["optimizer"]["state"][0]["exp_avg"].untyped_storage()
    with open("/proc/self/smaps") as file:
        maps = file.read().split("ckpt.pt\n")[1:]
    resident = sum(int(part.split("Rss:")[1].split()[0]) for part in maps)
    assert storage.nbytes() == 2**24 and resident < 4096  # KiB


def test_the_benchmark_times_the_real_step(launch, tiny, monkeypatch):
    steps, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: (steps.append(a[3]), step(*a))[1])
    monkeypatch.setattr(bench, "ROOT", tiny)
    out = launch(bench, *TINY, "--steps=5", "--seconds=5", "--profile=True")
    assert f"data: {tiny}/data/tiny/train.bin" in out
    assert steps == [0, 1, 2, 3, 4, 5, 0, 1, 2]  # one to warm up, five, three for the profile
    for start in ("hardware: 1 x cpu", "model: 0.03M", "step: 1 x 4 x 16 tokens, ", "waiting for"):
        assert sum(line.startswith(start) for line in out.splitlines()) == 1
    assert json.loads((tiny / "trace.json").read_text())["traceEvents"]
    out = launch(bench, *TINY, "--dataset=no", "--steps=1", "--seconds=0")
    assert "data: random tokens" in out and not (tiny / "out").exists()


def test_the_benchmark_compares_with_nanogpts_way(launch, tiny):
    out = launch(bench, *TINY, "--steps=2", "--dropout=0.2", "--baseline=True")
    assert out.count("tokens, median") == 2 and "nanoGPT's way takes " in out
    out = launch(bench, *TINY, "--steps=2", "--baseline=only")
    assert out.count("tokens, median") == 1 and "nanoGPT's way: 1 x 4 x 16 tokens" in out
    out = launch(bench, *TINY, "--new_tokens=20", "--num_samples=3", "--baseline=True")
    assert "sampling: 3 x 20 tokens" in out and "nanoGPT's way: 1 x 20 tokens" in out


def test_nanogpts_way_makes_the_same_update(launch, tiny, monkeypatch):
    ids = [n % 7 for n in range(17)]  # one window: both read the same tokens
    write_dataset(tiny / "data" / "tiny", char_meta("abcdefg"), train=[ids], val=[ids])
    built, build = [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *a: (built.append(build(*a)), built[-1])[1])
    monkeypatch.setattr(bench, "ROOT", tiny)
    launch(bench, *TINY, "--steps=1", "--seconds=0", "--baseline=True")
    assert len(built) == 2
    ours, theirs = (dict(model.named_parameters()) for model in built)
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_growth_script_understands_the_benchmark():
    small = "--dataset=none", "--n_layer=1", "--n_embd=8", "--block_size=16", "--seconds=0"
    for options in (small, (*small, "--new_tokens=8")):
        seconds, memory = growth.measure(*options)
        assert 0 < seconds < 60 and 0.1 < memory < 4
