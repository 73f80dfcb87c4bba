"""The project as a whole: its budgets, its config files, the commands that the README shows."""

import ast
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT

import bench
import configurator
import sample
import train

BUDGETS = {"model.py": 412, "fast.py": 190, "train.py": 560, "sample.py": 120, "bench.py": 285}
BUDGETS |= {"configurator.py": 160, "runtime.py": 290, "data/tokens.py": 230}
BUDGETS |= {str(path.relative_to(ROOT)): 100 for path in ROOT.glob("data/*/prepare.py")}
BUDGETS |= {str(path.relative_to(ROOT)): 30 for path in ROOT.glob("config/*.py")}
SCRIPTS = {"train.py": train, "sample.py": sample, "bench.py": bench}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_file_keeps_its_budget(name):
    source = (ROOT / name).read_text(encoding="utf-8")
    lines = source.count("\n")
    assert lines <= BUDGETS[name], f"{name} has {lines} lines, its budget is {BUDGETS[name]}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 45, f"{name}: {node.name} has {length} lines, its budget is 45"


def configure(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    others = [vars(train)] if script is bench else []
    return configurator.configure(vars(script), *others)


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.stem)
def test_a_config_file_loads_and_says_what_it_is_for(monkeypatch, path):
    configure(monkeypatch, train, str(path))
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_nanogpts_hyperparameters_stay(monkeypatch):
    default = configure(monkeypatch, train)
    expected = {"batch_size": 12, "block_size": 1024, "max_iters": 600000, "learning_rate": 6e-4}
    expected |= {"beta2": 0.95, "weight_decay": 0.1, "gradient_accumulation_steps": 40}
    assert {key: default[key] for key in expected} == expected
    shakespeare = configure(monkeypatch, train, "config/train_shakespeare_char.py")
    expected = {"n_layer": 6, "n_embd": 384, "dropout": 0.2, "block_size": 256, "batch_size": 64}
    expected |= {"learning_rate": 1e-3, "max_iters": 5000, "min_lr": 1e-4, "beta2": 0.99}
    assert {key: shakespeare[key] for key in expected} == expected
    finetune = configure(monkeypatch, train, "config/finetune_shakespeare.py")
    expected = {"init_from": "gpt2-xl", "max_iters": 20, "learning_rate": 3e-5, "decay_lr": False}
    assert {key: finetune[key] for key in expected} == expected
    for size in ("", "_medium", "_large", "_xl"):
        config = configure(monkeypatch, train, f"config/eval_gpt2{size}.py")
        assert config["eval_only"] and config["init_from"] == "gpt2" + size.replace("_", "-")
        assert (config["batch_size"], config["eval_iters"]) == (8, 500)


README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^ *```sh\n(.*?)^ *```", README, re.M | re.S)
LINES = [line.strip() for fence in FENCES for line in fence.replace("\\\n", " ").splitlines()]
COMMANDS = [part.strip() for line in LINES for part in line.split("&&") if not line.startswith("#")]
COMMANDS += re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", README)


def test_the_sacred_commands_are_in_the_readme():
    for command in (
        "python train.py config/train_shakespeare_char.py",
        "torchrun --nproc_per_node=8 train.py config/train_gpt2.py",
        "python sample.py --init_from=gpt2-xl",
        "python bench.py --compile=True",
    ):
        assert any(line.startswith(command) for line in COMMANDS), command


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if ".py" in c}))
def test_a_command_of_the_readme_is_understood(monkeypatch, command):
    words = shlex.split(command, comments=True)
    at = next(index for index, word in enumerate(words) if word.endswith(".py"))
    name, arguments = words[at], words[at + 1 :]
    assert (ROOT / name).exists(), name
    if name.startswith(("tests/", "assets/")):  # no settings of ours
        return
    is_data = name.startswith("data/")
    script = importlib.import_module(name[:-3].replace("/", ".")) if is_data else SCRIPTS[name]
    monkeypatch.chdir(ROOT)
    if "--help" not in arguments:
        configure(monkeypatch, script, *arguments)


@pytest.mark.parametrize("name", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_a_link_of_the_readme_leads_somewhere(name):
    assert (ROOT / name).exists()
