"""The texts of a line, its loss mask, and every way a line is invalid."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_slm.data.preprocessing.documents import DocumentKeys, InvalidLineError, Texts, parse_line
from megatron_slm.errors import ConfigError


def texts_of_line(line: bytes, *keys: str) -> list[Texts]:
    """By plain keys."""
    return DocumentKeys(json_keys=keys).texts(parse_line(line))


def test_texts_of_a_line() -> None:
    line = '{"text": "Zürich \\ud83d\\ude42", "title": ["a", "b"], "id": 3}'.encode()
    assert texts_of_line(line, "text", "title") == [Texts(["Zürich 🙂"], None), Texts(["a", "b"], None)]
    assert texts_of_line(b"\xef\xbb\xbf" + line, "text")[0].texts == ["Zürich 🙂"], "a byte order mark is ignored"
    assert texts_of_line(b'{"text": []}', "text")[0].texts == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a', r"not JSON \(Unterminated string"),
        (b"[" * 100_000, r"not JSON \("),
        (b'["text"]', "not a JSON object but list"),
        (b'{"body": "a", "id": 1}', r"no key 'text' \(the keys are 'body', 'id'\)"),
        (b"{}", r"no key 'text' \(the keys are none\)"),
        (b'{"text": null}', "the value of 'text' is not text but NoneType"),
        (b'{"text": ["a", 1]}', "the value of 'text' is not text but int"),
        (b'{"text": "\\ud800"}', "the value of 'text' has half of a surrogate pair"),
        (b'{"text": "\xff"}', r"not UTF-8 \(invalid start byte at byte 10\)"),
    ],
)
def test_invalid_lines(line: bytes, reason: str) -> None:
    with pytest.raises(InvalidLineError, match=reason):
        texts_of_line(line, "text")


def test_prompt_and_response() -> None:
    keys = DocumentKeys(prompt_key="p", response_key="r")
    assert (keys.corpora, keys.is_masked, keys.columns) == (("sft",), True, ("p", "r"))
    assert keys.texts({"p": "a", "r": "b", "text": 3}) == [Texts(["a", "b"], [0, 1])]
    with pytest.raises(InvalidLineError, match="the value of 'r' is not text but list"):
        keys.texts({"p": "a", "r": ["b"]})


def test_a_mask_for_a_list_of_texts() -> None:
    keys = DocumentKeys(loss_mask_key="m")
    assert (keys.corpora, keys.is_masked, keys.columns) == (("text",), True, ("text", "m"))
    assert keys.texts({"text": ["a", "b"], "m": [1, False]}) == [Texts(["a", "b"], [1, 0])]
    assert keys.texts({"text": "a", "m": 1}) == [Texts(["a"], [1])]


@pytest.mark.parametrize("mask", [[1], [1, 2], [1, "0"], 1, None])
def test_masks_that_do_not_fit(mask: Any) -> None:
    with pytest.raises(InvalidLineError, match="the value of 'm' is not 2 times 0 or 1"):
        DocumentKeys(loss_mask_key="m").texts({"text": ["a", "b"], "m": mask})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"json_keys": ()}, r"--json-keys is \(\): must be one or more different keys"),
        ({"json_keys": ("a", "a")}, "--json-keys is .*different keys"),
        ({"prompt_key": "p"}, "--response-key is missing: required by --prompt-key"),
        ({"response_key": "r"}, "--prompt-key is missing: required by --response-key"),
        ({"loss_mask_key": "m", "json_keys": ("a", "b")}, "--loss-mask-key is 'm': must be used with exactly one"),
        (
            {"loss_mask_key": "m", "prompt_key": "p", "response_key": "r"},
            "--loss-mask-key is 'm': .*without --prompt-key",
        ),
    ],
)
def test_keys_that_contradict_each_other(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DocumentKeys(**keys)
