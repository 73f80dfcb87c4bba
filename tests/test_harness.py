"""tools/harness.py: the figures of lm-evaluation-harness equal those of its own model class."""

import json

import pytest
import torch
from conftest import TINY

import sample
import train
from data.tokenizer import GPT2, BPETokenizer
from engine.huggingface import save_model
from engine.runtime import start_runtime
from model import GPT, GPTConfig
from tools import evaluate, export

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and what it imports have many

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
output_type: {kind}
"""
CHOICE = """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
WRITTEN = """
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["q"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def make_task(folder, name, kind, rest, lines):
    """Write a task and its data; return the path of its YAML file."""
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, folder=folder, kind=kind) + rest, encoding="utf-8")
    return str(path)


@pytest.mark.slow
def test_figures_are_those_of_the_exported_folder(tmp_path, gpt2_files):
    """Choices, whole texts and answers written, longer than the context too, by a random model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tools.harness import HarnessModel, run_tasks

    tokenizer = BPETokenizer(GPT2)
    torch.manual_seed(0)
    shape = {"block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 32, "bias": False}
    model = GPT(GPTConfig(**shape)).eval()  # 50,304 ids, of which 47 are padding
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / "hf"
    folder.mkdir()
    save_model(folder, vars(model.config), model.state_dict(), 50257, tokenizer.eot, torch.float32)
    export.save_tokenizer(folder, tokenizer, 48)

    questions = [f"What is {n} plus {n + 1}? " * (1 + 4 * (n % 3)) for n in range(20)]
    choices = [[f"{2 * n + 1}", "a lot more than that", "é", "none"] for n in range(20)]
    kinds = zip(questions, choices, strict=True)
    lines = [{"question": q, "choices": c, "label": 1} for q, c in kinds]
    answers = [{"question": q, "answer": "3"} for q in questions]
    pages = [{"page": " ".join(questions[: n + 1])} for n in range(6)]
    tasks = [
        make_task(tmp_path, "made_choice", "multiple_choice", CHOICE, lines),
        make_task(tmp_path, "made_pages", "loglikelihood_rolling", ROLLING, pages),
        make_task(tmp_path, "made_answers", "generate_until", WRITTEN, answers),
    ]
    runtime = start_runtime("cpu", "float32", False)
    ours = run_tasks(model, tokenizer, runtime, tasks, batch_size=3, examples=0)
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=3)
    found = lm_eval.simple_evaluate(theirs, tasks=tasks, log_samples=False)
    assert {name for name in ours if "stderr" not in name} >= {
        "made_choice acc", "made_choice acc_norm",
        "made_pages word_perplexity", "made_pages bits_per_byte",
    }  # fmt: skip
    for name, value in ours.items():
        task, figure = name.split(" ")
        key = figure if figure == "sample_len" else f"{figure},none"
        assert value == pytest.approx(found["results"][task][key], rel=1e-4), name

    mine = HarnessModel(model, tokenizer, runtime, batch_size=3)
    pairs = [(line["question"], f" {choice}") for line in lines for choice in line["choices"]]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for (one, greedy), (other, theirs_greedy) in zip(
        mine.loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert one == pytest.approx(other, rel=1e-4) and greedy == theirs_greedy
    for options in ({"until": ["e", " the"], "max_gen_toks": 12, "do_sample": False}, {}):
        options = {"max_gen_toks": 30, **options}
        requests = [
            Instance("generate_until", {}, (question, options), 0) for question in questions
        ]
        assert mine.generate_until(requests) == theirs.generate_until(requests)


@pytest.fixture
def trained(launch, tiny, monkeypatch):
    monkeypatch.setattr(sample, "ROOT", tiny)
    launch(train, *TINY, "--max_iters=5")


def test_an_empty_context_or_answer_is_judged(trained):
    from tools.harness import HarnessModel

    model, tokenizer, _ = sample.load("resume", "out", None, torch.device("cpu"))
    judge = HarnessModel(model, tokenizer, start_runtime("cpu", "float32", False), 2)
    ids = tokenizer.encode("3 plus")
    found = judge._loglikelihood_tokens([(None, [], ids), (None, ids, []), (None, ids, ids)])
    assert found[1] == (0.0, True) and found[0][0] < 0 and found[2][0] < 0
    assert found[0] == judge._loglikelihood_tokens([(None, [tokenizer.opening], ids)])[0]


def test_long_questions_are_said_to_be_cut(launch, trained, tiny):
    lines = [{"question": "3 plus " * n, "choices": ["makes", "plus"], "label": 0} for n in (1, 9)]
    path = make_task(tiny, "made", "multiple_choice", CHOICE, lines)
    text = launch(evaluate, "--device=cpu", f"--tasks={path}")
    assert "2 questions were longer than block_size, and lost their beginning" in text


def test_tasks_of_ones_own_are_judged(launch, trained, tiny):
    lines = [{"question": f"{n} plus 1", "choices": [" makes", " plus"], "label": 0} for n in "123"]
    path = make_task(tiny, "made", "multiple_choice", CHOICE, lines)
    text = launch(evaluate, "--device=cpu", f"--tasks={path}", "--figures_file=made.json")
    figures = json.loads((tiny / "made.json").read_text(encoding="utf-8"))
    assert figures["made sample_len"] == 3 and 0 <= figures["made acc"] <= 1
    assert f"made acc  {round(figures['made acc'], 4)}" in text
    launch(evaluate, "--device=cpu", f"--tasks={path}", "--examples=2", "--figures_file=made.json")
    assert json.loads((tiny / "made.json").read_text(encoding="utf-8"))["made sample_len"] == 2


@pytest.mark.parametrize(
    "tasks, line",
    [
        ("nonesuch.yaml", "tasks=nonesuch.yaml: KeyError"),
        ("{}/broken.yaml", "tasks={}/broken.yaml: "),
        ("{}/gone.yaml", "tasks={}/gone.yaml: "),
        ("{}/strange.yaml", "1 unknown characters: 'é'"),
        ("{}/long.yaml", "a task has an answer of 31 tokens, the model takes 16"),
    ],
)
def test_a_task_that_cannot_be_judged_gets_its_line(launch, trained, tiny, tasks, line):
    strange = [{"question": "é", "choices": [" a", " b"], "label": 0}]
    long = [{"question": "3 plus", "choices": [" plus" * 6, " plus"], "label": 0}]
    make_task(tiny, "strange", "multiple_choice", CHOICE, strange)
    make_task(tiny, "long", "multiple_choice", CHOICE, long)
    make_task(tiny, "gone", "multiple_choice", CHOICE, strange)
    (tiny / "gone.jsonl").unlink()
    (tiny / "broken.yaml").write_text("task: [", encoding="utf-8")
    with pytest.raises(SystemExit) as fault:
        launch(evaluate, "--device=cpu", f"--tasks={tasks.replace('{}', str(tiny))}")
    assert str(fault.value).startswith(f"error: {line.replace('{}', str(tiny))}")
    assert "\n" not in str(fault.value)
