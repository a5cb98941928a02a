"""All checks, cheapest first; within 8 minutes on one GPU."""

from __future__ import annotations

from gpu_checks import elementwise, environment, kernels, parity, several, speed
from gpu_checks.check import Check

CHECKS = (
    Check(
        name="environment",
        what="optional packages work or are absent",
        run=environment.environment,
        limit_seconds=120,
    ),
    Check(
        name="loss-kernels",
        what="losses, kept rows and gradients are those of full logits in fp64",
        run=kernels.loss_kernels,
        limit_seconds=120,
    ),
    Check(
        name="attention",
        what="every attention that works here equals its definition",
        run=kernels.attention,
        limit_seconds=90,
    ),
    Check(
        name="element-wise",
        what="compiled norms, rotations and activations are those of fp64",
        run=elementwise.elementwise,
        limit_seconds=120,
    ),
    Check(
        name="parity",
        what="20 selective steps have the CPU's losses and kept tokens",
        run=parity.parity,
        limit_seconds=240,
    ),
    Check(
        name="loss-head",
        what="figures only: the loss against full logits",
        run=kernels.loss_head_speed,
        limit_seconds=120,
    ),
    Check(
        name="step-1b",
        what="a 1B-shaped step trains within the planned memory",
        run=speed.step_1b,
        limit_seconds=300,
    ),
    Check(
        name="step-7b",
        what="a 7B-shaped step trains within the planned memory",
        run=speed.step_7b,
        limit_seconds=300,
    ),
    Check(
        name="schedules",
        what="every reference schedule and layout of two ranks has the same losses",
        run=several.schedules,
        limit_seconds=600,
        processes=2,
    ),
    Check(
        name="lost-rank",
        what="a killed rank is named and ends the run",
        run=several.lost_rank,
        limit_seconds=300,
        processes=2,
    ),
)
