"""The part of the study that compares losses: distillation and weighted cross-entropy on kept tokens."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from results import Results

METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "se-kd": (("--slm-keep-ratio", "0.2", "--slm-score", "entropy"), ("--loss", "kl")),
    "dft": (("--slm-keep-ratio", "0.6"), ("--slm-weight", "dft")),
}
"""Flags of the selection and of the loss. se-kd: the reference's distribution is distilled at the fifth of the tokens
where the model is least sure (SE-KD, arXiv 2602.01395). dft: the tokens of slm-0.6, each weighted by its probability
(DFT, arXiv 2508.05629)."""
COMPARED_WITH = ("clm", "slm-0.6")


def write_losses(out: Path, results: Results) -> Path:
    """Write losses.md into `out`/results: final held-out losses, and their distance from CLM's of the same seed.

    Raises:
        SystemExit: CLM is not finished.
    """
    if not results.runs["clm"]:
        raise SystemExit("CLM is not finished yet: run `train --losses` first")
    lines = ["| run | seeds | curated, nats | less CLM's | noisy, nats |", "|---|---|---|---|---|"]
    plain = results.final("clm")
    for name in (*COMPARED_WITH, *METHODS):
        target, noisy = results.final(name), results.final(name, "noisy")
        if not target:
            continue
        gaps = [loss - plain[seed] for seed, loss in target.items() if seed in plain]
        gap = f"{fmean(gaps):+.3f} ({min(gaps):+.3f} to {max(gaps):+.3f})" if gaps else "–"
        shown = f"{fmean(noisy.values()):.3f}" if noisy else "–"
        lines.append(f"| {name} | {len(target)} | {fmean(target.values()):.3f} | {gap} | {shown} |")
    path = out / "results" / "losses.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("# Losses on kept tokens\n\n" + "\n".join(lines) + "\n")
    return path
