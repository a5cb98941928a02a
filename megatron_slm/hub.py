"""Models and tokenizers by their name on the Hugging Face hub: `org/name` or `org/name@revision`.

A repository in the local cache is used as it is: a restarted run has the weights it started with, and only a missing
repository needs a network. It is downloaded once per machine, and pickled files never are.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Literal

from filelock import FileLock

from megatron_slm.errors import ConfigError, ServiceError, os_errors_as

logger = logging.getLogger(__name__)

Part = Literal["model", "tokenizer", "config"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a transformers tokenizer, for the supported families."""
_CONFIG_FILES = ("config.json", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PATTERNS: dict[Part, tuple[str, ...]] = {
    "model": (*_CONFIG_FILES, *TOKENIZER_FILES, _WEIGHTS, _INDEX, "model-*.safetensors"),
    "tokenizer": ("config.json", *TOKENIZER_FILES),  # transformers reads the tokenizer's class from either
    "config": ("config.json",),
}
_REQUIRED: dict[Part, str] = {
    "model": "have a config.json and safetensors weights (pickled .bin files are not loaded)",
    "tokenizer": "have a tokenizer.json or tokenizer_config.json",
    "config": "have a config.json",
}
_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def is_hub_name(path: str) -> bool:
    """Return True for a name of the hub's form at which no local file or folder is."""
    return _NAME.fullmatch(path) is not None and not Path(path).exists()


def local_path(path: str, *, field: str, part: Part = "model") -> Path:
    """Return a local path as it is, and the folder in the cache for a name of the hub, downloaded if it is missing.

    Args:
        path: a path or a hub name; a path that exists is never taken for a name.
        field: the flag that names it, for errors.
        part: the files that are needed.

    Raises:
        ConfigError: the hub has no such repository, or not these files in it; or it is not in the cache while
            HF_HUB_OFFLINE is set.
        ServiceError: the hub cannot be reached.
    """
    if not is_hub_name(path):
        return Path(path)
    from huggingface_hub import constants

    if (folder := cached_folder(path, part=part)) is not None:
        return folder
    match = _NAME.fullmatch(path)
    assert match is not None, "is_hub_name"
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            field,
            path,
            f"be a local path, or a model in the cache {constants.HF_HUB_CACHE} (HF_HUB_OFFLINE is set)",
            f"check the path, or download the model where there is a network: {_command(path)}",
        )
    locks = Path(constants.HF_HUB_CACHE) / ".locks"
    with os_errors_as(ConfigError, "HF_HUB_CACHE", str(locks.parent), "be a writable folder", "set HF_HOME"):
        locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"megatron_slm--{match['repo'].replace('/', '--')}.lock"):  # the other ranks wait here
        if (folder := cached_folder(path, part=part)) is not None:
            return folder
        folder = _download(path, match["repo"], match["revision"], field=field, part=part)
    if not _is_complete(folder, part):
        raise ConfigError(field, path, f"{_REQUIRED[part]} on the hub", "choose another model or revision")
    return folder


def cached_folder(path: str, *, part: Part = "model") -> Path | None:
    """Return the folder of a hub name in the local cache; None where it is missing or incomplete. Needs no network."""
    from huggingface_hub import try_to_load_from_cache

    match = _NAME.fullmatch(path)
    if match is None:
        return None
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        found = try_to_load_from_cache(match["repo"], name, revision=match["revision"])
        if isinstance(found, str) and _is_complete(Path(found).parent, part, with_tokenizer=True):
            return Path(found).parent
    return None


def _is_complete(folder: Path, part: Part, *, with_tokenizer: bool = False) -> bool:
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    has_config = (folder / "config.json").is_file()
    if part == "tokenizer":
        return has_tokenizer
    return has_config and (part == "config" or (_has_weights(folder) and (has_tokenizer or not with_tokenizer)))


def _has_weights(folder: Path) -> bool:
    if not (folder / _INDEX).is_file():
        return (folder / _WEIGHTS).is_file()
    try:
        shards = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True  # the reader of weights names the fault
    return all((folder / str(name)).is_file() for name in shards)


def _download(path: str, repo: str, revision: str | None, *, field: str, part: Part) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    logger.info("downloading %s from %s to %s", path, constants.ENDPOINT, constants.HF_HUB_CACHE)
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=list(_PATTERNS[part]), ignore_patterns="*/*")
    except GatedRepoError as error:
        fix = f"accept its terms at {constants.ENDPOINT}/{repo}, and log in: hf auth login, or set HF_TOKEN"
        raise ConfigError(field, path, "be a model that you may read", fix) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, RevisionNotFoundError) else "model"
        raise ConfigError(
            field,
            path,
            f"be a local path, or an existing {what} of {constants.ENDPOINT}",
            "check the path or the name; for a private model log in: hf auth login, or set HF_TOKEN",
        ) from error
    except Exception as error:  # httpx, requests, Xet and the operating system raise errors of many kinds
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise ServiceError(
            field,
            path,
            f"be a local path, or a model that can be downloaded from {constants.ENDPOINT} ({reason})",
            f"check the network, or download it on another machine and pass the folder: {_command(path)}",
        ) from error
    return Path(folder)


def _command(path: str) -> str:
    repo, _, revision = path.partition("@")
    return f"hf download {repo}{f' --revision {revision}' * bool(revision)} --local-dir models/{Path(repo).name}"
