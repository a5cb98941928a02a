"""Compares the facts of all ranks. Pure: facts and measurements in, checks out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_slm.config.preflight import PreflightConfig
from megatron_slm.preflight.check import Check, Status
from megatron_slm.preflight.facts import Facts
from megatron_slm.preflight.link_checks import check_clocks, check_links
from megatron_slm.preflight.links import Measurements

_NO_GPU_ERRORS = ("[N/A]", "N/A", "0", "")
"""Values of nvidia-smi for none, or for a GPU without ECC."""
_UNLIMITED = -1


def evaluate(facts: Sequence[Facts], measured: Measurements | None, limits: PreflightConfig) -> list[Check]:
    """Run all checks.

    Args:
        facts: of all ranks, by rank.
        measured: None if nothing was measured, because nodes cannot connect to each other.
    """
    first = [rank for rank in facts if "files" in rank]
    checks = [
        _ranks(facts),
        _alike("versions", facts, "install the same versions on all nodes"),
        _alike("configuration", first, "start all nodes with the same command", field="config"),
        _alike("environment", facts, "set it on all nodes, e.g. in .deepspeed_env", severity="warning"),
        _files(first),
        _writable(first),
        *_disk(first),
        _ports(first),
        *([] if measured is None else check_links(facts, measured, limits)),
        *([] if measured is None else [check_clocks(facts, measured, limits)]),
        _threads(facts),
        _limits(facts, limits),
        _shared_memory(first, limits),
        *_gpus(facts, first, limits),
    ]  # fmt: skip
    if limits.preflight_strict:
        checks = [replace(check, status="failed") if check.status == "warning" else check for check in checks]
    return checks


def majority_and_others(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common value (the first node's on a tie), and the nodes with another one.

    Args:
        values: hashable values by node.
    """
    counted = Counter(values.values())
    most = max(counted.values())
    common = next(value for value in values.values() if counted[value] == most)
    return common, {node: value for node, value in values.items() if value != common}


def _ranks(facts: Sequence[Facts]) -> Check:
    """All nodes have the same number of ranks, and the ranks of a node are numbered from 0."""
    nodes: dict[str, list[int]] = {}
    for rank in facts:
        nodes.setdefault(rank["node"], []).append(rank["local_rank"])
    problems = [
        f"{node}: LOCAL_RANKs {sorted(local)}"
        for node, local in nodes.items()
        if sorted(local) != list(range(len(local)))
    ]
    severity: Status = "failed" if problems else "warning"
    size, others = majority_and_others({node: len(local) for node, local in nodes.items()})
    problems += [f"{node}: {count} ranks (others {size})" for node, count in others.items()]
    found = f"{len(facts)} ranks on {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}: {', '.join(nodes)}"
    fix = "give every node the same number of slots in the hostfile, so that neighbors share nodes"
    return Check.of("nodes and ranks", found, problems, fix, severity=severity)


def _alike(
    name: str, facts: Sequence[Facts], fix: str, *, field: str | None = None, severity: Status = "failed"
) -> Check:
    """One mapping among the facts is the same on all ranks; if ranks of a node differ, it has both values."""
    field = field or name
    problems = []
    for key in sorted({key for rank in facts for key in rank[field]}):
        seen: dict[str, dict[str, None]] = {}
        for rank in facts:
            seen.setdefault(rank["node"], {})[rank[field].get(key, "none")] = None
        common, others = majority_and_others({node: " and ".join(values) for node, values in seen.items()})
        problems += [f"{node}: {key} {value} (others {common})" for node, value in others.items()]
    shown = facts[0][field]
    words = [f"{key} {shown[key]}" for key in ("python", "torch", "deepspeed", "megatron_slm", "CUDA") if key in shown]
    return Check.of(name, ", ".join(words) or f"{len(shown)} identical values", problems, fix, severity=severity)


def _files(first: Sequence[Facts]) -> Check:
    names = sorted({name for node in first for name in node["files"]})
    problems, count = [], 0
    for name in names:
        seen = {node["node"]: node["files"].get(name) for node in first}
        flag, _, path = name.partition(" ")
        optional = (
            flag == "--load" or (flag == "corpus" and not path.endswith((".idx", ".bin"))) or "_loss_mask" in path
        )
        common, others = majority_and_others(seen)
        present = common is not None
        count += present
        if not present and not others and not optional:
            problems.append(f"all nodes: {name} is missing")
        for node, value in others.items():
            problems.append(f"{node}: {name} {_presence(value, present)}")
    fix = "copy the files to every node, or put them on a file system that all nodes mount"
    return Check.of("files", f"{count} identical files and folders", problems, fix)


def _presence(value: str | None, present_elsewhere: bool) -> str:
    if value is None:
        return "is missing or unreadable (others have it)"
    return "differs from that of most nodes" if present_elsewhere else "exists (others do not have it)"


def _writable(first: Sequence[Facts]) -> Check:
    problems = [f"{node['node']}: {what} ({why})" for node in first for what, why in node["not_writable"].items()]
    fix = "choose another folder, or correct its permissions"
    return Check.of("write permission", "run, cache and checkpoint folders", problems, fix)


