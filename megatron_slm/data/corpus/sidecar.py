"""How a corpus was made: a small JSON file beside `.bin` and `.idx`, written by our preprocessing only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.data.corpus.indexed import CorpusIndex, bin_path, idx_path, sidecar_path
from megatron_slm.errors import CorpusError

logger = logging.getLogger(__name__)

LOSS_MASK_SUFFIX = "_loss_mask"
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What is known of a corpus beyond its tokens."""

    tokenizer_fingerprint: str
    """SHA-256 of the token table it was made with (`Tokenizer.fingerprint`)."""
    vocab_size: int
    """True size of that table, not padded."""
    num_documents: int
    """Documents, those without a token included."""
    num_tokens: int
    """Tokens, end-of-document tokens included."""
    max_token_id: int
    """The largest token id that occurs."""
    eod_id: int | None
    """The id appended to every document, None when none was."""
    command: str
    """The command line it was made with."""
    bos_id: int | None = None
    """The id put before every document, None when none was."""
    bin_sha256: str | None = None
    """SHA-256 of the `.bin` file, hexadecimal, as `sha256sum` prints it; None in sidecars of older versions."""
    idx_sha256: str | None = None
    """The same of the `.idx` file."""
    num_empty: int | None = None
    """Documents without a token."""
    num_invalid: int | None = None
    """Lines of the input that were left out."""
    longest_document: int | None = None
    """Tokens of the longest document."""
    loss_mask: str | None = None
    """Name of the corpus' loss mask, a prefix in the same folder: a corpus of uint8 with the same documents and
    lengths, 1 for a token that is trained on, 0 for one that is only read. None where all are trained on."""
    loss_mask_bin_sha256: str | None = None
    """SHA-256 of the mask's `.bin`."""
    loss_mask_idx_sha256: str | None = None
    """SHA-256 of the mask's `.idx`."""


def loss_mask_prefix(prefix: str | Path) -> Path:
    """Where the loss mask of the corpus `prefix` is, if it has one."""
    return Path(f"{prefix}{LOSS_MASK_SUFFIX}")


def find_loss_mask(prefix: str | Path) -> Path | None:
    """The loss mask of a corpus: the one its sidecar names; without a word of it, the one that lies beside it.

    A sidecar that says that all tokens are trained on is believed: a mask may be left of an earlier corpus there.

    Raises:
        CorpusError: the sidecar names one that is not there.
    """
    said: dict[str, Any] = {}
    if read_sidecar(prefix) is not None:
        said = json.loads(sidecar_path(prefix).read_text(encoding="utf-8"))
    beside = loss_mask_prefix(prefix)
    if "loss_mask" not in said:
        return beside if idx_path(beside).is_file() else None
    if said["loss_mask"] is None:
        if idx_path(beside).is_file():
            logger.warning("%s is not used: %s says that all tokens are trained on", beside, sidecar_path(prefix))
        return None
    named = Path(prefix).parent / str(said["loss_mask"])
    if not idx_path(named).is_file():
        raise CorpusError(
            f"loss mask of corpus {prefix}",
            str(named),
            "is there, as its .meta.json says",
            "copy PREFIX_loss_mask.bin and .idx beside the corpus, or preprocess it again",
        )
    return named


def sidecar_text(sidecar: Sidecar) -> str:
    """What the file holds."""
    return json.dumps(dataclasses.asdict(sidecar), indent=2) + "\n"


def read_sidecar(prefix: str | Path) -> Sidecar | None:
    """The sidecar of the corpus `prefix`; None when it has none (a corpus made by Megatron).

    Fields that this version does not know are ignored. Where the corpus is open, see `read_sidecar_of`.

    Raises:
        CorpusError: the file is not such an object, or a field has another type.
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
            f"must be a JSON object with the fields of Sidecar ({type(error).__name__}: {error})",
            "delete it (it is optional), or preprocess the corpus again",
        ) from error


def read_sidecar_of(corpus: CorpusIndex) -> Sidecar | None:
    """The sidecar of a corpus that is open, which must tell of these files and not of earlier ones there.

    Raises:
        CorpusError: see `read_sidecar`; or it counts other documents or tokens than the index.
    """
    sidecar = read_sidecar(corpus.prefix)
    if sidecar is None:
        return None
    for name, here in (("num_documents", corpus.num_documents), ("num_tokens", corpus.num_tokens)):
        said = getattr(sidecar, name)
        if said != here:
            raise CorpusError(
                f"{name} of {sidecar_path(corpus.prefix)}",
                said,
                f"must be {here}, as in {idx_path(corpus.prefix)}; it is of another corpus",
                "preprocess the corpus again, or move the stale .meta.json away",
            )
    return sidecar


def _check_types(values: dict[str, Any]) -> None:
    hints, words = typing.get_type_hints(Sidecar), Sidecar.__annotations__
    for name, value in values.items():
        if type(value) not in (typing.get_args(hints[name]) or (hints[name],)):  # a bool is an int to isinstance
            raise TypeError(f"{name} is {value!r}, not {words[name]}")


def verify_hashes(prefix: str | Path) -> list[Path]:
    """Read a corpus' files whole, its loss mask's too, and compare them with the sidecar.

    Returns:
        The files that were compared.

    Raises:
        CorpusError: there is nothing to compare with, or a file is another one than was written.
    """
    sidecar = read_sidecar(prefix)
    if sidecar is None or sidecar.bin_sha256 is None:
        raise CorpusError(
            "corpus sidecar",
            str(sidecar_path(prefix)),
            "must exist and hold hashes to compare with",
            "preprocess the corpus again (Megatron's corpora have none)",
        )
    expected = {bin_path(prefix): sidecar.bin_sha256, idx_path(prefix): sidecar.idx_sha256}
    if sidecar.loss_mask is not None:
        mask = Path(prefix).parent / sidecar.loss_mask
        expected |= {bin_path(mask): sidecar.loss_mask_bin_sha256, idx_path(mask): sidecar.loss_mask_idx_sha256}
    for path, wanted in expected.items():
        found = file_sha256(path)
        if found != wanted:
            raise CorpusError(
                f"SHA-256 of {path}",
                found,
                f"must be {wanted}, which it was when it was written",
                "copy the file again from where it was made, or preprocess again",
            )
    return list(expected)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        CorpusError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise CorpusError("corpus file", str(path), f"cannot be read ({error})", "copy it again") from error
    return digest.hexdigest()
