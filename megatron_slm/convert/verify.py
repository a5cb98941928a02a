"""Do our model and transformers', given the same weights, give every token the same probability?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_slm.checkpoint.load import CheckpointSource
from megatron_slm.checkpoint.weights import Quantity, WeightSource, fill_module
from megatron_slm.config.architecture import Architecture
from megatron_slm.convert.defaults import NUM_TOKENS
from megatron_slm.convert.hf_config import is_hf_folder, read_architecture
from megatron_slm.convert.hf_source import SAFETENSORS, HuggingFaceSource, weight_files
from megatron_slm.convert.source import open_model
from megatron_slm.convert.tensors import check_tensors
from megatron_slm.errors import WeightsError
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.shards import Part
from megatron_slm.reference.frozen import FrozenStage

_ROWS = 64
"""Positions whose probabilities are compared at once."""
_NUM_BANDS = 8


@dataclass(frozen=True, kw_only=True)
class Report:
    """How far two models' log-probabilities are apart, in nats; of a position, the largest of all tokens' counts."""

    delta_bs: Tensor = field(repr=False)
    """max |Δ log-prob| over the vocabulary at every position, fp32 [b, s]."""
    rounded_to: str | None
    """The folder's dtype, where it is not the checkpoint's and the checkpoint's weights were rounded to it."""

    @property
    def max_nats(self) -> float:
        """The largest difference; NaN if one is not a number."""
        return float(self.delta_bs.max())

    @property
    def worst(self) -> tuple[int, int]:
        """Sample and position of it."""
        row, position = divmod(int(self.delta_bs.flatten().argmax()), self.delta_bs.shape[1])
        return row, position

    def bands(self) -> Iterator[tuple[int, int, float]]:
        """(first, last, max |Δ|) of a few ranges of positions: an error of RoPE or of a window grows along them."""
        width = -(-self.delta_bs.shape[1] // _NUM_BANDS)
        for start in range(0, self.delta_bs.shape[1], width):
            held = self.delta_bs[:, start : start + width]
            yield start, start + held.shape[1] - 1, float(held.max())

    def as_dict(self) -> dict[str, Any]:
        """Everything, position by position."""
        return {
            "max_nats": self.max_nats,
            "worst_sample": self.worst[0],
            "worst_position": self.worst[1],
            "rounded_to": self.rounded_to,
            "delta_nats": self.delta_bs.tolist(),
        }


def verify(hf: str, load: str | None = None, text_file: str | None = None, *, num_tokens: int = NUM_TOKENS) -> Report:
    """Compare the log-probabilities of all tokens at every position of a text (or of random tokens).

    The two models are run one after the other in fp32 on the CPU, so one at a time is in memory.

    Args:
        hf: Hugging Face folder, run by transformers.
        load: a checkpoint of ours, its weights rounded to the dtype they have in the folder; without it the folder's
            own weights go through our model.
        text_file: plain text; without it random token ids from a fixed seed.
        num_tokens: positions to compare at most; a sample is no longer than the model's longest sequence.

    Raises:
        WeightsError: one of them cannot be read, or they are not of one architecture.
    """
    folder = Path(hf)
    if not is_hf_folder(folder):
        raise WeightsError("--hf", hf, "is a Hugging Face folder (with a config.json)", "check the path")
    theirs = read_architecture(folder)
    in_folder = HuggingFaceSource(folder) if load is None or weight_files(folder, SAFETENSORS) else None
    if in_folder is not None:  # else transformers reads .bin files, and there are no dtypes to round to
        check_tensors(theirs, in_folder, field="--hf")
    arch, rounded_to = theirs, None
    source: WeightSource | None = in_folder
    if load is not None:
        ours = open_model(load, field="--load", checksums=False)
        _check_same(ours.architecture, theirs)
        source = ours.source
        if isinstance(ours.source, CheckpointSource) and in_folder is not None:
            source, rounded_to = _rounded(ours.source, in_folder)
    assert source is not None, "one of the two was given"
    tokens_bs = _tokens(theirs, hf, text_file, num_tokens)
    log_probs = _our_log_probs(arch, source, tokens_bs)
    return Report(delta_bs=_differences(log_probs, hf, tokens_bs), rounded_to=rounded_to)


def enough_memory(arch: Architecture, num_tokens: int) -> str | None:
    """Why a model cannot be verified on this machine; None if it can."""
    needed = 1.2 * 4 * arch.num_parameters + 8 * num_tokens * arch.vocab_size + 2**30
    available = psutil.virtual_memory().available
    if needed <= available:
        return None
    return f"needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available"


def _check_same(ours: Architecture, theirs: Architecture) -> None:
    for name, value in vars(ours).items():
        if value != getattr(theirs, name) and name not in ("initializer_range", "max_position_embeddings"):
            raise WeightsError(
                f"--load: {name}",
                value,
                f"is the folder's {getattr(theirs, name)!r}",
                "compare a checkpoint with its own export",
            )


class _Rounded:
    """A `WeightSource` whose values are rounded to other dtypes, by name."""

    def __init__(self, source: WeightSource, dtypes: dict[str, torch.dtype]) -> None:
        self.source, self.dtypes = source, dtypes

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        """See `WeightSource.read`."""
        return self.source.read(quantity, part, begin, end).to(self.dtypes[part.name]).float()


def _rounded(source: CheckpointSource, to: HuggingFaceSource) -> tuple[WeightSource, str | None]:
    stored, wanted = source.dtypes(), to.dtypes()
    changed = {str(wanted[name]).removeprefix("torch.") for name in stored if wanted[name] != stored[name]}
    return (_Rounded(source, wanted), ", ".join(sorted(changed))) if changed else (source, None)


def _tokens(arch: Architecture, hf: str, text_file: str | None, num_tokens: int) -> Tensor:
    """Token ids [b, s]."""
    if num_tokens < 1:
        raise WeightsError("--tokens", num_tokens, "is at least 1", "give a positive number")
    length = min(arch.max_position_embeddings, num_tokens)
    rows = max(1, num_tokens // length)
    if text_file is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(arch.vocab_size, (rows, length), generator=generator)
    from transformers import AutoTokenizer

    try:
        text = Path(text_file).read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(hf, local_files_only=True)(text)["input_ids"][: rows * length]
    except (OSError, ValueError) as error:
        raise WeightsError(
            "--text-file",
            text_file,
            f"can be read, and the --hf folder has a tokenizer ({error})",
            "check both, or compare on random tokens",
        ) from error
    if not ids:
        raise WeightsError("--text-file", text_file, "holds at least one token", "use a longer text")
    length = min(length, len(ids))
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.no_grad()
def _our_log_probs(arch: Architecture, source: WeightSource, tokens_bs: Tensor) -> Tensor:
    """Our model's log-probabilities [b * s, V], fp32."""
    stage = FrozenStage(arch, ParallelLayers(), stage=0, num_stages=1)
    fill_module(stage, source)
    hidden_Nd = stage(tokens_bs).transpose(0, 1).flatten(0, 1)
    weight_Vd = stage.output_weight().weight_Vd
    return torch.cat([(rows @ weight_Vd.t()).log_softmax(-1) for rows in hidden_Nd.split(_ROWS)])


@torch.no_grad()
def _differences(log_probs_NV: Tensor, hf: str, tokens_bs: Tensor) -> Tensor:
    """Largest difference from transformers' log-probabilities at every position, [b, s]."""
    hidden_Nd, head = _their_hidden_states(hf, tokens_bs)
    deltas = [
        (ours - head(rows).float().log_softmax(-1)).abs().amax(-1)
        for ours, rows in zip(log_probs_NV.split(_ROWS), hidden_Nd.split(_ROWS), strict=True)
    ]
    return torch.cat(deltas).view(tokens_bs.shape)


def _their_hidden_states(hf: str, tokens_bs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise WeightsError(
                f"--hf: {kind}", sorted(map(str, info[kind]))[0], "is none, by transformers", "report it"
            )
    model = loaded.eval()
    return model.model(tokens_bs).last_hidden_state.flatten(0, 1), model.lm_head
