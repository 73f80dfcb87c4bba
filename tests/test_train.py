"""Training: the schedule, the steps, the evaluation, and what a run starts from."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, assert_equal, load, log, losses, save_pretrained

import train
from data.tokenizer import read_meta
from data.tokens import TokenFile, write_dataset
from engine import fast
from model import GPT, GPTConfig

slow = pytest.mark.slow
FULL = [*TINY, "--lr_decay_iters=8", "--dropout=0.2", "--gradient_accumulation_steps=2"]

# --- the schedule --------------------------------------------------------------------------------


def test_the_schedule_at_its_corners(monkeypatch):
    given = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "lr_decay_iters": 110}
    given |= {"lr_schedule": "cosine", "constant_share": 0.0, "decay_lr": True}
    for name, value in given.items():
        monkeypatch.setattr(train, name, value)
    rates = {step: train.learning_rate_at(step) for step in (0, 9, 10, 60, 110, 500)}
    expected = {0: 1 / 11, 9: 10 / 11, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}
    assert rates == pytest.approx(expected)
    monkeypatch.setattr(train, "min_lr", None)
    monkeypatch.setattr(train, "lr_decay_iters", None)
    monkeypatch.setattr(train, "max_iters", 60)
    assert train.learning_rate_at(60) == pytest.approx(0.1)
    assert train.learning_rate_at(35) == pytest.approx(0.55)
    monkeypatch.setattr(train, "decay_lr", False)
    assert train.learning_rate_at(0) == 1.0


def test_a_schedule_that_max_iters_cuts_short_is_announced(launch, tiny):
    whole = launch(train, *TINY, "--max_iters=2", "--lr_decay_iters=2")
    assert "schedule:" not in whole
    out = launch(train, *TINY, "--max_iters=2", "--lr_decay_iters=4", "--learning_rate=1e-2")
    (line,) = [line for line in out.splitlines() if line.startswith("schedule: ")]
    rate = train.learning_rate_at(2)
    assert rate == pytest.approx(5.5e-3)  # half-way from 1e-2 to a tenth of it
    why = "because lr_decay_iters=4 lies beyond max_iters=2"
    assert line == f"schedule: it ends at {rate:.2g}, not at min_lr, {why}"


# --- steps ---------------------------------------------------------------------------------------


def test_accumulation_4_by_2_equals_1_by_8(launch, tiny):
    for name, batch, accumulation in (("one", 8, 1), ("four", 2, 4)):
        shape = f"--batch_size={batch}", f"--gradient_accumulation_steps={accumulation}"
        launch(train, *TINY, *shape, "--max_iters=5", f"--out_dir={name}", "--eval_iters=100")
    assert_equal(load("one/ckpt.pt"), load("four/ckpt.pt"), atol=1e-5, rtol=1e-4)
    assert losses("one") == pytest.approx(losses("four"), rel=1e-5)


def test_one_batch_is_memorised(tiny, launch):
    meta = read_meta(tiny / "data" / "tiny")
    ids = TokenFile(tiny / "data" / "tiny" / "train.bin", meta, 16).ids[:17].tolist()
    write_dataset(tiny / "data" / "tiny", meta, train=[ids], val=[ids])
    launch(train, *TINY, "--max_iters=150", "--learning_rate=1e-2", "--eval_interval=150")
    assert log("out")[-1]["val/loss"] < 0.05


# --- evaluation ----------------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_the_tokens_of_the_whole_split(launch, tiny):
    out = launch(train, *TINY, "--max_iters=3", "--batch_size=7", "--eval_iters=1000")
    checkpoint = load("out/ckpt.pt")
    trained = GPT.from_state(GPTConfig(**checkpoint["model_args"]), checkpoint["model"]).eval()
    folder = tiny / "data" / "tiny"
    ids = torch.tensor(TokenFile(folder / "val.bin", read_meta(folder), 16).ids[:].tolist())
    sums = [
        trained(ids[None, at : at + 16], ids[None, at + 1 : at + 17])[1].item()
        for at in range(0, len(ids) - 16, 16)
    ]
    expected = sum(sums) / len(sums)
    assert log("out")[-1]["val/loss"] == pytest.approx(expected, rel=1e-5)
    line = next(line for line in out.splitlines() if line.startswith("step 3: train loss "))
    perplexity = math.exp(expected)
    bits = expected / math.log(2)  # of a byte, for its characters are one each
    figures = f"perplexity {perplexity:.2f}, {bits:.3f} bits per byte"
    assert line.endswith(f", val loss {expected:.4f}, {figures}")


def test_a_bounded_evaluation_is_repeatable_and_spread_over_the_split(launch, tiny, monkeypatch):
    seen, windows = [], TokenFile.windows

    def spy(self, starts, length):
        if self.path.name == "val.bin":
            seen.append(starts.tolist())
        return windows(self, starts, length)

    monkeypatch.setattr(TokenFile, "windows", spy)
    out = launch(train, *TINY, "--eval_only", "--eval_iters=3", "--batch_size=2")
    again = launch(train, *TINY, "--eval_only", "--eval_iters=3", "--batch_size=2", "--seed=1337")
    assert out == again and seen[:3] == seen[3:] and all(len(starts) == 2 for starts in seen)
    starts = sum(seen[:3], [])
    count = (tiny / "data" / "tiny" / "val.bin").stat().st_size // 2 - 1
    assert starts[0] == 0 and starts[-1] > count * 0.7 and all(s % 16 == 0 for s in starts)


def test_eval_only_writes_nothing(launch, tiny):
    out = launch(train, *TINY, "--eval_only=True")
    assert out.count("step 0: train loss") == 1 and "iter" not in out
    assert not (tiny / "out").exists()
    launch(train, *TINY, "--max_iters=2")
    before = {path: path.read_bytes() for path in (tiny / "out").iterdir()}
    out = launch(train, "--init_from=resume", "--eval_only")
    assert "step 2: train loss" in out
    assert {path: path.read_bytes() for path in (tiny / "out").iterdir()} == before


# --- the loop ------------------------------------------------------------------------------------


def test_exactly_max_iters_updates_then_a_last_evaluation(launch, tiny, monkeypatch):
    steps, step = [], train.train_step

    def watched(model, state, batches, number, runtime):
        steps.append(number)
        return step(model, state, batches, number, runtime)

    monkeypatch.setattr(train, "train_step", watched)
    out = launch(train, *TINY, "--max_iters=5", "--eval_interval=4", "--log_interval=2")
    assert steps == [0, 1, 2, 3, 4]
    starts = [line.split(":")[0] for line in out.splitlines()]
    described = ["hardware", "data", "model", "steps"]
    course = ["step 0", "iter 0", "iter 2", "step 4", "iter 4", "step 5"]
    assert starts == [*described, *course, "best model"]
    entries = log("out")
    resolved = {"max_iters": 5, "device": "cpu", "dtype": "float32", "compile": False}
    assert {key: entries[0]["settings"][key] for key in resolved} == resolved
    assert [e["iter"] for e in entries[1:]] == [0, 0, 2, 4, 4, 5]


def poison(monkeypatch, bad):
    """Make the gradients of these steps NaN."""
    step = train.train_step

    def poisoned(model, state, batches, number, runtime):
        if number not in bad:
            return step(model, state, batches, number, runtime)
        hook = state.model.lm_head.weight.register_hook(lambda gradient: gradient * torch.nan)
        result = step(model, state, batches, number, runtime)
        hook.remove()
        return result

    monkeypatch.setattr(train, "train_step", poisoned)


def test_a_gradient_that_is_not_finite_changes_nothing(launch, tiny, monkeypatch):
    launch(train, *TINY, "--max_iters=3", "--lr_decay_iters=9", "--out_dir=before")
    poison(monkeypatch, {3, 4})
    launch(train, *TINY, "--max_iters=5", "--lr_decay_iters=9", "--max_bad_steps=3")
    assert_equal(load("before/ckpt.pt"), load("out/ckpt.pt"))
    launch(train, "--init_from=resume", "--max_iters=6")
    assert load("out/ckpt.pt")["optimizer"]["state"][0]["step"] == 4
    assert [e["grad_norm"] for e in log("out") if e.get("iter") == 3 and "loss" in e] == [None]


def test_bad_steps_in_a_row_end_the_run(launch, tiny, monkeypatch):
    poison(monkeypatch, {1, 2, 4, 5, 6, 7})
    options = "--max_iters=20", "--eval_interval=4", "--max_bad_steps=3", "--log_interval=1"
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, *options)
    entries = [entry for entry in log("out") if "loss" in entry]
    last = entries[-1]
    what = "3 steps in a row had no finite gradient, seen at step 10"
    figures = f"loss {last['loss']:.4f}, gradient norm {last['grad_norm']:.4f}"
    way_back = "out keeps the checkpoint of step 8; lower --learning_rate"
    assert stop.value.code == f"error: {what}: {figures}; {way_back}"
    assert load("out/ckpt.pt")["iter_num"] == 8


def test_bad_steps_between_two_log_lines_are_seen(launch, tiny, monkeypatch):
    poison(monkeypatch, {1, 2, 3, 5, 6})
    options = *TINY, "--max_iters=20", "--eval_interval=20", "--max_bad_steps=3"
    told = "3 steps in a row had no finite gradient, seen at step {}: .* checkpoint of step 0"
    with pytest.raises(SystemExit, match=told.format(10)):
        launch(train, *options, "--log_interval=100")
    with pytest.raises(SystemExit, match=told.format(8)):
        launch(train, *options, "--max_iters=8")


def test_a_float16_run_whose_gradients_stay_bad_ends(launch, tiny, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler("cpu"))
    poison(monkeypatch, set(range(1, 100)))
    # The scale of 2**16 halves 15 times, which is normal; step 16 brings it to 1 and counts.
    told = "5 steps in a row had no finite gradient, seen at step 30"
    with pytest.raises(SystemExit, match=told):
        launch(train, *TINY, "--max_iters=100")


# --- parts that change no result -----------------------------------------------------------------


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=slow)])
def test_the_loss_without_logits_trains_alike(launch, tiny, monkeypatch, compiled, dtype, bound):
    options = *FULL, f"--dtype={dtype}", f"--compile={compiled}", "--max_iters=4"
    launch(train, *options, "--out_dir=logits")
    parts, used = fast.LossInParts.apply, []
    monkeypatch.setattr(fast, "FEW_LOGITS", 0)
    monkeypatch.setattr(fast, "LOGITS_AT_ONCE", 1000)
    monkeypatch.setattr(fast.LossInParts, "apply", lambda *a: (used.append(1), parts(*a))[1])
    launch(train, *options, "--out_dir=parts")
    assert losses("parts") == pytest.approx(losses("logits"), rel=bound) and used


LOSS_IN_PARTS = """
import runpy
from engine import fast

