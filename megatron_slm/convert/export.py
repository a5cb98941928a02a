"""A checkpoint as a Hugging Face folder, some tens of MiB at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_slm.checkpoint.format import Manifest
from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.checkpoint.tensor_file import Entry
from megatron_slm.convert.card import model_card
from megatron_slm.convert.carried import ORIGIN_FILES, TOKENIZER_FILES, copy_files
from megatron_slm.convert.defaults import SHARD_BYTES, TOLERANCE_NATS
from megatron_slm.convert.hf_config import CONFIG, exported_config, is_hf_folder, read_config
from megatron_slm.convert.source import Model, open_model
from megatron_slm.convert.tensors import DTYPES, check_tensors, expected_tensors, row_blocks
from megatron_slm.convert.verify import Report, enough_memory, verify
from megatron_slm.convert.writer import write_shards
from megatron_slm.errors import CheckpointError, WeightsError
from megatron_slm.files import sync_folder

VERIFIED_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export came to."""

    folder: Path
    report: Report | None
    """The comparison with transformers; None where there was none."""
    not_verified: str | None
    """Why there was none."""


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

    The folder appears under its name only when it is whole and, if the model fits in memory, transformers gives the
    same probabilities with it as our model with the checkpoint.

    Args:
        dtype: of the weights written; None: as stored, which is fp32 of a trained model and as it was of an imported.
        overwrite: replace the Hugging Face folder that is there already.
        verifies: compare with transformers on some tokens.
        tolerance_nats: largest difference of log-probabilities that is accepted.

    Raises:
        CheckpointError, WeightsError: no complete checkpoint, an output folder that is there already, a model that no
            family of transformers' can express, or a difference beyond the tolerance.
    """
    model = open_model(load, field="--load")
    source = model.source
    if not isinstance(source, CheckpointSource):
        raise CheckpointError("--load", load, "is a checkpoint of ours", "it is a Hugging Face folder already")
    check_tensors(model.architecture, source, field="--load")
    final = Path(os.path.abspath(output))  # a name of its own, also for "."
    _check_output(final, source.folder, overwrite=overwrite)
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write_folder(model, source, temporary, dtype, shard_bytes)
        report: Report | None = None
        reason: str | None = "--no-verify"
        if verifies:
            reason = enough_memory(model.architecture, VERIFIED_TOKENS)
            report = verify(str(temporary), str(source.folder), num_tokens=VERIFIED_TOKENS) if reason is None else None
        if report is not None and not report.max_nats <= tolerance_nats:  # not `>`: it may be NaN
            raise WeightsError(
                "--output",
                f"max |Δ log-prob| {report.max_nats:.3e} nats",
                f"differs from the checkpoint by at most {tolerance_nats} nats, by transformers; nothing was kept",
                "report it; --no-verify writes the folder all the same",
            )
        _publish(temporary, final)
    except OSError as error:
        if error.errno is None:  # transformers' own, of the model or the tokenizer that it reads
            raise WeightsError(
                "--load", load, f"is a model that transformers loads ({error})", "see to the files that it names"
            ) from error
        raise WeightsError(
            "--output", error.filename or output, f"can be written ({error.strerror})", "free or choose another disk"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(folder=final, report=report, not_verified=None if report else reason)


def _check_output(final: Path, checkpoint: Path, *, overwrite: bool) -> None:
    if final.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise WeightsError("--output", str(final), "is not a folder that the checkpoint is in", "choose another")
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not overwrite:
        raise WeightsError(
            "--output",
            str(final),
            "is a folder that does not exist yet, or is empty",
            "choose another, or replace it with --overwrite",
        )
    if not is_hf_folder(final):  # a slip of the pen must not cost somebody's home
        raise WeightsError(
            "--output", str(final), "is a Hugging Face folder (with a config.json), to be overwritten", "choose another"
        )


def _write_folder(model: Model, source: CheckpointSource, folder: Path, dtype: str | None, shard_bytes: int) -> None:
    manifest = Manifest.read(source.folder)
    carried = None
    if model.origin_folder is not None:
        copy_files(model.origin_folder, folder, ORIGIN_FILES)
        carried = read_config(model.origin_folder) if (model.origin_folder / CONFIG).exists() else None
    special_ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
    if model.tokenizer_folder is not None:
        copy_files(model.tokenizer_folder, folder, TOKENIZER_FILES)
        special_ids = _special_ids(model.tokenizer_folder)
    stored, expected = source.dtypes(), expected_tensors(model.architecture)
    dtypes = {name: DTYPES[dtype] if dtype else stored[name] for name in expected}
    as_it_was = dtype is None and manifest.step == 0  # an imported model: its configuration says it already
    raw = exported_config(
        model.architecture, carried, dtype=None if as_it_was and carried else _usual(dtypes), special_ids=special_ids
    )
    write_json(folder / CONFIG, raw)
    if carried is None:
        write_json(folder / "generation_config.json", {"_from_model_config": True, **special_ids})
    entries = [Entry(name=name, shape=shape, dtype=dtypes[name]) for name, shape in expected.items()]

    def blocks(entry: Entry) -> Iterator[Tensor]:
        return (source.rows(entry.name, *bounds).to(entry.dtype) for bounds in row_blocks(entry.shape, 4))

    write_shards(folder, entries, blocks, shard_bytes=shard_bytes)
    (folder / "README.md").write_text(model_card(source.folder, manifest, raw), encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _usual(dtypes: dict[str, torch.dtype]) -> str:
    """The dtype of most tensors, by its name."""
    held = list(dtypes.values())
    return str(max(set(held), key=held.count)).removeprefix("torch.")


def _special_ids(folder: Path) -> dict[str, int | None]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


def _publish(temporary: Path, final: Path) -> None:
    """Give the whole folder its name; what was there before goes only then."""
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
