"""`slm-checkpoint`: lists checkpoints and verifies that they are complete."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_slm.checkpoint.format import MANIFEST, Manifest, checkpoint_folders, step_of, verify_files
from megatron_slm.checkpoint.retention import read_evaluations
from megatron_slm.cli.arguments import ToolParser
from megatron_slm.cli.command import run_command
from megatron_slm.errors import CheckpointError
from megatron_slm.progress import show_progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 on success, 1 on damage or an error the user can fix."""
    return run_command(_run, argv)


def _run(words: Sequence[str]) -> int:
    parser = ToolParser("List checkpoints, and verify that they are complete.")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("list", help="list the checkpoints in a folder")
    shown.add_argument("folder", type=Path, help="a run's checkpoints folder")
    checked = commands.add_parser("verify", help="compare every byte with the manifests")
    checked.add_argument("folder", type=Path, help="a run's checkpoints folder, or one checkpoint in it")
    args = parser.parse_args(words)
    folders = _folders(args.folder)
    return _list(args.folder, folders) if args.command == "list" else _verify(folders)


def _folders(folder: Path) -> list[Path]:
    if (folder / MANIFEST).exists() or (step_of(folder) is not None and folder.is_dir()):
        return [folder]
    found = checkpoint_folders(folder)
    if not found:
        raise CheckpointError("FOLDER", str(folder), "hold checkpoints (step_... folders)", "check the path")
    return found


def _list(folder: Path, checkpoints: list[Path]) -> int:
    """One line a checkpoint; sizes and names of files are compared, contents are not."""
    losses = read_evaluations(folder)
    table = Table(title=str(folder))
    for name in ("checkpoint", "samples", "MiB", "saved at", *(f"loss {name}" for name in losses), "state"):
        table.add_column(name, justify="left" if name in ("checkpoint", "saved at", "state") else "right")
    damaged = False
    for path in checkpoints:
        of_step = [of_set.get(step_of(path) or 0) for of_set in losses.values()]
        shown = ["-" if loss is None else f"{loss:.4f}" for loss in of_step]
        try:
            manifest = Manifest.read(path)
            verify_files(path, manifest, checksums=False)
        except CheckpointError as error:
            damaged = True
            table.add_row(path.name, "", "", "", *shown, f"{error.field} is {error.value!r}: must {error.rule}")
            continue
        samples, size = f"{manifest.state.consumed_samples:,}", f"{manifest.num_bytes / 2**20:,.1f}"
        table.add_row(path.name, samples, size, manifest.describe_layout(), *shown, "complete")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return int(damaged)


def _verify(checkpoints: list[Path]) -> int:
    damaged = 0
    for path in checkpoints:
        try:
            manifest = Manifest.read(path)
            with show_progress(path.name, manifest.num_bytes, "B") as progress:
                verify_files(path, manifest, limit_bytes=float("inf"), on_bytes=progress.advance)
        except CheckpointError as error:
            damaged += 1
            print(f"{path.name}: DAMAGED: {error}")
        else:
            print(f"{path.name}: whole ({len(manifest.files)} files, {manifest.num_bytes:,} bytes)")
    return int(damaged > 0)
