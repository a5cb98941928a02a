"""Columns that a run names and cannot use end it before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_slm.data.corpus.columns import ColumnWriter
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.errors import CorpusError
from megatron_slm.flags.load import parse
from megatron_slm.run.plan import make_plan
from tests.support.runs import flags, run_flags, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("columns")
    corpus = IndexedCorpus(write_corpus(path / "corpus"))
    with ColumnWriter(path / "corpus", "signed") as writer:
        for sequence in range(corpus.num_sequences):
            writer.add([0.5] * (len(corpus.get(sequence)) - 1) + [-0.25])
    return path


def plan(folder: Path, **changes: Any) -> Any:
    values = run_flags(folder / "corpus", folder / "run", objective="slm", **{"slm_score": "loss", **changes})
    return make_plan(parse(flags(values))[0], 1)


def test_weights_below_zero(folder: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"--slm-weight external:signed: least number .* is -0.25: must be at least 0"
    ):
        plan(folder, slm_weight="external:signed")
    plan(folder, slm_score="external:signed", slm_protected_spans="signed")  # a score and spans have signs


@pytest.mark.parametrize(
    "named", [{"slm_score": "external:none"}, {"slm_weight": "external:none"}, {"slm_protected_spans": "none"}]
)
def test_a_column_that_is_not_there(folder: Path, named: dict[str, str]) -> None:
    with pytest.raises(CorpusError, match=r"column none of .* is '.*corpus_none\.idx': must be a file"):
        plan(folder, **named)
