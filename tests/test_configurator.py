"""Settings: what each argument means, and the line that each mistake gets."""

import subprocess
import sys

import pytest
from conftest import ROOT

import configurator

SCRIPT = '''"""A script.

    python script.py
"""
from pathlib import Path

# First
name = "x"                      # a word
rate = 0.5                      # per second
count = 2 * 3                   # of things
# Second
flag = False                    # whether
most: int | None = None         # at most
mode: bool | str = "auto"       # auto, True, False
HIDDEN = Path(".")

def main():
    local = 1
'''


@pytest.fixture
def configure(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    namespace = {"__file__": str(tmp_path / "script.py")}
    exec(SCRIPT, namespace)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        config = configurator.configure(namespace)
        assert {key: namespace[key] for key in config} == config
        return config

    run.namespace = namespace
    return run


@pytest.mark.parametrize(
    "arguments, name, value",
    [
        (["--rate=1"], "rate", 1.0),
        (["--rate=6e-4"], "rate", 6e-4),
        (["--count=1e3"], "count", 1000),
        (["--count", "32"], "count", 32),
        (["--count=123456789012345678901"], "count", 123456789012345678901),
        (["--flag=true"], "flag", True),
        (["--flag=False"], "flag", False),
        (["--flag"], "flag", True),
        (["--flag", "--count=1"], "flag", True),
        (["--name=1+1=2"], "name", "1+1=2"),
        (["--name=123"], "name", "123"),
        (["--name=None"], "name", "None"),
        (["--name='quoted'"], "name", "'quoted'"),
        (["--name="], "name", ""),
        (["--name", ""], "name", ""),
        (["--most=None"], "most", None),
        (["--most=5"], "most", 5),
        (["--mode=True"], "mode", True),
        (["--mode=false"], "mode", False),
        (["--mode=other"], "mode", "other"),
        (["--count=1", "--count=2"], "count", 2),
    ],
)
def test_an_argument_becomes_a_value_of_the_type_of_its_setting(configure, arguments, name, value):
    config = configure(*arguments)
    assert (config[name], type(config[name])) == (value, type(value))


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--cuont=1"], "error: unknown setting 'cuont', the closest is count; --help lists all"),
        (["--zzz=1"], "error: unknown setting 'zzz', the closest is rate; --help lists all"),
        (
            ["--__name__=x"],
            "error: unknown setting '__name__', the closest is name; --help lists all",
        ),
        (["--HIDDEN=x"], "error: unknown setting 'HIDDEN', the closest is rate; --help lists all"),
        (["--count=1.5"], "error: count must be int, got 1.5"),
        (["--count=many"], "error: count must be int, got 'many'"),
        (["--count"], "error: count must be int, got ''"),
        (["--count=None"], "error: count must be int, got None"),
        (["--rate=fast"], "error: rate must be float, got 'fast'"),
        (["--rate=nan"], "error: rate must be float, got 'nan'"),
        (["--flag=1"], "error: flag must be bool, got 1"),
        (["--most=x"], "error: most must be int or None, got 'x'"),
        (
            ["count=1"],
            "error: no config file 'count=1' (ends with .py?); a setting is given as --key=value",
        ),
        (
            ["no.py"],
            "error: no config file 'no.py' (ends with .py?); a setting is given as --key=value",
        ),
        (
            ["--count=x", "--flag=x"],
            "error: count must be int, got 'x'\nerror: flag must be bool, got 'x'",
        ),
    ],
)
def test_a_mistake_gets_its_line(configure, arguments, line):
    with pytest.raises(SystemExit) as stop:
        configure(*arguments)
    assert stop.value.code == line


@pytest.mark.parametrize(
    "content, line",
    [
        (
            "cuont = 1",
            "error: c.py: unknown setting 'cuont', the closest is count; --help lists all",
        ),
        ("count = 'a'", "error: c.py: count must be int, got 'a'"),
        ("name = 1", "error: c.py: name must be str, got 1"),
        ("flag = 1", "error: c.py: flag must be bool, got 1"),
        (
            "count = 1.5\nrate = 'x'",
            "error: c.py: rate must be float, got 'x'\nerror: c.py: count must be int, got 1.5",
        ),
        ("count = 1 +", "error: c.py: invalid syntax (c.py, line 1)"),
        ("count = 1 / 0", "error: c.py: division by zero"),
    ],
)
def test_a_mistake_in_a_config_file_gets_its_line(configure, tmp_path, content, line):
    (tmp_path / "c.py").write_text(content)
    with pytest.raises(SystemExit) as stop:
        configure("c.py")
    assert stop.value.code == line


def test_a_config_file_may_compute_and_keep_helpers(configure, tmp_path):
    lines = "import time", "from math import sqrt", "_half = 3", "def double(x): return 2 * x"
    settings = "count = double(_half)", "rate = 1", "most = 1e3", "name = 'run-' + str(time.time())"
    (tmp_path / "c.py").write_text("\n".join((*lines, *settings)))
    config = configure("c.py")
    assert (config["count"], config["rate"], config["most"]) == (6, 1.0, 1000)
    assert config["name"].startswith("run-1")


def test_the_last_word_wins_between_files_and_flags(configure, tmp_path):
    (tmp_path / "c.py").write_text("count = 10\nrate = count / 4")
    assert configure("--count=1", "c.py")["count"] == 10
    assert configure("c.py", "--count=1")["count"] == 1
    assert configure("c.py", "--count=1")["rate"] == 2.5


def test_a_config_file_of_the_project_is_found_from_any_folder(configure, tmp_path, monkeypatch):
    (tmp_path / "c.py").write_text("count = 10")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(configurator, "PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert configure("c.py")["count"] == 10


def test_help_lists_each_setting_under_its_heading(configure, capsys):
    with pytest.raises(SystemExit) as stop:
        configure("--help")
    shown = capsys.readouterr().out
    assert not stop.value.code
    assert shown.startswith("A script.")
    first, second = shown.index("\n# First\n"), shown.index("\n# Second\n")
    assert first < shown.index("rate = 0.5 ") < second < shown.index("most: int | None = None ")
    assert shown.count("per second") == 1 and "HIDDEN" not in shown


def test_a_value_that_is_not_allowed_gets_its_line(configure):
    configure.namespace["ALLOWED"] = {"rate": (0, 1), "count": (1, 100), "most": (0, 10)}
    configure.namespace["ALLOWED"]["mode"] = ["auto", True, False]
    assert configure("--rate=0", "--count=99", "--most=None")["count"] == 99
    with pytest.raises(SystemExit) as stop:
        configure("--rate=1.5", "--count=0", "--most=-1", "--mode=other")
    assert stop.value.code == (
        "error: rate=1.5 must be from 0 to 1\n"
        "error: count=0 must be from 1 to 100\n"
        "error: most=-1 must be from 0 to 10\n"
        "error: mode='other': choose one of ['auto', True, False]"
    )


def test_a_script_of_nanogpt_reads_it_with_exec(tmp_path):
    source = "rate = 0.1\nname = 'x' if rate else ''\nexec(open('configurator.py').read())\n"
    (tmp_path / "old.py").write_text(source + "more = [rate, name]\nprint(*more)\n")
    command = [sys.executable, tmp_path / "old.py", "--rate=1", "--name=y"]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "1.0 y\n"
