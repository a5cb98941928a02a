"""From what all ranks saw to one verdict. Pure: facts and measurements in, checks out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_slm.config.preflight import PreflightConfig
from megatron_slm.operations.preflight.facts import Facts
from megatron_slm.operations.preflight.link_checks import check_clocks, check_links
from megatron_slm.operations.preflight.links import Measurements

Status = Literal["passed", "warning", "failed"]
_GPU_ERRORS_UNKNOWN = ("[N/A]", "N/A", "0", "")
_ALL_MEMORY_LOCKABLE = -1


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the table."""

    name: str
    status: Status
    found: str
    """What holds on the nodes, in a few words."""
    problems: tuple[str, ...] = ()
    """What does not, each beginning with the node it is about."""
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate(facts: Sequence[Facts], measured: Measurements | None, limits: PreflightConfig) -> list[Check]:
    """All checks.

    Args:
        facts: of all ranks, in order.
        measured: None where nodes cannot reach each other, so that nothing could be.
    """
    first = [rank for rank in facts if "files" in rank]
    checks = [
        _ranks(facts),
        _alike("versions", facts, "install the same everywhere"),
        _alike("configuration", first, "start all nodes with one command", field="config"),
        _alike("environment", facts, "set it alike, for example in .deepspeed_env", wrong="warning"),
        _files(first),
        _writable(first),
        *_disk(first),
        _ports(first),
        *([] if measured is None else _measured(facts, measured, limits)),
        _threads(facts),
        _limits(facts, limits),
        _shared_memory(first, limits),
        *_gpus(facts, first, limits),
    ]  # fmt: skip
    if limits.preflight_strict:
        checks = [_with_status(check, "failed") if check.status == "warning" else check for check in checks]
    return checks


