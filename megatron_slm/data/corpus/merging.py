"""Merges corpora, with their loss masks, columns and sidecars."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_slm.data.corpus.indexed import CorpusIndex, bin_path, idx_path, sidecar_path
from megatron_slm.data.corpus.joined_corpus import JoinedCorpus, Merged, require_dtype
from megatron_slm.data.corpus.merged_columns import MergedColumns
from megatron_slm.data.corpus.sidecar import Sidecar, find_loss_mask, loss_mask_prefix, read_sidecar_of
from megatron_slm.errors import CorpusError, VocabularyError
from megatron_slm.progress import show_progress


def concatenate(
    prefixes: Sequence[str | Path],
    output_prefix: str | Path,
    sidecar_of: Callable[[Merged], Sidecar | None] = lambda _: None,
) -> Merged:
    """Write the corpora `prefixes`, in this order, as the corpus `output_prefix`: whole, or not at all.

    Memory does not grow with the corpora. Some may be empty, not all. Temporary files that a killed writer left of the
    same corpus or its loss mask are removed.

    Args:
        prefixes: the corpora, in order.
        output_prefix: prefix of the new corpus.
        sidecar_of: returns its sidecar, which is put in place before the corpus, or None.

    Raises:
        CorpusError: a corpus is damaged, the token dtypes differ, the output is one of the inputs or cannot be
            written, or no corpus holds a token.
    """
    if not prefixes:
        raise CorpusError.missing("--input", "merging", "name at least one corpus")
    _require_other_output(prefixes, output_prefix)
    dtype = CorpusIndex(prefixes[0]).dtype
    for prefix in prefixes:
        require_dtype(CorpusIndex(prefix), dtype)  # check all before copying the first
    size = sum(bin_path(prefix).stat().st_size for prefix in prefixes)
    for prefix in (output_prefix, loss_mask_prefix(output_prefix)):
        _remove_orphans(prefix)
    with JoinedCorpus(output_prefix) as joined, show_progress(f"writing {output_prefix}", size, "B") as progress:
        for prefix in prefixes:
            joined.add(CorpusIndex(prefix), on_bytes=progress.advance)
        merged = joined.finish(sidecar_of)
        joined.put_in_place()
    return merged


def merge_corpora(
    prefixes: Sequence[str | Path],
    output_prefix: str | Path,
    command: str,
    warn: Callable[[str], None] = lambda _: None,
    *,
    drop: Sequence[str] = (),
) -> Merged:
    """Concatenate corpora with their loss masks, columns and sidecars.

    Args:
        prefixes: the corpora, in order.
        output_prefix: prefix of the new corpus.
        command: the command line, recorded in the sidecar.
        warn: called with a message if something cannot be checked.
        drop: names of columns to leave out.

    Raises:
        VocabularyError: the corpora's tokenizers or their BOS and EOD ids differ.
        CorpusError: see `concatenate` and `MergedColumns`; or only some corpora have a loss mask; or a sidecar is of
            another corpus.
    """
    _require_other_output(prefixes, output_prefix)
    columns = MergedColumns(prefixes, output_prefix, drop)
    sidecar_of = _checked_sidecars(prefixes, output_prefix, command, warn)
    columns.write(concatenate)
    merged = concatenate(prefixes, output_prefix, sidecar_of)
    columns.complete()
    return merged


def _checked_sidecars(
    prefixes: Sequence[str | Path], output_prefix: str | Path, command: str, warn: Callable[[str], None]
) -> Callable[[Merged], Sidecar | None]:
    """Check that corpora fit together, and merge their loss masks; return what builds the new corpus' sidecar."""
    sidecars = [read_sidecar_of(CorpusIndex(prefix)) for prefix in prefixes]
    known = [(prefix, sidecar) for prefix, sidecar in zip(prefixes, sidecars, strict=True) if sidecar is not None]
    for prefix, sidecar in known:
        _require_same(prefix, sidecar, *known[0])
    masked = [str(prefix) for prefix, sidecar in known if sidecar.loss_mask is not None]
    if masked and len(masked) != len(prefixes):
        without = next(str(prefix) for prefix in prefixes if str(prefix) not in masked)
        raise CorpusError(
            f"{without}: loss mask", "none", f"exist, since {masked[0]} has one", "merge corpora with masks separately"
        )
    if len(known) != len(prefixes):
        for prefix, found in zip(prefixes, sidecars, strict=True):
            if found is None and find_loss_mask(prefix) is not None:
                raise CorpusError(
                    "loss mask",
                    str(find_loss_mask(prefix)),
                    "be named in its corpus's .meta.json to be merged with it",
                    "preprocess with --loss-mask-key, or move the mask away",
                )
        without = next(str(prefix) for prefix, sidecar in zip(prefixes, sidecars, strict=True) if sidecar is None)
        warn(f"{without} has no .meta.json: its tokenizer cannot be checked, and the new corpus gets no .meta.json")
        return lambda _: None
    mask: Merged | None = None
    if masked:
        masks = [Path(prefix).parent / str(sidecar.loss_mask) for prefix, sidecar in known]
        mask = concatenate(masks, loss_mask_prefix(output_prefix))

    def sidecar_of(merged: Merged) -> Sidecar:
        return _combined([sidecar for _, sidecar in known], merged, mask, output_prefix, command)

    return sidecar_of


