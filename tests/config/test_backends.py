"""Which backend `auto` takes, and what is refused by name."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from megatron_slm import device
from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backends import BackendConfig, Backends
from megatron_slm.errors import ConfigError
from megatron_slm.run import backends
from megatron_slm.run.backends import choose_backends


def arch(width: int = 64) -> Architecture:
    return Architecture(
        num_layers=1, hidden_size=64, ffn_hidden_size=64, num_attention_heads=1, num_query_groups=1, kv_channels=width,
        vocab_size=8,
    )  # fmt: skip


def choose(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], *, gpu: bool = True, bf16: bool = True, width: int = 64,
    zero_stage: int = 1, updates_on_host: bool = False, **asked: Any,
) -> Backends:  # fmt: skip
    for module in (device, backends):
        monkeypatch.setattr(module, "on_gpu", lambda: gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name in installed else None)
    return choose_backends(
        BackendConfig(**asked),
        bf16=bf16,
        zero_stage=zero_stage,
        architectures=[arch(), arch(width)],
        updates_on_host=updates_on_host,
    )


BOTH = {"flash_attn", "apex"}
PLAIN = Backends()


@pytest.mark.parametrize(
    ("options", "installed", "expected"),
    [
        ({}, BOTH, Backends(attention="flash", norm="apex", optimizer="apex")),
        ({}, set(), PLAIN),
        ({"gpu": False}, BOTH, PLAIN),
        ({"bf16": False}, BOTH, Backends(norm="apex", optimizer="apex")),
        ({"width": 258}, BOTH, Backends(norm="apex", optimizer="apex")),
        ({"updates_on_host": True}, BOTH, Backends(attention="flash", norm="apex")),
        ({"width": 256}, {"flash_attn"}, Backends(attention="flash")),
        ({"attention_backend": "sdpa", "norm_backend": "torch", "optimizer_backend": "deepspeed"}, BOTH,
         Backends(optimizer="deepspeed")),
        ({"compile_blocks": True, "gpu": False}, set(), Backends(compile_blocks=True)),
    ],
)  # fmt: skip
def test_chosen(
    options: dict[str, Any], installed: set[str], expected: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(monkeypatch, installed, **options) == expected


@pytest.mark.parametrize(
    ("options", "installed", "match"),
    [
        ({"attention_backend": "flash", "gpu": False}, BOTH, "--attention-backend is 'flash': must run on a GPU"),
        ({"attention_backend": "flash"}, {"apex"}, "--attention-backend is 'flash': must be an installed backend"),
        ({"attention_backend": "flash", "bf16": False}, BOTH, "at most 256 in bf16 .*width 64, fp32"),
        ({"attention_backend": "flash", "width": 258}, BOTH, "width 258, bf16"),
        ({"norm_backend": "apex"}, {"flash_attn"}, "--norm-backend is 'apex': must be an installed"),
        ({"norm_backend": "apex", "gpu": False}, BOTH, "--norm-backend is 'apex': must run on a GPU"),
        ({"optimizer_backend": "apex"}, set(), "--optimizer-backend is 'apex': must be an installed"),
        (
            {"optimizer_backend": "deepspeed", "gpu": False},
            BOTH,
            "--optimizer-backend is 'deepspeed': must run on a GPU",
        ),
        (
            {"optimizer_backend": "apex", "updates_on_host": True},
            BOTH,
            "--optimizer-backend is 'apex': must be torch or auto",
        ),
        ({"compile_blocks": True, "zero_stage": 3}, set(), "--compile-blocks is True: must be off with ZeRO-3"),
    ],
)
def test_refused(options: dict[str, Any], installed: set[str], match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=match):
        choose(monkeypatch, installed, **options)


def test_what_a_run_computes_with_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    described = choose(monkeypatch, BOTH, compile_blocks=True).describe()
    assert described == {
        "attention": "flash-attn", "norm": "apex FusedRMSNorm", "optimizer": "apex FusedAdam",
        "blocks": "torch.compile",
    }  # fmt: skip
