"""Model card of an exported checkpoint: training, data and origin, as far as the checkpoint records them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_slm.checkpoint.format import Manifest
from megatron_slm.convert.companion_files import ORIGIN, ORIGIN_RECORD

NOT_KNOWN = "not recorded"


def model_card(checkpoint: Path, manifest: Manifest, hf_config: Mapping[str, Any]) -> str:
    """Return the README.md of an exported folder, with the metadata that model hubs read on top.

    Args:
        checkpoint: folder of the checkpoint; uses its config.yaml and origin/origin.json if present.
        hf_config: content of the exported config.json.
    """
    flags = _read(checkpoint / "config.yaml", yaml.safe_load)
    config = {name: value for name, value in flags.items() if value not in (None, [])}
    origin = read_origin(checkpoint)
    sections = [
        _front_matter(origin, config),
        f"# {_title(checkpoint, config)}\n\n{_summary(manifest, config)}",
        "## Training\n\n" + _table(_training(manifest, config)),
        "## Data\n\n" + _data(origin),
        "## Initialization and reference\n\n" + _table(_models(origin)),
        "## Architecture\n\n" + _table(_architecture(manifest, hf_config)),
    ]
    if config:
        listed = yaml.safe_dump(config, sort_keys=True, allow_unicode=True)
        sections.append(f"## Configuration\n\nResolved flags of the run:\n\n```yaml\n{listed}```")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    sections.append(f"Written by {versions}.")
    return "\n\n".join(section for section in sections if section) + "\n"


def read_origin(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's record of its initial weights, references and corpora; empty without one."""
    return _read(checkpoint / ORIGIN / ORIGIN_RECORD, json.loads)


def _read(path: Path, parse: Any) -> dict[str, Any]:
    loaded = parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return loaded if isinstance(loaded, dict) else {}


def _front_matter(origin: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = origin.get("base") or {}
    if base:
        name = base.get("hub") or _hub_name(Path(base["path"]))
        front |= {} if name is None else {"base_model": name}
    front["tags"] = ["megatron_slm", *(["selective-language-modeling"] if config.get("objective") == "slm" else [])]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _hub_name(path: Path) -> str | None:
    """Return a model's id on the hub, from the hub's cache folder (models--OWNER--NAME/snapshots/...).

    Returns:
        None for any other folder: hubs take `base_model` for an id, and a folder's name is none.
    """
    cached = next((part for part in path.parts if part.startswith("models--")), None)
    return "/".join(cached.split("--")[1:]) if cached else None


def _title(checkpoint: Path, config: Mapping[str, Any]) -> str:
    return Path(str(config["run-dir"])).name if config.get("run-dir") else checkpoint.resolve().parent.name


def _summary(manifest: Manifest, config: Mapping[str, Any]) -> str:
    if not manifest.step:
        return "Converted from a Hugging Face model, without further training."
    if config.get("objective") == "slm":
        return (
            "Trained with Selective Language Modeling (arXiv 2404.07965), on the tokens with the highest scores only."
        )
    return "Trained on every token (causal language modeling)."


def _training(manifest: Manifest, config: Mapping[str, Any]) -> dict[str, Any]:
    if not manifest.step:
        return {"tokenizer (SHA-256 of its token table)": manifest.tokenizer_fingerprint or NOT_KNOWN}
    seen, kept = manifest.state.tokens_seen, manifest.state.tokens_kept
    rows = {
        "steps": f"{manifest.step:,} ({manifest.step - manifest.state.adam_step} skipped)",
        "samples": f"{manifest.state.consumed_samples:,}",
        "sequence length": config.get("seq-length", NOT_KNOWN),
        "tokens seen": f"{seen:,}" if seen is not None else NOT_KNOWN,
        "tokens kept (trained on)": f"{kept:,} ({kept / seen:.1%})" if kept is not None and seen else NOT_KNOWN,
        "objective": config.get("objective", NOT_KNOWN),
        "sample order (SHA-256)": manifest.sample_order,
        "tokenizer (SHA-256 of its token table)": manifest.tokenizer_fingerprint,
    }
    if config.get("objective") == "slm":
        rows |= {
            "score": " ".join(map(str, _listed(config.get("slm-score")))),
            "selection policy": config.get("slm-policy"),
            "keep ratio": config.get("slm-keep-ratio"),
        }
    return rows


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _data(origin: Mapping[str, Any]) -> str:
    corpora = origin.get("data")
    if not corpora:
        return NOT_KNOWN
    lines = ["| corpus | tokens | documents | SHA-256 |", "|---|---|---|---|"]
    for corpus in corpora:
        tokens, documents = (f"{corpus[name]:,}" for name in ("tokens", "documents"))
        lines.append(f"| {corpus['path']} | {tokens} | {documents} | `{corpus['sha256']}` |")
    return "\n".join(lines)


def _models(origin: Mapping[str, Any]) -> dict[str, Any]:
    base = origin.get("base")
    initial = "random weights" if "data" in origin else NOT_KNOWN
    references = "; ".join(map(_model, origin.get("references", [])))
    return {"initial weights": _model(base) if base else initial, "reference": references or "none"}


def _model(entry: Mapping[str, Any]) -> str:
    checksum = f" (SHA-256 `{entry['sha256']}`)" if entry.get("sha256") else ""
    return f"{entry['path']}{checksum}"


def _architecture(manifest: Manifest, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    arch = manifest.architecture
    return {
        "class": ", ".join(hf_config.get("architectures") or [NOT_KNOWN]),
        "parameters": f"{arch.num_parameters:,}",
        "layers, hidden size, FFN size": f"{arch.num_layers}, {arch.hidden_size}, {arch.ffn_hidden_size}",
        "attention heads, key-value heads, head size": (
            f"{arch.num_attention_heads}, {arch.num_query_groups}, {arch.kv_channels}"
        ),
        "vocabulary size": f"{arch.vocab_size:,}",
        "maximum sequence length": f"{arch.max_position_embeddings:,}",
    }


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value not in ("", None)]
    return "\n".join(["| | |", "|---|---|", *lines])
