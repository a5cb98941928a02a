"""Batched greedy generation with transformers and its key-value cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_slm.device import local_device
from megatron_slm.errors import TaskError, WeightsError

logger = logging.getLogger(__name__)


class Written(NamedTuple):
    """A generated text."""

    text: str
    is_complete: bool
    """The model ended it, or wrote a stop string; False where it was cut off at its longest length."""


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A transformers model and its tokenizer, padding on the left."""

    model: Any
    tokenizer: Any
    context: int
    """Context length of the model in tokens, for prompt and answer together."""

    def write(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stops: Sequence[str],
        batch_size: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Written]:
        """Generate a continuation of each prompt, greedily, up to the first stop string.

        Prompts of similar length share a batch; the result has the order of the prompts.

        Raises:
            TaskError: a prompt fills the model's context.
        """
        ids = [self.tokenizer(prompt, add_special_tokens=True)["input_ids"] for prompt in prompts]
        for i, row in enumerate(ids):
            if len(row) >= self.context:
                raise TaskError(
                    f"length of the prompt of question {i + 1}",
                    len(row),
                    f"be less than {self.context} tokens, the model's context length",
                    "use fewer --shots, or a model with a longer context",
                )
        texts: dict[int, Written] = {}
        order = sorted(range(len(prompts)), key=lambda i: -len(ids[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            for i, text in zip(rows, self._batch([ids[i] for i in rows], max_new_tokens, stops), strict=True):
                texts[i] = text
            progress(start + len(rows))
        return [texts[i] for i in range(len(prompts))]

    @torch.no_grad()
    def _batch(self, ids: Sequence[list[int]], max_new_tokens: int, stops: Sequence[str]) -> list[Written]:
        length = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        tokens_bs = torch.tensor([[pad] * (length - len(row)) + row for row in ids])
        mask_bs = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
        device, limit = self.model.device, min(max_new_tokens, self.context - length)
        out = self.model.generate(
            tokens_bs.to(device),
            attention_mask=mask_bs.to(device),
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            stop_strings=list(stops),
            tokenizer=self.tokenizer,
            pad_token_id=pad,
        )
        written = self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        ends = self.model.generation_config.eos_token_id
        end_ids = set(ends if isinstance(ends, list) else [ends])
        return [
            Written(cut(text, stops), len(row) < limit or cut(text, stops) != text or not end_ids.isdisjoint(row))
            for text, row in zip(written, out[:, length:].tolist(), strict=True)
        ]


def cut(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def load_generator(folder: str, *, dtype: str = "float32") -> Generator:
    """Load a Hugging Face folder for generation on this process's device.

    Raises:
        WeightsError: transformers cannot load the model or its tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    except Exception as error:  # the library raises errors of any kind
        raise WeightsError(
            "--model", folder, f"load in transformers ({type(error).__name__}: {error})", "check the folder"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    model.generation_config.temperature = model.generation_config.top_p = model.generation_config.top_k = None
    return Generator(
        model=model.to(local_device()).eval(), tokenizer=tokenizer, context=int(model.config.max_position_embeddings)
    )
