"""Training: the schedule, the steps, the evaluation, and what a run starts from."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import (
    RECIPE,
    ROOT,
    TINY,
    assert_equal,
    find_losses,
    load,
    log,
    losses,
    save_pretrained,
)

import train
from data.tokenizer import read_meta
from data.tokens import TokenFile
from engine import kernels
from model import GPT, GPTConfig

slow = pytest.mark.slow
FULL = [*TINY, "--lr_decay_iters=8", "--dropout=0.2", "--gradient_accumulation_steps=2"]


# --- schedule ------------------------------------------------------------------------------------


def set_globals(monkeypatch, **settings):
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)


def test_the_cosine_schedule_at_its_corners(monkeypatch):
    set_globals(monkeypatch, learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    set_globals(monkeypatch, lr_schedule="cosine", constant_share=0.0, decay_lr=True)
    rates = {step: train.learning_rate_at(step) for step in (0, 9, 10, 60, 110, 500)}
    expected = {0: 1 / 11, 9: 10 / 11, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}
    assert rates == pytest.approx(expected)
    set_globals(monkeypatch, min_lr=None, lr_decay_iters=None, max_iters=60)
    assert train.learning_rate_at(60) == pytest.approx(0.1)
    assert train.learning_rate_at(35) == pytest.approx(0.55)
    set_globals(monkeypatch, decay_lr=False)
    assert train.learning_rate_at(0) == 1.0


def test_the_linear_schedule_is_constant_and_then_falls_to_zero(monkeypatch):
    set_globals(monkeypatch, learning_rate=1.0, min_lr=None, warmup_iters=10, max_iters=110)
    set_globals(monkeypatch, lr_schedule="linear", constant_share=0.4, lr_decay_iters=None)
    set_globals(monkeypatch, decay_lr=True)
    rates = [train.learning_rate_at(step) for step in (0, 10, 50, 80, 110, 200)]
    assert rates == pytest.approx([1 / 11, 1, 1, 0.5, 0, 0])


@pytest.mark.parametrize("max_iters", [0, 1, 5])
def test_a_smoke_test_works_whatever_the_warm_up(launch, tiny, max_iters):
    out = launch(train, *TINY, f"--max_iters={max_iters}", "--warmup_iters=100")
    rates = [entry["lr"] for entry in log("out") if "lr" in entry]  # exactly max_iters of them
    assert rates == pytest.approx([6e-4 * (step + 1) / 101 for step in range(max_iters)])
    assert f"\n{max_iters} of {max_iters} steps done; out keeps step {max_iters} and " in out


# --- steps ---------------------------------------------------------------------------------------


def test_accumulation_4_by_2_equals_1_by_8(launch, tiny):
    for name, batch, accumulation in (("one", 8, 1), ("four", 2, 4)):
        shape = f"--batch_size={batch}", f"--gradient_accumulation_steps={accumulation}"
        launch(train, *TINY, *shape, "--max_iters=5", f"--out_dir={name}", "--eval_iters=100")
    assert_equal(load("one/ckpt.pt"), load("four/ckpt.pt"), atol=1e-5, rtol=1e-4)
    assert losses("one") == pytest.approx(losses("four"), rel=1e-5)


def test_exactly_max_iters_updates_then_a_last_evaluation(launch, tiny):
    out = launch(train, *TINY, "--max_iters=5", "--eval_interval=4", "--log_interval=2")
    starts = [line.split(":")[0] for line in out.splitlines()]
    described = ["hardware", "data", "model", "steps"]
    course = ["step 0", "iter 0", "iter 2", "step 4", "iter 4", "step 5"]
    assert starts[:-1] == [*described, *course]
    assert [entry["iter"] for entry in log("out")[1:]] == [0, 0, 2, 4, 4, 5]
    moments = load("out/ckpt.pt")["optimizer"]["state"].values()
    assert all(moment["step"] == 5 for moment in moments)


def poison(monkeypatch, steps):
    """Make the gradients of these steps NaN."""
    train_step = train.train_step

    def poisoned(model, state, batches, runtime):
        if state.step not in steps:
            return train_step(model, state, batches, runtime)
        hook = state.model.lm_head.weight.register_hook(lambda gradient: gradient * torch.nan)
        result = train_step(model, state, batches, runtime)
        hook.remove()
        return result

    monkeypatch.setattr(train, "train_step", poisoned)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(launch, tiny, monkeypatch, optimizer):
    options = *TINY, f"--optimizer={optimizer}", "--lr_decay_iters=9"
    launch(train, *options, "--max_iters=3", "--out_dir=before")
    poison(monkeypatch, {3, 4})
    launch(train, *options, "--max_iters=5", "--max_bad_steps=3")
    assert_equal(load("before/ckpt.pt"), load("out/ckpt.pt"))
    assert [e["grad_norm"] for e in log("out") if e["iter"] == 3 and "loss" in e] == [None]


def test_bad_steps_in_a_row_end_the_run_also_across_stops(launch, tiny, monkeypatch):
    poison(monkeypatch, {1, 3, 4, 5})
    options = *TINY, "--eval_interval=2", "--max_bad_steps=3", "--lr_decay_iters=9"
    launch(train, *options, "--max_iters=4")
    with pytest.raises(SystemExit) as stop:
        launch(train, "--init_from=resume", "--max_iters=9")
    assert stop.value.code == (
        "error: step 5: 3 steps in a row had no finite gradient, loss 2.9892; "
        "the newest saved step is 4; lower --learning_rate"
    )


def test_a_float16_run_keeps_its_loss_scale_and_ends_if_it_cannot_fall(launch, tiny, monkeypatch):
    scaler = torch.amp.GradScaler
    options = {"init_scale": 2.0**127, "growth_interval": 1000}  # the loss overflows at first
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler("cpu", **options))
    launch(train, *TINY, "--max_iters=30", "--max_bad_steps=1", "--lr_decay_iters=40")
    saved = load("out/ckpt.pt")
    halved = 127 - math.log2(saved["scaler"]["scale"])
    assert halved >= 1 and saved["optimizer"]["state"][0]["step"].item() == 30 - halved
    launch(train, "--init_from=resume", "--max_iters=31")
    assert load("out/ckpt.pt")["scaler"]["scale"] == saved["scaler"]["scale"]
    options["init_scale"] = 2.0**3
    poison(monkeypatch, range(1, 100))  # 3 steps bring the scale to 1
    with pytest.raises(SystemExit, match="error: step 7: 5 steps in a row had no finite gradient"):
        launch(train, *TINY, "--max_iters=100", "--out_dir=other")


def test_a_loss_that_has_risen_gets_one_line(launch, tiny, monkeypatch):
    find_losses(monkeypatch, 3.0, 2.0, 2.4, 2.6)
    out = launch(train, *TINY, "--max_iters=3", "--eval_interval=1")
    assert out.count("the loss has risen; best.pt keeps step 1") == 1


def test_patience_ends_a_run_without_a_better_model(launch, tiny, monkeypatch):
    find_losses(monkeypatch, 3.0, 2.0, 2.1, 2.2, 2.3)
    launch(train, *TINY, "--max_iters=20", "--eval_interval=2", "--patience=2")
    assert load("out/ckpt.pt")["iter_num"] == 6 and load("out/best.pt")["iter_num"] == 2


# --- parts that change no result -----------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize("recipe", [[], RECIPE], ids=["gpt2", "recipe"])
def test_activation_checkpointing_and_the_chunked_loss_train_alike(
    launch, tiny, monkeypatch, recipe, compiled
):
    torch._dynamo.reset()
    options = *FULL, *recipe, f"--compile={compiled}", "--max_iters=4"
    launch(train, *options, "--out_dir=plain")
    launch(train, *options, "--out_dir=again", "--activation_checkpointing=True")
    tolerance = {"atol": 1e-6, "rtol": 1e-4} if compiled else {}  # it adds in another order
    assert_equal(load("plain/ckpt.pt"), load("again/ckpt.pt"), **tolerance)
    monkeypatch.setattr(kernels, "FEW_LOGITS", 0)
    launch(train, *options, "--out_dir=chunks")
    assert losses("plain") == pytest.approx(losses("again"), rel=1e-5)
    assert losses("plain") == pytest.approx(losses("chunks"), rel=1e-5)


# --- evaluation ----------------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_the_tokens_of_the_split(launch, tiny):
    out = launch(train, *TINY, "--max_iters=3", "--batch_size=7", "--eval_iters=1000")
    checkpoint = load("out/ckpt.pt")
    trained = GPT.from_state(GPTConfig(**checkpoint["model_args"]), checkpoint["model"]).eval()
    folder = tiny / "data" / "tiny"
    ids = torch.tensor(TokenFile(folder / "val.bin", read_meta(folder), 16).ids().tolist())
    each = [
        trained(ids[None, at : at + 16], ids[None, at + 1 : at + 17])[1].item()
        for at in range(0, len(ids) - 16, 16)
    ]
    expected = sum(each) / len(each)
    assert log("out")[-1]["val/loss"] == pytest.approx(expected, rel=1e-5)
    line = next(line for line in out.splitlines() if line.startswith("step 3: train loss "))
    assert line.endswith(f", val loss {expected:.4f}, perplexity {math.exp(expected):.2f}")


def test_eval_only_writes_nothing_and_takes_the_best_state(launch, tiny, monkeypatch):
    out = launch(train, *TINY, "--eval_only")
    assert out.count("step 0: train loss") == 1 and "iter" not in out
    assert not (tiny / "out").exists()
    with monkeypatch.context() as patch:
        find_losses(patch, 3.0, 1.0, 2.0)
        launch(train, *TINY, "--max_iters=4", "--eval_interval=2")
    before = {path: path.read_bytes() for path in (tiny / "out").iterdir()}
    assert "step 2: train loss" in launch(train, "--init_from=resume", "--eval_only")
    newest = "--checkpoint_file=ckpt.pt"
    assert "step 4: train loss" in launch(train, "--init_from=resume", "--eval_only", newest)
    assert {path: path.read_bytes() for path in (tiny / "out").iterdir()} == before


# --- finetuning ----------------------------------------------------------------------------------

FINETUNE = "--batch_size=4 --block_size=16 --gradient_accumulation_steps=1 --dataset=tiny".split()
FINETUNE += "--device=cpu --dtype=float32 --warmup_iters=0 --init_from=pretrained".split()


@pytest.fixture
def pretrained(tiny):
    """Save a model for the vocabulary of `tiny` in the folder pretrained; return its weights."""
    vocab_size = read_meta(tiny / "data" / "tiny")["vocab_size"]
    return save_pretrained("pretrained", vocab_size=vocab_size).state_dict()


def test_finetuning_starts_from_the_weights_of_a_folder_and_resumes(launch, tiny, pretrained):
    options = *FINETUNE, "--lr_decay_iters=6", "--dropout=0.2", "--eval_interval=3"
    launch(train, *options, "--max_iters=6", "--out_dir=straight")
    first = launch(train, *options, "--auto_resume=True", "--max_iters=3", "--learning_rate=0")
    checkpoint = load("out/ckpt.pt")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16}
    assert checkpoint["model_args"] == {**sizes, "vocab_size": 21, "bias": True, "dropout": 0.2}
    assert checkpoint["gelu_tanh"] is True
    for name in ("transformer.wte.weight", "transformer.ln_f.bias"):
        assert torch.equal(checkpoint["model"][name], pretrained[name])
    launch(train, *options, "--max_iters=3", "--out_dir=out2")
    second = launch(train, *options, "--auto_resume=True", "--max_iters=6", "--out_dir=out2")
    assert "steps: 0 to 3, " in first and "steps: 3 to 6, " in second
    assert_equal(load("straight/ckpt.pt"), load("out2/ckpt.pt"))
    assert losses("straight") == losses("out2")


def test_importing_the_scripts_does_nothing():
    code = "import train, sample, bench, model, configurator"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
