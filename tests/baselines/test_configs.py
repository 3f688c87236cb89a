"""Hyperparameters of every algorithm's class: the values that it documents are those that it has."""

import dataclasses
import inspect
from typing import Any

import pytest

from baselines import REGISTRY
from mac.config import CommonConfig

GOALS = {"hidden": (1024,) * 4, "batch": 1024, "discount": 0.999, "actor_norm": True}
SINGLE = {"hidden": (512,) * 4, "batch": 256, "discount": 0.99, "actor_norm": False, "critic_norm": True}
IMAGINED = SINGLE | {"discount": 0.999, "actor_norm": True, "rollout": 5, "members": 5, "rollouts_kept": 5}
PLANS = {"hidden": (32, 128, 256), "batch": 64, "lr": 2e-4, "ema_every": 10, "ema_start": 2000}
OWN: dict[str, dict[str, Any]] = {
    "mac": {"hidden": (512,) * 4, "batch": 256, "discount": 0.999, "chunk": 10, "rollout": 10},
    "mac_gaussian": {"discount": 0.999, "candidates": 8, "candidates_test": 32},
    "mac_fql": {"discount": 0.999, "candidates": 1, "candidates_test": 1},
    "mac_nodistill": {"discount": 0.999, "candidates": 8, "candidates_test": 32},
    "flow_bc": SINGLE,
    "iql": SINGLE | {"expectile": 0.9},
    "fql": SINGLE | {"combine": "mean"},
    "rebrac": SINGLE,
    "ifql": SINGLE | {"expectile": 0.9, "candidates": 32, "flow_steps": 10},
    "idql": SINGLE | {"expectile": 0.7, "candidates": 64},
    "gciql": SINGLE | {"discount": 0.999, "actor_norm": True, "expectile": 0.9},
    "nsac_bc": GOALS | {"n_step": 25, "combine": "min"},
    "sharsa": GOALS | {"n_step": 25, "combine": "min", "candidates": 32, "flow_steps": 10},
    "fmpc": {"hidden": (512,) * 4, "batch": 256, "discount": 0.999, "chunk": 32, "candidates": 64},
    "leq": {
        "hidden": (512,) * 4,
        "batch": 256,
        "discount": 0.999,
        "rollout": 10,
        "expectile": 0.5,
        "lam": 1.0,
    },
    "mopo": IMAGINED,
    "mobile": IMAGINED | {"samples": 5, "penalty_combine": "mean", "unbiased_std": False},
    "tap": {
        "hidden": (512,) * 4, "batch": 512, "discount": 0.99, "lr": 2e-4, "window": 24, "stride": 3,
        "codes": 512, "code_decay": 0.99, "weight_decay": 0.1, "clip": 1.0, "dropout": 0.1, "horizon": 15,
        "beam": 64, "expand": 4, "likelihood_weight": 500.0, "probable": 0.05, "action_weight": 5.0,
        "terminal_reward": -100.0,
    },
    "tt": {"hidden": (128,) * 4, "batch": 256, "discount": 0.99, "window": 10, "beams": 128, "expand": 2},
    "cql": {"hidden": (256,) * 3, "batch": 256, "activation": "relu", "critic_norm": False},
    "diffuser": PLANS | {"horizon": 256, "tokens": 256, "diffusion_steps": 256, "action_weight": 1.0},
    "hd_da": PLANS
    | {"horizon": 255, "jump": 15, "tokens": 20, "low_diffusion_steps": 128, "action_weight": 10.0},
}  # fmt: skip
"""What the docstrings and sources of each class say of a call without arguments."""


def hidden_defaults(config: type[Any]) -> dict[str, tuple[Any, Any]]:
    """Fields whose value is not that of the first class in the order of resolution that states them.

    A dataclass takes fields from its bases in reverse, each with those it inherits: with two bases, one's
    inherited default may overwrite the other's own.
    """
    made, wrong = config(), {}
    for field in dataclasses.fields(config):
        owner = next(cls for cls in config.__mro__ if field.name in inspect.get_annotations(cls))
        stated = owner.__dict__[field.name]
        if getattr(made, field.name) != stated or field.default != stated:
            wrong[field.name] = (getattr(made, field.name), stated)
    return wrong


@pytest.mark.parametrize("name", REGISTRY)
def test_config_has_the_values_of_its_own_classes(name: str):
    assert hidden_defaults(REGISTRY[name].config) == {}


@pytest.mark.parametrize("name", REGISTRY)
def test_config_has_the_documented_values(name: str):
    made = REGISTRY[name].config()
    assert {key: getattr(made, key) for key in OWN[name]} == OWN[name]


@pytest.mark.parametrize("name", REGISTRY)
def test_no_base_hides_what_another_says_of_its_fields(name: str):
    """Of two bases only one's `ACTING` and `STATIC` count, so it must hold the other's."""
    config = REGISTRY[name].config
    own = {field.name for field in dataclasses.fields(config)}
    for told in ("ACTING", "STATIC"):
        assert set(getattr(config, told)) <= own
        for base in config.__mro__:
            missing = set(base.__dict__.get(told, ())) - set(getattr(config, told))
            assert not missing, (base.__name__, told, missing)


def test_overwritten_default_of_a_diamond_is_found():
    class Left(CommonConfig):
        extra: int = 1

    class Right(CommonConfig):
        batch: int = 7

    class Wrong(Left, Right): ...

    class Good(Right, Left): ...

    assert hidden_defaults(Wrong) == {"batch": (256, 7)} and hidden_defaults(Good) == {}
