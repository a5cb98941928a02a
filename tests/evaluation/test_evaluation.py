"""Tasks, prompts, generation and intervals of the evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_slm.cli.evaluate import main
from megatron_slm.convert.imports import import_folder
from megatron_slm.errors import TaskError, WeightsError
from megatron_slm.evaluation.generation import cut, load_generator
from megatron_slm.evaluation.prompts import STOPS, prompt_named, read_prompt
from megatron_slm.evaluation.statistics import bootstrap, share
from megatron_slm.evaluation.tasks import FORMS, read_task
from tests.analysis.conftest import TEXTS
from tests.support.runs import write_corpus


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- tasks and prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "record", "question", "answer"),
    [
        ("gsm8k", {"question": "Q?", "answer": "2+2=4\n#### 4"}, "Q?", "4"),
        ("svamp", {"Body": "B.", "Question": "Q?", "Answer": 3.0}, "B. Q?", "3.0"),
        ("asdiv", {"body": "B.", "question": "Q?", "answer": "8 (apples)"}, "B. Q?", "8"),
        ("mawps", {"input": "Q?", "target": 145.0}, "Q?", "145.0"),
        ("tabmwp", {"table": "a|b", "question": "Q?", "answer": "yes", "choices": ["yes", "no"]},
         "a|b Q? Please select from the following options: ['yes', 'no']", "yes"),
        ("math", {"problem": "P", "solution": "so $\\boxed{\\frac{1}{2}}$."}, "P", "\\frac{1}{2}"),
        ("mathqa", {"question": "Q", "options": "a ) 1 , b ) 2", "correct": "b"},
         "Q\nWhat of the following is the right choice? Explain your answer.\na ) 1 , b ) 2", "B"),
        ("mmlu_stem", {"question": "Q", "choices": ["x", "y"], "answer": 1},
         "Q\nWhat of the following is the right choice? Explain your answer.\n(A) x, (B) y", "B"),
        ("sat_math", {"question": "Q", "options": {"A": "x", "B": "y"}, "answer": "(A)"},
         "Q\nWhat of the following is the right choice? Explain your answer.\n(A) x, (B) y", "A"),
    ],
)  # fmt: skip
def test_published_forms(form: str, record: dict[str, Any], question: str, answer: str, tmp_path: Path) -> None:
    task = read_task(f"mine:{form}={write_lines(tmp_path / 'a.jsonl', record, record)}", limit=1)
    assert task.name == "mine"
    assert [(one.text, one.answer) for one in task.questions] == [(question, answer)]
    assert task.prompt == FORMS[form].prompt


@pytest.mark.parametrize(
    ("form", "record", "match"),
    [
        ("gsm8k", {"answer": "4"}, r"line 1 is \['answer'\]: must have a question \(question or problem or input\)"),
        ("gsm8k", {"question": "Q"}, r"must have an answer \(answer or target\)"),
        ("gsm8k", {"question": "Q", "answer": "#### "}, "line 1: answer is '#### ': must hold an answer"),
        ("mmlu_stem", {"question": "Q", "answer": "A"}, "must have choices"),
        ("gsm8k", [1], "line 1 is 'list': must be a JSON object"),
    ],
)
def test_lines_without_their_fields(form: str, record: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=match):
        read_task(f"{form}={write_lines(tmp_path / 'a.jsonl', record)}")


def test_files_that_are_no_tasks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(TaskError, match="line 1"):
        read_task(f"gsm8k={tmp_path / 'a.jsonl'}")
    with pytest.raises(TaskError, match="must hold at least one question"):
        read_task(f"gsm8k={write_lines(tmp_path / 'b.jsonl')}")
    for text in ("unknown=x", "gsm8k"):
        with pytest.raises(TaskError, match="--task"):
            read_task(text)


def test_the_papers_prompts() -> None:
    """Eight shots of word problems, four of the others; each shot's own answer is read from it."""
    from megatron_slm.evaluation.answers import extract

    counts = {"gsm8k": 8, "math": 4, "choices": 4}
    for name, count in counts.items():
        prompt = prompt_named(name)  # type: ignore[arg-type]
        assert len(prompt.shots) == count
        text = prompt.ask("What is {this}?")
        assert "What is {this}?" in text
        assert not text.endswith(("\n", " "))
        assert any(stop in text for stop in STOPS), "a model that goes on with a new question is stopped"
    words = [extract(shot, "number") for shot in prompt_named("gsm8k").shots]
    assert [str(word) for word in words] == ["6", "5", "39", "8", "9", "29", "33", "8"]
    assert [extract(shot, "choice") for shot in prompt_named("choices").shots] == ["B", "D", "C", "A"]
    assert [extract(shot, "math") for shot in prompt_named("math").shots] == ["[2,5)", "24", "16", "-\\frac{2}{3}"]
    assert len(prompt_named("gsm8k").with_shots(2).ask("Q").split("Question:")) == 4


