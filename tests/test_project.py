"""The project: its weight, its imports, its config files, and the commands that its pages show."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, losses

import bench
import configurator
import train
from tools import size

CODE = [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("data/**/*.py")]
CODE += [*ROOT.glob("tools/*.py"), *ROOT.glob("docs/*.py")]
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in CODE
}
ROOMS = {  # pattern -> statements at most
    r"model\.py": 220, r"train\.py": 240, r"sample\.py": 90, r"bench\.py": 110,
    r"configurator\.py": 100, r"engine/runtime\.py": 150, r"engine/checkpoint\.py": 200,
    r"engine/sharded\.py": 50, r"engine/log\.py": 110, r"engine/process\.py": 80,
    r"engine/kernels\.py": 90, r"engine/muon\.py": 65, r"engine/huggingface\.py": 110,
    r"data/(tokens|batches)\.py": 130, r"data/(tokenizer|bpe)\.py": 145, r"data/documents\.py": 120,
    r"tools/(size|plot|evaluate|export)\.py": 400, r"tools/compare\.py": 100,
    r"tools/gpu_check\.py": 100, r"docs/\w+\.py": 250,
    **{rf"data/{path.parent.name}/prepare\.py": 40 for path in ROOT.glob("data/*/prepare.py")},
    r"(engine|data|tools)/.*": 1850, r".*": 2800,
}  # fmt: skip


def statements(tree):
    """Return the number of statements in a syntax tree, docstrings not counted."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    texts = [n for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return len(nodes) - len(texts)


def count(kind, tree):
    return sum(isinstance(node, kind) for node in ast.walk(tree))


@pytest.mark.parametrize("pattern", ROOMS)
def test_a_room_stays_below_its_ceiling(pattern):
    trees = [tree for name, tree in TREES.items() if re.fullmatch(pattern, name)]
    assert 0 < sum(map(statements, trees)) <= ROOMS[pattern]


def test_every_file_has_a_ceiling():
    small = [pattern for pattern in ROOMS if not pattern.endswith(".*")]
    assert [name for name in TREES if not any(re.fullmatch(p, name) for p in small)] == []


def test_no_file_is_squeezed():
    dense = {n: count(ast.expr, t) / statements(t) for n, t in TREES.items()}
    assert {name: ratio for name, ratio in dense.items() if ratio > 5.8} == {}
    assigns = [n for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.Assign)]
    pairs = [n for n in assigns if {type(n.targets[0]), type(n.value)} == {ast.Tuple}]
    assert len(pairs) <= 40
    assert sum(count(ast.IfExp, tree) for tree in TREES.values()) <= 60


def test_the_tests_do_not_outgrow_the_code():
    paths = ROOT.glob("tests/*.py")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    assert sum(map(statements, trees)) <= 2900


# --- what you read is what runs ------------------------------------------------------------------


def test_no_function_is_replaced_from_outside():
    for path in CODE:
        found = re.findall(r"[.]forward = |_compiled_call_[i]mpl", path.read_text(encoding="utf-8"))
        assert found == [], path


EDITS = {
    "nothing": ("", ""),
    "loss": ("return cross_entropy(x.", "return 2 * cross_entropy(x."),
    "MLP.forward": ("x = F.gelu(x", "x = F.gelu(2 * x"),
    "attention": ("y = attention(q, k, v,", "y = attention(q, k, v / 2,"),
    "mask": ("is_causal=T > 1", "is_causal=False"),
}


def test_an_edit_of_the_model_changes_training(tiny):
    """On the CPU, with dropout, so that every kernel is in use."""
    shutil.copytree(ROOT / "engine", tiny / "engine")
    for path in (ROOT / "train.py", ROOT / "configurator.py", *ROOT.glob("data/*.py")):
        shutil.copy(path, tiny / path.relative_to(ROOT))
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    env = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    found = []
    for edit, (before, after) in EDITS.items():
        assert before in source
        (tiny / "model.py").write_text(source.replace(before, after), encoding="utf-8")
        options = "--dropout=0.1", "--max_iters=2", "--eval_iters=1", f"--out_dir={edit}"
        command = [sys.executable, "train.py", *TINY, *options]
        subprocess.run(command, cwd=tiny, env=env, check=True, capture_output=True, timeout=100)
        found.append(losses(edit))
        assert found.count(found[-1]) == 1, edit


# --- who may import whom -------------------------------------------------------------------------

FLOORS = {  # file or folder -> modules of ours that it may import
    "engine/": {"engine"},
    "configurator.py": {"engine.process"},
    "model.py": {"engine"},
    "data/": {"configurator", "data", "engine.process", "engine.checkpoint"},
    "train.py": {"model", "configurator", "data", "engine"},
    "sample.py": {"model", "configurator", "data", "engine"},
    "bench.py": {"train", "model", "configurator", "data", "engine"},
    "tools/compare.py": {"configurator", "engine", "tools.plot"},
    "tools/gpu_check.py": {"configurator", "engine", "tools.plot"},
    "tools/": {"train", "sample", "model", "configurator", "data", "engine"},
    "docs/": {"train", "sample", "model", "configurator", "data", "engine", "tools"},
}


def imports(tree):
    """Return the modules of ours that a file imports, such as engine.log."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    ours = {name.removesuffix("/").removesuffix(".py") for name in FLOORS}
    return {name for name in found if name.split(".")[0] in ours}


@pytest.mark.parametrize("name", TREES)
def test_imports_run_one_way(name):
    floor = next(floor for floor in FLOORS if name.startswith(floor))
    for module in imports(TREES[name]):
        assert {module, module.split(".")[0]} & FLOORS[floor], module


def test_no_modules_import_one_another_in_a_circle():
    above = {name[:-3].replace("/", "."): imports(tree) for name, tree in TREES.items()}
    while above:
        ground = [name for name, below in above.items() if not below & above.keys()]
        assert ground, above
        for name in ground:
            del above[name]


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

PAGES = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}
PAGES[ROOT / "README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")


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
    if name.startswith("docs/"):  # it has no settings, but parts, which its docstring names
        documented = ast.get_docstring(TREES[name])
        assert all(word in documented for word in arguments)
        return
    script = importlib.import_module(name[:-3].replace("/", "."))
    monkeypatch.chdir(ROOT)
    if name == "tools/compare.py":  # the arguments of two training commands come first
        for _ in range(2):
            configure(monkeypatch, train, *shlex.split(arguments.pop(0)))
    configure(monkeypatch, script, *(word for word in arguments if word != "--help"))


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
