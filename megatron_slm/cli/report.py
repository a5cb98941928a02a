"""`slm-report`: compares runs in a page, a picture and a JSON file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megatron_slm.analysis.runs import Axis, held_out_sets, read_runs
from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import run_command
from megatron_slm.errors import AnalysisError
from megatron_slm.files import write_durably


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 after an error the user can fix."""
    return run_command(_run, argv)


def _run(words: Sequence[str]) -> None:
    parser = ToolParser("Compare runs, finished or not, in a page, a picture and a JSON file.")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, or NAME=FOLDER; the first is the baseline"
    )
    parser.add_argument(
        "--output", type=Path, help="the page (default: RUN/report.html of the first); a .png and a .json beside it"
    )
    parser.add_argument("--x-axis", choices=get_args(Axis), default="tokens", help="x axis of the curves")
    parser.add_argument(
        "--target-loss", action="append", default=[], metavar="SET=NATS", help="report the tokens to reach this loss"
    )
    args = parser.parse_args(words)
    from megatron_slm.analysis.run_report import summary, tokens_to_reach, write_report

    runs = read_runs(args.runs)
    targets = _targets(args.target_loss, held_out_sets(runs))
    output = args.output or runs[0].folder / "report.html"
    path = write_report(runs, output, axis=args.x_axis, targets=targets)
    numbers = {"runs": [summary(run) for run in runs], "tokens_to_reach": tokens_to_reach(runs, targets)}
    write_durably(path.with_suffix(".json"), (json.dumps(numbers, indent=1) + "\n").encode())
    print(f"wrote {path}, {path.with_suffix('.png').name} and {path.with_suffix('.json').name}")


def _targets(texts: Sequence[str], sets: Sequence[str]) -> dict[str, list[float]]:
    targets: dict[str, list[float]] = defaultdict(list)
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            loss = float(number)
        except ValueError:
            loss = float("nan")
        if name not in sets or not loss > 0:
            known = ", ".join(sets) or "none"
            raise AnalysisError(
                "--target-loss",
                text,
                f"be SET=NATS with a held-out set ({known}) and a positive loss",
                "name one of the sets",
            )
        targets[name].append(loss)
    return targets
