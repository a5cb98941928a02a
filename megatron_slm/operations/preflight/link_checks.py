"""What the measured links and clocks say. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megatron_slm.config.preflight import PreflightConfig
from megatron_slm.operations.preflight.facts import Facts
from megatron_slm.operations.preflight.links import Link, Measurements

Finding = tuple[str, str, list[str], str, bool]
"""Name, what was found, problems, fix, and whether the problems end the run."""


def check_links(facts: Sequence[Facts], measured: Measurements, limits: PreflightConfig) -> list[Finding]:
    """Links between nodes, links inside nodes, and the all-reduce over all ranks."""
    nodes = [rank["node"] for rank in facts]
    between = [link for link in measured.links if nodes[link.source] != nodes[link.target]]
    inside = [link for link in measured.links if nodes[link.source] == nodes[link.target]]
    findings = []
    if between:
        findings.append(_too_slow(between, facts, limits))
        findings.append(_slow("links between nodes", between, facts, limits))
    if inside:
        findings.append(_slow("links inside nodes", inside, facts, limits))
    rate = measured.all_reduce_bytes_per_second
    if rate is not None:
        findings.append(("all-reduce over all ranks", f"bus bandwidth {_gbps(rate)} Gbit/s", [], "", False))
    return findings


def _too_slow(links: Sequence[Link], facts: Sequence[Facts], limits: PreflightConfig) -> Finding:
    """Against what was asked for; this ends the run."""
    least = limits.min_bandwidth_gbps
    below = [link for link in links if least is not None and link.bytes_per_second * 8e-9 < least]
    problems = [f"{_ends(link, facts)}: {_gbps(link.bytes_per_second)} Gbit/s" for link in below]
    asked = "no least one asked for" if least is None else f"--min-bandwidth-gbps {least:g}"
    return "least bandwidth", asked, problems, _FIX, True


def _slow(name: str, links: Sequence[Link], facts: Sequence[Facts], limits: PreflightConfig) -> Finding:
    """Against the other links of its kind; of two links, against the faster one."""
    rates = [link.bytes_per_second for link in links]
    median = statistics.median_high(rates)
    latency = statistics.median(link.latency_seconds for link in links)
    problems = [
        f"{_ends(link, facts)}: {_gbps(link.bytes_per_second)} Gbit/s, {link.bytes_per_second / median:.0%} of median"
        for link in sorted(links, key=lambda link: link.bytes_per_second)
        if link.bytes_per_second < limits.slow_link_share * median
    ]
    low, high = _gbps(min(rates)), _gbps(max(rates))
    found = f"{len(links)}: median {_gbps(median)} Gbit/s ({low} to {high}), latency {latency * 1e6:,.0f} us"
    return name, found, problems, _FIX, False


_FIX = (
    "look at the cable, switch port and NIC of the node named most often, and at the interface in use (NCCL_DEBUG=INFO)"
)


def check_clocks(facts: Sequence[Facts], measured: Measurements, limits: PreflightConfig) -> Finding:
    """Each node's clock against the median of all; node 0's partners tell theirs."""
    nodes = [rank["node"] for rank in facts]
    offsets = {nodes[0]: 0.0}
    error = 0.0
    for link in measured.links:
        if link.source == 0 and nodes[link.target] != nodes[0]:
            offsets[nodes[link.target]] = link.clock_offset_seconds
            error = max(error, link.latency_seconds)
    middle = statistics.median_low(offsets.values())
    problems = [
        f"{node}: {offset - middle:+.3f} s from the other nodes"
        for node, offset in offsets.items()
        if abs(offset - middle) > limits.max_clock_skew_seconds
    ]
    spread = max(offsets.values()) - min(offsets.values())
    found = f"within {spread * 1e3:,.3f} ms (+- {error * 1e3:,.3f} ms)" if len(offsets) > 1 else "one node"
    return "clocks", found, problems, "synchronise the clocks (chrony or ntpd)", True


def _ends(link: Link, facts: Sequence[Facts]) -> str:
    ends = []
    for rank in (link.source, link.target):
        ends.append(f"{facts[rank]['node']} (rank {rank})")
    return " to ".join(ends)


def _gbps(bytes_per_second: float) -> str:
    return f"{bytes_per_second * 8e-9:.3g}"
