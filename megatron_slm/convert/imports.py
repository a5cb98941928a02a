"""Import of a Hugging Face folder as a checkpoint: step 0, weights in their stored dtype, no optimizer moments."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_slm.checkpoint.format import Manifest, file_entry, find_checkpoint, folder_name, versions
from megatron_slm.checkpoint.slices import TABLE, describe_slice, file_name
from megatron_slm.checkpoint.state import RunState
from megatron_slm.checkpoint.tensor_file import Entry, write_entries
from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.bin_source import BinSource
from megatron_slm.convert.companion_files import (
    ORIGIN,
    ORIGIN_FILES,
    ORIGIN_RECORD,
    TOKENIZER,
    copy_files,
    tokenizer_folder,
)
from megatron_slm.convert.hf_config import hf_folder, read_architecture
from megatron_slm.convert.hf_source import SAFETENSORS, weight_files
from megatron_slm.convert.stored_names import LogicalSource, LogicalWeights, stored_modules
from megatron_slm.convert.tensors import TensorSource, check_tensors, counted, expected_tensors, row_blocks
from megatron_slm.convert.vocabulary import ExtendedVocabulary, ExtendInit, check_extends, new_tokens
from megatron_slm.data.tokenizers.registry import Tokenizer, build_tokenizer
from megatron_slm.errors import VocabularyError, WeightsError, os_errors_as
from megatron_slm.files import sync_folder, write_durably
from megatron_slm.hub import TOKENIZER_FILES, local_path
from megatron_slm.parallel.shards import Part
from megatron_slm.progress import show_progress

logger = logging.getLogger(__name__)


def import_folder(
    hf: str,
    output: str,
    *,
    extend_vocabulary: str | None = None,
    extend_init: ExtendInit = "mean",
    allow_bin: bool = False,
) -> Path:
    """Write a Hugging Face model as a checkpoint in `output`, holding a few tens of MiB in memory at a time.

    Weights keep their dtype; configurations, tokenizer and license are copied along (see `companion_files`).

    Args:
        extend_vocabulary: tokenizer folder with further tokens; it becomes the model's tokenizer.
        extend_init: rows of new tokens within the matrix, which were padding: the mean of the others, or kept.
        allow_bin: without safetensors files, read pickled `.bin` files (with weights_only).

    Returns:
        The committed checkpoint folder, for `--init-from` and `--reference-load` in any layout.

    Raises:
        WeightsError, VocabularyError: the folder is incomplete or not supported, or `output` is not empty.
    """
    folder, target = hf_folder(hf, field="--hf"), Path(output)
    architecture = read_architecture(folder)
    source: TensorSource
    if allow_bin and not weight_files(folder, SAFETENSORS):
        source = LogicalSource(BinSource(folder), expected_tensors(architecture), stored_modules(folder))
    else:
        source = LogicalWeights.of_folder(folder, architecture)
    check_tensors(architecture, source, field="--hf")
    tokenizer, tokenizer_from = _tokenizer(folder), tokenizer_folder(folder)
    if extend_vocabulary is not None:
        extended = local_path(extend_vocabulary, field="--extend-vocabulary", part="tokenizer")
        new = build_tokenizer("HuggingFaceTokenizer", extended)
        check_extends(tokenizer, new, extend_vocabulary)
        assert tokenizer is not None, "checked by check_extends"
        num_rows = architecture.vocab_size
        architecture = replace(architecture, vocab_size=max(new.vocab_size, num_rows))
        added = new_tokens(tokenizer, new)
        within = [index for index in added if index < num_rows]
        logger.info(
            "%d new tokens: %d in rows of the matrix that were padding (%s), %d in rows behind it (mean row)",
            len(added),
            len(within),
            "mean row" if extend_init == "mean" else "kept as they are",
            len(added) - len(within),
        )
        source = ExtendedVocabulary(
            source,
            num_tokens=tokenizer.vocab_size,
            vocab_size=architecture.vocab_size,
            replaced=within if extend_init == "mean" else (),
        )
        tokenizer, tokenizer_from = new, extended
    elif tokenizer is not None and tokenizer.vocab_size > architecture.vocab_size:
        raise VocabularyError(
            "--hf: number of tokens of the tokenizer",
            tokenizer.vocab_size,
            f"be at most {architecture.vocab_size}, the rows of the model's embedding",
            f"add the missing rows with --extend-vocabulary {hf}",
        )
    temporary = _make_temporary(target)
    try:
        with os_errors_as(WeightsError, "--output", str(output), "be writable", "free disk space or choose another"):
            files = _write_weights(temporary, architecture, source)
            _copy_companions(temporary, folder, tokenizer_from)
            _commit(temporary, target, architecture, tokenizer, files)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed already after a successful import
    return find_checkpoint(target)


def _tokenizer(folder: Path) -> Tokenizer | None:
    return build_tokenizer("HuggingFaceTokenizer", folder) if tokenizer_folder(folder) else None


def _make_temporary(target: Path) -> Path:
    temporary = target / f".{folder_name(0)}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed import
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError("--output", str(target), "be a new or empty folder", "choose another")
    with os_errors_as(WeightsError, "--output", str(target), "be a folder that can be created", "choose another"):
        temporary.mkdir(parents=True)
    return temporary


def _write_weights(folder: Path, architecture: Architecture, source: TensorSource) -> dict[str, dict[str, Any]]:
    """Write one file for each of the folder's, with the same tensors, flattened; return their manifest entries."""
    dtypes, file_of = source.dtypes(), source.files()
    expected = expected_tensors(architecture)
    names_by_file: dict[str, list[str]] = {}
    for name in expected:
        names_by_file.setdefault(file_of[name], []).append(name)
    files: dict[str, dict[str, Any]] = {}
    size = sum(prod(shape) * dtypes[name].itemsize for name, shape in expected.items())
    with show_progress("writing weights", size, "B") as progress:
        for number, (_, names) in enumerate(sorted(names_by_file.items())):
            slices = [describe_slice(Part(name=name, shape=expected[name]), 0, prod(expected[name])) for name in names]
            by_key = {f"{i}.weight": name for i, name in enumerate(names)}
            entries = [
                Entry(name=key, shape=(prod(expected[name]),), dtype=dtypes[name]) for key, name in by_key.items()
            ]

            def blocks(entry: Entry, by_key: dict[str, str] = by_key) -> Iterator[Tensor]:
                name = by_key[entry.name]
                return (source.rows(name, *bounds) for bounds in row_blocks(expected[name], entry.dtype.itemsize))

            path = folder / file_name("weights", number)
            entry = write_entries(path, entries, counted(blocks, progress), {TABLE: json.dumps(slices)})
            files[path.name] = {**entry, TABLE: slices}
    return files


def _copy_companions(temporary: Path, folder: Path, tokenizer_from: Path | None) -> None:
    if tokenizer_from is not None:
        copy_files(tokenizer_from, temporary / TOKENIZER, TOKENIZER_FILES)
    copy_files(folder, temporary / ORIGIN, ORIGIN_FILES)
    origin = {"base": {"path": str(folder)}}
    (temporary / ORIGIN / ORIGIN_RECORD).write_text(json.dumps(origin, indent=1))


def _commit(
    temporary: Path,
    target: Path,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
    files: dict[str, dict[str, Any]],
) -> None:
    companions = (path for path in temporary.rglob("*") if path.is_file() and path.name not in files)
    files |= {str(path.relative_to(temporary)): file_entry(path) for path in companions}
    Manifest(
        state=RunState(),
        architecture=architecture,
        layout={"pipeline": 1, "data": 1, "tensor": 1},
        tokenizer_fingerprint=None if tokenizer is None else tokenizer.fingerprint(),
        sample_order=None,
        files=dict(sorted(files.items())),
        versions=dict(versions()),
    ).write(temporary)
    os.rename(temporary, target / folder_name(0))
    sync_folder(target)
    write_durably(target / "latest", folder_name(0).encode())