def _disk(first: Sequence[Facts]) -> list[Check]:
    """There is space for the run's checkpoints, in a folder that all nodes share."""
    if first[0]["disk"] is None:
        return [Check.of("room for checkpoints", "the run writes none", [], "")]
    problems = []
    for node in first:
        disk = node["disk"]
        needed = (disk["checkpoint"] or 0) * disk["more"]
        if disk["free"] < needed:
            problems.append(f"{node['node']}: {_gib(disk['free'])} free in {disk['folder']}, {_gib(needed)} needed")
    disk = first[0]["disk"]
    size = "of unknown size" if disk["checkpoint"] is None else f"of {_gib(disk['checkpoint'])}"
    checkpoints = "1 checkpoint" if disk["more"] == 1 else f"{disk['more']} checkpoints"
    found = f"{checkpoints} {size} to write, {_gib(disk['free'])} free"
    fix = "free space, save to another disk, or keep fewer checkpoints (--keep-last)"
    checks = [Check.of("room for checkpoints", found, problems, fix)]
    if len(first) > 1:
        blind = [
            f"{node['node']}: does not see files that {first[0]['node']} writes"
            for node in first
            if node["sees_save"] is False
        ]
        fix = "save to a file system that all nodes share: every rank writes a part of each checkpoint"
        checks.append(Check.of("shared checkpoint folder", disk["folder"], blind, fix))
    return checks


def _ports(first: Sequence[Facts]) -> Check:
    problems = [
        f"{node['node']}: cannot connect to {other}: {why}"
        for node in first
        for other, why in node["unreachable"].items()
    ]
    fix = (
        "open all ports between the nodes, map host names to addresses of the cluster's network in /etc/hosts or DNS, "
        "or name its interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    )
    return Check.of("connections", f"{len(first) * (len(first) - 1)} between nodes", problems, fix)


def _threads(facts: Sequence[Facts]) -> Check:
    nodes: dict[str, list[Facts]] = {}
    for rank in facts:
        nodes.setdefault(rank["node"], []).append(rank)
    problems = []
    for node, ranks in nodes.items():
        threads, cores = sum(rank["threads"] for rank in ranks), ranks[0]["cores"]
        if threads > cores and ranks[0]["threads"] > 1:
            problems.append(f"{node}: {len(ranks)} ranks x {ranks[0]['threads']} threads on {cores} cores")
    found = f"{facts[0]['threads']} per rank, {facts[0]['cores']} cores"
    fix = "set OMP_NUM_THREADS to cores / ranks of a node"
    return Check.of("threads", found, problems, fix, severity="warning")


def _limits(facts: Sequence[Facts], limits: PreflightConfig) -> Check:
    problems: dict[str, None] = {}  # an ordered set
    for rank in facts:
        files, locked = rank["limits"]["open files"], rank["limits"]["locked memory"]
        if 0 <= files < limits.min_open_files:
            problems[f"{rank['node']}: {files} open files, --min-open-files {limits.min_open_files}"] = None
        if rank["gpu"] is not None and locked != _UNLIMITED:
            problems[f"{rank['node']}: {locked // 1024} KiB of locked memory; InfiniBand needs unlimited"] = None
    fix = "raise ulimit -n and -l in limits.conf, the container or sshd's service"
    most = facts[0]["limits"]["open files"]
    found = f"{'unlimited' if most == _UNLIMITED else most} open files"
    return Check.of("limits", found, list(problems), fix, severity="warning")


def _shared_memory(first: Sequence[Facts], limits: PreflightConfig) -> Check:
    problems = [
        f"{node['node']}: /dev/shm has {node['shm_mib']:.0f} MiB, --min-shm-mib {limits.min_shm_mib}"
        for node in first
        if node["shm_mib"] < limits.min_shm_mib
    ]
    found = f"{first[0]['shm_mib']:,.0f} MiB"
    fix = "start the container with --shm-size or --ipc=host"
    return Check.of("shared memory", found, problems, fix, severity="warning")


def _gpus(facts: Sequence[Facts], first: Sequence[Facts], limits: PreflightConfig) -> list[Check]:
    if all(rank["gpu"] is None for rank in facts):
        return []
    problems = []
    for rank in facts:
        if rank["gpu"] is not None and rank["gpu"][0] < limits.min_free_gpu_share * rank["gpu"][1]:
            free, total = rank["gpu"]
            problems.append(f"{rank['node']}: GPU {rank['local_rank']}: {_gib(free)} of {_gib(total)} free")
    found = f"{_gib(min(rank['gpu'][0] for rank in facts if rank['gpu']))} free on the fullest"
    checks = [Check.of("GPU memory", found, problems, "end the other processes on it (nvidia-smi)")]
    states = [(node["node"], gpu) for node in first for gpu in node["gpus"]]
    errors = [f"{n}: GPU {g['index']}: {g['ecc']} uncorrected" for n, g in states if g["ecc"] not in _NO_GPU_ERRORS]
    checks.append(Check.of("GPU memory errors", f"{len(states)} GPUs checked", errors, "reset or replace the GPU"))
    busy = [f"{n}: GPU {g['index']}: {g['processes']}" for n, g in states if g["processes"]]
    fix = "end them, or leave the GPU out of the hostfile"
    checks.append(Check.of("other GPU processes", "none", busy, fix, severity="warning"))
    return checks


def _gib(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.1f} KiB"
