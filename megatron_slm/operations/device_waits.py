"""Finds out what a rank waits for whose host waits for its GPU.

On NCCL a message or a collective is a kernel: the call that issues it returns at once, and the host stops at the next
value that it reads from the device. Neither the call stack nor a wait in Python shows then that a peer is missing.
torch's flight recorder does (`init_distributed` turns it on): it lists what was issued and has not ended.
"""

from __future__ import annotations

import json
import linecache
import re
import sys
import threading

from megatron_slm.device import on_gpu

_READS_DEVICE = re.compile(r"\.(tolist|item|cpu|nonzero|synchronize|to|masked_select)\(|\bfloat\(|\bint\(|\bbool\(")
"""Calls that wait for the device, in a line of Python."""


def waits_on_device() -> str | None:
    """Return what this rank's GPU waits for, if its host waits for the GPU; None otherwise, and without a GPU."""
    if not on_gpu() or not _host_waits():
        return None
    from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]  # no public name

    communication = oldest_active(_dump_fr_trace_json(True, True))
    return None if communication is None else f"its GPU is in {communication}"


def oldest_active(trace: bytes | str) -> str | None:
    """Return the communication that was issued first of those that have not ended; None if all have.

    Args:
        trace: JSON of torch's flight recorder.
    """
    entries = json.loads(trace).get("entries", [])
    active = [entry for entry in entries if entry["state"] != "completed" and not entry.get("retired", False)]
    if not active:
        return None
    first = min(active, key=lambda entry: entry["record_id"])
    group = first["process_group"][-1]
    return f"{first['profiling_name']} of group {group}, issued {len(active) - 1} communications before the last"


def _host_waits() -> bool:
    """Tell whether the training thread, or one of autograd's, is at a line that reads a value from the device."""
    for thread, frame in sys._current_frames().items():
        if thread != threading.get_ident():
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            if _READS_DEVICE.search(line):
                return True
    return False
