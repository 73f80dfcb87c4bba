"""Measure what each part of the recipe brings, and how sensitive training is to each setting.

    python data/shakespeare_char/prepare.py && python docs/recipe.py small
    python docs/recipe.py time
    python docs/recipe.py sweep
    python docs/recipe.py epochs
    python docs/recipe.py large
    python docs/recipe.py time_large
    python docs/recipe.py base
    python data/shakespeare/prepare.py && python docs/recipe.py finetune
    python docs/recipe.py draw

Each run is train.py in a process of its own, and a line in docs/recipe.jsonl when it has ended: an
interrupted command goes on with the first run that has none. `large` and `finetune` first write a
dataset, Python's own source in GPT-2's tokens; `base` trains on it what `finetune` finetunes.
`time` repeats some of `small`, and `time_large` of `large`, with as many steps as fit into the time
of GPT-2's; `draw` draws the pictures and prints the tables.
"""

import itertools
import json
import re
import statistics
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from configurator import configure  # noqa: E402
from data.tokenizer import GPT2, make_tokenizer  # noqa: E402
from data.tokens import write_dataset  # noqa: E402
from engine.muon import Muon  # noqa: E402
from model import GPT, MLP, cross_entropy  # noqa: E402

RESULTS = ROOT / "docs" / "recipe.jsonl"
RUN = """--device=cpu --dtype=float32 --compile=False --gradient_accumulation_steps=1 --dropout=0
    --min_lr=0 --warmup_iters=10 --lr_schedule=linear --eval_interval=100000 --log_interval=20"""
SMALL = """--dataset=shakespeare_char --n_layer=4 --n_head=4 --n_embd=128 --block_size=64
    --batch_size=12 --max_iters=200 --eval_iters=50"""  # 0.8M parameters
LARGE = """--dataset=stdlib_bpe --n_layer=6 --n_head=5 --n_embd=160 --block_size=128
    --batch_size=8 --max_iters=100 --eval_iters=10"""  # 10M parameters, 8M of them token table

# --- what is measured ----------------------------------------------------------------------------

ADAMW, MUON = "--learning_rate=3e-3", "--optimizer=muon --learning_rate=1e-2"
WHOLE = f"{MUON} --position=rotary --rms_norm=True --tied=False"
# What did not beat the noise, or is one part of a switch: not in the code, but put into the model.
PARTS = {"qk_norm", "norm_of_embedding", "norm_of_layers"}
OTHERS = {"relu_squared", "softcap", "zero_init", "residual_scalars", "value_embeddings"}
ALONE = {  # name -> flags and what is put in
    "GPT-2, AdamW": (ADAMW, ""),
    "+ Muon": (MUON, ""),
    "+ rotary": (f"{ADAMW} --position=rotary", ""),
    "+ ALiBi": (f"{ADAMW} --position=alibi", ""),
    "+ RMSNorm, also of embeddings, queries, keys": (f"{ADAMW} --rms_norm=True", ""),
    "+ untied head": (f"{ADAMW} --tied=False", ""),
    **{f"+ {name}": (ADAMW, name) for name in sorted(PARTS | OTHERS)},
}
LESS = {
    "the recipe": (WHOLE, ""),
    "AdamW for Muon": (WHOLE.replace(MUON, ADAMW), ""),
    "learned positions for rotary": (WHOLE.replace("=rotary", "=learned"), ""),
    "ALiBi for rotary": (WHOLE.replace("=rotary", "=alibi"), ""),
    "LayerNorm for all RMSNorm": (WHOLE.replace("--rms_norm=True", ""), ""),
    "tied head": (WHOLE.replace("--tied=False", ""), ""),
    **{f"without {name}": (WHOLE, f"no_{name}") for name in sorted(PARTS)},
    **{f"the recipe + {name}": (WHOLE, name) for name in sorted(OTHERS | {"momentum_warmup"})},
}
IN_TIME = ["GPT-2, AdamW", "+ Muon", "+ rotary", "AdamW for Muon", "the recipe"]
TIMED = {"time": ("small", SMALL, 200), "time_large": ("large", LARGE, 100)}  # steps of GPT-2's
SWEEP = {  # setting -> values, around the laptop recipe with its schedule cut to 200 steps
    "learning_rate": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    "batch_size": [3, 6, 12, 24, 48],
    "warmup_iters": [0, 10, 30, 100],
    "beta2": [0.9, 0.95, 0.99, 0.999],
    "weight_decay": [0, 0.03, 0.1, 0.3, 1],
    "grad_clip": [0, 0.3, 1, 3],
    "initialisation": [0.1, 0.3, 1, 3],  # times GPT-2's
    "dropout": [0, 0.1, 0.2, 0.4],
    "block_size": [16, 32, 64, 128],
}
TUNED = """--n_layer=4 --n_head=4 --n_embd=128 --block_size=128 --batch_size=8
    --eval_iters=8"""  # 7M parameters
