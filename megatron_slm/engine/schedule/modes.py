"""Modes of a schedule: when the reference's forward passes run. The losses are the same bits in all of them."""

from __future__ import annotations

from enum import Enum


class Mode(Enum):
    """Placement of the reference's forward passes around the model's 1F1B order."""

    CLM = "clm"
    """No reference: the model alone."""
    RIDE_ALONG = "ride-along"
    """Each right before the model's forward pass of the same micro-batch: the plainest mode, the others' oracle."""
    SEQUENTIAL = "sequential"
    """All of a step's before the model's first."""
    BUBBLE = "bubble"
    """All in idle slots of the step before."""
    SKEWED = "skewed"
    """In idle slots of the step before, and on later stages partly in those of the step itself."""

    @classmethod
    def of_run(cls, reference_schedule: str, *, num_stages: int, has_reference: bool) -> Mode:
        """Return a run's mode. With one stage no slot is idle, and the reference rides along.

        Args:
            reference_schedule: value of `--reference-schedule`.
        """
        if not has_reference:
            return cls.CLM
        return cls.RIDE_ALONG if num_stages == 1 else cls(reference_schedule)

    @property
    def works_ahead(self) -> bool:
        """True where a step runs reference forwards of the next one; such a schedule is searched for by its costs."""
        return self in (Mode.BUBBLE, Mode.SKEWED)

    def __str__(self) -> str:
        return self.value
