"""Comparison of this package's model with transformers': the same weights must give the same probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from megatron_slm.arithmetic import ceil_div
from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.checkpoint.weights import Quantity, WeightSource, fill_module
from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.defaults import NUM_TOKENS
from megatron_slm.convert.hf_config import hf_folder, read_architecture
from megatron_slm.convert.hf_source import SAFETENSORS, weight_files
from megatron_slm.convert.source import open_model
from megatron_slm.convert.stored_names import LogicalWeights
from megatron_slm.convert.tensors import check_tensors
from megatron_slm.errors import WeightsError
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.shards import Part
from megatron_slm.progress import Progress, show_progress
from megatron_slm.reference.frozen import FrozenStage

_ROWS = 64
"""Positions compared at a time."""
_NUM_BANDS = 8


@dataclass(frozen=True, kw_only=True)
class Report:
    """Differences between two models' log-probabilities, in nats."""

    delta_bs: Tensor = field(repr=False)
    """Largest |Δ log-prob| over the vocabulary at every position, fp32 [b, s]."""
    rounded_to: str | None
    """Dtype of the folder to which the checkpoint's weights were rounded; None if both have the same dtype."""

    @property
    def max_nats(self) -> float:
        """Largest difference; NaN if any is NaN."""
        return float(self.delta_bs.max())

    @property
    def worst(self) -> tuple[int, int]:
        """Row and position of the largest difference."""
        row, position = divmod(int(self.delta_bs.flatten().argmax()), self.delta_bs.shape[1])
        return row, position

    def bands(self) -> Iterator[tuple[int, int, float]]:
        """Yield (first, last, max |Δ|) for a few ranges of positions; errors in RoPE or windows grow with position."""
        width = ceil_div(self.delta_bs.shape[1], _NUM_BANDS)
        for start in range(0, self.delta_bs.shape[1], width):
            band_bs = self.delta_bs[:, start : start + width]
            yield start, start + band_bs.shape[1] - 1, float(band_bs.max())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, position by position."""
        return {
            "max_nats": self.max_nats,
            "worst_sample": self.worst[0],
            "worst_position": self.worst[1],
            "rounded_to": self.rounded_to,
            "delta_nats": self.delta_bs.tolist(),
        }


def verify(hf: str, load: str | None = None, text_file: str | None = None, *, num_tokens: int = NUM_TOKENS) -> Report:
    """Compare the log-probabilities of all tokens at every position of a text (or of random tokens).

    Runs the two models one after the other in fp32 on the CPU, with one at a time in memory.

    Args:
        hf: Hugging Face folder, run by transformers.
        load: checkpoint run by this package's model, with weights rounded to the folder's dtypes; None runs the
            folder's own weights.
        text_file: plain text; None compares on random token ids with a fixed seed.
        num_tokens: largest number of positions; cut into rows of at most the model's maximum sequence length.

    Raises:
        WeightsError: a folder is unreadable, or the architectures differ.
    """
    folder = hf_folder(hf, field="--hf")
    arch = read_architecture(folder)
    hf_source = LogicalWeights.of_folder(folder, arch) if load is None or weight_files(folder, SAFETENSORS) else None
    if hf_source is not None:  # else transformers reads .bin files, and there are no dtypes to round to
        check_tensors(arch, hf_source, field="--hf")
    rounded_to = None
    source: WeightSource | None = hf_source
    if load is not None:
        loaded = open_model(load, field="--load", checksums=False)
        _check_same(loaded.architecture, arch)
        source = loaded.source
        if isinstance(loaded.source, CheckpointSource) and hf_source is not None:
            source, rounded_to = _rounded(loaded.source, hf_source)
    assert source is not None, "either from --hf or from --load"
    tokens_bs = _tokens(arch, str(folder), text_file, num_tokens)
    with show_progress("comparing with transformers", 2 * arch.num_layers, "blocks") as progress:
        log_probs_NV = _our_log_probs(arch, source, tokens_bs, progress)
        delta_bs = _differences(log_probs_NV, str(folder), tokens_bs, progress)
    return Report(delta_bs=delta_bs, rounded_to=rounded_to)


def memory_shortage(arch: Architecture, num_tokens: int) -> str | None:
    """Return the memory that verifying a model lacks on this machine as text; None if there is enough."""
    needed = 1.2 * 4 * arch.num_parameters + 8 * num_tokens * arch.vocab_size + 2**30
    available = psutil.virtual_memory().available
    if needed <= available:
        return None
    return f"needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available"


def _check_same(loaded: Architecture, expected: Architecture) -> None:
    for name, value in vars(loaded).items():
        if value != getattr(expected, name) and name not in ("initializer_range", "max_position_embeddings"):
            raise WeightsError(
                f"--load: {name}",
                value,
                f"equal {getattr(expected, name)!r}, the value of the --hf folder",
                "compare a checkpoint with its own export",
            )


class _Rounded:
    """`WeightSource` that rounds the values of another one to the given dtypes, by name."""

    def __init__(self, source: WeightSource, dtypes: dict[str, torch.dtype]) -> None:
        self.source, self.dtypes = source, dtypes

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        """Return elements [begin, end) of a part of a tensor, flattened, rounded, in fp32."""
        return self.source.read(quantity, part, begin, end).to(self.dtypes[part.name]).float()


def _rounded(source: CheckpointSource, to: LogicalWeights) -> tuple[WeightSource, str | None]:
    stored, wanted = source.dtypes(), to.dtypes()
    changed = {str(wanted[name]).removeprefix("torch.") for name in stored if wanted[name] != stored[name]}
    return (_Rounded(source, wanted), ", ".join(sorted(changed))) if changed else (source, None)


def _tokens(arch: Architecture, hf: str, text_file: str | None, num_tokens: int) -> Tensor:
    """Return token ids, int64 [b, s]."""
    if num_tokens < 1:
        raise WeightsError("--tokens", num_tokens, "be at least 1", "raise it")
    length = min(arch.max_position_embeddings, num_tokens)
    rows = max(1, num_tokens // length)
    if text_file is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(arch.vocab_size, (rows, length), generator=generator)
    from transformers import AutoTokenizer

    try:
        text = Path(text_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError("--text-file", text_file, f"be readable UTF-8 text ({error})", "check the path") from error
    try:
        ids = AutoTokenizer.from_pretrained(hf, local_files_only=True)(text)["input_ids"][: rows * length]
    except (OSError, ValueError) as error:
        raise WeightsError(
            "--hf",
            hf,
            f"have a tokenizer that transformers loads, required by --text-file ({error})",
            "copy the model's tokenizer into the folder, or drop --text-file to compare on random tokens",
        ) from error
    if not ids:
        raise WeightsError("--text-file", text_file, "hold at least one token", "use a longer text")
    length = min(length, len(ids))
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.no_grad()
def _our_log_probs(arch: Architecture, source: WeightSource, tokens_bs: Tensor, progress: Progress) -> Tensor:
    """Return this package's log-probabilities, fp32 [b * s, V]."""
    stage = FrozenStage(arch, ParallelLayers(), stage=0, num_stages=1)
    fill_module(stage, source)
    _count_blocks(stage.layers[1:-1], progress)  # between the embedding and the head
    hidden_Nd = stage(tokens_bs).transpose(0, 1).flatten(0, 1)
    output = stage.output_weight()
    return torch.cat([output.logits(rows).log_softmax(-1) for rows in hidden_Nd.split(_ROWS)])


@torch.no_grad()
def _differences(log_probs_NV: Tensor, hf: str, tokens_bs: Tensor, progress: Progress) -> Tensor:
    """Return the largest difference from transformers' log-probabilities at every position, fp32 [b, s]."""
    logits_NV = _their_logits(hf, tokens_bs, progress)
    deltas = [
        (ours - theirs.log_softmax(-1)).abs().amax(-1)
        for ours, theirs in zip(log_probs_NV.split(_ROWS), logits_NV.split(_ROWS), strict=True)
    ]
    return torch.cat(deltas).view(tokens_bs.shape)


def _count_blocks(blocks: Iterable[nn.Module], progress: Progress) -> None:
    """Count each block as done when it has run."""
    for block in blocks:
        block.register_forward_hook(lambda *_: progress.advance())


def _their_logits(hf: str, tokens_bs: Tensor, progress: Progress) -> Tensor:
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise WeightsError(
                f"--hf: {kind} of transformers", sorted(map(str, info[kind])), "be empty", "report a bug with the model"
            )
    model = loaded.eval()
    _count_blocks(model.model.layers, progress)
    logits_bsV: Tensor = model(tokens_bs, use_cache=False).logits
    return logits_bsV.flatten(0, 1).float()
