"""`slm-convert`: converts between checkpoints and Hugging Face folders, and compares them.

Conversions stream: a few tens of MiB of the weights are in memory at a time, on the CPU, in one process.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import run_command
from megatron_slm.convert.defaults import DTYPE_NAMES, NUM_TOKENS, SHARD_BYTES, TOLERANCE_NATS

if TYPE_CHECKING:
    from megatron_slm.convert.verify import Report


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser("Convert between checkpoints and Hugging Face folders, and compare them.")
    commands = parser.add_subparsers(dest="command", required=True)
    imported = commands.add_parser("import", help="write a Hugging Face folder as a checkpoint")
    imported.add_argument("--hf", required=True, help="the Hugging Face folder, or its name on the hub")
    imported.add_argument("--output", required=True, help="the checkpoints folder to write")
    imported.add_argument(
        "--extend-vocabulary",
        metavar="TOKENIZER",
        help="tokenizer folder with added tokens; their embeddings are the mean of the others",
    )
    imported.add_argument(
        "--extend-init",
        choices=["mean", "keep"],
        default="mean",
        help="embeddings of added tokens whose rows exist as padding: the mean of the others, or as stored "
        "(default: %(default)s)",
    )
    imported.add_argument(
        "--allow-bin", action="store_true", help="also read .bin files (pickles, loaded with weights_only)"
    )
    export = commands.add_parser("export", help="write a checkpoint as a folder that transformers loads, and verify it")
    export.add_argument("--load", required=True, help="a run's checkpoints folder (the newest is taken) or one of them")
    export.add_argument("--output", required=True, help="the Hugging Face folder to write")
    export.add_argument("--dtype", choices=DTYPE_NAMES, help="data type of the written weights (default: as stored)")
    export.add_argument(
        "--max-shard-gib",
        type=float,
        default=SHARD_BYTES / 2**30,
        help="largest size of a weights file (default: %(default)s)",
    )
    export.add_argument("--overwrite", action="store_true", help="replace the Hugging Face folder at --output")
    export.add_argument("--no-verify", action="store_true", help="skip the comparison with transformers")
    check = commands.add_parser("verify", help="compare log-probabilities with transformers at every position")
    check.add_argument("--hf", required=True, help="the Hugging Face folder, run by transformers")
    check.add_argument("--load", help="checkpoint to compare with (default: the folder's weights in our model)")
    check.add_argument("--text-file", help="text to compare on (default: random tokens)")
    check.add_argument("--tokens", type=int, default=NUM_TOKENS, help="number of tokens (default: %(default)s)")
    check.add_argument("--json", metavar="FILE", help="write the difference at every position")
    for command in (export, check):
        command.add_argument(
            "--tolerance",
            type=float,
            default=TOLERANCE_NATS,
            help="largest accepted difference in nats (default: %(default)s)",
        )
    inspect = commands.add_parser("inspect", help="print what a folder or checkpoint holds")
    inspect.add_argument("path", help="a Hugging Face folder, or a checkpoint of ours")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(words)


def _export(args: argparse.Namespace) -> int:
    from megatron_slm.convert.export import export_checkpoint

    done = export_checkpoint(
        args.load,
        args.output,
        dtype=args.dtype,
        shard_bytes=round(args.max_shard_gib * 2**30),
        overwrite=args.overwrite,
        verifies=not args.no_verify,
        tolerance_nats=args.tolerance,
    )
    print(f"wrote {done.folder}")
    if done.report is None:
        print(f"not compared with transformers: {done.not_verified}")
    else:
        print(f"max |Δ log-prob| = {done.report.max_nats:.3e} nats over {done.report.delta_bs.numel()} positions")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_slm.convert.verify import verify

    report = verify(args.hf, args.load, args.text_file, num_tokens=args.tokens)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report.as_dict(), file)
    agree = report.max_nats <= args.tolerance
    print_report(report)
    print("they agree" if agree else f"they differ by more than {args.tolerance} nats")
    print(f"max |Δ| = {report.max_nats:.3e}")
    return 0 if agree else 1


def print_report(report: Report) -> None:
    """Print the differences by position."""
    if report.rounded_to:
        print(f"the checkpoint's weights rounded to {report.rounded_to}, as the folder stores them")
    print("position        max |Δ log-prob|, nats")
    for first, last, largest in report.bands():
        print(f"{first:>6}-{last:<6}  {largest:.3e}")
    print(f"largest at position {report.worst[1]} of sample {report.worst[0]}")


def _inspect(args: argparse.Namespace) -> int:
    from megatron_slm.convert.inspect import inspect_model

    found = inspect_model(args.path)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print_values(found, "")
    return 0


def _print_values(values: dict[str, Any], indent: str) -> None:
    width = max(map(len, values), default=0)
    for name, value in values.items():
        if isinstance(value, dict) and value:
            print(f"{indent}{name}")
            _print_values(value, indent + "  ")
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            print(f"{indent}{name:<{width}}  {shown}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 on an error or a difference beyond the tolerance."""
    return run_command(_run, argv)


def _run(words: Sequence[str]) -> int:
    args = _arguments(words)
    commands = {"import": _import, "export": _export, "verify": _verify, "inspect": _inspect}
    return commands[args.command](args)


def _import(args: argparse.Namespace) -> int:
    from megatron_slm.convert.imports import import_folder

    extension = args.extend_vocabulary
    folder = import_folder(
        args.hf,
        args.output,
        extend_vocabulary=extension,
        extend_init=args.extend_init,
        allow_bin=args.allow_bin,
    )
    print(f"wrote {folder}")
    return 0
