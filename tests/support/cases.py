"""Cases of parametrized tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some_by_default(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """All cases, of which those not in `quick` run with the slow tests."""
    known = list(cases)
    assert all(case in known for case in quick), f"{quick} are not all of {known}"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in known]
