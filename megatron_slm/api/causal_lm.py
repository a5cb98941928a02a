"""Selective loss of a transformers causal language model, for one's own training loop.

Shapes: b sequences of t token ids give N = b * (t - 1) predicted tokens; d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from megatron_slm.config.selection import SelectionConfig
from megatron_slm.errors import LayoutError
from megatron_slm.loss.selective_ce import selective_cross_entropy, token_statistics
from megatron_slm.loss.variants import LossHead
from megatron_slm.selection.configure import build_selector
from megatron_slm.selection.ranking import Choice
from megatron_slm.selection.selector import Selector
from megatron_slm.types import MicroBatch, Selection, TokenStatistics

IGNORED_LABEL = -100
"""Label of tokens without a loss, as in transformers."""

DEFAULT_HEAD = LossHead()

_SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Fields of configurations whose logits are more than a product of hidden states and weight."""


class CausalLMLoss(NamedTuple):
    """Selective loss of one micro-batch. Sums accumulate; divide once per optimizer step."""

    loss_sum: Tensor
    """Sum of the kept tokens' losses, each times its weight, in nats; carries the gradient."""
    divisor: Tensor
    """Number of kept tokens, or its expectation with the policy `quantile`; fp64 []."""
    choice: Choice
    """Kept tokens and scores, in (sequence, position) order."""
    statistics: TokenStatistics
    """Loss of every token in nats, fp32 [N], detached; 0 where not valid."""

    @property
    def mean(self) -> Tensor:
        """Mean loss of the kept tokens in nats, fp32 []; 0 where no token was kept."""
        return self.loss_sum / self.divisor.clamp(min=1.0).to(self.loss_sum.dtype)

    def metrics(self, reference: TokenStatistics | None = None) -> dict[str, float]:
        """Return `loss`, `loss_all`, `keep_fraction`, and with a reference its loss and the kept tokens' excess."""
        finite_N, kept_N, loss_N = self.choice.finite_N, self.choice.kept_N, self.statistics.loss_N
        found = {
            "loss": _mean(loss_N, kept_N),
            "loss_all": _mean(loss_N, finite_N),
            "keep_fraction": float(kept_N.sum() / finite_N.sum().clamp(min=1)),
        }
        if reference is not None:
            found["reference_loss"] = _mean(reference.loss_N, finite_N)
            found["excess_selected"] = _mean(loss_N - reference.loss_N, kept_N)
        return found


def _mean(values_N: Tensor, mask_N: Tensor) -> float:
    return float(values_N[mask_N].double().mean()) if bool(mask_N.any()) else 0.0


def make_selector(
    score: str | Sequence[str] = "excess",
    *,
    keep_ratio: float = 0.6,
    scope: Literal["sequence", "micro-batch"] = "micro-batch",
    seed: int = 0,
    **options: Any,
) -> Selector:
    """Return a selector by the names and rules of the `--slm-...` flags.

    Args:
        score: name of a score, or several with `combine`.
        keep_ratio: share of the valid tokens to keep, in (0, 1].
        scope: the tokens ranked against each other.
        seed: of random scores and policies.
        options: further `--slm-...` flags without the prefix, such as `policy="threshold", threshold=0.5`.

    Raises:
        ConfigError: an unknown score or a value out of range; names the flag.
        TypeError: an unknown option.
    """
    names = [score] if isinstance(score, str) else list(score)
    flags = {f"slm_{name}": value for name, value in options.items()}
    config = SelectionConfig(
        slm_score=names, slm_keep_ratio=keep_ratio, slm_scope=scope, reference_load="in memory", **flags
    )
    return build_selector(config, seed=seed, vocabulary_size=None)


def micro_batch(
    input_ids_bt: Tensor,
    labels_bt: Tensor | None = None,
    attention_mask_bt: Tensor | None = None,
    *,
    first_sample: int = 0,
    columns: Mapping[str, Tensor] | None = None,
) -> MicroBatch:
    """Return the shifted micro-batch of token ids, as transformers shifts labels.

    Args:
        input_ids_bt: int64 [b, t].
        labels_bt: unshifted labels, -100 where a token has no loss; by default the token ids.
        attention_mask_bt: 0 where a token is padding and has no loss.
        first_sample: number of the first sequence in the order of the run, for random scores and stored scores.
        columns: numbers of the predicted tokens for scores and weights named `external:NAME`, by name, fp32 [b, t - 1].
    """
    labels_bt = input_ids_bt if labels_bt is None else labels_bt
    labels_bs = labels_bt[:, 1:]
    valid_bs = labels_bs != IGNORED_LABEL
    if attention_mask_bt is not None:
        valid_bs = valid_bs & attention_mask_bt[:, 1:].bool()
    return MicroBatch(
        tokens_bs=input_ids_bt[:, :-1],
        labels_bs=labels_bs.masked_fill(~valid_bs, 0),
        valid_bs=valid_bs,
        sample_b=first_sample + torch.arange(len(input_ids_bt), device=input_ids_bt.device),
        columns=columns,
    )