def majority_and_others(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most nodes have (of equals the first node's), and the nodes with another one.

    Args:
        values: by node; hashable.
    """
    counted = Counter(values.values())
    most = max(counted.values())
    common = next(value for value in values.values() if counted[value] == most)
    return common, {node: value for node, value in values.items() if value != common}


def _with_status(check: Check, status: Status) -> Check:
    return Check(name=check.name, status=status, found=check.found, problems=check.problems, fix=check.fix)


def _check(name: str, found: str, problems: Sequence[str], fix: str, *, wrong: Status = "failed") -> Check:
    status: Status = wrong if problems else "passed"
    return Check(name=name, status=status, found=found, problems=tuple(problems), fix=fix if problems else "")


def _ranks(facts: Sequence[Facts]) -> Check:
    """Each node has as many ranks as the others, and its ranks have numbers of their own."""
    nodes: dict[str, list[int]] = {}
    for rank in facts:
        nodes.setdefault(rank["node"], []).append(rank["local_rank"])
    problems = [
        f"{node}: LOCAL_RANKs {sorted(local)}"
        for node, local in nodes.items()
        if sorted(local) != list(range(len(local)))
    ]
    wrong: Status = "failed" if problems else "warning"
    size, others = majority_and_others({node: len(local) for node, local in nodes.items()})
    problems += [f"{node}: {count} ranks (others {size})" for node, count in others.items()]
    found = f"{len(facts)} ranks on {len(nodes)} node{'s' * (len(nodes) != 1)}: {', '.join(nodes)}"
    fix = "give every node the same slots in the hostfile, so that neighbours share nodes"
    return _check("nodes and ranks", found, problems, fix, wrong=wrong)


def _alike(name: str, facts: Sequence[Facts], fix: str, *, field: str | None = None, wrong: Status = "failed") -> Check:
    """Whether one mapping among the facts is the same on all ranks; a node whose ranks differ has both values."""
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
    return _check(name, ", ".join(words) or f"{len(shown)} values alike", problems, fix, wrong=wrong)


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
            problems.append(f"all nodes: {name} is not there")
        for node, value in others.items():
            problems.append(f"{node}: {name} {_presence(value, present)}")
    fix = "copy the files to every node, or put them on a shared file system and mount it everywhere"
    return _check("files", f"{count} files and folders alike", problems, fix)


def _presence(value: str | None, present_elsewhere: bool) -> str:
    if value is None:
        return "is not there, or cannot be read (others have it)"
    return "has another content (than on most nodes)" if present_elsewhere else "is there (others do not have it)"


def _writable(first: Sequence[Facts]) -> Check:
    problems = [f"{node['node']}: {what} ({why})" for node in first for what, why in node["not_writable"].items()]
    return _check(
        "write permission", "run, cache and checkpoint folders", problems, "choose another folder, or mend it"
    )


def _disk(first: Sequence[Facts]) -> list[Check]:
    """Room for checkpoints, and one folder for all nodes."""
    if first[0]["disk"] is None:
        return [_check("room for checkpoints", "the run writes none", [], "")]
    problems, found = [], ""
    for node in first:
        disk = node["disk"]
        needed = (disk["checkpoint"] or 0) * disk["more"]
        if disk["free"] < needed:
            problems.append(f"{node['node']}: {_gib(disk['free'])} free in {disk['folder']}, {_gib(needed)} needed")
    disk = first[0]["disk"]
    one = "of unknown size" if disk["checkpoint"] is None else f"of {_gib(disk['checkpoint'])}"
    found = f"{disk['more']} checkpoint{'s' * (disk['more'] != 1)} {one} to come, {_gib(disk['free'])} free"
    fix = "make room, save to another disk, or keep fewer (--keep-last)"
    checks = [_check("room for checkpoints", found, problems, fix)]
    if len(first) > 1:
        blind = [
            f"{node['node']}: does not see what {first[0]['node']} writes"
            for node in first
            if node["sees_save"] is False
        ]
        fix = "save to a file system that all nodes share: every rank writes a part of a checkpoint"
        checks.append(_check("shared checkpoint folder", disk["folder"], blind, fix))
    return checks


def _ports(first: Sequence[Facts]) -> Check:
    problems = [
        f"{node['node']}: cannot connect to {other}: {why}"
        for node in first
        for other, why in node["unreachable"].items()
    ]
    fix = (
        "let the nodes connect to each other at any port, give host names an address of the cluster's network in "
        "/etc/hosts or DNS, or name its interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    )
    return _check("connections", f"{len(first) * (len(first) - 1)} between nodes", problems, fix)


def _measured(facts: Sequence[Facts], measured: Measurements, limits: PreflightConfig) -> list[Check]:
    checks = []
    for name, found, problems, fix, fails in (
        *check_links(facts, measured, limits), check_clocks(facts, measured, limits)
    ):  # fmt: skip
        checks.append(_check(name, found, problems, fix, wrong="failed" if fails else "warning"))
    return checks


def _threads(facts: Sequence[Facts]) -> Check:
    nodes: dict[str, list[Facts]] = {}
    for rank in facts:
        nodes.setdefault(rank["node"], []).append(rank)
    problems = []
    for node, ranks in nodes.items():
        threads, cores = sum(rank["threads"] for rank in ranks), ranks[0]["cores"]
        if threads > cores and ranks[0]["threads"] > 1:
            problems.append(f"{node}: {len(ranks)} ranks x {ranks[0]['threads']} threads on {cores} cores")
    found = f"{facts[0]['threads']} a rank, {facts[0]['cores']} cores"
    return _check("threads", found, problems, "set OMP_NUM_THREADS to cores / ranks of a node", wrong="warning")


def _limits(facts: Sequence[Facts], limits: PreflightConfig) -> Check:
    problems: dict[str, None] = {}  # each once, in order
    for rank in facts:
        files, locked = rank["limits"]["open files"], rank["limits"]["locked memory"]
        if 0 <= files < limits.min_open_files:
            problems[f"{rank['node']}: {files} open files, --min-open-files {limits.min_open_files}"] = None
        if rank["gpu"] is not None and locked != _ALL_MEMORY_LOCKABLE:
            problems[f"{rank['node']}: {locked // 1024} KiB of locked memory; InfiniBand needs it without limit"] = None
    fix = "raise ulimit -n and -l in limits.conf, the container or sshd's service"
    shown = facts[0]["limits"]["open files"]
    return _check(
        "limits", f"{'any number of' if shown < 0 else shown} open files", list(problems), fix, wrong="warning"
    )


def _shared_memory(first: Sequence[Facts], limits: PreflightConfig) -> Check:
    problems = [
        f"{node['node']}: /dev/shm has {node['shm_mib']:.0f} MiB, --min-shm-mib {limits.min_shm_mib}"
        for node in first
        if node["shm_mib"] < limits.min_shm_mib
    ]
    found = f"{first[0]['shm_mib']:,.0f} MiB"
    return _check(
        "shared memory", found, problems, "start the container with --shm-size or --ipc=host", wrong="warning"
    )


def _gpus(facts: Sequence[Facts], first: Sequence[Facts], limits: PreflightConfig) -> list[Check]:
    if all(rank["gpu"] is None for rank in facts):
        return []
    problems = []
    for rank in facts:
        if rank["gpu"] is not None and rank["gpu"][0] < limits.min_free_gpu_share * rank["gpu"][1]:
            free, total = rank["gpu"]
            problems.append(f"{rank['node']}: GPU {rank['local_rank']}: {_gib(free)} of {_gib(total)} free")
    found = f"{_gib(min(rank['gpu'][0] for rank in facts if rank['gpu']))} free on the fullest"
    checks = [_check("GPU memory", found, problems, "end what else runs there (nvidia-smi)")]
    states = [(node["node"], gpu) for node in first for gpu in node["gpus"]]
    errors = [
        f"{n}: GPU {g['index']}: {g['ecc']} uncorrected" for n, g in states if g["ecc"] not in _GPU_ERRORS_UNKNOWN
    ]
    checks.append(_check("GPU memory errors", f"{len(states)} GPUs asked", errors, "reset or replace the GPU"))
    busy = [f"{n}: GPU {g['index']}: {g['processes']}" for n, g in states if g["processes"]]
    fix = "end them, or leave the GPU out of the hostfile"
    checks.append(_check("other GPU processes", "none", busy, fix, wrong="warning"))
    return checks


def _gib(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.1f} KiB"
