"""The project as a whole: budgets, imports, config files, and the commands that its pages show."""

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
from tools import convert, evaluate, export, plot, size

BUDGETS = {"train.py": 240, "model.py": 240, "sample.py": 90, "bench.py": 130}
BUDGETS |= {"configurator.py": 120, "data/tokens.py": 160, "data/tokenizer.py": 140}
BUDGETS |= dict.fromkeys(("data/batches.py", "data/corpus.py", "data/documents.py"), 160)
for pattern, most in ("engine/*", 150), ("tools/*", 120), ("data/*/prepare", 60), ("config/*", 30):
    BUDGETS |= {str(path.relative_to(ROOT)): most for path in ROOT.glob(f"{pattern}.py")}
DOCS = sorted(ROOT.glob("docs/*.md"))
SCRIPTS = {"train.py": train, "sample.py": sample, "bench.py": bench}
TOOLS = convert, evaluate, export, plot, size
SCRIPTS |= {f"{tool.__name__.replace('.', '/')}.py": tool for tool in TOOLS}


def statements(tree):
    """Return the number of statements in a syntax tree, docstrings not counted."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    texts = [n for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return len(nodes) - len(texts)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_file_keeps_its_budget_in_statements(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    assert statements(tree) <= BUDGETS[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert statements(node) - 1 <= 30, node.name
    if name == "train.py":
        expressions = sum(isinstance(node, ast.expr) for node in ast.walk(tree))
        assert round(expressions / statements(tree), 1) <= 5.6


def test_the_root_holds_the_five_scripts_and_no_other_code():
    names = {path.name for path in ROOT.glob("*.py")}
    assert names == {"model.py", "train.py", "sample.py", "bench.py", "configurator.py"}


# --- who may import whom -------------------------------------------------------------------------

OURS = "model", "train", "sample", "bench", "configurator", "data", "engine", "tools", "docs"
DATA = "data.tokens", "data.tokenizer", "data.batches"
FLOORS = {
    "engine": {"engine"},
    "model.py": {"engine.huggingface", "engine.muon"},  # within functions
    "configurator.py": set(),
    "data/tokenizer.py": {"engine.process"},
    "data/tokens.py": {"engine.process", "data.tokenizer"},
    "data/batches.py": {"engine.process"},
    "data/corpus.py": {"engine.process", "data.tokenizer"},
    "data/documents.py": {"engine.process", "engine.lock", "data"},
    "data/": {"configurator", "data", "engine.process"},
    "train.py": {"model", "configurator", *DATA, "engine"},
    "sample.py": {"model", "configurator", *DATA, "engine"},
    "bench.py": {"train", "model", "configurator", *DATA, "engine"},
    "config/": set(),
}


def imports(path):
    """Return what a file imports of ours, as two names: engine.log, model.GPT."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)  # a relative one would not be seen below
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {".".join(name.split(".")[:2]) for name in found if name.split(".")[0] in OURS}


@pytest.mark.parametrize("name", [name for name in BUDGETS if not name.startswith("tools/")])
def test_no_import_runs_upwards(name):
    floor = next(floor for floor in FLOORS if name.startswith(floor))
    for imported in imports(ROOT / name):
        assert any(f"{imported}.".startswith(f"{allowed}.") for allowed in FLOORS[floor]), imported


def test_the_modules_of_the_engine_import_one_another_in_no_circle():
    above = {f"engine.{path.stem}": imports(path) for path in ROOT.glob("engine/*.py")}
    while above:
        ground = [name for name, below in above.items() if not below & above.keys()]
        assert ground, above
        for name in ground:
            del above[name]


def test_the_model_imports_nothing_of_ours_before_it_is_asked_to():
    tree = ast.parse((ROOT / "model.py").read_text(encoding="utf-8"))
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for n in tree.body if isinstance(n, ast.Import) for alias in n.names}
    assert modules == {"math", "dataclasses", "typing", "torch", "torch.nn.functional"}


# --- settings ------------------------------------------------------------------------------------


def configure(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    others = [vars(train)] if script in (bench, size) else []
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
    for end in ("", "_medium", "_large", "_xl"):
        config = configure(monkeypatch, train, f"config/eval_gpt2{end}.py")
        assert config["eval_only"] and config["init_from"] == "gpt2" + end.replace("_", "-")
        assert (config["batch_size"], config["eval_iters"]) == (8, 500)


# --- pages ---------------------------------------------------------------------------------------

PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *DOCS)}


def commands(text):
    """Return the commands in the sh blocks of a page, and those that stand in its sentences."""
    fences = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.M | re.S)
    lines = [line for fence in fences for line in fence.replace("\\\n", " ").splitlines()]
    found = [part.strip() for line in lines for part in line.split("&&")]
    found += re.findall(r"`((?:[A-Z_]+=\S+ )?(?:python|torchrun) [^`]*\.py[^`]*)`", text)
    return {line for line in found if ".py" in line and not line.startswith("#")}


COMMANDS = sorted(set().union(*map(commands, PAGES.values())))


def test_the_readme_is_short_and_shows_the_sacred_commands():
    readme = PAGES[ROOT / "README.md"]
    assert readme.count("\n") <= 200
    for command in (
        "python train.py config/train_shakespeare_char.py",
        "torchrun --nproc_per_node=8 train.py config/train_gpt2.py",
        "python sample.py --init_from=gpt2-xl",
        "python bench.py --compile=True",
    ):
        assert any(line.startswith(command) for line in commands(readme)), command


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_page_is_understood(monkeypatch, command):
    words = shlex.split(command.replace("\n", " "), comments=True)
    at = next(index for index, word in enumerate(words) if word.endswith(".py"))
    name, arguments = words[at], words[at + 1 :]
    assert (ROOT / name).exists(), name
    if name.startswith(("tests/", "docs/")):  # no settings of ours, but a part, which is named
        documented = (ROOT / name).read_text(encoding="utf-8")
        assert all(word.startswith("-") or f"{name} {word}" in documented for word in arguments)
        return
    is_data = name.startswith("data/")
    script = importlib.import_module(name[:-3].replace("/", ".")) if is_data else SCRIPTS[name]
    monkeypatch.chdir(ROOT)
    if "--help" not in arguments:
        configure(monkeypatch, script, *arguments)


def anchors(text):
    """Return the anchors that the headings of a page have on the usual web sites."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


LINKS = [
    (page, link)
    for page, text in PAGES.items()
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", text)
]


@pytest.mark.parametrize("page, link", LINKS, ids=[f"{page.stem}-{link}" for page, link in LINKS])
def test_a_link_leads_somewhere(page, link):
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    assert target.exists()
    if anchor:
        assert anchor in anchors(target.read_text(encoding="utf-8"))
