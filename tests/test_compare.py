"""tools/compare.py judges differences as statistics does, and continues after an interruption."""

import re
import statistics

import pytest
from conftest import TINY

from tools import compare, gpu_check


def test_the_interval_is_students():
    mean, half = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(1.9632, abs=1e-3)
    _, half = compare.interval([(-1.0) ** n for n in range(30)])
    assert half == pytest.approx(2.0452 * statistics.stdev([1, -1] * 15) / 30**0.5, abs=1e-3)


@pytest.mark.parametrize(
    "differences, sentence",
    [
        ([-0.012, -0.010, -0.014], "B is better by 0.0120 +- 0.0050 with 3 seeds"),
        ([0.012, 0.010, 0.014], "A is better by 0.0120 +- 0.0050 with 3 seeds"),
        ([0.0, 0.0], "no difference can be seen with 2 seeds (B - A = +0.0000 +- 0.0000 nats)"),
        (
            [0.01, -0.01, 0.0],
            "no difference can be seen with 3 seeds (B - A = +0.0000 +- 0.0248 nats); "
            "29 more seeds would be needed to see a difference of 0.005",
        ),
    ],
)
def test_the_verdict_is_a_sentence(differences, sentence):
    assert compare.verdict(differences) == sentence


@pytest.mark.slow
def test_equal_commands_do_not_differ_and_finished_runs_are_kept(tiny, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    ran = []

    def run(script, *arguments):
        ran.append(script.name)
        return run_script(script, *arguments)

    run_script = compare.run
    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(compare, "seeds", 2)
    monkeypatch.setattr(compare, "ROOT", compare.ROOT)
    command = " ".join([*TINY, "--max_iters=2", "--dataset=shakespeare_char"])
    if not (compare.ROOT / "data/shakespeare_char/val.bin").exists():
        pytest.skip("shakespeare_char is not prepared")
    compare.main({}, command, f"{command} --learning_rate=0.0006")
    assert ran == ["train.py", "evaluate.py"] * 4
    compare.main({}, command, f"{command} --learning_rate=0.0006")
    assert len(ran) == 8 and (tiny / "compare.png").stat().st_size > 0
    assert (
        "no difference can be seen with 2 seeds (B - A = +0.0000 +- 0.0000 nats)"
        in capsys.readouterr().out
    )
    assert len((tiny / "results.tsv").read_text().splitlines()) == 2


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_on_a_cpu(monkeypatch, tmp_path, capsys):
    if not (compare.ROOT / "data/shakespeare_char/val.bin").exists():
        pytest.skip("shakespeare_char is not prepared")
    monkeypatch.setattr(gpu_check, "dry", True)
    monkeypatch.setattr(gpu_check, "out_dir", str(tmp_path / "runs"))
    gpu_check.main({})
    shown = capsys.readouterr().out
    assert shown.count("exact resume with --deterministic=") == shown.count(": True\n") == 2
    assert "failed" not in shown and len(re.findall(r"(?m)^\| s.* \| [\d,]+ \|", shown)) == 5
