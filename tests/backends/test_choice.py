"""Which backend `auto` takes, and what is refused by name: of packages that work, and of those that only look so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from megatron_slm.backends.choice import check_same_on_all_ranks, choose_backends
from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backends import BackendConfig, Backends
from megatron_slm.errors import ConfigError
from megatron_slm.model import sdpa
from tests.support.pretend_gpu import CORRECT, believe_in_a_gpu, files_of, forget, install
from tests.support.world import WorldError, run_world


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    forget()
    yield
    forget()


def arch(width: int = 64, **options: Any) -> Architecture:
    return Architecture(
        num_layers=1, hidden_size=64, ffn_hidden_size=64, num_attention_heads=1, num_query_groups=1, kv_channels=width,
        vocab_size=8, **options,
    )  # fmt: skip


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def chosen(
        files: dict[str, str], *, gpu: bool = True, bf16: bool = True, width: int = 64, zero_stage: int = 1,
        updates_on_host: bool = False, capability: tuple[int, int] = (8, 0), documents: bool = False,
        window: int | None = None, softcap: float | None = None, compiles: bool = False, positions: bool = False, own_backward: bool = False,
        **asked: Any,
    ) -> Backends:  # fmt: skip
        install(monkeypatch, tmp_path, files)
        if gpu:
            believe_in_a_gpu(monkeypatch, capability, compiles=compiles)
        return choose_backends(
            BackendConfig(**asked),
            bf16=bf16,
            zero_stage=zero_stage,
            architectures=[arch(), arch(width, sliding_window=window, attention_softcap=softcap)],
            updates_on_host=updates_on_host,
            keeps_documents_apart=documents,
            resets_positions=positions,
            own_backward=own_backward,
        )

    return chosen


BOTH = files_of("flash", "apex")
PLAIN = Backends()
PIECES = Backends(fuses_elementwise=True)
HOPPER = {"capability": (9, 0)}


@pytest.mark.parametrize(
    ("options", "files", "expected"),
    [
        ({}, BOTH, Backends(attention="flash", norm="apex", optimizer="apex")),
        ({}, {}, PLAIN),
        ({"gpu": False}, BOTH, PLAIN),
        ({"bf16": False}, BOTH, Backends(norm="apex", optimizer="apex")),
        ({"width": 258}, BOTH, Backends(norm="apex", optimizer="apex")),
        ({"updates_on_host": True}, BOTH, Backends(attention="flash", norm="apex")),
        ({"width": 256}, files_of("flash"), Backends(attention="flash")),
        ({"attention_backend": "sdpa", "norm_backend": "torch", "optimizer_backend": "deepspeed"}, BOTH,
         Backends(optimizer="deepspeed")),
        ({"compile_blocks": True, "gpu": False}, {}, Backends(compile_blocks=True)),
        ({"compiles": True}, {}, Backends(compile_blocks=True)),
        ({"compiles": True, "gpu": False}, {}, PLAIN),
        # where blocks are not compiled, their element-wise work is
        ({"compiles": True, "compile_blocks": False}, {}, PIECES),
        ({"compiles": True, "zero_stage": 3}, {}, PIECES),
        ({"compiles": True, "documents": True}, {}, PIECES),
        ({"compiles": True, "positions": True}, {}, PIECES),
        ({"compiles": True, "own_backward": True}, {}, PIECES),
        ({"compiles": True, "own_backward": True, "compile_elementwise": False}, {}, PLAIN),
        ({"compiles": True, "compile_elementwise": True}, {}, Backends(compile_blocks=True)),
        ({"gpu": False, "own_backward": True}, {}, PLAIN),
        ({"gpu": False, "compile_elementwise": True}, {}, PIECES),
        # Hopper: flash-attn 3, else torch's (cuDNN), which is behind flash-attn 2 for windows and documents
        (HOPPER, CORRECT, Backends(attention="flash3", norm="apex", optimizer="apex")),
        (HOPPER, files_of("flash"), PLAIN),
        ({**HOPPER, "window": 16}, files_of("flash"), Backends(attention="flash")),
        ({**HOPPER, "documents": True}, files_of("flash"), Backends(attention="flash")),
        ({**HOPPER, "attention_backend": "flash"}, files_of("flash"), Backends(attention="flash")),
        ({"attention_backend": "flash3"}, files_of("flash3"), Backends(attention="flash3")),
    ],
)  # fmt: skip
def test_chosen(choose: Any, options: dict[str, Any], files: dict[str, str], expected: Backends) -> None:
    assert choose(files, **options) == expected


NOT_A_PACKAGE = {"flash_attn/cute/__init__.py": ""}
"""What flash-attn 4 installs by itself: a folder `flash_attn` without any of flash-attn 2's functions."""
WITHOUT_CUDA = {**files_of("flash"), "flash_attn_2_cuda.py": "raise ImportError('undefined symbol: _ZN3c10')"}
NO_KERNEL = {
    **files_of("flash"),
    "flash_attn/__init__.py": """
        def flash_attn_func(*args, **kwargs): raise RuntimeError("CUDA error: no kernel image is available\\nmore")
        def flash_attn_varlen_func(*args, **kwargs): pass
        """,
}
WRONG = {
    **files_of("flash"),
    "flash_attn/__init__.py": """
        from tests.support import plain_kernels
        from tests.support.plain_kernels import flash_attn_varlen_func
        def flash_attn_func(q, k, v, *, causal, window_size):  # of a version before windows
            return plain_kernels.flash_attn_func(q, k, v, causal=causal)
        """,
}
PYPI_APEX = {"apex/__init__.py": "from apex.lib import *", "apex/lib.py": ""}
"""PyPI's `apex`, a web toolkit."""
PYTHON_ONLY_APEX = {
    **{name: text for name, text in files_of("apex").items() if name.startswith("apex/")},
    "apex/optimizers/__init__.py": """
        class FusedAdam:
            def __init__(self, *args, **kwargs): raise RuntimeError('apex.optimizers.FusedAdam requires cuda extensions')
        """,
}
"""NVIDIA's apex, built without its extensions."""


