"""The slices of logical tensors that the files of a checkpoint hold, and the tables of them in headers and manifest."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.shards import Part

TABLE = "pieces"
"""Key of the table of a file's slices, in the file's header (as JSON) and in its entry in the manifest."""


@dataclass(frozen=True)
class Slice:
    """Elements [begin, end) of a tensor-parallel rank's part of a logical tensor, `number` in the files `file_number`.

    The weight is the tensor `{number}.weight` of one file, its moments are `{number}.exp_avg` and
    `{number}.exp_avg_sq` of another.
    """

    file_number: str
    number: int
    part: Part
    begin: int
    end: int


Slices = dict[str, list[Slice]]
"""By name of the logical tensor."""


def file_name(kind: str, rank: int | str) -> str:
    """Name of a rank's file of `weights`, of the moments (`optimizer`), or of another kind."""
    return f"{kind}_{rank:0>5}.safetensors"


def describe_slice(part: Part, begin: int, end: int) -> dict[str, Any]:
    """Describe elements [begin, end) of a flattened part for a table."""
    return {
        "name": part.name,
        "shape": list(part.shape),
        "dim": part.dim,
        "start": part.start,
        "length": part.length,
        "begin": begin,
        "end": end,
    }


def slices_in(folder: Path, files: Mapping[str, dict[str, Any]], kind: str = "weights") -> Slices:
    """List the slices in a checkpoint's files of a kind, from the entries of its manifest.

    Files whose entry has no table (of format 2) are opened for it.

    Raises:
        CheckpointError: such a file is damaged.
    """
    names = sorted(name for name in files if name.startswith(f"{kind}_"))
    return _by_name(
        (name, files[name][TABLE] if TABLE in files[name] else _table_in_header(folder / name)) for name in names
    )


def slices_in_headers(folder: Path, kind: str = "weights") -> Slices:
    """List the slices in a folder's files of a kind, from their headers; there need be no manifest."""
    paths = sorted(folder.glob(f"{kind}_*.safetensors"))
    return _by_name((path.name, _table_in_header(path)) for path in paths)


def _by_name(tables: Iterable[tuple[str, list[dict[str, Any]]]]) -> Slices:
    found: Slices = defaultdict(list)
    for name, table in tables:
        file_number = Path(name).stem.partition("_")[2]
        for number, entry in enumerate(table):
            part = Part(
                name=entry["name"],
                shape=tuple(entry["shape"]),
                dim=entry["dim"],
                start=entry["start"],
                length=entry["length"],
            )
            found[part.name].append(Slice(file_number, number, part, entry["begin"], entry["end"]))
    return found


def _table_in_header(path: Path) -> list[dict[str, Any]]:
    with readable(path), safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[TABLE])


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Translate the errors of a damaged file, whose checksum need not have been compared."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            str(path), "damaged", f"be as it was saved ({error})", "load another checkpoint"
        ) from error
