"""The base model of an export's card is an id of the hub, or left out."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from megatron_slm.convert.card import _front_matter

CACHED = "/home/someone/.cache/huggingface/hub/models--org--name/snapshots/0a1b2c"


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ({"path": CACHED}, "org/name"),
        ({"path": "/models/smollm2", "hub": "org/other"}, "org/other"),
        ({"path": "smollm2"}, None),
        ({"path": "/models/org/name"}, None),
        (None, None),
    ],
    ids=["a folder of the hub's cache", "a name", "a folder", "a longer path", "random weights"],
)
def test_the_base_model_is_a_hub_id_or_left_out(base: dict[str, Any] | None, name: str | None) -> None:
    text = _front_matter({"base": base}, {"objective": "slm"})
    front = yaml.safe_load(text.removeprefix("---\n").removesuffix("---"))
    assert front.get("base_model") == name
    assert ("base_model" in front) == (name is not None)
    assert "selective-language-modeling" in front["tags"]
