"""How a corpus was made: a small JSON file beside `.bin` and `.idx`, written by our preprocessing only."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.data.indexed import sidecar_path
from megatron_slm.errors import CorpusError


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


def write_sidecar(prefix: str | Path, sidecar: Sidecar) -> None:
    """Write `<prefix>.meta.json` at once: readers see the old file or the new one."""
    path = sidecar_path(prefix)
    part = Path(f"{path}.part-{os.getpid()}")
    part.write_text(json.dumps(dataclasses.asdict(sidecar), indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_sidecar(prefix: str | Path) -> Sidecar | None:
    """The sidecar of the corpus `prefix`; None when it has none (a corpus made by Megatron).

    Fields that this version does not know are ignored.

    Raises:
        CorpusError: the file is not such an object.
    """
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name: values[field.name] for field in dataclasses.fields(Sidecar)}
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            "corpus sidecar",
            str(path),
            f"must be a JSON object with the fields of Sidecar ({type(error).__name__}: {error})",
            "delete it (it is optional), or preprocess the corpus again",
        ) from error
    return Sidecar(**known)
