from __future__ import annotations

import pytest

from megatron_slm.arithmetic import ceil_div


@pytest.mark.parametrize(
    ("numerator", "denominator", "quotient"), [(0, 3, 0), (1, 3, 1), (3, 3, 1), (4, 3, 2), (10**20 + 1, 10, 10**19 + 1)]
)
def test_the_quotient_is_rounded_up_exactly(numerator: int, denominator: int, quotient: int) -> None:
    assert ceil_div(numerator, denominator) == quotient
