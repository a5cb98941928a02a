"""Selective training in Hugging Face's Trainer, and in trainers derived from it (TRL's SFTTrainer).

For one process, or several with DistributedDataParallel. Models whose parameters are partitioned between forward passes
(FSDP, ZeRO-3) are refused, since the loss reads the output weight outside of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron_slm.api.causal_lm import (
    CausalLMLoss,
    check_plain_head,
    make_selector,
    micro_batch,
    selective_loss,
    token_losses,
)
from megatron_slm.errors import ConfigError, LayoutError
from megatron_slm.selection.select import num_kept
from megatron_slm.selection.selector import Selector
from megatron_slm.types import MicroBatch, TokenStatistics

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

REFERENCE_LOSS = "reference_loss"
"""Column of stored reference losses: one number in nats for each predicted token, t - 1 of a sequence of t."""


class SlmTrainerMixin(_Base):
    """Trains on the kept tokens only; put it before a Trainer: `class Mine(SlmTrainerMixin, SFTTrainer)`.

    The gradient of an optimizer step is divided once, by the kept tokens of all its micro-batches and processes.
    Evaluation is plain: the mean loss of all tokens. Training logs gain `loss_all`, `keep_fraction`, and with a
    reference `reference_loss` and `excess_selected`, means since the last log.

    Args:
        selector: how tokens are kept (`make_selector`); default: 60 % by excess loss.
        reference_model: frozen model for scores that need one. None reads the column `reference_loss` that
            `with_reference_losses` adds and `ReferenceLossCollator` pads.

    Raises:
        LayoutError: the model's logits are scaled, or its parameters would be partitioned.
    """

    def __init__(
        self, *args: Any, selector: Selector | None = None, reference_model: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.selector = make_selector() if selector is None else selector
        if self.selector.policy == "quantile" or self.selector.scope == "data-parallel":
            raise ConfigError(
                "selector of SlmTrainer",
                self.selector.describe(),
                "use neither the policy quantile nor the scope data-parallel together with it",
                "choose another policy or scope, or train with slm-pretrain",
            )
        check_plain_head(self.model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise LayoutError(
                "args", "FSDP or DeepSpeed", "be DistributedDataParallel or one process", "use slm-pretrain for ZeRO"
            )
        self.reference_model = reference_model
        if reference_model is not None:
            check_plain_head(reference_model)
            reference_model.to(self.args.device).eval().requires_grad_(False)
        self.model_accepts_loss_kwargs = True  # asks for num_items_in_batch and divides by nothing else
        self._samples_seen = 0
        self._sums: dict[str, list[float]] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the kept tokens over the kept tokens of the whole step; plain loss while evaluating."""
        stored_bs = inputs.pop(REFERENCE_LOSS, None)
        if not model.training or return_outputs:
            model_inputs = {**inputs, "use_cache": False}
            outputs = model(**model_inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        extra = {name: value for name, value in inputs.items() if name not in ("input_ids", "labels")}
        batch = micro_batch(
            inputs["input_ids"], inputs.get("labels"), inputs.get("attention_mask"), first_sample=self._first_sample()
        )
        self._samples_seen += len(batch.sample_b)
        reference = self._reference(batch, stored_bs, extra)
        loss = selective_loss(
            model, batch, selector=self.selector, reference=reference, step=self.state.global_step, **extra
        )
        self._count(loss, reference)
        if num_items_in_batch is None:
            return loss.mean
        return loss.loss_sum * (self.args.world_size / num_items_in_batch)

    def _first_sample(self) -> int:
        """Number of the next sequence of this process; processes have numbers of their own."""
        return self.args.process_index * (1 << 40) + self._samples_seen

    def _reference(self, batch: MicroBatch, stored_bs: Tensor | None, extra: dict[str, Any]) -> TokenStatistics | None:
        if self.reference_model is not None:
            return token_losses(
                self.reference_model, batch, with_entropy=self.selector.needs("reference-entropy"), **extra
            )
        if stored_bs is not None:
            return TokenStatistics(stored_bs.flatten().float().masked_fill(~batch.valid_bs.flatten(), 0.0))
        if self.selector.needs_reference:
            raise ConfigError.missing(
                "reference_model of SlmTrainer",
                f"score {self.selector.scores[0].name}",
                f"pass a model, or add the column {REFERENCE_LOSS} with with_reference_losses",
            )
        return None

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """Return the kept tokens of an optimizer step over all processes, expected where scores decide their number."""
        if not batch_samples or not self.model.training:
            return super()._get_num_items_in_batch(batch_samples, device)
        kept = sum(self._expected_kept(one) for one in batch_samples)
        total = torch.tensor(float(kept), device=device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total[None]).sum()
        return total.clamp(min=1.0)

    def _expected_kept(self, inputs: Mapping[str, Tensor]) -> float:
        batch = micro_batch(inputs["input_ids"], inputs.get("labels"), inputs.get("attention_mask"))
        share = self.selector.expected_share(self.state.global_step)
        groups = batch.valid_bs.sum(1) if self.selector.scope == "sequence" else batch.valid_bs.sum()[None]
        return sum(num_kept(int(count), share) for count in groups)

    def _count(self, loss: CausalLMLoss, reference: TokenStatistics | None) -> None:
        for name, value in loss.metrics(reference).items():
            if name != "loss":
                self._sums.setdefault(name, []).append(value)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Add the selection's means since the last training log."""
        if "loss" in logs and self._sums:
            for name, values in sorted(self._sums.items()):
                total = torch.tensor([sum(values), len(values)], dtype=torch.float32, device=self.args.device)
                if self.args.world_size > 1:
                    total = self.accelerator.reduce(total, reduction="sum")
                logs[name] = float(total[0] / total[1])
            self._sums = {}
        super().log(logs, *args, **options)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = set(vars(self)["_signature_columns"] or ())
        self._signature_columns = sorted({*columns, REFERENCE_LOSS})


class ReferenceLossCollator:
    """Wraps a collator: pads the column `reference_loss` to the batch's length.

    Args:
        collator: any collator that pads on the right.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate examples, with or without the column."""
        plain = [{k: v for k, v in one.items() if k != REFERENCE_LOSS} for one in examples]
        batch = self.collator(plain)
        if all(REFERENCE_LOSS in one for one in examples):
            loss_bs = torch.zeros(len(examples), batch["input_ids"].shape[1] - 1)
            for row_s, one in zip(loss_bs, examples, strict=True):
                row_s[: len(one[REFERENCE_LOSS])] = torch.as_tensor(one[REFERENCE_LOSS])
            batch[REFERENCE_LOSS] = loss_bs
        return batch


def with_reference_losses(
    reference: nn.Module, examples: Sequence[Mapping[str, Any]], *, device: torch.device | str = "cpu"
) -> list[dict[str, Any]]:
    """Return copies of tokenized examples with the reference's losses in the column `reference_loss`.

    Args:
        reference: a transformers causal language model.
        examples: dictionaries with `input_ids`, such as the rows of a datasets.Dataset; scored one by one.
        device: device to run on.
    """
    reference = reference.to(device).eval()
    scored = []
    for one in examples:
        batch = micro_batch(torch.as_tensor(one["input_ids"], device=device)[None])
        scored.append({**one, REFERENCE_LOSS: token_losses(reference, batch).loss_N.tolist()})
    return scored


def __getattr__(name: str) -> Any:
    if name != "SlmTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _trainer_class()


def _trainer_class() -> type:
    from transformers import Trainer

    class SlmTrainer(SlmTrainerMixin, Trainer):
        """`transformers.Trainer` that trains on the kept tokens only; see `SlmTrainerMixin`."""

    SlmTrainer.__module__ = __name__
    globals()["SlmTrainer"] = SlmTrainer
    return SlmTrainer


if TYPE_CHECKING:

    class SlmTrainer(SlmTrainerMixin):
        """`transformers.Trainer` that trains on the kept tokens only; see `SlmTrainerMixin`."""
