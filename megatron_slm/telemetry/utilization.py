"""How much of the hardware a run uses: operations counted from the architectures, over the time a step took."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.architecture import Architecture
from megatron_slm.device import device_name
from megatron_slm.engine.schedule.costs import inference_flops, training_flops
from megatron_slm.planning.gpus import named_gpu


@dataclass(frozen=True, kw_only=True)
class Utilization:
    """Turns tokens per second into operations per second and into a share of the peak.

    The model is counted as plain training would be (three forwards, the loss head whole), so that the figure compares
    with other systems'; the reference as one forward. What the selection saves shows as a higher figure.
    """

    model_flops_per_token: float
    reference_flops_per_token: float
    """0 where no reference runs."""
    num_devices: int
    peak_flops_per_device: float | None
    """None where it is not known."""

    @classmethod
    def of(
        cls,
        model: Architecture,
        reference: Architecture | None,
        *,
        seq_length: int,
        num_devices: int,
        bf16: bool,
        peak_tflops: float | None,
    ) -> Utilization:
        """Of a run.

        Args:
            peak_tflops: of one device; None looks this device up among the GPUs that can be planned for.
        """
        gpu = named_gpu(device_name())
        peak = gpu.flops(bf16=bf16) if gpu else None
        return cls(
            model_flops_per_token=training_flops(model, seq_length),
            reference_flops_per_token=inference_flops(reference, seq_length) if reference else 0.0,
            num_devices=num_devices,
            peak_flops_per_device=peak if peak_tflops is None else peak_tflops * 1e12,
        )

    def metrics(self, tokens_per_second: float) -> dict[str, float | None]:
        """`tflops_per_device` of the model; `mfu` of the model, and with the reference's work (shares of the peak)."""
        rate = tokens_per_second / self.num_devices
        model, reference = self.model_flops_per_token * rate, self.reference_flops_per_token * rate
        peak = self.peak_flops_per_device
        return {
            "tflops_per_device": model / 1e12,
            "mfu": model / peak if peak else None,
            "mfu_with_reference": (model + reference) / peak if peak else None,
        }
