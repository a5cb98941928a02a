"""Rank-side of scoring passes, and what to compare them with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from megatron_slm.cli.score import main, parse_scoring
from megatron_slm.flags.load import parse
from megatron_slm.reference import manifest, store
from megatron_slm.scoring import score as scoring
from megatron_slm.scoring.run import score
from megatron_slm.training.pretrain import pretrain
from tests.support.runs import flags
from tests.support.training import train_and_report


def score_here(values: dict[str, Any]) -> None:
    """A scoring pass on this rank; `values` are the run's flags and the pass's own.

    Shards are few, so that these small stores have several micro-batches in each and a last one that is shorter.
    """
    manifest.LEAST_SHARDS = 3
    config, options, _ = parse_scoring(flags(values))
    score(config, options)


def score_command(argv: list[str]) -> int:
    """The command itself; its exit code is this process's."""
    raise SystemExit(main(argv))


def score_and_die(values: dict[str, Any], shard: int, rank: int, where: str) -> None:
    """As above, but `rank` is killed when it comes to `where` in writing or entering `shard`."""
    real = store.write_durably if where == "before the rename" else scoring.write_shard

    def dying(*args: Any) -> Any:
        if where == "before the rename" and manifest.shard_name(shard) in str(args[0]):
            Path(f"{args[0].parent}/.{args[0].name}.tmp").write_bytes(args[1][:100])
            os._exit(9)
        result = real(*args)
        if where == "before the manifest" and args[2] == shard:
            os._exit(9)
        return result

    if int(os.environ["RANK"]) == rank:
        if where == "before the rename":
            store.write_durably = dying
        else:
            scoring.write_shard = dying
    score_here(values)


def online_losses(values: dict[str, Any]) -> dict[int, np.ndarray]:
    """The reference's losses [s] by sample number, as a training run with a live reference computes them."""
    seen: dict[int, np.ndarray] = {}

    def observe(batch: Any, token_loss_N: Any, reference_loss_N: torch.Tensor, kept_K: Any) -> None:
        rows = reference_loss_N.view_as(batch.valid_bs).numpy().copy()
        seen.update(zip(batch.sample_b.tolist(), rows, strict=True))

    pretrain(parse(flags(values))[0], observer=observe)
    return seen


def online_then_stored(
    online: dict[str, Any], scoring_pass: dict[str, Any], offline: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train with a live reference, score, and train from the scores: the two trainings' reports."""
    live = train_and_report(online)
    score_here(scoring_pass)
    return live, train_and_report(offline)


def stored(folder: Path, name: str = "loss") -> torch.Tensor:
    """All rows of a store, [samples, s], in the stored dtype, read without the package's reader."""
    num_shards = manifest.StoreManifest.read(folder).num_shards
    return torch.cat([load_file(folder / manifest.shard_name(i))[name] for i in range(num_shards)])
