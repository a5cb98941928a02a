"""One evaluation from its command line: perplexity, few-shot questions, lm-eval; prints and saves the results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_slm.convert.source import open_model
from megatron_slm.device import local_device
from megatron_slm.errors import ConfigError
from megatron_slm.evaluation.evaluate import evaluate_task, hugging_face_folder, named_sets, perplexity
from megatron_slm.evaluation.generation import load_generator
from megatron_slm.evaluation.prompts import read_prompt
from megatron_slm.evaluation.tasks import read_task
from megatron_slm.files import write_durably
from megatron_slm.progress import show_progress


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Run the requested evaluations, saving after each one, so that a killed evaluation keeps its results.

    Raises:
        SlmError: an input is invalid; raised before the first forward pass if possible.
    """
    tasks = [read_task(text, limit=args.limit) for text in args.task]
    prompt = read_prompt(args.prompt_file) if args.prompt_file else None
    sets = named_sets(args.perplexity)
    results: dict[str, Any] = {"model": args.model, "perplexity": {}, "tasks": {}}
    model = open_model(_inside(args.model), field="--model", checksums=False) if sets else None
    for name, path in sets.items():
        assert model is not None, "opened if there are sets"
        results["perplexity"][name] = perplexity(
            model,
            path,
            tokenizer_model=args.tokenizer_model,
            sequence_length=args.seq_length,
            max_tokens=args.max_tokens,
        )
        _write(args.output, results)
    if not (tasks or args.lm_eval):
        return results
    with hugging_face_folder(args.model) as folder:
        generator = load_generator(folder, dtype=args.dtype) if tasks else None
        for task in tasks:
            assert generator is not None, "loaded if there are tasks"
            with show_progress(task.name, len(task.questions), "questions") as progress:
                results["tasks"][task.name], records = evaluate_task(
                    generator,
                    task,
                    prompt=prompt,
                    num_shots=args.shots,
                    max_new_tokens=args.max_new_tokens,
                    batch_size=args.batch_size,
                    rules=args.rules,
                    progress=progress.update,
                )
            if args.output is not None:
                lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                write_durably(args.output.with_suffix(f".{task.name}.jsonl"), lines.encode())
            _write(args.output, results)
        if args.lm_eval:
            results["lm_eval"] = lm_eval(folder, args)
            _write(args.output, results)
    return results


def _inside(path: str) -> str:
    inside = Path(path) / "checkpoints"
    return str(inside) if inside.is_dir() else path


def lm_eval(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a model with EleutherAI's lm-evaluation-harness.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models import huggingface  # noqa: F401 (lm-eval would import it later)
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError.missing("package lm-eval[hf]", f"--lm-eval ({error})", "pip install -e '.[eval]'") from error
    tasks = TaskManager(include_path=args.lm_eval_include)
    unknown = [name for name in args.lm_eval if not tasks.match_tasks([name])]
    if unknown:
        raise ConfigError(
            "--lm-eval",
            unknown[0],
            "name a task of the harness or of --lm-eval-include",
            "list tasks: lm-eval ls tasks",
        )
    out = simple_evaluate(
        model="hf",
        model_args={"pretrained": folder, "dtype": args.dtype},
        tasks=args.lm_eval,
        num_fewshot=args.lm_eval_shots,
        limit=args.limit,
        batch_size=args.batch_size,
        device=str(local_device()),
        task_manager=tasks,
        log_samples=False,
    )
    results: dict[str, Any] = json.loads(json.dumps(out["results"], default=str))
    return results


def _write(output: Path | None, results: dict[str, Any]) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_durably(output, (json.dumps(results, indent=1) + "\n").encode())


def print_results(results: dict[str, Any]) -> None:
    """Print perplexities and accuracies as tables."""
    console = Console()
    if results["perplexity"]:
        table = Table(title="Perplexity")
        for column in ("set", "loss, nats", "95 % interval", "perplexity", "bits/byte", "tokens"):
            table.add_column(column, justify="left" if column == "set" else "right")
        for name, row in results["perplexity"].items():
            low, high = row["loss_interval"]
            bits = "–" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
            cells = (f"{row['loss']:.4f}", f"{low:.4f} to {high:.4f}", f"{row['perplexity']:,.3f}", bits)
            table.add_row(name, *cells, f"{row['tokens']:,}")
        console.print(table)
    if results["tasks"]:
        table = Table(title="Accuracy")
        for column in ("task", "accuracy", "95 % interval", "questions", "no readable answer", "cut off"):
            table.add_column(column, justify="left" if column == "task" else "right")
        for name, row in results["tasks"].items():
            low, high = row["interval"]
            figures = (
                f"{row['accuracy']:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{row['questions']:,}",
                f"{row['unread']:,}",
                f"{row['cut_off']:,}",
            )
            table.add_row(name, *figures)
        mean = sum(row["accuracy"] for row in results["tasks"].values()) / len(results["tasks"])
        if len(results["tasks"]) > 1:
            table.add_row("mean", f"{mean:.1%}", "", "", "", "")
        console.print(table)
    for name, row in results.get("lm_eval", {}).items():
        console.print(f"lm-eval {name}: {row}", highlight=False)
