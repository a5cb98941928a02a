"""Old names work for a while, and warn."""

from __future__ import annotations

from pathlib import Path

import pytest

import megatron_slm
from megatron_slm import deprecation
from megatron_slm.config.load import known_flags, parse
from megatron_slm.deprecation import Renamed

ROOT = Path(__file__).parents[1]
MESSAGE = "{} is deprecated and will be removed in 9.9: use {}"


def test_an_old_flag_and_an_old_key_set_the_new_one_and_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deprecation.FLAGS, "old_keep_ratio", Renamed("slm_keep_ratio", "9.9"))
    monkeypatch.setitem(deprecation.FLAGS, "old_quiet", Renamed("quiet", "9.9"))
    with pytest.warns(DeprecationWarning, match=MESSAGE.format("flag --old-keep-ratio", "--slm-keep-ratio")):
        config, _ = parse(["--train-iters", "1", "--slm-score", "loss", "--old-keep-ratio", "0.3"])
    assert config.selection.slm_keep_ratio == 0.3
    with pytest.warns(DeprecationWarning, match="old-quiet"):
        assert not parse(["--train-iters", "1", "--slm-score", "loss", "--no-old-quiet"])[0].logging.quiet
    path = tmp_path / "run.yaml"
    path.write_text("train-iters: 1\nslm-score: loss\nold-keep-ratio: 0.4\n")
    with pytest.warns(DeprecationWarning, match=MESSAGE.format("flag old-keep-ratio", "--slm-keep-ratio")):
        assert parse(["--config", str(path)])[0].selection.slm_keep_ratio == 0.4


def test_an_old_python_name_is_the_new_one_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deprecation.NAMES, "old_error", Renamed("SlmError", "9.9"))
    with pytest.warns(DeprecationWarning, match=MESSAGE.format("name old_error", "SlmError")):
        assert megatron_slm.old_error is megatron_slm.SlmError
    with pytest.raises(AttributeError, match="older_error"):
        _ = megatron_slm.older_error


def test_what_is_deprecated_exists_under_its_new_name_and_is_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    for old, renamed in deprecation.FLAGS.items():
        assert "--" + renamed.new.replace("_", "-") in known_flags()
        assert "--" + old.replace("_", "-") in text
    for old, renamed in deprecation.NAMES.items():
        assert renamed.new in megatron_slm.__all__
        assert old in text
    if not (deprecation.FLAGS or deprecation.NAMES):
        assert "Nothing is deprecated now" in (ROOT / "docs/reference/python.md").read_text()
