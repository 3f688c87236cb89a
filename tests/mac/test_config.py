"""MAC's hyperparameters: the paper's defaults, and impossible values named."""

from typing import Any

import jax.numpy as jnp
import pytest

from mac.config import Config
from mac.errors import UserError
from mac.mac import MAC
from mac.types import EnvSpec
from tests.helpers.toy_env import GOAL_SPEC, SPEC, mac


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch", 0),
        ("chunk", -1),
        ("rollout", 0),
        ("candidates", 0),
        ("candidates_test", 0),
        ("flow_steps", 0),
        ("execute", 0),
        ("execute", 3),
        ("hidden", ()),
        ("hidden", (8, 0)),
        ("discount", 1.0),
        ("discount", 0.0),
        ("lam", -0.1),
        ("tau_ema", 0.0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("rollout_batch", 0),
        ("flow_steps_test", -1),
        ("cooldown", 1.5),
    ],
)
def test_impossible_hyperparameter_is_named_in_one_line(field: str, value: Any):
    with pytest.raises(UserError, match=f"^--hp.{field.replace('_', '-')}=.*") as caught:
        mac(**{field: value})
    assert "\n" not in str(caught.value)


def test_defaults_are_the_papers():
    """Tables 6 to 8, single-task reward data."""
    cfg = Config()
    assert (cfg.batch, cfg.hidden, cfg.lr, cfg.discount, cfg.tau_ema) == (256, (512,) * 4, 3e-4, 0.999, 0.005)
    assert (cfg.chunk, cfg.rollout, cfg.candidates, cfg.candidates_test, cfg.flow_steps) == (
        10,
        10,
        8,
        32,
        10,
    )
    assert (cfg.lam, cfg.chunk_reward, cfg.execute) == (1.0, "mean", 1)
    assert cfg.rollout_batch >= cfg.batch and (cfg.cooldown, cfg.flow_steps_test) == (0, 0)


@pytest.mark.parametrize(
    ("spec", "values", "line"),
    [
        (SPEC, {"actor_goals_later": "uniform"}, "--hp.actor-goals-later=uniform: toy has no goals"),
        (GOAL_SPEC, {"reward_scale": 4.0}, "--hp.reward-scale=4.0: toy has goals, where each step costs 1"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(spec: EnvSpec, values: dict[str, Any], line: str):
    """A scale of rewards would leave the losses alone and divide the returns that are reported."""
    with pytest.raises(UserError) as caught:
        MAC(Config(**values), spec)
    assert str(caught.value) == line.replace("toy", spec.name) + "; leave it out"


def test_swept_numbers_are_leaves_and_others_cannot_be_swept():
    cfg = Config(lr=1e-3).with_hparams({"lr": jnp.asarray(2.0), "discount": jnp.asarray(-1.0)})
    assert (float(cfg.lr), float(cfg.discount), cfg.tau_ema) == (2.0, -1.0, 0.005)
    with pytest.raises(TypeError, match="Config cannot sweep chunk, lam"):
        cfg.with_hparams({"chunk": jnp.asarray(1.0), "lam": jnp.asarray(1.0), "lr": jnp.asarray(1.0)})
