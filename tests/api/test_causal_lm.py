"""The selective loss of a transformers model against transformers' own loss and full logits in fp64."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from megatron_slm import Selector, make_selector, micro_batch, selective_loss, token_losses
from megatron_slm.errors import ConfigError, LayoutError
from tests.support.hub_models import save_model_and_tokenizer, write_text
from tests.support.models import random_hf_model

SHAPE = dict(
    vocab_size=53,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def _ids() -> torch.Tensor:
    return torch.randint(53, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral"])
def test_all_tokens_give_the_loss_and_gradient_of_transformers(kind: str) -> None:
    model, ids = random_hf_model(kind, 0, **SHAPE), _ids()
    labels = ids.clone()
    labels[:, 3:6] = -100
    expected = model(ids, labels=labels).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = selective_loss(model, micro_batch(ids, labels), selector=Selector())
    loss.mean.backward()
    torch.testing.assert_close(loss.mean, expected, rtol=1e-5, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_kept_tokens_and_gradient_are_those_of_full_logits() -> None:
    model, reference = (random_hf_model("Llama", seed, **SHAPE).double() for seed in (0, 1))
    ids = _ids()
    batch = micro_batch(ids)
    statistics = token_losses(reference, batch)
    loss = selective_loss(model, batch, selector=make_selector("excess", keep_ratio=0.6), reference=statistics)
    loss.mean.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    def losses(one: torch.nn.Module) -> torch.Tensor:
        return F.cross_entropy(one(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")

    token_loss_N = losses(model)
    kept = (token_loss_N - losses(reference)).topk(29).indices  # ceil(0.6 * 48)
    assert set(kept.tolist()) == set(loss.choice.kept_N.nonzero().flatten().tolist())
    token_loss_N[kept].mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, found[name], rtol=1e-6, atol=1e-9)
    metrics = loss.metrics(statistics)
    assert metrics["keep_fraction"] == pytest.approx(29 / 48)
    assert metrics["loss_all"] == pytest.approx(float(token_loss_N.mean()), rel=1e-6)
    assert metrics["excess_selected"] > metrics["loss_all"] - metrics["reference_loss"]


def test_padding_is_not_kept() -> None:
    ids, mask = _ids(), torch.ones(3, 17, dtype=torch.long)
    mask[1, 9:] = 0
    batch = micro_batch(ids, attention_mask_bt=mask)
    loss = selective_loss(
        random_hf_model("Llama", 0, **SHAPE), batch, selector=make_selector("loss", keep_ratio=0.9), attention_mask=mask
    )
    assert not loss.choice.kept_N.view(3, 16)[1, 8:].any()
    assert int(loss.divisor) == 36  # ceil(0.9 * 40)


def test_wrong_options_name_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"--slm-keep-ratio is 2: must be in"):
        make_selector(keep_ratio=2)
    with pytest.raises(ConfigError, match=r"--slm-score is 'exces'.*did you mean excess"):
        make_selector("exces")


def test_scaled_logits_are_refused() -> None:
    model = random_hf_model("Gemma2", 0, head_dim=6, **SHAPE)
    with pytest.raises(LayoutError, match=r"final_logit_softcapping is 30\.0: must be unset"):
        selective_loss(model, micro_batch(_ids()), selector=Selector())


def test_the_example_trains(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "reference")):
        save_model_and_tokenizer(tmp_path / name, seed=seed)
    text = write_text(tmp_path / "text.txt")
    script = Path("examples/python/own_loop.py")
    assert len(script.read_text().splitlines()) <= 60
    words = ["--model", tmp_path / "base", "--reference", tmp_path / "reference", "--text", text, "--lr", "3e-2"]
    history = runpy.run_path(str(script))["main"]([*map(str, words), "--length", "32", "--steps", "8"])
    assert history[-1]["loss_all"] < history[0]["loss_all"] - 0.3
    assert all(one["keep_fraction"] == pytest.approx(75 / 124) for one in history)  # ceil(0.6 * 4 * 31)


def test_importing_the_package_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; at = time.process_time(); import megatron_slm; took = time.process_time() - at;"
        "assert not {'torch', 'numpy', 'deepspeed', 'transformers'} & set(sys.modules); assert took < 0.5, took;"
        "from megatron_slm import selective_cross_entropy;"
        "assert 'deepspeed' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves() -> None:
    import megatron_slm

    for name in megatron_slm.__all__:
        if name != "SlmTrainer" or "accelerate" in sys.modules:
            assert getattr(megatron_slm, name) is not None
    typed = {line.split()[-1] for line in Path("megatron_slm/__init__.pyi").read_text().splitlines() if " as " in line}
    assert typed == set(megatron_slm.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'selctor'"):
        megatron_slm.selctor  # noqa: B018