def hidden_and_weight(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a model; return the hidden states of all but the last position [N, d] and the output weight [V, d].

    The model is called as a whole, so that a DistributedDataParallel wrapper sees the call. Logits of the last
    position only are computed.

    Raises:
        LayoutError: the logits are not a plain product of hidden states and weight.
    """
    inner: Any = getattr(model, "module", model)
    check_plain_head(inner)
    output = model(**inputs, output_hidden_states=True, logits_to_keep=1, use_cache=False)
    hidden_bsd = output.hidden_states[-1][:, :-1]
    weight_Vd = inner.get_output_embeddings().weight
    return hidden_bsd.flatten(0, 1).to(weight_Vd.dtype), weight_Vd


def check_plain_head(model: Any) -> None:
    """Check that a model's logits are `hidden @ weight.T`.

    Raises:
        LayoutError: the output layer has a bias, or the configuration scales or caps logits.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise LayoutError("model", type(model).__name__, "have an output layer without bias", "use another model")
    for name in _SCALED_LOGITS:
        value = getattr(model.config, name, None)
        if value not in (None, 1, 1.0):
            raise LayoutError(
                f"model.config: {name}", value, "be unset (logits are hidden states times weight)", "use another model"
            )


@torch.no_grad()
def token_losses(
    model: nn.Module, batch: MicroBatch, *, with_entropy: bool = False, head: LossHead = DEFAULT_HEAD, **inputs: Any
) -> TokenStatistics:
    """Return a model's loss of every token of a micro-batch, without a gradient; call it on the reference.

    Args:
        with_entropy: also return entropies, for scores that need them.
        inputs: further arguments of the model's forward pass, such as `attention_mask` [b, t].
    """
    hidden_Nd, weight_Vd = hidden_and_weight(model, {"input_ids": _whole_sequences(batch), **inputs})
    return token_statistics(
        hidden_Nd,
        weight_Vd,
        batch.labels_bs.flatten(),
        batch.valid_bs.flatten(),
        with_entropy=with_entropy,
        head=head,
    )


def selective_loss(
    model: nn.Module,
    batch: MicroBatch,
    *,
    selector: Selector,
    reference: TokenStatistics | None = None,
    step: int = 0,
    threshold: float | None = None,
    head: LossHead = DEFAULT_HEAD,
    **inputs: Any,
) -> CausalLMLoss:
    """Return the loss of the kept tokens of a micro-batch, with its gradient (Rho-1, equation 5, as a sum).

    Args:
        selector: from `make_selector`; `Selector()` keeps every token.
        reference: the reference's losses of the same micro-batch, if the score needs them.
        step: optimizer steps done, for keep schedules.
        threshold: running threshold of the policy `quantile`.
        inputs: further arguments of the model's forward pass, such as `attention_mask` [b, t].
    """
    hidden_Nd, weight_Vd = hidden_and_weight(model, {"input_ids": _whole_sequences(batch), **inputs})
    choices: list[Choice] = []

    def select(tokens: TokenStatistics) -> Selection:
        ranking = selector.rank(tokens, reference, batch)
        choice = selector.choose(ranking, length=batch.labels_bs.shape[1], step=step, threshold=threshold)
        choices.append(choice)
        kept_K = choice.kept_N.nonzero().squeeze(1)
        return Selection(kept_K, None if choice.weight_N is None else choice.weight_N[kept_K])

    loss = selective_cross_entropy(
        hidden_Nd,
        weight_Vd,
        batch.labels_bs.flatten(),
        batch.valid_bs.flatten(),
        select=select,
        keep_ratio=selector.expected_share(step),
        with_entropy=selector.needs("entropy"),
        with_top_entropy=selector.needs("top-entropy"),
        head=head,
    )
    return CausalLMLoss(loss.loss_sum, choices[0].divisor(), choices[0], loss.statistics)


def _whole_sequences(batch: MicroBatch) -> Tensor:
    """Return [b, t] ids; the last token is an input whose output nobody reads, so its id does not matter."""
    return torch.cat([batch.tokens_bs, batch.labels_bs[:, -1:]], dim=1)
