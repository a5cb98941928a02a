"""What we export is read by transformers 4 as by 5: the same logits, from an environment of its own.

MEGATRON_SLM_TRANSFORMERS_4=/path/to/venv/bin/python bash tests/run.sh -m slow tests/convert/test_old_readers.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_slm.convert.hf_config import exported_config, read_architecture, read_config
from tests.support.families import FAMILIES, family_model

PYTHON = os.environ.get("MEGATRON_SLM_TRANSFORMERS_4")
READ = """
import sys, torch, transformers
from safetensors.torch import save_file
assert transformers.__version__.startswith("4."), transformers.__version__
tokens = torch.arange(80).view(2, 40)
logits = {}
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits[folder] = model.eval()(tokens).logits.contiguous()
save_file(logits, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="MEGATRON_SLM_TRANSFORMERS_4 names no Python with transformers 4.57")
@pytest.mark.parametrize("from_scratch", [False, True])
def test_the_same_logits(from_scratch: bool, tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for number, name in enumerate(FAMILIES):
        folder, model = tmp_path / str(number), family_model(name)
        saved: Any = model
        saved.save_pretrained(folder)
        arch, original = read_architecture(folder), read_config(folder)
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        raw = exported_config(
            arch, None if from_scratch else original, dtype="float32", special_ids=ids, is_trained=True
        )
        (folder / "config.json").write_text(json.dumps(raw))
        if raw["model_type"] == original["model_type"]:  # else its names of weights are another family's
            with torch.no_grad():
                expected[str(folder)] = model(torch.arange(80).view(2, 40)).logits
    assert PYTHON is not None
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([PYTHON, "-c", READ, str(tmp_path / "logits"), *expected], check=True, env=environment)
    found = load_file(tmp_path / "logits")
    for folder, logits in expected.items():
        assert (found[folder] - logits).abs().max() <= 1e-5, read_config(Path(folder))["model_type"]
