"""The ranges of parameters that one rank's ZeRO optimizer owns; the one module that reads DeepSpeed's optimizers.

ZeRO keeps, on each data-parallel rank, a flat fp32 partition that holds ranges of the rank's parameters. A
`Fragment` is one such range, with the master weights and Adam's moments behind it as views.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_slm.checkpoint.weights import Quantity, WeightSource, copy_range


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements [begin, end) of a flattened parameter, at `offset` of the flat partition `flat`."""

    parameter: nn.Parameter
    begin: int
    end: int
    flat: Tensor
    offset: int
    state: dict[str, Any]
    """The base optimizer's state of `flat`."""

    def view(self, quantity: Quantity) -> Tensor:
        """Return the fragment's values as a 1-D view into the optimizer's memory."""
        held = self.flat if quantity == "weight" else self.state[quantity]
        return held.detach().narrow(0, self.offset, self.end - self.begin)


def fragments(optimizer: Any) -> Iterator[Fragment]:
    """Yield every fragment that this rank owns, in the optimizer's order."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _stage_3(optimizer)
    return _stages_1_and_2(optimizer)


def _stages_1_and_2(optimizer: Any) -> Iterator[Fragment]:
    bf16 = hasattr(optimizer, "bf16_groups")
    groups = optimizer.bf16_groups if bf16 else optimizer.bit16_groups
    flats = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
    for group, flat in zip(groups, flats, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            held, at = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Fragment(
                parameter=parameter,
                begin=held.start,
                end=held.start + held.numel,
                flat=flat,
                offset=at.start,
                state=optimizer.optimizer.state[flat],
            )


def _stage_3(optimizer: Any) -> Iterator[Fragment]:
    for parameter in (p for group in optimizer.fp16_groups for p in group):
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        begin = torch.distributed.get_rank(parameter.ds_process_group) * parameter.ds_tensor.ds_numel
        end = min(begin + numel, parameter.ds_numel)
        flat = optimizer.fp32_partitioned_groups_flat[group]
        if begin < end:
            yield Fragment(
                parameter=parameter,
                begin=begin,
                end=end,
                flat=flat,
                offset=offset,
                state=optimizer.optimizer.state[flat],
            )


def fill_optimizer(optimizer: Any, source: WeightSource, *, adam_step: int | None) -> None:
    """Set this rank's fp32 master weights and, on a resume, Adam's moments; `share_weights` comes next.

    Args:
        adam_step: number of optimizer steps in the moments; None starts with fresh moments.
    """
    for fragment in fragments(optimizer):
        if adam_step is not None:
            _prepare_state(fragment, optimizer, adam_step)
            for quantity in ("exp_avg", "exp_avg_sq"):
                _fill(fragment, source, quantity)
        else:
            fragment.state.clear()
        _fill(fragment, source, "weight")
        if hasattr(fragment.parameter, "ds_tensor"):
            held = fragment.parameter.ds_tensor.data
            held[: fragment.end - fragment.begin].copy_(fragment.view("weight"))


def share_weights(optimizer: Any) -> None:
    """Set the trained parameters to the master weights, each read by one rank. Collective over data-parallel ranks.

    As at the end of an optimizer step. Under ZeRO-3 parameters are gathered where they are used, and then cut again for
    their second shares inside the nodes (`zero_hpz_partition_size`).
    """
    for parameter in (p for group in getattr(optimizer, "fp16_groups", ()) for p in group):
        parameter.ds_secondary_tensor = None
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def _fill(fragment: Fragment, source: WeightSource, quantity: Quantity) -> None:
    copy_range(fragment.view(quantity), fragment.parameter, source, quantity, fragment.begin, fragment.end)


def _prepare_state(fragment: Fragment, optimizer: Any, adam_step: int) -> None:
    """Create missing moments of the base optimizer and set its step count."""
    for quantity in ("exp_avg", "exp_avg_sq"):
        if quantity not in fragment.state:
            fragment.state[quantity] = torch.zeros_like(fragment.flat.detach())
    base = optimizer.optimizer
    if isinstance(base, torch.optim.AdamW):
        fused = any(group.get("fused") for group in base.param_groups)  # its kernel reads the step there
        fragment.state["step"] = torch.tensor(float(adam_step), device=fragment.flat.device if fused else "cpu")
        return
    fragment.state["step"] = adam_step  # DeepSpeed's FusedAdam counts for each parameter
    for group in base.param_groups:
        group["step"] = adam_step  # apex's counts for each group, from 1 where the group has no count