def test_own_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Q: 1+1\nA: 2\n\n\nQ: {question}\nA:\n")
    assert read_prompt(str(path)).ask("2+2") == "Q: 1+1\nA: 2\n\n\nQ: 2+2\nA:"
    path.write_text("no place")
    with pytest.raises(TaskError, match=r"\{question\}"):
        read_prompt(str(path))
    with pytest.raises(TaskError, match="readable"):
        read_prompt(str(tmp_path / "none"))


# ---- generation ---------------------------------------------------------------------------------------------


def test_batches_write_what_single_prompts_do(folders: list[Path]) -> None:
    """Prompts of unlike length, together and one by one by plain argmax without a cache."""
    generator = load_generator(str(folders[0]))
    prompts = [TEXTS[0][:20], TEXTS[2][:31], "a", TEXTS[0][:9]]
    together = generator.write(prompts, max_new_tokens=12, stops=STOPS, batch_size=3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders[0]), generator.tokenizer
    for prompt, text in zip(prompts, together, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        plain = tokenizer.decode(ids[start:], skip_special_tokens=True)
        ended = ids[-1] == tokenizer.eos_token_id or cut(plain, STOPS) != plain
        assert text == (cut(plain, STOPS), ended)


def test_a_stop_ends_the_text(folders: list[Path]) -> None:
    generator = load_generator(str(folders[0]))
    (whole,) = generator.write(["Question"], max_new_tokens=12, stops=STOPS, batch_size=1)
    assert not whole.is_complete
    stop = whole.text[4:6]
    (stopped,) = generator.write(["Question"], max_new_tokens=12, stops=[stop], batch_size=1)
    assert stopped == (whole.text[: whole.text.index(stop)], True)
    assert cut("abcabc", ["c", "b"]) == "a"


def test_prompts_that_do_not_fit_and_models_that_do_not_load(folders: list[Path], tmp_path: Path) -> None:
    generator = load_generator(str(folders[0]))
    with pytest.raises(TaskError, match=r"prompt of question 2 is \d+: must be less than 64 tokens.*fewer --shots"):
        generator.write(["a", "word " * 70], max_new_tokens=4, stops=STOPS, batch_size=2)
    with pytest.raises(WeightsError, match=r"--model is .*: must load in transformers"):
        load_generator(str(tmp_path))


# ---- intervals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_of_shares(successes: int, total: int, low: float, high: float) -> None:
    """Against Newcombe (Statistics in Medicine 17, 1998), table I, method 3."""
    interval = share(successes, total)
    assert interval.mean == successes / total
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    other = share(total - successes, total)
    assert (other.low, other.high) == pytest.approx((1 - interval.high, 1 - interval.low))


def test_intervals_are_the_normal_ones() -> None:
    """For many independent values the percentile interval is mean +- 1.96 standard errors."""
    values = np.random.default_rng(0).random(400) < 0.3
    interval = bootstrap(values.astype(float))
    error = 1.96 * math.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert interval.mean == values.mean()
    assert interval.low == pytest.approx(values.mean() - error, abs=0.006)
    assert interval.high == pytest.approx(values.mean() + error, abs=0.006)
    assert bootstrap([1.0, 1.0]) == (1.0, 1.0, 1.0)
    assert bootstrap([2.0, 30.0], [1.0, 10.0]).mean == pytest.approx(32 / 11)


# ---- the command --------------------------------------------------------------------------------------------


def test_the_command(folders: list[Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of ours and the folder that it came from give the same results, to the last digit."""
    import_folder(str(folders[0]), str(tmp_path / "run" / "checkpoints"))
    task = write_lines(tmp_path / "t.jsonl", *({"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(5)))
    (tmp_path / "prompt.txt").write_text("{question}")
    results = []
    for number, model in enumerate((folders[0], tmp_path / "run")):
        output = tmp_path / f"out{number}.json"
        argv = ["--model", str(model), "--perplexity", f"held={text_file}", "--task", f"sums:gsm8k={task}"]
        argv += ["--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "8", "--output", str(output)]
        if number:
            argv += ["--tokenizer-model", str(folders[0])]
            _add_tokenizer(tmp_path / "run" / "checkpoints", folders[0])
        assert main(argv) == 0, capsys.readouterr().err
        results.append(json.loads(output.read_text()))
        records = [json.loads(line) for line in output.with_suffix(".sums.jsonl").read_text().splitlines()]
        assert [record["truth"] for record in records] == ["1", "2", "3", "4", "5"]
    assert results[0]["perplexity"] == results[1]["perplexity"]
    assert results[0]["tasks"] == results[1]["tasks"]
    held = results[0]["perplexity"]["held"]
    assert held["perplexity"] == pytest.approx(math.exp(held["loss"]))
    assert held["loss_interval"][0] < held["loss"] < held["loss_interval"][1]
    assert held["bits_per_byte"] > 0
    row = results[0]["tasks"]["sums"]
    assert row["cut_off"] == sum(record["cut_off"] for record in records)
    assert 0 <= row["interval"][0] <= row["accuracy"] <= row["interval"][1] <= 1
    assert row["interval"][1] > row["interval"][0]
    assert row["unread"] == len(row["unread_questions"]) == sum(record["answer"] is None for record in records)


def _add_tokenizer(checkpoints: Path, folder: Path) -> None:
    """Imported checkpoints bring the folder's tokenizer; nothing to do where it is there."""
    (checkpoint,) = checkpoints.glob("step_*")
    assert (checkpoint / "tokenizer" / "tokenizer.json").exists() or (folder / "tokenizer.json").exists()


@pytest.mark.slow
def test_lm_eval_on_a_task_of_ones_own(folders: list[Path], tmp_path: Path) -> None:
    """EleutherAI's harness, its hf model, and a task file beside local questions: no network."""
    pytest.importorskip("lm_eval")
    questions = write_lines(tmp_path / "q.jsonl", *({"question": f"{i}+1=", "answer": str(i + 1)} for i in range(4)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {questions}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: ['1', '2', '3', '4']\ndoc_to_target: '{{answer|int - 1}}'\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    output = tmp_path / "out.json"
    argv = ["--model", str(folders[0]), "--lm-eval", "sums", "--lm-eval-include", str(tmp_path / "tasks")]
    assert main([*argv, "--output", str(output)]) == 0
    assert main([*argv[:2], "--lm-eval", "no_such_task"]) == 1
    assert 0 <= json.loads(output.read_text())["lm_eval"]["sums"]["acc,none"] <= 1


def test_bad_input(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = str(folders[0])
    cases = {
        ("--model", one): "--perplexity, --task or --lm-eval is missing",
        ("--model", one, "--perplexity", "x"): "NAME=FILE",
        ("--model", one, "--perplexity", "x=/none.jsonl"): "must be a file",
        ("--model", str(tmp_path), "--task", "gsm8k=/none"): "must be a file",
        ("--model", one, "--task", "gsm8k=/none", "--shots", "-1"): "--shots",
        ("--model", one, "--task", "gsm8k=/none", "--batch-size", "0"): "--batch-size",
        ("--model", one, "--task", "gsm8k=/none", "--output", "x.txt"): "must end in .json",
    }
    for argv, message in cases.items():
        assert main(list(argv)) == 1
        assert message in capsys.readouterr().err
    corpus = write_corpus(tmp_path / "corpus", vocab_size=400, num_documents=200)
    assert main(["--model", one, "--perplexity", f"x={corpus}"]) == 1
    assert "largest token id is 399: must be less than 300, the model's vocabulary size" in capsys.readouterr().err
    task = write_lines(tmp_path / "t.jsonl", {"question": "Q", "answer": "1"})
    assert main(["--model", str(tmp_path), "--task", f"gsm8k={task}"]) == 1
    assert "error: " in capsys.readouterr().err