@pytest.mark.parametrize(
    ("files", "what", "note"),
    [
        (NOT_A_PACKAGE, "attention", "flash-attn: flash_attn has no flash_attn_func"),
        (WITHOUT_CUDA, "attention", "flash-attn: importing flash_attn_2_cuda fails: ImportError: undefined symbol"),
        (NO_KERNEL, "attention", "flash-attn: a trial fails: RuntimeError: CUDA error: no kernel image is available"),
        (WRONG, "attention", "flash-attn: a trial fails: RuntimeError: its results differ from torch's by"),
        (PYPI_APEX, "norm", "apex: importing apex.normalization.fused_layer_norm fails: ModuleNotFoundError"),
        (PYPI_APEX, "optimizer", "apex: importing apex.optimizers fails: ModuleNotFoundError"),
        (PYTHON_ONLY_APEX, "norm", "apex: importing fused_layer_norm_cuda fails: ModuleNotFoundError"),
        (PYTHON_ONLY_APEX, "optimizer", "apex: importing amp_C fails: ModuleNotFoundError"),
        ({}, "attention", "flash-attn-3: not installed; flash-attn: not installed"),
    ],
)
def test_what_only_looks_installed_is_not_taken(choose: Any, files: dict[str, str], what: str, note: str) -> None:
    chosen = choose(files)
    assert chosen == PLAIN
    assert note in chosen.notes[what]
    assert note in chosen.describe()[what]


@pytest.mark.parametrize(
    ("options", "files", "match"),
    [
        (
            {"attention_backend": "flash", "softcap": 50.0},
            BOTH,
            "--attention-backend is 'flash': must be sdpa .*soft cap",
        ),
        ({"attention_backend": "flash", "gpu": False}, BOTH, "--attention-backend is 'flash': must run on a GPU"),
        ({"attention_backend": "flash"}, files_of("apex"), "flash-attn: not installed.*--no-build-isolation"),
        ({"attention_backend": "flash"}, NOT_A_PACKAGE, "flash_attn has no flash_attn_func"),
        ({"attention_backend": "flash"}, NO_KERNEL, "no kernel image"),
        ({"attention_backend": "flash3"}, files_of("flash"), "flash-attn-3: not installed.*hopper"),
        ({"attention_backend": "flash", "bf16": False}, BOTH, "at most 256 in bf16 .*width 64, fp32"),
        ({"attention_backend": "flash", "width": 258}, BOTH, "width 258, bf16"),
        ({"norm_backend": "apex"}, files_of("flash"), "--norm-backend is 'apex': .*not installed"),
        ({"norm_backend": "apex"}, PYPI_APEX, "No module named 'apex.normalization'.*PyPI is another project"),
        ({"norm_backend": "apex", "gpu": False}, BOTH, "--norm-backend is 'apex': must run on a GPU"),
        ({"optimizer_backend": "apex"}, PYTHON_ONLY_APEX, "importing amp_C fails.*APEX_CUDA_EXT=1"),
        (
            {"optimizer_backend": "deepspeed", "gpu": False},
            BOTH,
            "--optimizer-backend is 'deepspeed': must run on a GPU",
        ),
        ({"optimizer_backend": "apex", "updates_on_host": True}, BOTH, "be torch or auto"),
        ({"compile_blocks": True, "zero_stage": 3}, {}, "--compile-blocks is True: must be off with ZeRO-3"),
    ],
)
def test_refused(choose: Any, options: dict[str, Any], files: dict[str, str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        choose(files, **options)


def test_an_attention_without_a_fused_kernel_is_refused(choose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch fails on a GPU where the math path is forbidden and no kernel takes the heads."""

    def attend(*_: Any) -> torch.Tensor:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(sdpa, "attend", attend)
    with pytest.raises(ConfigError, match=r"--attention-backend is 'sdpa'.*width 64 in torch.bfloat16 \(No available"):
        choose({}, attention_backend="sdpa")


def test_description(choose: Any) -> None:
    assert choose(BOTH, compile_blocks=True).describe() == {
        "attention": "flash-attn", "norm": "apex FusedRMSNorm", "optimizer": "apex FusedAdam",
        "blocks": "torch.compile", "element-wise": "torch.compile",
    }  # fmt: skip


def chosen_by_ranks() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    check_same_on_all_ranks(PLAIN, "torch")
    try:
        check_same_on_all_ranks(Backends(norm="apex") if dist.get_rank() == 1 else PLAIN, "torch")
    except ConfigError as error:
        print(error, flush=True)
        raise SystemExit(7) from error


def test_ranks_that_choose_differently_are_refused() -> None:
    with pytest.raises(WorldError) as failed:
        run_world(chosen_by_ranks, 2)
    assert failed.value.codes == [7, 7]
    assert all("norm backend of rank 1 is 'apex'" in output for output in failed.value.outputs)


def test_math_is_no_fused_kernel() -> None:
    assert SDPBackend.MATH not in sdpa.FUSED
    assert set(sdpa.FUSED_OF_ANY_LENGTH) < set(sdpa.FUSED)
