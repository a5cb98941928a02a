"""Writes the origin of a run's weights: initial weights, corpora and references.

The folder is copied into every checkpoint, and ends up in the model card of an exported model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_slm.convert.card import read_origin
from megatron_slm.convert.companion_files import ORIGIN, ORIGIN_FILES, ORIGIN_RECORD, copy_files
from megatron_slm.convert.source import Model
from megatron_slm.data.corpus.content import content_sha256
from megatron_slm.hub import is_hub_name
from megatron_slm.reference.manifest import StoreManifest
from megatron_slm.run.plan import Plan


def write_origin(plan: Plan, folder: Path) -> None:
    """Write a run's origin and replace an earlier one. A resumed run keeps its initial weights.

    Reads the corpora and the models for their checksums.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before = plan.resume.folder / ORIGIN if plan.resume is not None else None
    if before is None and plan.models.init is not None:
        before = plan.models.init.origin_folder
    if before is not None and before.is_dir():
        copy_files(before, folder, ORIGIN_FILES)
    if plan.resume is not None:
        base = read_origin(plan.resume.folder).get("base")
    else:
        base = _model(plan.config.model.init_from, plan.models.init)
    origin = {"base": base, "references": _references(plan), "data": _corpora(plan)}
    (folder / ORIGIN_RECORD).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _model(path: str | None, model: Model | None) -> dict[str, Any] | None:
    if path is None or model is None:
        return None
    record = {"path": path, "sha256": model.content_sha256()}
    if is_hub_name(path) and model.origin_folder is not None:
        record |= {"hub": path.partition("@")[0], "revision": model.origin_folder.name}
    return record


def _references(plan: Plan) -> list[dict[str, Any]]:
    selection = plan.config.selection
    if plan.scores is not None:
        manifests = [StoreManifest.read(Path(store)) for store in selection.reference_scores]
        return [{"path": manifest.reference, "sha256": manifest.reference_sha256} for manifest in manifests]
    config, models = plan.config, plan.models
    pairs = ((config.reference_path, models.reference), (config.reference_base_path, models.reference_base))
    return [found for path, model in pairs if (found := _model(path, model)) is not None]


def _corpora(plan: Plan) -> list[dict[str, Any]]:
    """Describe the training corpora of all phases."""
    corpora = [source.corpus for source in plan.data.train.sources]
    return [
        {
            "path": str(corpus.prefix),
            "sha256": content_sha256(corpus),
            "tokens": corpus.num_tokens,
            "documents": corpus.num_documents,
        }
        for corpus in corpora
    ]
