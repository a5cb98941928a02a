"""The model card of a published checkpoint: where it comes from, as far as the checkpoint says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_slm.checkpoint.format import Manifest
from megatron_slm.convert.carried import ORIGIN, STORY

NOT_KNOWN = "not recorded"


def model_card(checkpoint: Path, manifest: Manifest, hf_config: Mapping[str, Any]) -> str:
    """The README.md of an exported folder, with the fields that model hubs read on top.

    Args:
        checkpoint: folder of the checkpoint; its config.yaml and origin/origin.json are read where they are there.
        hf_config: the content of the exported config.json.
    """
    flags = _read(checkpoint / "config.yaml", yaml.safe_load)
    config = {name: value for name, value in flags.items() if value not in (None, [])}
    story = read_story(checkpoint)
    sections = [
        _front_matter(story, config),
        f"# {_title(checkpoint, config)}\n\n{_summary(manifest, config)}",
        "## Training\n\n" + _table(_training(manifest, config)),
        "## Data\n\n" + _data(story),
        "## Start and reference\n\n" + _table(_models(story)),
        "## Architecture\n\n" + _table(_architecture(manifest, hf_config)),
    ]
    if config:
        listed = yaml.safe_dump(config, sort_keys=True, allow_unicode=True)
        sections.append(f"## Configuration\n\nThe run's flags, as resolved:\n\n```yaml\n{listed}```")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    sections.append(f"Written by {versions}.")
    return "\n\n".join(section for section in sections if section) + "\n"


def read_story(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of where its weights come from; empty where it does not."""
    return _read(checkpoint / ORIGIN / STORY, json.loads)


def _read(path: Path, parse: Any) -> dict[str, Any]:
    loaded = parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return loaded if isinstance(loaded, dict) else {}


def _front_matter(story: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = (story.get("base") or {}).get("path")
    if base:
        front["base_model"] = _hub_name(Path(base))
    front["tags"] = ["megatron_slm", *(["selective-language-modeling"] if config.get("objective") == "slm" else [])]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _hub_name(path: Path) -> str:
    """A folder's name, or what a folder of the hub's cache (models--OWNER--NAME/snapshots/...) stands for."""
    cached = next((part for part in path.parts if part.startswith("models--")), None)
    return "/".join(cached.split("--")[1:]) if cached else path.name


def _title(checkpoint: Path, config: Mapping[str, Any]) -> str:
    return Path(str(config["run-dir"])).name if config.get("run-dir") else checkpoint.resolve().parent.name


def _summary(manifest: Manifest, config: Mapping[str, Any]) -> str:
    if not manifest.step:
        return "Converted; not trained here."
    if config.get("objective") == "slm":
        return "Trained with Selective Language Modeling: on the tokens that its reference says are worth learning."
    return "Trained on every token (causal language modeling)."


def _training(manifest: Manifest, config: Mapping[str, Any]) -> dict[str, Any]:
    if not manifest.step:
        return {"tokenizer (SHA-256 of its token table)": manifest.tokenizer_fingerprint or NOT_KNOWN}
    seen, kept = manifest.state.tokens_seen, manifest.state.tokens_kept
    selective = config.get("objective") == "slm"
    return {
        "steps": f"{manifest.step:,} ({manifest.step - manifest.state.adam_step} skipped)",
        "samples": f"{manifest.state.consumed_samples:,}",
        "sequence length": config.get("seq-length", NOT_KNOWN),
        "tokens seen": f"{seen:,}" if seen is not None else NOT_KNOWN,
        "tokens kept (trained on)": f"{kept:,} ({kept / seen:.1%})" if kept is not None and seen else NOT_KNOWN,
        "objective": config.get("objective", NOT_KNOWN),
        "score": " ".join(map(str, _listed(config.get("slm-score")))) if selective else "",
        "policy": config.get("slm-policy", "") if selective else "",
        "keep ratio": config.get("slm-keep-ratio", "") if selective else "",
        "order of the samples (SHA-256)": manifest.sample_order or "",
        "tokenizer (SHA-256 of its token table)": manifest.tokenizer_fingerprint or "",
    }


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _data(story: Mapping[str, Any]) -> str:
    corpora = story.get("data")
    if not corpora:
        return NOT_KNOWN
    lines = ["| corpus | tokens | documents | SHA-256 |", "|---|---|---|---|"]
    for corpus in corpora:
        tokens, documents = (f"{corpus[name]:,}" for name in ("tokens", "documents"))
        lines.append(f"| {corpus['path']} | {tokens} | {documents} | `{corpus['sha256']}` |")
    return "\n".join(lines)


def _models(story: Mapping[str, Any]) -> dict[str, Any]:
    def named(entry: Mapping[str, Any] | None, otherwise: str) -> str:
        if not entry:
            return otherwise
        checksum = f" (SHA-256 `{entry['sha256']}`)" if entry.get("sha256") else ""
        return f"{entry['path']}{checksum}"

    out = {"start": named(story.get("base"), "random weights" if "data" in story else NOT_KNOWN)}
    references = story.get("references", [])
    out["reference"] = "; ".join(named(entry, "") for entry in references) or "none"
    return out


def _architecture(manifest: Manifest, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    arch = manifest.architecture
    return {
        "class": ", ".join(hf_config.get("architectures") or [NOT_KNOWN]),
        "parameters": f"{arch.num_parameters:,}",
        "blocks, width, inner width": f"{arch.num_layers}, {arch.hidden_size}, {arch.ffn_hidden_size}",
        "query heads, key and value heads, their width": (
            f"{arch.num_attention_heads}, {arch.num_query_groups}, {arch.kv_channels}"
        ),
        "vocabulary": f"{arch.vocab_size:,}",
        "longest sequence": f"{arch.max_position_embeddings:,}",
    }


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value not in ("", None)]
    return "\n".join(["| | |", "|---|---|", *lines])
