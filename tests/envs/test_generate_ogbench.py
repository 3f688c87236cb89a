"""Tests of our generator compared with OGBench's: the same statistics, at least the same speed.

`python -m tests.helpers.compare_generators` prints the numbers.
"""

import pytest

from envs_mjx.manipulation.scenes import FAMILIES
from tests.helpers.compare_generators import COMPARED, compare, speed

pytestmark = [pytest.mark.slow, pytest.mark.promotion]


@pytest.mark.parametrize("dataset", COMPARED)
def test_experts_do_the_same_as_ogbenchs(dataset: str) -> None:
    """Compares ten statistics of 50 episodes each. For all 60 together, 4 standard errors are exceeded with
    probability 0.004; a small number of distinct episodes has somewhat heavier tails.
    """
    far = [row for row in compare(dataset, 50) if row.z > 4]
    assert not far


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_at_least_as_fast_as_ogbenchs(family: str) -> None:
    """Compares steps per second of processor time, alternating in one process."""
    assert speed(f"{family}-play-v0").ratio >= 1