BASE = ROOT / "out-recipe-base"
FINETUNE = [  # steps, learning rates, their decay, dropout
    (80, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3], [False, True], [0]),
    (20, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], [False, True], [0]),
    (320, [3e-4, 1e-3, 3e-3], [True], [0, 0.1, 0.2]),
]


def change_models(change):
    """Let change(model, config) be called with every GPT after it was built."""
    build = GPT.__init__

    def build_and_change(self, config):
        build(self, config)
        change(self, config)

    GPT.__init__ = build_and_change


def norm(size):
    return nn.RMSNorm(size, 1e-6, elementwise_affine=False)


def put_norms(model, config, which, make):
    """Put make(size) in the places called `which`, a name of PARTS."""
    if which == "norm_of_embedding":
        model.transformer["ln_e"] = make(config.n_embd)
    if which == "norm_of_layers":
        model.transformer["ln_f"] = make(config.n_embd)
    for block in model.transformer.h:
        if which == "qk_norm":
            block.attn.qk_norm = make(config.n_embd // config.n_head)
        if which == "norm_of_layers":
            block.ln_1, block.ln_2 = make(config.n_embd), make(config.n_embd)


def start_at_zero(model, config):
    """Projections into the residual stream, and a head of its own, start at 0."""
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight") or (name == "lm_head.weight" and not config.tied):
            nn.init.zeros_(parameter)


def add_residual_scalars(model, config):
    """Each block reads a x + b x0, x0 what the first one reads; a starts at 1, b at 0."""
    model.stream_scales = nn.Parameter(torch.ones(config.n_layer))
    model.first_scales = nn.Parameter(torch.zeros(config.n_layer))
    model.transformer.drop.register_forward_hook(lambda module, args, x: setattr(model, "x0", x))
    for layer, block in enumerate(model.transformer.h):

        def mix(module, args, layer=layer):
            x = model.stream_scales[layer] * args[0] + model.first_scales[layer] * model.x0
            return (x, *args[1:])

        block.register_forward_pre_hook(mix)


def add_value_embeddings(model, config):
    """Every second block adds to its values a table's row for the token, scaled from 0 on."""
    model.value_scales = nn.Parameter(torch.zeros(config.n_layer))
    model.value_table = nn.Embedding(config.vocab_size, config.n_embd)
    model.transformer.wte.register_forward_pre_hook(lambda m, args: setattr(model, "ids", args[0]))
    for layer, block in enumerate(model.transformer.h):

        def add(module, args, qkv, layer=layer):
            values = model.value_scales[layer] * model.value_table(model.ids)
            return qkv + F.pad(values, (2 * config.n_embd, 0))

        if layer % 2:
            block.attn.c_attn.register_forward_hook(add)


def warm_up_momentum():
    """Let Muon's momentum rise from 0.85 over the first 80 steps."""
    direction, made = Muon.direction, Counter()

    def with_less(self, parameter, momentum, good):
        share = min(1, made[parameter] / 80)
        made[parameter] += 1
        return direction(self, parameter, 0.85 + share * (momentum - 0.85), good)

    Muon.direction = with_less


def put_in(name):
    """Change the models that are built from now on by what is called `name`."""
    part = name.removeprefix("no_")
    if part in PARTS:
        gpt2s = nn.Identity if part != "norm_of_layers" else lambda C: nn.LayerNorm(C, bias=False)
        make = norm if part == name else gpt2s
        change_models(lambda model, config: put_norms(model, config, part, make))
    elif name == "relu_squared":
        MLP.forward = lambda self, x: self.dropout(self.c_proj(self.c_fc(x).relu().square()))
    elif name == "softcap":
        GPT.head_loss = lambda self, x, targets: cross_entropy(
            15 * torch.tanh(self.lm_head(x) / 15), targets
        )
    elif name == "zero_init":
        change_models(start_at_zero)
    elif name == "residual_scalars":
        change_models(add_residual_scalars)
    elif name == "value_embeddings":
        change_models(add_value_embeddings)
    elif name == "momentum_warmup":
        warm_up_momentum()
    elif name == "pretrained":
        weights = torch.load(BASE / "ckpt.pt", weights_only=True)["model"]
        change_models(lambda model, config: model.load_state_dict(weights))
    elif name.startswith("scale="):

        @torch.no_grad()
        def scale(model, config):
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(float(name.removeprefix("scale=")))

        change_models(scale)


# --- runs ----------------------------------------------------------------------------------------


def plan(part):
    """Yield the runs of a part: what tells one from the others, flags, and what is put in."""
    for seed in (1, 2, 3):
        if part == "finetune":
            for steps, *choices in FINETUNE:
                for rate, decay, dropout in itertools.product(*choices):
                    key = {"steps": steps, "rate": rate, "decay": decay, "dropout": dropout}
                    flags = f"{TUNED} --dataset=shakespeare --max_iters={steps} --dropout={dropout}"
                    flags += f" --learning_rate={rate} --decay_lr={decay} --warmup_iters=0"
                    yield {**key, "seed": seed}, flags, "pretrained"
        elif part == "sweep":
            for optimizer, rate in (("adamw", ADAMW), ("muon", MUON)):
                for name, values in SWEEP.items():
                    for value in values:
                        given = "" if name == "initialisation" else f"--{name}={value}"
                        key = {"optimizer": optimizer, "name": name, "value": value}
                        put = f"scale={value}" if name == "initialisation" else ""
                        yield {**key, "seed": seed}, f"{SMALL} {rate} {given}", put
        elif part == "epochs":
            for epochs, sampling in itertools.product((1, 4), ("random", "epochs")):
                steps = round(epochs * 1_003_854 / (48 * 64))  # of Tiny Shakespeare's train.bin
                flags = f"{SMALL} {ADAMW} --batch_size=48 --max_iters={steps}"
                flags += f" --sampling={sampling} --eval_iters=1000000"
                yield {"epochs": epochs, "sampling": sampling, "seed": seed}, flags, ""
        elif part in TIMED:
            scale, size, budget = TIMED[part]
            times = by_name(scale)[1]
            for name in IN_TIME:
                medians = [statistics.median(times[each]) for each in ("GPT-2, AdamW", name)]
                steps = round(budget * medians[0] / medians[1])
                flags, put = {**ALONE, **LESS}[name]
                flags = f"{size} {flags} --max_iters={steps}"
                yield {"name": name, "steps": steps, "seed": seed}, flags, put
        else:
            for name, (flags, put) in {**ALONE, **LESS}.items():
                size = {"small": SMALL, "large": LARGE}[part]
                yield {"name": name, "seed": seed}, f"{size} {flags}", put


def known():
    """Return the results so far."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def run(part, flags, put, seed):
    """Train once; return the loss on the validation split and milliseconds per step."""
    out = ROOT / f"out-recipe-{part}"
    # The fast parts compute the loss themselves, so a change of it needs PyTorch's way.
    flags = [*RUN.split(), *flags.split(), f"--out_dir={out}", f"--seed={seed}"]
    flags += ["--fast_parts=False"] if put == "softcap" else []
    command = [sys.executable, __file__, "run", put, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    losses = re.findall(r"^step .* val loss ([\d.]+)", done.stdout, re.MULTILINE)
    if done.returncode and "had no finite gradient" not in done.stderr:
        raise SystemExit(done.stderr)
    if done.returncode:
        return {"loss": None, "ms": None}  # it diverged
    entries = map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    times = [entry["ms"] for entry in entries if "ms" in entry]
    return {"loss": float(losses[-1]), "ms": round(statistics.median(times), 1)}


def make_base():
    """Train what is finetuned: a model of 7M parameters on Python's source, in out-recipe-base."""
    if not (BASE / "ckpt.pt").exists():
        flags = f"{RUN} {TUNED} {ADAMW} --dataset=stdlib_bpe --max_iters=400 --out_dir={BASE}"
        subprocess.run([sys.executable, ROOT / "train.py", *flags.split()], check=True)


def run_all(part):
    done = []
    if part in ("large", "time_large", "finetune"):
        write_source_code()
    if part == "finetune":
        make_base()
    for line in known():
        done.append({name: line[name] for name in line if name not in ("loss", "ms")})
    for key, flags, put in plan(part):
        key = {"part": part, **key}
        if key not in done:
            line = json.dumps({**key, **run(part, flags, put, key["seed"])})
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(line + "\n")
            print(line, flush=True)


def write_source_code():
    """Write Python's standard library with its tests, 20 MB, as a dataset in GPT-2's tokens."""
    folder = ROOT / "data" / "stdlib_bpe"
    if (folder / "train.bin").exists():
        return
    texts = []
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = set(path.relative_to(library).parts)
        if not inside & {"site-packages", "encodings", "pydoc_data"}:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    encode, held_out = make_tokenizer(GPT2).encode_corpus, texts[9::10]
    del texts[9::10]
    write_dataset(folder, GPT2, train=encode(texts), val=encode(held_out))


# --- what came of them ---------------------------------------------------------------------------


def by_name(part):
    """Return {name: losses of its seeds} and {name: milliseconds per step of each} of a part."""
    losses, times = {}, {}
    for line in known():
        if line["part"] == part and line["loss"]:
            losses.setdefault(line["name"], []).append(line["loss"])
            times.setdefault(line["name"], []).append(line["ms"])
    return losses, times


def cell(losses):
    """Return the mean of the losses, and how far they lie apart."""
    return f"{statistics.mean(losses):.3f} ({max(losses) - min(losses):.3f}, {len(losses)})"


def draw_ablation():
    """Print the table, and draw every run as a point, a panel per scale."""
    import matplotlib.pyplot as plt

    parts = {"small": "0.8M parameters, characters", "large": "10M parameters, GPT-2's tokens"}
    measured = {part: by_name(part) for part in parts}
    parts = {part: about for part, about in parts.items() if measured[part][0]}
    print(f"| | {' | '.join(f'{about} | ms' for about in parts.values())} |")
    for name in {**ALONE, **LESS}:
        row = [name.replace("_", " ")]
        for losses, times in (measured[part] for part in parts):
            row += [cell(losses[name]), min(times[name])] if name in losses else ["", ""]
        print(f"| {' | '.join(map(str, row))} |")
    for part, (scale, _, _) in TIMED.items():
        for name, losses in by_name(part)[0].items():
            print(f"{scale}, in the time of GPT-2: {name} {cell(losses)}")
    figure, axes = plt.subplots(
        2, len(parts), figsize=(1 + 6 * len(parts), 8), layout="constrained", squeeze=False
    )
    for column, part in enumerate(parts):
        losses, _ = measured[part]
        for row, group in enumerate((ALONE, LESS)):
            panel, names = axes[row, column], [name for name in group if name in losses]
            for height, name in enumerate(reversed(names)):
                panel.plot(losses[name], [height] * len(losses[name]), "o", color="tab:blue")
            if names:
                panel.axvspan(min(losses[names[0]]), max(losses[names[0]]), color="0.85")
            labels = [name.replace("_", " ") for name in reversed(names)]
            panel.set_yticks(range(len(names)), labels)
            panel.set(xlabel=f"loss, {parts[part]}")
            panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "assets" / "recipe.png", dpi=90)


