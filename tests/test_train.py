"""Training: each run against another that must give the same, and what a run leaves on the disk."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, assert_equal, load, log, losses

import model
import runtime
import train
from data.tokens import TokenFile, read_meta
from model import GPT, GPTConfig

# --- the schedule --------------------------------------------------------------------------------


def test_the_schedule_at_its_corners(monkeypatch):
    given = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "lr_decay_iters": 110}
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


# --- steps ---------------------------------------------------------------------------------------


def test_accumulation_4_by_2_equals_1_by_8(launch, tiny):
    for name, batch, accumulation in (("one", 8, 1), ("four", 2, 4)):
        shape = f"--batch_size={batch}", f"--gradient_accumulation_steps={accumulation}"
        launch(train, *TINY, *shape, "--max_iters=5", f"--out_dir={name}", "--eval_iters=100")
    assert_equal(load("one/ckpt.pt"), load("four/ckpt.pt"), atol=1e-5, rtol=1e-4)
    assert losses("one") == pytest.approx(losses("four"), rel=1e-5)


def test_one_batch_is_memorised(tiny, launch):
    from data.tokens import write_dataset

    meta = read_meta(tiny / "data" / "tiny")
    ids = TokenFile(tiny / "data" / "tiny" / "train.bin", meta, 16).ids[:17].tolist()
    write_dataset(tiny / "data" / "tiny", meta, train=[ids], val=[ids])
    out = launch(train, *TINY, "--max_iters=150", "--learning_rate=1e-2", "--eval_interval=150")
    assert float(out.splitlines()[-1].split("val loss ")[1]) < 0.05


# --- evaluation ----------------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_the_tokens_of_the_whole_split(launch, tiny):
    out = launch(train, *TINY, "--max_iters=3", "--batch_size=7", "--eval_iters=1000")
    checkpoint = load("out/ckpt.pt")
    trained = GPT.from_state(GPTConfig(**checkpoint["model_args"]), checkpoint["model"]).eval()
    folder = tiny / "data" / "tiny"
    ids = torch.tensor(TokenFile(folder / "val.bin", read_meta(folder), 16).ids.tolist())
    sums = [
        trained(ids[None, at : at + 16], ids[None, at + 1 : at + 17])[1].item()
        for at in range(0, len(ids) - 16, 16)
    ]
    expected = sum(sums) / len(sums)
    assert log("out")[-1]["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert out.splitlines()[-1].startswith("step 3: train loss ")
    assert out.splitlines()[-1].endswith(f"val loss {expected:.4f}")


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


# --- what a run leaves ---------------------------------------------------------------------------


def test_a_checkpoint_is_nanogpts_with_more_keys(launch, tiny):
    launch(train, *TINY, "--max_iters=3")
    checkpoint = load("out/ckpt.pt")
    keys = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert checkpoint.keys() == keys | {"tokenizer", "scaler", "wandb_id"}
    fields = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert checkpoint["model_args"].keys() == fields
    assert checkpoint["iter_num"] == 3 and checkpoint["config"]["n_embd"] == 32
    assert checkpoint["tokenizer"] == read_meta(tiny / "data" / "tiny")
    assert not any(name.startswith("_orig_mod.") for name in checkpoint["model"])
    assert checkpoint["best_val_loss"] == min(e["val/loss"] for e in log("out") if "val/loss" in e)


def test_exactly_max_iters_updates_then_a_last_evaluation(launch, tiny, monkeypatch):
    steps, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: (steps.append(a[3]), step(*a))[1])
    out = launch(train, *TINY, "--max_iters=5", "--eval_interval=4", "--log_interval=2")
    assert steps == [0, 1, 2, 3, 4]
    starts = [line.split(":")[0] for line in out.splitlines()[4:]]
    assert starts == ["step 0", "iter 0", "iter 2", "step 4", "iter 4", "step 5"]
    entries = log("out")
    resolved = {"max_iters": 5, "device": "cpu", "dtype": "float32", "compile": False}
    assert {key: entries[0]["settings"][key] for key in resolved} == resolved
    assert [e["iter"] for e in entries[1:]] == [0, 0, 2, 4, 4, 5]


def test_the_best_and_the_newest_are_kept_apart(launch, tiny, monkeypatch):
    values = iter([3.0, 2.0, 1.0, 2.5, 2.6])
    monkeypatch.setattr(train, "evaluate", lambda *a: {"train": 1.0, "val": next(values)})
    launch(train, *TINY, "--max_iters=4", "--eval_interval=1", "--always_save_checkpoint=False")
    best, newest = load("out/ckpt.pt"), load("out/last.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (2, 1.0)
    assert (newest["iter_num"], newest["best_val_loss"]) == (4, 1.0)
    values = iter([2.7, 2.8])
    out = launch(train, "--init_from=resume", "--max_iters=5")
    assert "max_iters: 4 -> 5" in out and "iter 4:" in out
    assert load("out/ckpt.pt")["iter_num"] == 2 and load("out/last.pt")["iter_num"] == 5


def test_a_kill_between_the_two_saves_leaves_the_best_model(launch, tiny, monkeypatch):
    values, real = iter([3.0, 2.0]), train.atomic

    def killed(path):
        if path.name == "last.pt":
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(train, "evaluate", lambda *a: {"train": 1.0, "val": next(values)})
    monkeypatch.setattr(train, "atomic", killed)
    with pytest.raises(SystemExit):
        launch(train, *TINY, "--max_iters=2", "--eval_interval=2", "--always_save_checkpoint=False")
    best = load("out/ckpt.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (2, 2.0)


def test_a_broken_model_is_never_saved(launch, tiny, monkeypatch):
    values = iter([3.0, 2.0, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *a: {"train": 1.0, "val": next(values)})
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, "--max_iters=9", "--eval_interval=3")
    what = "step 6: the loss or a weight is not finite"
    assert stop.value.code == f"error: {what}; out keeps the checkpoint of step 3"
    assert load("out/ckpt.pt")["iter_num"] == 3


def test_a_fresh_run_moves_the_older_one_aside(launch, tiny):
    out = [launch(train, *TINY, f"--max_iters={n}", "--eval_interval=9") for n in (1, 2, 3)]
    assert "moved" not in out[0] and "moved the older run in out to out/previous" in out[2]
    folders = "out", "out/previous", "out/previous/previous"
    assert [load(f"{folder}/ckpt.pt")["iter_num"] for folder in folders] == [3, 2, 1]
    assert [len(log(folder)) for folder in folders] == [1 + 3 + 2, 1 + 2 + 2, 1 + 1 + 2]


def test_what_a_resumed_run_changes_is_printed(launch, tiny):
    (tiny / "c.py").write_text("learning_rate = 0.5\nbatch_size = 2")
    launch(train, *TINY, "--max_iters=2", "--learning_rate=1e-3", "--weight_decay=0.1")
    flags = "--learning_rate=5e-4", "--max_iters=4", "--weight_decay=0.2", "--beta1=0.8"
    out = launch(train, "c.py", "--init_from=resume", *flags).splitlines()
    assert out[:5] == [
        "batch_size: stays 4; only --batch_size=2 changes it",
        "learning_rate: 0.001 -> 0.0005",
        "max_iters: 2 -> 4",
        "weight_decay: 0.1 -> 0.2",
        "beta1: 0.9 -> 0.8",
    ]
    checkpoint = load("out/ckpt.pt")
    group = checkpoint["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["betas"]) == (0.2, (0.8, 0.95))
    assert checkpoint["config"]["learning_rate"] == 5e-4


def test_a_shorter_context_can_be_resumed_with(launch, tiny):
    launch(train, *TINY, "--max_iters=2")
    out = launch(train, "--init_from=resume", "--block_size=8", "--max_iters=3")
    assert "block_size: 16 -> 8" in out
    checkpoint = load("out/ckpt.pt")
    assert checkpoint["model"]["transformer.wpe.weight"].shape == (8, 32)
    assert checkpoint["optimizer"]["state"][1]["exp_avg"].shape == (8, 32)
    assert checkpoint["model_args"]["block_size"] == 8


# --- nanoGPT's own files -------------------------------------------------------------------------


def nanogpt_checkpoint(folder, vocab_size):
    """Write a checkpoint as nanoGPT lays it out: compiled names, resolved device, tensors."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
    arguments = {**sizes, "bias": False, "vocab_size": vocab_size, "dropout": 0.0}
    layer = {"ln_1.weight": (32,), "attn.c_attn.weight": (96, 32), "attn.c_proj.weight": (32, 32)}
    layer |= {"ln_2.weight": (32,), "mlp.c_fc.weight": (128, 32), "mlp.c_proj.weight": (32, 128)}
    shapes = {"wte.weight": (vocab_size, 32), "wpe.weight": (16, 32)}
    shapes |= {f"h.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    shapes = {f"transformer.{k}": v for k, v in (shapes | {"ln_f.weight": (32,)}).items()}
    weights = {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    order = sorted(shapes, key=lambda name: len(shapes[name]) < 2)  # matrices, then vectors
    matrices = sum(len(shape) == 2 for shape in shapes.values())
    hyper = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": False, "maximize": False}
    hyper |= {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
    groups = [
        {**hyper, "weight_decay": 0.1, "params": list(range(matrices))},
        {**hyper, "weight_decay": 0.0, "params": list(range(matrices, len(order)))},
    ]
    state = {
        index: {
            "step": torch.tensor(7.0),
            "exp_avg": torch.full(shapes[name], 0.01),
            "exp_avg_sq": torch.full(shapes[name], 0.02),
        }
        for index, name in enumerate(order)
    }
    config = {"out_dir": "elsewhere", "dataset": "tiny", "batch_size": 4, "block_size": 16}
    config |= {"gradient_accumulation_steps": 1, "max_iters": 7, "warmup_iters": 2}
    config |= {"device": "cpu", "dtype": "float32", "compile": False, "init_from": "scratch"}
    named = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    named["_orig_mod.lm_head.weight"] = weights["transformer.wte.weight"]
    Path(folder).mkdir()
    torch.save(
        {
            "model": named,
            "optimizer": {"state": state, "param_groups": groups},
            "model_args": arguments,
            "iter_num": 7,
            "best_val_loss": torch.tensor(2.5),
            "config": config,
        },
        Path(folder, "ckpt.pt"),
    )
    return weights


def test_a_checkpoint_of_nanogpt_resumes_at_its_step_with_its_optimizer(launch, tiny):
    vocab_size = read_meta(tiny / "data" / "tiny")["vocab_size"]
    weights = nanogpt_checkpoint("theirs", vocab_size)
    launch(train, "--init_from=resume", "--out_dir=theirs", "--learning_rate=0", "--min_lr=0")
    kept = load("theirs/ckpt.pt")
    assert kept["iter_num"] == 7 and kept["best_val_loss"] <= 2.5
    for name, tensor in weights.items():
        assert torch.equal(kept["model"][name], tensor)
    assert all(s["step"] == 7 for s in kept["optimizer"]["state"].values())
    assert all((s["exp_avg"] == 0.01).all() for s in kept["optimizer"]["state"].values())
    out = launch(train, "--init_from=resume", "--out_dir=theirs", "--max_iters=9")
    assert "iter 7: loss" in out
    assert load("theirs/ckpt.pt")["optimizer"]["state"][0]["step"] == 9


def test_a_checkpoint_of_nanogpt_is_sampled_from(launch, tiny, monkeypatch):
    import sample

    monkeypatch.setattr(sample, "ROOT", tiny)  # where its dataset's meta.pkl is
    nanogpt_checkpoint("theirs", read_meta(tiny / "data" / "tiny")["vocab_size"])
    out = launch(sample, "--out_dir=theirs", "--num_samples=2", "--max_new_tokens=20", "--start=1")
    assert out.count("---------------") == 2


# --- finetuning ----------------------------------------------------------------------------------


@pytest.fixture
def pretrained(tiny):
    transformers = pytest.importorskip("transformers")
    vocab_size = read_meta(tiny / "data" / "tiny")["vocab_size"]
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": vocab_size}
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained("pretrained")
    return "pretrained"


def test_finetuning_starts_from_the_weights_of_a_folder(launch, tiny, pretrained):
    options = [*TINY, f"--init_from={pretrained}", "--max_iters=2", "--dropout=0.1"]
    launch(train, *options)
    checkpoint = load("out/ckpt.pt")
    assert checkpoint["model_args"]["gelu_tanh"] and checkpoint["model_args"]["bias"]
    assert checkpoint["model_args"]["block_size"] == 16 and checkpoint["model_args"]["n_layer"] == 1
    out = launch(train, "--init_from=resume", "--max_iters=3")
    assert "iter 2: loss" in out


# --- mistakes ------------------------------------------------------------------------------------

NO_GPU = not torch.cuda.is_available()


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--n_head=3"], "n_embd=32 is no multiple of n_head=3"),
        (["--batch_size=0"], "batch_size=0 must be at least 1"),
        (["--dropout=1"], "dropout=1.0 must be at least 0 and below 1"),
        (["--seed=-1", "--beta2=2"], "seed=-1 must be at least 0\nbeta2=2.0 must be at least 0 and below 1"),  # noqa: E501
        (["--max_iters=2", "--warmup_iters=2"], "warmup_iters=2 leaves no step to decay in before lr_decay_iters=2; lower --warmup_iters"),  # noqa: E501
        (["--dataset=no"], "no train.bin in {tmp}/data/no; make it: python data/text/prepare.py --input=FILE --dataset=no"),  # noqa: E501
        (["--block_size=10000"], "{tmp}/data/tiny/train.bin holds 3519 tokens and 0 bytes; block_size=10000 needs 10001 tokens, all of them whole"),  # noqa: E501
        (["--init_from=resume"], "no ckpt.pt in out to resume; name its folder with --out_dir"),
        (["--init_from=gpt2"], "dataset tiny has a vocabulary of 21, the model 50257; prepare the dataset with the model's tokenizer"),  # noqa: E501
        (["--init_from=scrach"], "init_from=scrach: choose scratch, resume, auto, gpt2, gpt2-medium, -large, -xl, OWNER/NAME or a folder"),  # noqa: E501
        (["--init_from=pretrained", "--block_size=64"], "block_size=64 exceeds the model's 32; lower --block_size"),  # noqa: E501
        (["--device=tpu"], "device=tpu: this machine has none; try --device=auto"),
        (["--dtype=float8"], "dtype=float8: choose auto, float32, bfloat16, or float16 on CUDA"),
        (["--dtype=float16"], "dtype=float16: choose auto, float32, bfloat16, or float16 on CUDA"),
        (["--compile=maybe"], "compile=maybe: choose auto, True or False"),
        pytest.param(["--device=cuda"], "device=cuda: this machine has none; try --device=auto", marks=pytest.mark.skipif(not NO_GPU, reason="has a GPU")),  # noqa: E501
    ],
)  # fmt: skip
def test_a_mistake_gets_its_line_and_leaves_nothing(launch, tiny, pretrained, arguments, line):
    with pytest.raises(SystemExit) as stop:
        launch(train, *TINY, *arguments)
    lines = line.replace("{tmp}", str(tiny)).splitlines()
    assert stop.value.code == "\n".join(f"error: {line}" for line in lines)
    assert not (tiny / "out").exists()


def test_what_cannot_change_on_resume_is_refused(launch, tiny):
    launch(train, *TINY, "--max_iters=3")
    before = (tiny / "out" / "ckpt.pt").read_bytes()
    for flag, line in (
        ("--n_embd=64", "the checkpoint has n_embd=32 and keeps it"),
        ("--block_size=32", "block_size=32 exceeds the model's 16; lower --block_size"),
    ):
        with pytest.raises(SystemExit) as stop:
            launch(train, "--init_from=resume", flag)
        assert stop.value.code == f"error: {line}"
    assert (tiny / "out" / "ckpt.pt").read_bytes() == before


def test_sequences_that_cannot_be_shared_equally_name_the_numbers_that_can(monkeypatch):
    monkeypatch.setattr(train, "batch_size", 12)
    monkeypatch.setattr(train, "gradient_accumulation_steps", 1)
    with pytest.raises(ValueError) as fault:
        train.check_settings(8)
    batch = "batch_size * gradient_accumulation_steps = 12 sequences per step"
    assert str(fault.value) == f"{batch} divide among 1, 2, 3, 4, 6, 12 processes, not among 8"


def test_a_failing_compile_falls_back_with_one_line(launch, tiny, monkeypatch):
    def broken(self, *args, **options):
        self._compiled_call_impl = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no Triton"))

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    out = launch(train, *TINY, "--max_iters=3", "--compile=True")
    assert out.count("not compiled, which is slower: RuntimeError: no Triton") == 1
    assert "step 3: train loss" in out


# --- hardware ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, dtype",
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)],
)
def test_a_gpu_computes_in_what_its_hardware_has(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runtime.choose_dtype("auto", torch.device("cuda", 0))[0] == dtype


@pytest.mark.parametrize("amx, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bfloat16_where_that_is_fast(monkeypatch, amx, dtype):
    capabilities = {"amx_bf16": amx, "avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert runtime.choose_dtype("auto", torch.device("cpu"))[0] == dtype
    assert runtime.choose_dtype("auto", torch.device("mps"))[0] == torch.float32


@pytest.mark.parametrize(
    "name, dtype, tera",
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA A100-SXM4-40GB", torch.bfloat16, 312),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 156),
        ("NVIDIA A10G", torch.bfloat16, 70),
        ("Tesla T4", torch.float16, 65),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA RTX A1000", torch.bfloat16, None),
        ("NVIDIA RTX A6000", torch.bfloat16, 155),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, dtype, tera):
    run = runtime.Run(torch.device("cuda", 0), dtype, False, 0, 1, name, "")
    assert run.peak_flops() == (tera and tera * 1e12)
    unknown = runtime.Run(torch.device("cpu"), dtype, False, 0, 1, "cpu", "")
    assert unknown.peak_flops() is None


def test_the_modules_import_without_doing_anything():
    assert not model.__dict__.get("_flags")
    code = "import train, sample, bench, model, runtime, configurator"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
