"""Context of a pipeline stage: everything its engine works with beside the module."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_slm.engine.rows import RowSampler
from megatron_slm.engine.schedule.programs import Schedule
from megatron_slm.engine.schedule.simulate import Sizes
from megatron_slm.engine.timers import Timers
from megatron_slm.loss.objective import Objective
from megatron_slm.parallel.activity import Activity
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.reference.pair import ReferencePair
from megatron_slm.reference.stored import StoredScores


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """Context of this stage, beside the module that DeepSpeed trains."""

    topology: Topology
    objective: Objective
    reference: FrozenStage | ReferencePair | None
    scores: StoredScores | None
    """Stored statistics, in place of a reference that computes them."""
    schedule: Schedule
    """The first schedule; `SelectiveEngine.adopt` replaces it."""
    num_measured_steps: int = 0
    """First steps that are timed; the schedule is chosen again for the costs they had."""
    sizes: Sizes
    message_shape: tuple[int, int, int]
    """Hidden states between the model's stages: [s or s / size, b, d]."""
    dtype: torch.dtype
    rows: RowSampler | None = None
    """Chooses the rows that the blocks' backward passes run on; None for all."""
    keeps_documents_apart: bool = False
    """Layers must know the documents of a micro-batch, so that every stage reads its micro-batches."""
    timers: Timers = field(default_factory=Timers)
    activity: Activity = field(default_factory=Activity)
