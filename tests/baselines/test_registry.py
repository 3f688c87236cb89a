"""Registration of algorithms: what is refused, and how an unknown name is answered."""

from typing import Any

import pytest

from baselines import REGISTRY, algorithms, get_algorithm, register_algorithm
from mac.errors import UserError


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("mac", REGISTRY["mac"].config, "exists already"),
        ("two words", REGISTRY["mac"].config, "letters, digits"),
        ("mine", dict, "subclass of mac.config.CommonConfig"),
    ],
)
def test_malformed_registrations_are_refused(name: str, config: Any, said: str):
    with pytest.raises(ValueError, match=said):
        register_algorithm(name, config, REGISTRY["mac"].algorithm)
    assert algorithms().keys() == REGISTRY.keys()


def test_unknown_algorithm_has_the_closest_name():
    with pytest.raises(UserError, match="--algo 'sharas' is not known; did you mean 'sharsa'"):
        get_algorithm("sharas", "--algo")


def test_entry_names_its_publication():
    assert get_algorithm("iql").source == "IQL (Kostrikov et al. 2022), arXiv 2110.06169, 2022"
    assert get_algorithm("iql")._replace(year=0, arxiv="").source == "IQL (Kostrikov et al. 2022)"
