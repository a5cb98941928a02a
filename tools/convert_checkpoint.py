#!/usr/bin/env python3
"""Between our checkpoints and Hugging Face folders: export, import, verify."""

import argparse
import sys

from megatron_slm.convert.export import DTYPES, export_checkpoint
from megatron_slm.convert.imports import import_folder
from megatron_slm.convert.verify import TOLERANCE_NATS, verify
from megatron_slm.errors import SlmError


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="a checkpoint to a folder that transformers loads")
    export.add_argument("--load", required=True, help="a run's checkpoints folder (the newest is taken) or one of them")
    export.add_argument("--output", required=True, help="the Hugging Face folder to write")
    export.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the weights written")
    imported = commands.add_parser("import", help="a Hugging Face Llama to a checkpoint")
    imported.add_argument("--hf", required=True, help="the Hugging Face folder")
    imported.add_argument("--output", required=True, help="the checkpoints folder to write")
    check = commands.add_parser("verify", help="compare token log-probabilities with transformers'")
    check.add_argument("--hf", required=True, help="the Hugging Face folder, run by transformers")
    check.add_argument("--load", help="a checkpoint to compare with; without it the folder's weights in our model")
    check.add_argument("--text-file", help="text to compare on; without it random tokens")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 on success, 1 on an error or a difference beyond the tolerance."""
    args = _arguments(argv)
    try:
        if args.command == "export":
            print(f"wrote {export_checkpoint(args.load, args.output, dtype=args.dtype)}")
        elif args.command == "import":
            print(f"wrote {import_folder(args.hf, args.output)}")
        else:
            difference = verify(args.hf, args.load, args.text_file)
            agree = difference <= TOLERANCE_NATS
            print("the two agree" if agree else f"the two differ by more than {TOLERANCE_NATS} nats")
            print(f"max |Δ| = {difference:.3e}")
            return 0 if agree else 1
    except SlmError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
