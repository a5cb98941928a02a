"""Rounds of pairs, and the checks of measured links."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from megatron_slm.config.preflight import PreflightConfig
from megatron_slm.preflight.check import Check
from megatron_slm.preflight.link_checks import check_clocks, check_links
from megatron_slm.preflight.links import Link, Measurements, rounds


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("num_local", [1, 2, 5])
def test_every_pair_of_nodes_meets_once_and_nobody_has_two_partners(num_nodes: int, num_local: int) -> None:
    nodes = [[n * num_local + i for i in range(num_local)] for n in range(num_nodes)]
    found = rounds(nodes)
    for pairs in found:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    between = [pair for pairs in found for pair in pairs if pair[0] // num_local != pair[1] // num_local]
    assert sorted(between) == list(combinations([ranks[0] for ranks in nodes], 2))
    inside = sorted(pair for pairs in found for pair in pairs if pair[0] // num_local == pair[1] // num_local)
    assert inside == sorted((a, a + 1) for ranks in nodes for a in ranks[:-1])
    assert len(found) <= num_nodes + num_nodes % 2 + 1


def facts(num_nodes: int) -> list[dict[str, Any]]:
    return [{"node": f"node{n}", "rank": n} for n in range(num_nodes)]


def world(
    num_nodes: int, *, rates: dict[tuple[int, int], float] | None = None, offsets: dict[int, float] | None = None
):
    rates, offsets = rates or {}, offsets or {}
    links = [
        Link(
            source=a, target=b, bytes_per_second=rates.get((a, b), 1e9), latency_seconds=1e-5,
            clock_offset_seconds=offsets.get(b, 0.0) - offsets.get(a, 0.0),
        )
        for a in range(num_nodes) for b in range(num_nodes) if a != b
    ]  # fmt: skip
    return Measurements(links=links, all_reduce_bytes_per_second=1e9)


def problems(checks: list[Check]) -> dict[str, list[str]]:
    return {check.name: list(check.problems) for check in checks if check.problems}


def test_a_slow_direction_is_named_against_the_median() -> None:
    found = check_links(facts(4), world(4, rates={(2, 1): 3e8}), PreflightConfig())
    assert problems(found) == {"links between nodes": ["node2 (rank 2) to node1 (rank 1): 2.4 Gbit/s, 30% of median"]}
    assert problems(check_links(facts(4), world(4, rates={(2, 1): 3e8}), PreflightConfig(slow_link_share=0.2))) == {}


def test_with_one_cable_the_slow_direction_is_named_against_the_other() -> None:
    found = problems(check_links(facts(2), world(2, rates={(1, 0): 1e8}), PreflightConfig()))
    assert list(found) == ["links between nodes"]
    assert found["links between nodes"][0].startswith("node1 (rank 1) to node0")


def test_the_least_bandwidth_that_was_asked_for() -> None:
    limits = PreflightConfig(min_bandwidth_gbps=7.9)
    assert problems(check_links(facts(3), world(3), limits)) == {}
    found = problems(check_links(facts(3), world(3, rates={(0, 2): 9.8e8}), limits))
    assert found == {"least bandwidth": ["node0 (rank 0) to node2 (rank 2): 7.84 Gbit/s"]}


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_clock_that_is_wrong_is_named_whichever_it_is(wrong: int) -> None:
    check = check_clocks(facts(3), world(3, offsets={wrong: -1.5}), PreflightConfig())
    assert (check.name, check.status) == ("clocks", "failed")
    assert check.problems == (f"node{wrong}: -1.500 s from the other nodes",)


def test_clocks_within_the_limit_pass() -> None:
    assert check_clocks(facts(3), world(3, offsets={1: 0.9}), PreflightConfig()).status == "passed"
