"""GPUs that can be planned for: their makers' figures, none of them measured here."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator as its data sheet describes it (NVIDIA's; see docs/planning.md for which)."""

    memory_bytes: int
    """What the driver shows as the total."""
    bf16_flops: float
    """Peak dense floating-point operations per second in bf16 with fp32 accumulation."""
    fp32_flops: float
    """The same in fp32, without TF32, which is off by default in torch."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """To the other GPUs of its node, in one direction."""
    network_bits_per_second: float
    """Its share of the node's network, in one direction."""

    def flops(self, *, bf16: bool) -> float:
        """Peak operations per second at a run's precision."""
        return self.bf16_flops if bf16 else self.fp32_flops


def _gpu(mib: int, bf16: float, fp32: float, memory: float, link: float, network: float) -> Gpu:
    """From MiB, TFLOP/s, TFLOP/s, TB/s, GB/s (one direction), Gb/s."""
    return Gpu(
        memory_bytes=mib * 2**20,
        bf16_flops=bf16 * 1e12,
        fp32_flops=fp32 * 1e12,
        memory_bytes_per_second=memory * 1e12,
        link_bytes_per_second=link * 1e9,
        network_bits_per_second=network * 1e9,
    )


GPUS: dict[str, Gpu] = {
    "b200": _gpu(183359, 2250, 75, 8.0, 900, 400),
    "h200": _gpu(143771, 989, 67, 4.8, 450, 400),
    "h100": _gpu(81559, 989, 67, 3.35, 450, 400),
    "h100-pcie": _gpu(81559, 756, 51, 2.0, 64, 200),
    "h800": _gpu(81559, 989, 67, 3.35, 200, 400),
    "a100-80g": _gpu(81920, 312, 19.5, 2.039, 300, 200),
    "a100-40g": _gpu(40960, 312, 19.5, 1.555, 300, 200),
    "l40s": _gpu(46068, 362, 91.6, 0.864, 32, 100),
    "rtx4090": _gpu(24564, 165, 82.6, 1.008, 32, 50),
}
"""By the name of `--gpu`."""


_DRIVER_NAMES = {
    "B200": "b200",
    "H200": "h200",
    "H100 PCIe": "h100-pcie",
    "H100 80GB": "h100",
    "H800": "h800",
    "A100-SXM4-80GB": "a100-80g",
    "A100 80GB": "a100-80g",
    "A100-SXM4-40GB": "a100-40g",
    "A100-PCIE-40GB": "a100-40g",
    "L40S": "l40s",
    "RTX 4090": "rtx4090",
}


def named_gpu(driver_name: str) -> Gpu | None:
    """The GPU that a driver calls so (`NVIDIA H100 80GB HBM3`); None where it is none of `GPUS`."""
    return next((GPUS[name] for part, name in _DRIVER_NAMES.items() if part in driver_name), None)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines, and what is assumed of them beyond their data sheets."""

    gpu: Gpu
    num_nodes: int
    gpus_per_node: int
    efficiency: float = 0.4
    """Share of the peak that a stage's forward and backward passes reach, norms and attention included."""
    link_efficiency: float = 0.75
    """Share of a link's bandwidth that collectives reach."""
    memory_share: float = 0.9
    """Share of the memory that tensors may take; the rest is for CUDA, NCCL and the allocator's fragments."""

    def __post_init__(self) -> None:
        for name in ("num_nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                flag = {"num_nodes": "--nodes", "gpus_per_node": "--gpus-per-node"}[name]
                raise ConfigError(flag, getattr(self, name), "is at least 1", "give a positive number")
        for name in ("efficiency", "link_efficiency", "memory_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    "--" + name.replace("_", "-"), getattr(self, name), "lies in (0, 1]", "give a share such as 0.4"
                )

    @property
    def num_gpus(self) -> int:
        """GPUs in all."""
        return self.num_nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Memory of one GPU that tensors may take."""
        return self.gpu.memory_bytes * self.memory_share

    def ring_bytes_per_second(self, num_ranks: int, stride: int) -> float:
        """What a ring over `num_ranks` ranks, `stride` apart, moves through each of them.

        Inside a node it runs on the links. Across nodes it is as fast as the narrowest place between two nodes:
        the network shares of those of its ranks that stand in one node.
        """
        inside = self.gpu.link_bytes_per_second
        if (num_ranks - 1) * stride < self.gpus_per_node:
            return inside * self.link_efficiency
        together = max(1, min(num_ranks, self.gpus_per_node // stride))
        return min(inside, together * self.gpu.network_bits_per_second / 8) * self.link_efficiency

    def hop_bytes_per_second(self, stride: int) -> float:
        """What a message between two ranks `stride` apart moves at."""
        network = self.gpu.network_bits_per_second / 8
        return (self.gpu.link_bytes_per_second if stride < self.gpus_per_node else network) * self.link_efficiency