def _require_other_output(prefixes: Sequence[str | Path], output_prefix: str | Path) -> None:
    if any(bin_path(prefix).resolve() == bin_path(output_prefix).resolve() for prefix in prefixes):
        raise CorpusError("--output-prefix", str(output_prefix), "not be one of the inputs", "choose another prefix")


def _remove_orphans(prefix: str | Path) -> None:
    """Remove the temporary files at a prefix (see `temporary_path`) whose process no longer runs on this machine."""
    for path in (bin_path(prefix), idx_path(prefix), sidecar_path(prefix)):
        for orphan in path.parent.glob(f"{glob.escape(path.name)}.part-*"):
            pid = orphan.name.rpartition("-")[2]
            if pid.isascii() and pid.isdigit() and not _is_alive(int(pid)):
                with contextlib.suppress(OSError):  # a leftover file does no harm
                    orphan.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process; a number too large for a process
        return True
    return True


def _require_same(prefix: str | Path, sidecar: Sidecar, first: str | Path, expected: Sidecar) -> None:
    if sidecar.tokenizer_fingerprint != expected.tokenizer_fingerprint:
        raise VocabularyError(
            f"{prefix}: tokenizer",
            sidecar.tokenizer_fingerprint[:12],
            f"have the token table of {first} ({expected.tokenizer_fingerprint[:12]})",
            "preprocess one of them again with the other's tokenizer",
        )
    ends = {(one.bos_id, one.eod_id) for one in (sidecar, expected)}
    if len(ends) > 1:
        raise VocabularyError(
            f"{prefix}: (BOS, EOD) ids",
            (sidecar.bos_id, sidecar.eod_id),
            f"be those of {first}: {(expected.bos_id, expected.eod_id)}",
            "preprocess one of them again with the other's flags",
        )


def _combined(
    sidecars: list[Sidecar], merged: Merged, mask: Merged | None, output_prefix: str | Path, command: str
) -> Sidecar:
    def total(field: str) -> int | None:
        values = [getattr(sidecar, field) for sidecar in sidecars]
        return None if None in values else sum(values)

    longest = [sidecar.longest_document for sidecar in sidecars]
    return replace(
        sidecars[0],
        num_documents=merged.num_documents,
        num_tokens=merged.num_tokens,
        max_token_id=max(sidecar.max_token_id for sidecar in sidecars),
        command=command,
        bin_sha256=merged.bin_sha256,
        idx_sha256=merged.idx_sha256,
        num_empty=total("num_empty"),
        num_invalid=total("num_invalid"),
        longest_document=None if None in longest else max(length or 0 for length in longest),
        loss_mask=None if mask is None else loss_mask_prefix(output_prefix).name,
        loss_mask_bin_sha256=None if mask is None else mask.bin_sha256,
        loss_mask_idx_sha256=None if mask is None else mask.idx_sha256,
    )
