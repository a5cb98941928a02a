"""A Hugging Face folder as one of our checkpoints: weights at step 0, as they were stored, and no moments."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_slm.checkpoint.format import Manifest, file_entry, find_checkpoint, folder_name, versions
from megatron_slm.checkpoint.state import RunState
from megatron_slm.checkpoint.tensor_file import Entry, write_entries
from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.bin_source import BinSource
from megatron_slm.convert.carried import (
    ORIGIN,
    ORIGIN_FILES,
    STORY,
    TOKENIZER,
    TOKENIZER_FILES,
    copy_files,
    tokenizer_folder,
)
from megatron_slm.convert.hf_config import is_hf_folder, read_architecture
from megatron_slm.convert.hf_source import SAFETENSORS, HuggingFaceSource, weight_files
from megatron_slm.convert.tensors import TensorSource, check_tensors, expected_tensors, row_blocks
from megatron_slm.convert.vocabulary import ExtendedVocabulary, check_extends
from megatron_slm.data.tokenizers.registry import Tokenizer, build_tokenizer
from megatron_slm.errors import VocabularyError, WeightsError, os_errors_as
from megatron_slm.files import sync_folder, write_durably


def import_folder(hf: str, output: str, *, extend_vocabulary: str | None = None, allow_bin: bool = False) -> Path:
    """Write the weights of a Hugging Face model as a checkpoint in `output`, at most some tens of MiB at a time.

    Weights keep their dtype; configurations, tokenizer and licence travel along (see `carried`).

    Args:
        extend_vocabulary: a tokenizer folder with further tokens, which becomes the model's.
        allow_bin: take pickled `.bin` files (read with weights_only) where there are no safetensors.

    Returns:
        the committed checkpoint folder, for `--init-from` and `--reference-load` at any layout.

    Raises:
        WeightsError, VocabularyError: the folder is not whole or not supported, or `output` holds something already.
    """
    folder, target = Path(hf), Path(output)
    if not is_hf_folder(folder):
        raise WeightsError("--hf", hf, "is a Hugging Face folder (with a config.json)", "check the path")
    architecture = read_architecture(folder)
    source: TensorSource
    if allow_bin and not weight_files(folder, SAFETENSORS):
        source = BinSource(folder)
    else:
        source = HuggingFaceSource(folder)
    check_tensors(architecture, source, field="--hf")
    tokenizer, tokenizer_from = _tokenizer(folder), tokenizer_folder(folder)
    if extend_vocabulary is not None:
        new = build_tokenizer("HuggingFaceTokenizer", extend_vocabulary)
        check_extends(tokenizer, new, extend_vocabulary)
        assert tokenizer is not None, "check_extends has seen to it"
        architecture = replace(architecture, vocab_size=max(new.vocab_size, architecture.vocab_size))
        source = ExtendedVocabulary(source, num_tokens=tokenizer.vocab_size, vocab_size=architecture.vocab_size)
        tokenizer, tokenizer_from = new, Path(extend_vocabulary)
    elif tokenizer is not None and tokenizer.vocab_size > architecture.vocab_size:
        raise VocabularyError(
            f"--hf: tokenizer of {hf}",
            tokenizer.vocab_size,
            f"has at most the model's {architecture.vocab_size} tokens",
            f"add rows for the others with --extend-vocabulary {hf}",
        )
    temporary = _make_temporary(target)
    try:
        with os_errors_as(WeightsError, "--output", str(output), "can be written", "free or choose another disk"):
            files = _write_weights(temporary, architecture, source)
            _carry(temporary, folder, tokenizer_from)
            _commit(temporary, target, architecture, tokenizer, files)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where all went well
    return find_checkpoint(target)


def _tokenizer(folder: Path) -> Tokenizer | None:
    return build_tokenizer("HuggingFaceTokenizer", folder) if tokenizer_folder(folder) else None


def _make_temporary(target: Path) -> Path:
    temporary = target / f".{folder_name(0)}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of an import that was killed
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(
            "--output", str(target), "is a folder that does not exist yet, or is empty", "choose another"
        )
    with os_errors_as(WeightsError, "--output", str(target), "can be made", "choose another"):
        temporary.mkdir(parents=True)
    return temporary


def _write_weights(folder: Path, architecture: Architecture, source: TensorSource) -> dict[str, dict[str, Any]]:
    """One file for each of the folder's, with the same tensors, flattened; the files' lines in the manifest."""
    dtypes, held_in = source.dtypes(), source.files()
    expected = expected_tensors(architecture)
    names_by_file: dict[str, list[str]] = {}
    for name in expected:
        names_by_file.setdefault(held_in[name], []).append(name)
    files: dict[str, dict[str, Any]] = {}
    for number, (_, names) in enumerate(sorted(names_by_file.items())):
        pieces = [_whole(name, expected[name]) for name in names]
        by_key = {f"{i}.weight": name for i, name in enumerate(names)}
        entries = [Entry(name=k, shape=(pieces[i]["end"],), dtype=dtypes[n]) for i, (k, n) in enumerate(by_key.items())]

        def blocks(entry: Entry, by_key: dict[str, str] = by_key) -> Iterator[Tensor]:
            name = by_key[entry.name]
            return (source.rows(name, *bounds) for bounds in row_blocks(expected[name], entry.dtype.itemsize))

        path = folder / f"weights_{number:05d}.safetensors"
        files[path.name] = write_entries(path, entries, blocks, {"pieces": json.dumps(pieces)})
    return files


def _whole(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """How a checkpoint describes a tensor that is in one piece (see `checkpoint.save`)."""
    numel = 1
    for length in shape:
        numel *= length
    return {"name": name, "shape": shape, "dim": None, "start": 0, "length": 0, "begin": 0, "end": numel}


def _carry(temporary: Path, folder: Path, tokenizer_from: Path | None) -> None:
    if tokenizer_from is not None:
        copy_files(tokenizer_from, temporary / TOKENIZER, TOKENIZER_FILES)
    copy_files(folder, temporary / ORIGIN, ORIGIN_FILES)
    story = {"base": {"path": str(folder)}}
    (temporary / ORIGIN / STORY).write_text(json.dumps(story, indent=1))


def _commit(
    temporary: Path,
    target: Path,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
    files: dict[str, dict[str, Any]],
) -> None:
    others = (path for path in temporary.rglob("*") if path.is_file() and path.name not in files)
    files |= {str(path.relative_to(temporary)): file_entry(path) for path in others}
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