def draw_sweep():
    """Draw the loss against each setting, for both optimizers, in one picture."""
    import matplotlib.pyplot as plt

    lines = [line for line in known() if line["part"] == "sweep"]
    figure, axes = plt.subplots(3, 3, figsize=(11, 8.5), layout="constrained", sharey=True)
    for panel, (name, values) in zip(axes.flat, SWEEP.items(), strict=True):
        for optimizer, color in (("adamw", "tab:orange"), ("muon", "tab:blue")):
            mean = []
            for place, value in enumerate(values):
                key = {"optimizer": optimizer, "name": name, "value": value}
                found = [line["loss"] for line in lines if key.items() <= line.items()]
                found = [loss for loss in found if loss]
                panel.plot([place] * len(found), found, ".", color=color)
                mean.append(statistics.mean(found) if found else float("nan"))
            panel.plot(range(len(values)), mean, color=color, label=optimizer)
        panel.set_xticks(range(len(values)), values)
        panel.set(xlabel=name, ylim=(1.8, 3.0))
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    figure.supylabel("validation loss after 200 steps")
    figure.savefig(ROOT / "assets" / "sensitivity.png", dpi=90)


def print_epochs():
    """Print the mean loss of drawing windows at random, and of each window once per epoch."""
    found = {}
    for line in known():
        if line["part"] == "epochs":
            found.setdefault((line["epochs"], line["sampling"]), []).append(line["loss"])
    for (epochs, sampling), losses in found.items():
        print(f"| {epochs} epochs | {sampling} | {cell(losses)} |")


def print_finetuning():
    """Print the mean loss of each way to finetune."""
    lines = [line for line in known() if line["part"] == "finetune"]
    for steps, rates, decays, dropouts in FINETUNE:
        for decay, dropout in itertools.product(decays, dropouts):
            row = [f"{steps} steps", f"decay {decay}", f"dropout {dropout}"]
            for rate in rates:
                key = {"steps": steps, "rate": rate, "decay": decay, "dropout": dropout}
                losses = [line["loss"] for line in lines if key.items() <= line.items()]
                row.append(f"{rate}: {cell(losses)}" if losses else "")
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    part, *arguments = sys.argv[1:] or ["nothing"]
    if part == "run":
        put_in(arguments[0])
        sys.argv = [train.__file__, *arguments[1:]]
        train.main(configure(vars(train)))
    elif part == "draw":
        draw_ablation()
        draw_sweep()
        print_epochs()
        print_finetuning()
    elif part == "base":
        write_source_code()
        make_base()
    elif part in ("small", "large", *TIMED, "sweep", "epochs", "finetune"):
        run_all(part)
    else:
        parts = "small, large, time, time_large, sweep, epochs, base, finetune or draw"
        raise SystemExit(f"error: name a part: {parts}")
