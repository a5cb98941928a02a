"""GPUs known to the planner, with their data sheets' figures; none were measured."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Data sheet figures of one GPU (NVIDIA's; docs/planning.md lists the sources)."""

    memory_bytes: int
    """Total memory as reported by the driver."""
    bf16_flops: float
    """Peak dense FLOP/s in bf16 with fp32 accumulation."""
    fp32_flops: float
    """Peak FLOP/s in fp32 without TF32, which torch disables by default."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """Bandwidth to the other GPUs of its node, in one direction."""
    network_bits_per_second: float
    """Its share of the node's network, in one direction."""

    def flops(self, *, bf16: bool) -> float:
        """Return peak FLOP/s at a run's precision."""
        return self.bf16_flops if bf16 else self.fp32_flops


def _gpu(mib: int, bf16: float, fp32: float, memory: float, link: float, network: float) -> Gpu:
    """Build a GPU from MiB, TFLOP/s, TFLOP/s, TB/s, GB/s (one direction), Gb/s."""
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
"""GPUs by their names in `--gpu`."""


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
    """Return the GPU with a driver's name such as `NVIDIA H100 80GB HBM3`; None if unknown."""
    return next((GPUS[name] for part, name in _DRIVER_NAMES.items() if part in driver_name), None)


HOST_GIB_PER_GPU = 128
"""Host memory of a node for each of its GPUs, by default: nodes of eight usually have 1 TiB or more."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines, and assumptions about them beyond the data sheets."""

    gpu: Gpu
    num_nodes: int
    gpus_per_node: int
    efficiency: float | None = None
    """Share of peak FLOP/s reached in a stage's forward and backward passes, norms and attention included; None for
    the roofline's."""
    link_efficiency: float = 0.75
    """Share of a link's bandwidth reached by collectives."""
    memory_share: float = 0.9
    """Share of memory available to tensors; the rest is for CUDA, NCCL and fragmentation."""

    host_memory: float | None = None
    """GiB of a node's host memory; None for `HOST_GIB_PER_GPU` a GPU."""

    def __post_init__(self) -> None:
        for flag, number in (("--nodes", self.num_nodes), ("--gpus-per-node", self.gpus_per_node)):
            if number < 1:
                raise ConfigError(flag, number, "be at least 1", "give a positive number")
        if self.host_memory is not None and not self.host_memory > 0:
            raise ConfigError("--host-memory", self.host_memory, "be above 0", "give GiB of a node")
        for name in ("efficiency", "link_efficiency", "memory_share"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ConfigError("--" + name.replace("_", "-"), share, "be in (0, 1]", "give a share such as 0.4")

    @property
    def num_gpus(self) -> int:
        """Total number of GPUs."""
        return self.num_nodes * self.gpus_per_node

    @property
    def host_bytes(self) -> float:
        """Host memory of a node."""
        gib = self.gpus_per_node * HOST_GIB_PER_GPU if self.host_memory is None else self.host_memory
        return gib * 2**30

    @property
    def usable_bytes(self) -> float:
        """Memory of one GPU available to tensors."""
        return self.gpu.memory_bytes * self.memory_share

    def ring_bytes_per_second(self, num_ranks: int, stride: int) -> float:
        """Return the bandwidth per rank of a ring over `num_ranks` ranks, `stride` apart.

        Inside a node the ring uses the links. Across nodes its bottleneck is the network between two nodes, of which it
        has the shares of its ranks in one node.
        """
        inside = self.gpu.link_bytes_per_second
        if (num_ranks - 1) * stride < self.gpus_per_node:
            return inside * self.link_efficiency
        ranks_per_node = max(1, min(num_ranks, self.gpus_per_node // stride))
        return min(inside, ranks_per_node * self.gpu.network_bits_per_second / 8) * self.link_efficiency

    def hop_bytes_per_second(self, stride: int) -> float:
        """Return the bandwidth of a message between two ranks `stride` apart."""
        network = self.gpu.network_bits_per_second / 8
        return (self.gpu.link_bytes_per_second if stride < self.gpus_per_node else network) * self.link_efficiency
