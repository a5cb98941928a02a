"""Stopping cleanly when the scheduler or the user asks."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class StopRequest:
    """Set by SIGTERM and SIGINT; agreed on by all ranks once a step, so that they stop after the same one.

    A second SIGINT (Ctrl-C) ends the process at once. A second SIGTERM does not: launchers send it again to
    processes that they were asked to end, while the checkpoint is being written.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._asked = device, False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def agreed(self, must_stop: bool = False) -> bool:
        """Whether any rank was asked to stop, or must. Collective over the world.

        Args:
            must_stop: this rank cannot go on.
        """
        flag = torch.tensor(float(self._asked or must_stop), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
