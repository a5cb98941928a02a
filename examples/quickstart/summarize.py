"""The quickstart's numbers: `summary.json`, a short table, and a few lines that the trained model writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

RUNS = ("reference", "clm", "slm")


def read_run(folder: Path) -> dict[str, Any]:
    """Last held-out losses (nats) and the training tokens of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["set"]: line["loss"] for line in lines if line.get("event") == "eval"}
    steps = [line for line in lines if "event" not in line]
    return {
        "target_loss": losses["target"],
        "noisy_loss": losses["noisy"],
        "tokens": steps[-1]["tokens"],
        "kept_tokens": int(sum(line["kept_tokens"] for line in steps)),
        "training_seconds": sum(line["step_time_seconds"] for line in steps),
    }


def generate(hf_dir: Path, prompt: str, max_new_tokens: int = 80) -> str:
    """What the exported model writes after a prompt, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    model = AutoModelForCausalLM.from_pretrained(hf_dir).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def main() -> None:
    """Write the summary, print the table, and let the model write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--keep-ratio", type=float, default=0.6)
    parser.add_argument("--seconds", type=float, required=True, help="what the runs before this took")
    args = parser.parse_args()
    runs = {name: read_run(args.run_dir / name) for name in RUNS}
    summary = {
        **runs,
        "keep_ratio": args.keep_ratio,
        "tokens": runs["slm"]["tokens"],
        "seconds": args.seconds,
        "hf_dir": str(args.run_dir / "hf_slm"),
    }
    (args.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    table = Table(title="Held-out loss (nats per token), lower is better")
    for column in ("run", "clean arithmetic", "noisy pages", "tokens read", "tokens trained on"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, run in runs.items():
        losses = (f"{run['target_loss']:.4f}", f"{run['noisy_loss']:.4f}")
        table.add_row(name, *losses, f"{run['tokens']:,}", f"{run['kept_tokens']:,}")
    console = Console()
    console.print(table)
    heldout = args.run_dir / "text" / "curated_heldout.jsonl"
    with heldout.open() as lines:
        prompt = json.loads(next(lines))["text"].split("\n")[0] + "\n"
    console.print("[bold]The SLM model, given the first line of a held-out problem:[/bold]")
    console.print(generate(args.run_dir / "hf_slm", prompt), markup=False, highlight=False)


if __name__ == "__main__":
    main()
