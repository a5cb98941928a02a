"""Export of a checkpoint as a Hugging Face folder, a few tens of MiB at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_slm.checkpoint.format import Manifest
from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.checkpoint.tensor_file import Entry
from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.card import model_card
from megatron_slm.convert.companion_files import ORIGIN_FILES, copy_files
from megatron_slm.convert.defaults import SHARD_BYTES, TOLERANCE_NATS
from megatron_slm.convert.families import family_named
from megatron_slm.convert.hf_config import CONFIG, exported_config, is_hf_folder, read_config
from megatron_slm.convert.source import Model, open_model
from megatron_slm.convert.stored_names import stored_tensors
from megatron_slm.convert.tensors import DTYPES, check_tensors, counted, expected_tensors, row_blocks
from megatron_slm.convert.verify import Report, memory_shortage, verify
from megatron_slm.convert.writer import write_shards
from megatron_slm.errors import CheckpointError, WeightsError
from megatron_slm.files import sync_folder
from megatron_slm.hub import TOKENIZER_FILES
from megatron_slm.progress import show_progress

VERIFIED_TOKENS = 256
"""Random tokens on which the export is compared with the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of an export."""

    folder: Path
    report: Report | None
    """Comparison with transformers; None if skipped."""
    not_verified: str | None
    """Reason for skipping the comparison."""


def export_checkpoint(
    load: str,
    output: str,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    verifies: bool = True,
    tolerance_nats: float = TOLERANCE_NATS,
) -> Exported:
    """Write the newest complete checkpoint in `load` as a folder that `from_pretrained` loads.

    The folder appears under its name only once it is complete and, if the model fits in memory, transformers has
    computed the same probabilities from it as this package from the checkpoint.

    Args:
        dtype: dtype of the exported weights; None keeps the stored one: fp32 for a trained model, the original dtype
            for an imported one.
        overwrite: replace an existing Hugging Face folder.
        verifies: compare with transformers on a few tokens.
        tolerance_nats: largest accepted difference between log-probabilities.

    Raises:
        CheckpointError, WeightsError: there is no complete checkpoint, `output` exists, no transformers family can
            express the model, or the probabilities differ by more than the tolerance.
    """
    model = open_model(load, field="--load")
    source = model.source
    if not isinstance(source, CheckpointSource):
        raise CheckpointError("--load", load, "be a checkpoint", "use the folder as it is: it is a Hugging Face folder")
    check_tensors(model.architecture, source, field="--load")
    final = Path(os.path.abspath(output))  # has a name even for "."
    _check_output(final, source.folder, overwrite=overwrite)
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write_folder(model, source, temporary, dtype, shard_bytes)
        if verifies:
            report, not_verified = _compare(model.architecture, temporary, source.folder, tolerance_nats)
        else:
            report, not_verified = None, "--no-verify"
        _publish(temporary, final)
    except OSError as error:
        if error.errno is None:  # raised by transformers, about the model or the tokenizer
            raise WeightsError(
                "--load", load, f"be a model that transformers loads ({error})", "repair the files named"
            ) from error
        raise WeightsError(
            "--output",
            error.filename or output,
            f"be writable ({error.strerror})",
            "free disk space or choose another folder",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(folder=final, report=report, not_verified=not_verified)


def _compare(
    arch: Architecture, exported: Path, checkpoint: Path, tolerance_nats: float
) -> tuple[Report | None, str | None]:
    """Compare an export with its checkpoint; return the report, or None and the reason for skipping it."""
    shortage = memory_shortage(arch, VERIFIED_TOKENS)
    if shortage is not None:
        return None, shortage
    report = verify(str(exported), str(checkpoint), num_tokens=VERIFIED_TOKENS)
    if not report.max_nats <= tolerance_nats:  # not `>`: it may be NaN
        raise WeightsError(
            "--output: max |Δ log-prob| between transformers and the checkpoint",
            float(f"{report.max_nats:.3e}"),
            f"be at most {tolerance_nats} nats; nothing was written",
            "report a bug; --no-verify exports without this check",
        )
    return report, None


def _check_output(final: Path, checkpoint: Path, *, overwrite: bool) -> None:
    if final.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise WeightsError("--output", str(final), "not contain the checkpoint", "choose another folder")
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not overwrite:
        raise WeightsError(
            "--output", str(final), "be a new or empty folder", "choose another, or replace it with --overwrite"
        )
    if not is_hf_folder(final):  # a typo must not delete a home folder
        raise WeightsError(
            "--output",
            str(final),
            "be a Hugging Face folder (with a config.json) to be replaced by --overwrite",
            "choose another folder",
        )


def _write_folder(model: Model, source: CheckpointSource, folder: Path, dtype: str | None, shard_bytes: int) -> None:
    manifest = Manifest.read(source.folder)
    original = None
    if model.origin_folder is not None:
        copy_files(model.origin_folder, folder, ORIGIN_FILES)
        original = read_config(model.origin_folder) if (model.origin_folder / CONFIG).exists() else None
    special_ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
    if model.tokenizer_folder is not None:
        copy_files(model.tokenizer_folder, folder, TOKENIZER_FILES)
        special_ids = _special_ids(model.tokenizer_folder)
    stored, expected = source.dtypes(), expected_tensors(model.architecture)
    dtypes = {name: DTYPES[dtype] if dtype else stored[name] for name in expected}
    keeps_dtype = dtype is None and manifest.step == 0 and original is not None
    raw = exported_config(
        model.architecture,
        original,
        dtype=None if keeps_dtype else _most_common(dtypes.values()),
        special_ids=special_ids,
        is_trained=manifest.step > 0,
    )
    _write_hf_json(folder / CONFIG, raw)
    if original is None:
        _write_hf_json(folder / "generation_config.json", {"_from_model_config": True, **special_ids})
    family = family_named(raw["model_type"])
    assert family is not None, "the configuration is of a family"
    parts = stored_tensors(expected, family.stored_modules)
    entries = [
        Entry(
            name=stored,
            shape=(sum(expected[name][0] for name in names), *expected[names[0]][1:]),
            dtype=dtypes[names[0]],
        )
        for stored, names in parts.items()
    ]

    def blocks(entry: Entry) -> Iterator[Tensor]:
        for name in parts[entry.name]:
            for bounds in row_blocks(expected[name], 4):
                yield source.rows(name, *bounds).to(entry.dtype)

    size = sum(entry.num_bytes for entry in entries)
    with show_progress("writing weights", size, "B") as progress:
        write_shards(folder, entries, counted(blocks, progress), shard_bytes=shard_bytes)
    (folder / "README.md").write_text(model_card(source.folder, manifest, raw), encoding="utf-8")


def _write_hf_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file in the layout of transformers."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _most_common(dtypes: Iterable[torch.dtype]) -> str:
    """Return the name of the most common dtype."""
    ((dtype, _),) = Counter(dtypes).most_common(1)
    return str(dtype).removeprefix("torch.")


def _special_ids(folder: Path) -> dict[str, int | None]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


def _publish(temporary: Path, final: Path) -> None:
    """Rename the complete folder to its final name, and only then delete the folder it replaces."""
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
