"""`slm-replay`: runs the bad batches of a run through a checkpoint again, without training."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import choose_accelerator, run_command
from megatron_slm.flags.load import parse

_DESCRIPTION = """Run the bad batches of a run through a checkpoint again, micro-batch by micro-batch, without training.

Takes the flags of pretrain_slm.py (see its --help) as well, best as --config RUN_DIR/config.yaml; --load names the
checkpoint. Layout and --micro-batch-size may differ from the run's."""


def _parser() -> ToolParser:
    parser = ToolParser(
        _DESCRIPTION,
        prog="replay.py",
        usage="%(prog)s RUN_DIR/bad_batches.jsonl[:STEPS] --config RUN_DIR/config.yaml --load CHECKPOINT [flags]",
    )
    parser.add_argument("records", help="a run's record of bad batches, and which steps of it, such as :17,20-22")
    parser.add_argument("--worst", type=int, default=3, help="print the text of this many samples of a step (3)")
    parser.add_argument("--context", type=int, default=48, help="tokens shown on either side of the worst one (48)")
    parser.add_argument("--output", help="write everything to this JSON file too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 after an error the user can fix."""
    return run_command(_run, argv)


def _run(words: Sequence[str]) -> None:
    own, rest = _parser().parse_known_args(words)
    choose_accelerator()
    from megatron_slm.training.replay import read_records
    from megatron_slm.training.replay_report import replay

    records = read_records(own.records)
    config, _ = parse(rest)
    replay(config, records, worst=own.worst, context=own.context, output=own.output)
