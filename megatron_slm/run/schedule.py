"""The pipeline schedule of a run."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.run import RunConfig
from megatron_slm.engine.schedule.costs import arithmetic_costs
from megatron_slm.engine.schedule.modes import Mode
from megatron_slm.engine.schedule.programs import Schedule
from megatron_slm.engine.schedule.search import choose_schedule
from megatron_slm.engine.schedule.simulate import Sizes
from megatron_slm.run.plan import Plan


def message_sizes(plan: Plan, *, message_length: int) -> Sizes:
    """Sizes of a micro-batch, for predictions in tokens and bytes."""
    num_samples = plan.config.training.micro_batch_size
    length = plan.config.data.seq_length // plan.topology.context
    width = sum(reference.hidden_size for reference in plan.models.references)
    message = num_samples * message_length * width * plan.dtype.itemsize
    distills = plan.models.reference is not None and plan.config.distillation.distills
    return Sizes.of_micro_batch(num_samples, length, reference_message=message, distills=distills)


def plan_schedule(plan: Plan) -> Schedule:
    """Choose the schedule that a plan's run starts with."""
    share = plan.selector.expected_share(plan.config.training.train_iters)
    return counted_schedule(
        plan.config,
        plan.models.architecture,
        plan.models.references,
        plan.topology.pipeline,
        plan.num_micro_batches,
        keep_ratio=share,
    )


def counted_schedule(
    config: RunConfig,
    arch: Architecture,
    references: Sequence[Architecture],
    num_stages: int,
    num_micro_batches: int,
    *,
    keep_ratio: float,
) -> Schedule:
    """Choose the schedule for counted costs."""
    costs = arithmetic_costs(
        arch,
        references,
        num_stages,
        seq_length=config.data.seq_length,
        keep_ratio=keep_ratio,
        recomputation=config.parallel.recomputation,
        rows=config.backward,
        distillation=config.distillation,
    )
    flag = config.parallel.reference_schedule
    mode = Mode.of_run(flag, num_stages=num_stages, has_reference=bool(references))
    return choose_schedule(mode, costs, num_micro_batches)
