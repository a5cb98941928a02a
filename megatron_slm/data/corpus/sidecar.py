"""Sidecar of a corpus: a JSON file beside `.bin` and `.idx` that records how preprocessing made them."""

from __future__ import annotations

import dataclasses
import json
import logging
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.data.corpus.indexed import CorpusIndex, bin_path, idx_path, sidecar_path
from megatron_slm.errors import CorpusError, os_errors_as
from megatron_slm.files import file_sha256
from megatron_slm.progress import show_progress

logger = logging.getLogger(__name__)

LOSS_MASK_SUFFIX = "_loss_mask"


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Origin, counts and hashes of a corpus; Megatron's corpora have no sidecar."""

    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer's token table (`Tokenizer.fingerprint`)."""
    vocab_size: int
    """True size of the token table, not padded."""
    num_documents: int
    """Empty documents included."""
    num_tokens: int
    """BOS and end-of-document tokens included."""
    max_token_id: int
    """The largest token id in the corpus."""
    eod_id: int | None
    """The id appended to every document; None if none was."""
    command: str
    """The command line that made the corpus."""
    bos_id: int | None = None
    """The id prepended to every document; None if none was."""
    bin_sha256: str | None = None
    """SHA-256 of the `.bin` file, hexadecimal, as `sha256sum` prints it; None in sidecars of older versions."""
    idx_sha256: str | None = None
    """SHA-256 of the `.idx` file, hexadecimal; None in sidecars of older versions."""
    num_empty: int | None = None
    """Documents without a token."""
    num_invalid: int | None = None
    """Input lines that were skipped."""
    longest_document: int | None = None
    """Tokens of the longest document."""
    special_tokens_in_text: str | None = None
    """Treatment of special tokens that texts spell out: parse, plain or error; None in sidecars of older versions."""
    num_special_in_text: int | None = None
    """Special tokens that texts spell out."""
    loss_mask: str | None = None
    """Prefix of the loss mask in the same folder: a uint8 corpus with the same documents and lengths, 1 for a token
    that is trained on, 0 for context only. None if all tokens are trained on."""
    loss_mask_bin_sha256: str | None = None
    """SHA-256 of the mask's `.bin`."""
    loss_mask_idx_sha256: str | None = None
    """SHA-256 of the mask's `.idx`."""


def loss_mask_prefix(prefix: str | Path) -> Path:
    """Return the default prefix of the loss mask of the corpus `prefix`."""
    return Path(f"{prefix}{LOSS_MASK_SUFFIX}")


def find_loss_mask(prefix: str | Path) -> Path | None:
    """Return the prefix of a corpus's loss mask: the one its sidecar names, else the one beside the corpus, or None.

    A sidecar whose `loss_mask` is null rules out a mask beside the corpus: it may be left from an earlier corpus.

    Raises:
        CorpusError: the sidecar names a mask that does not exist.
    """
    recorded: dict[str, Any] = {}
    if read_sidecar(prefix) is not None:
        recorded = json.loads(sidecar_path(prefix).read_text(encoding="utf-8"))
    beside = loss_mask_prefix(prefix)
    if "loss_mask" not in recorded:
        return beside if idx_path(beside).is_file() else None
    if recorded["loss_mask"] is None:
        if idx_path(beside).is_file():
            logger.warning(
                "ignoring the loss mask %s: according to %s all tokens are trained on", beside, sidecar_path(prefix)
            )
        return None
    named = Path(prefix).parent / str(recorded["loss_mask"])
    if not idx_path(named).is_file():
        raise CorpusError(
            f"{sidecar_path(prefix)}: loss_mask",
            str(recorded["loss_mask"]),
            f"be a loss mask in the same folder; {idx_path(named)} does not exist",
            "copy PREFIX_loss_mask.bin and .idx beside the corpus, or preprocess it again",
        )
    return named


def sidecar_text(sidecar: Sidecar) -> str:
    """Return the content of the sidecar file."""
    return json.dumps(dataclasses.asdict(sidecar), indent=2) + "\n"


def read_sidecar(prefix: str | Path) -> Sidecar | None:
    """Read the sidecar of the corpus `prefix`; None if it has none (a corpus made by Megatron).

    Unknown fields are ignored. For an open corpus, use `read_sidecar_of`.

    Raises:
        CorpusError: the file is not a JSON object with these fields, or a field has another type.
    """
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name: values[field.name] for field in dataclasses.fields(Sidecar) if field.name in values}
        _check_types(known)
        return Sidecar(**known)
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            "corpus sidecar",
            str(path),
            f"be a JSON object with the fields of a sidecar ({type(error).__name__}: {error})",
            "delete it (it is optional), or preprocess the corpus again",
        ) from error


def read_sidecar_of(corpus: CorpusIndex) -> Sidecar | None:
    """Read the sidecar of an open corpus and check that it belongs to these files, not to earlier ones.

    Raises:
        CorpusError: see `read_sidecar`; or its counts of documents or tokens differ from the index.
    """
    sidecar = read_sidecar(corpus.prefix)
    if sidecar is None:
        return None
    for name, here in (("num_documents", corpus.num_documents), ("num_tokens", corpus.num_tokens)):
        recorded = getattr(sidecar, name)
        if recorded != here:
            raise CorpusError(
                f"{sidecar_path(corpus.prefix)}: {name}",
                recorded,
                f"be {here}, as in {idx_path(corpus.prefix)}; the sidecar is of another corpus",
                "preprocess the corpus again, or move the stale .meta.json away",
            )
    return sidecar


def _check_types(values: dict[str, Any]) -> None:
    hints, words = typing.get_type_hints(Sidecar), Sidecar.__annotations__
    for name, value in values.items():
        if type(value) not in (typing.get_args(hints[name]) or (hints[name],)):  # isinstance counts a bool as an int
            raise TypeError(f"{name} is {value!r}, not {words[name]}")


def verify_hashes(prefix: str | Path) -> list[Path]:
    """Hash the files of a corpus and its loss mask, and compare the hashes with the sidecar.

    Returns:
        The files that were compared.

    Raises:
        CorpusError: no sidecar with hashes exists, or a file differs from what was written.
    """
    sidecar = read_sidecar(prefix)
    if sidecar is None or sidecar.bin_sha256 is None:
        raise CorpusError(
            "corpus sidecar",
            str(sidecar_path(prefix)),
            "exist and hold hashes to compare with",
            "preprocess the corpus again (Megatron's corpora have no hashes)",
        )
    expected = {bin_path(prefix): sidecar.bin_sha256, idx_path(prefix): sidecar.idx_sha256}
    if sidecar.loss_mask is not None:
        mask = Path(prefix).parent / sidecar.loss_mask
        expected |= {bin_path(mask): sidecar.loss_mask_bin_sha256, idx_path(mask): sidecar.loss_mask_idx_sha256}
    size = sum(path.stat().st_size for path in expected if path.is_file())
    with show_progress(f"verifying {prefix}", size, "B") as progress:
        for path, wanted in expected.items():
            with os_errors_as(CorpusError, "corpus file", str(path), "be readable", "copy it again"):
                found = file_sha256(path, on_bytes=progress.advance)
            if found != wanted:
                raise CorpusError(
                    f"{path}: SHA-256",
                    found,
                    f"be {wanted}, as recorded when it was written",
                    "copy the file again from its source, or preprocess again",
                )
    return list(expected)