fast.FEW_LOGITS, fast.LOGITS_AT_ONCE = 0, 1000
runpy.run_path("train.py", run_name="__main__")
"""


@slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fsdp", [False, True])
def test_the_loss_without_logits_trains_alike_on_2_processes(finish, tiny, fsdp, compiled):
    options = [*FULL, f"--fsdp={fsdp}", f"--compile={compiled}", "--max_iters=4"]
    finish(*options, "--out_dir=logits", processes=2)
    (tiny / "parts.py").write_text(LOSS_IN_PARTS)
    out = finish(*options, "--out_dir=parts", processes=2, script="parts.py")
    assert "not compiled, which" not in out
    assert losses("parts") == pytest.approx(losses("logits"), rel=1e-5)


def test_a_run_without_the_fast_parts_trains_alike(launch, tiny):
    options = *TINY, "--lr_decay_iters=8", "--max_iters=4"
    launch(train, *options, "--out_dir=fast")
    launch(train, *options, "--out_dir=plain", "--fast_parts=False")
    assert losses("fast") == pytest.approx(losses("plain"), rel=1e-5)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=slow)])
def test_activation_checkpointing_changes_no_bit(launch, tiny, compiled):
    options = *FULL, f"--compile={compiled}", "--max_iters=4"
    launch(train, *options, "--out_dir=kept")
    launch(train, *options, "--out_dir=again", "--activation_checkpointing=True")
    assert_equal(load("kept/ckpt.pt"), load("again/ckpt.pt"))
    assert losses("kept") == losses("again")


# --- finetuning ----------------------------------------------------------------------------------

FINETUNE = "--batch_size=4 --block_size=16 --gradient_accumulation_steps=1 --dataset=tiny".split()
FINETUNE += "--device=cpu --dtype=float32 --warmup_iters=0 --init_from=pretrained".split()


@pytest.fixture
def pretrained(tiny):
    """Save a model for the vocabulary of `tiny` in the folder pretrained; return its weights."""
    vocab_size = read_meta(tiny / "data" / "tiny")["vocab_size"]
    return save_pretrained("pretrained", vocab_size=vocab_size).state_dict()


def test_finetuning_starts_from_the_weights_of_a_folder(launch, tiny, pretrained):
    launch(train, *FINETUNE, "--max_iters=2", "--dropout=0.1")
    checkpoint = load("out/ckpt.pt")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16}
    assert checkpoint["model_args"] == {**sizes, "vocab_size": 21, "bias": True, "dropout": 0.1}
    assert checkpoint["gelu_tanh"] is True
    out = launch(train, "--init_from=resume", "--max_iters=3")
    assert "iter 2: loss" in out


@pytest.mark.parametrize("best, always", [("best.pt", True), ("ckpt.pt", False)])
def test_a_finetune_that_only_gets_worse_keeps_the_model_of_step_0(
    launch, tiny, monkeypatch, pretrained, best, always
):
    values = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(train, "evaluate", lambda *a: {"train": 1.0, "val": next(values)})
    steps = "--max_iters=2", "--eval_interval=1", f"--always_save_checkpoint={always}"
    out = launch(train, *FINETUNE, *steps)
    kept = load(f"out/{best}")
    assert (kept["iter_num"], kept["best_val_loss"]) == (0, 1.0)
    names = "transformer.wte.weight", "transformer.ln_f.bias"
    assert all(torch.equal(kept["model"][name], pretrained[name]) for name in names)
    assert out.splitlines()[-1] == f"best model: out/{best}, val loss 1.0000"


def test_auto_resume_finetunes_first_and_resumes_later(launch, tiny, pretrained):
    options = *FINETUNE, "--lr_decay_iters=6", "--dropout=0.2"
    launch(train, *options, "--max_iters=6", "--out_dir=straight")
    first = launch(train, *options, "--auto_resume=True", "--max_iters=3")
    second = launch(train, *options, "--auto_resume=True", "--max_iters=6")
    assert "steps: 0 to 3, " in first and "steps: 3 to 6, " in second
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"))
    assert losses("straight") == losses("out")


def non_contiguous(tree):
    """Return `tree`, of dicts and tensors, with each matrix held transposed in memory."""
    if isinstance(tree, dict):
        return {key: non_contiguous(value) for key, value in tree.items()}
    return tree.t().contiguous().t() if hasattr(tree, "dim") and tree.dim() == 2 else tree


@slow
def test_a_sharded_finetune_trains_and_resumes_whatever_the_layout(finish, tiny, pretrained):
    options = [*FINETUNE, "--fsdp=True", "--lr_decay_iters=4", "--gradient_accumulation_steps=2"]
    finish(*options, "--max_iters=4", "--out_dir=straight", processes=2)
    finish(*options, "--max_iters=2", processes=2)
    saved = load("out/ckpt.pt")
    assert all(weight.is_contiguous() for weight in saved["model"].values())
    saved = non_contiguous(saved)  # as the code before wrote it
    assert not saved["model"]["transformer.wte.weight"].is_contiguous()
    torch.save(saved, "out/ckpt.pt")
    finish("--init_from=resume", "--max_iters=4", processes=2)
    assert_equal(load("straight/ckpt.pt"), load("out/ckpt.pt"))
    assert losses("straight") == losses("out")


# --- importing -----------------------------------------------------------------------------------


def test_the_modules_import_without_doing_anything():
    code = "import train, sample, bench, model, configurator; from engine import log, folder"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_eps_reaches_adamw_and_the_adamw_of_muon(launch, tiny):
    for optimizer in ("adamw", "muon"):
        launch(train, *TINY, "--max_iters=1", "--eps=1e-3", f"--optimizer={optimizer}")
        groups = load("out/ckpt.pt")["optimizer"]["param_groups"]
        assert {group["eps"] for group in groups} == {1e-3}
