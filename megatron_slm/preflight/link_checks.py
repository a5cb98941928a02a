"""Checks of the measured links and clocks. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megatron_slm.config.preflight import PreflightConfig
from megatron_slm.preflight.check import Check
from megatron_slm.preflight.facts import Facts
from megatron_slm.preflight.links import Link, Measurements

_FIX = "check the cable, switch port and NIC of the node named most often, and the interface in use (NCCL_DEBUG=INFO)"


def check_links(facts: Sequence[Facts], measured: Measurements, limits: PreflightConfig) -> list[Check]:
    """Check links between nodes and inside nodes, and report the all-reduce over all ranks."""
    nodes = [rank["node"] for rank in facts]
    between = [link for link in measured.links if nodes[link.source] != nodes[link.target]]
    inside = [link for link in measured.links if nodes[link.source] == nodes[link.target]]
    checks = []
    if between:
        checks.append(_minimum_bandwidth(between, facts, limits))
        checks.append(_relative_bandwidth("links between nodes", between, facts, limits))
    if inside:
        checks.append(_relative_bandwidth("links inside nodes", inside, facts, limits))
    rate = measured.all_reduce_bytes_per_second
    if rate is not None:
        checks.append(Check.of("all-reduce over all ranks", f"bus bandwidth {_gbps(rate)} Gbit/s", [], ""))
    return checks


def _minimum_bandwidth(links: Sequence[Link], facts: Sequence[Facts], limits: PreflightConfig) -> Check:
    """Compare links with --min-bandwidth-gbps."""
    least = limits.min_bandwidth_gbps
    below = [link for link in links if least is not None and link.bytes_per_second * 8e-9 < least]
    problems = [f"{_ends(link, facts)}: {_gbps(link.bytes_per_second)} Gbit/s" for link in below]
    required = "--min-bandwidth-gbps is not set" if least is None else f"--min-bandwidth-gbps {least:g}"
    return Check.of("least bandwidth", required, problems, _FIX)


def _relative_bandwidth(name: str, links: Sequence[Link], facts: Sequence[Facts], limits: PreflightConfig) -> Check:
    """Compare links with the median of their kind; of two links, with the faster one."""
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
    return Check.of(name, found, problems, _FIX, severity="warning")


def check_clocks(facts: Sequence[Facts], measured: Measurements, limits: PreflightConfig) -> Check:
    """Compare each node's clock with the median of all; offsets are those measured from rank 0."""
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
    return Check.of("clocks", found, problems, "synchronize the clocks (chrony or ntpd)")


def _ends(link: Link, facts: Sequence[Facts]) -> str:
    ends = []
    for rank in (link.source, link.target):
        ends.append(f"{facts[rank]['node']} (rank {rank})")
    return " to ".join(ends)


def _gbps(bytes_per_second: float) -> str:
    return f"{bytes_per_second * 8e-9:.3g}"
