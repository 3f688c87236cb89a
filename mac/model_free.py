"""Shared parts of model-free methods: single-step transitions, and a policy that acts at every step."""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mac.algorithm import AbstractConfigured, Nets, TrainState
from mac.config import CommonConfig
from mac.errors import UserError
from mac.nn.critics import Combine, aggregate, q_values
from mac.nn.mlp import Activation, Style
from mac.types import Batch, EnvSpec, Number, SampleSpec, Subgoals, SubgoalSpec

Goal = Float[Array, "*B G"] | None


@dataclass(frozen=True)
class ModelFreeConfig(CommonConfig):
    """Hyperparameters of model-free methods."""

    activation: Activation = "gelu"
    """what follows each hidden layer's products"""
    critic_norm: bool = True
    """LayerNorm after the activations of values and critics"""
    actor_norm: bool = False
    """LayerNorm after the activations of policies"""

    @property
    def critic_style(self) -> Style:
        """Of the hidden layers of values and critics."""
        return Style(self.activation, self.critic_norm)

    @property
    def actor_style(self) -> Style:
        """Of the hidden layers of policies."""
        return Style(self.activation, self.actor_norm)


@dataclass(frozen=True)
class FlowChoiceConfig(ModelFreeConfig):
    """Hyperparameters of methods that act by best-of-N samples of a flow."""

    candidates: int = 32
    """samples per choice while acting: of actions, or of where to be"""
    flow_steps: int = 10
    """Euler steps of flow policies while acting"""

    ACTING = ("candidates", "flow_steps")

    def __post_init__(self):
        super().__post_init__()
        self._require_positive("candidates", "flow_steps")


@dataclass(frozen=True)
class NStepConfig(ModelFreeConfig):
    """Hyperparameters of n-step methods; the defaults are of goal-conditioned runs."""

    batch: int = 1024
    """items drawn from the data per update"""
    hidden: tuple[int, ...] = (1024, 1024, 1024, 1024)
    """width of each hidden layer, of every network"""
    discount: float = 0.999
    """discount factor γ per environment step, in (0, 1)"""
    actor_norm: bool = True
    """LayerNorm after the activations of policies"""
    n_step: int = 25
    """steps that values look ahead in the data, n; less where the goal comes first"""
    ends_count: bool = True
    """whether coming within n steps of an episode's end counts as reaching any goal, as in published runs"""
    combine: Combine = "min"
    """how targets aggregate the two target critics"""

    def __post_init__(self):
        super().__post_init__()
        self._require_positive("n_step")

    @property
    def subgoals(self) -> SubgoalSpec:
        """Returns the request to the sampler."""
        return SubgoalSpec(self.n_step, self.ends_count)


class Step(NamedTuple):
    """`B` steps of the data. With goals, the reward is 0 in states that are `goal`, else -1.

    `mask` is 0 where nothing follows; `goal` is for values and `actor_goal` for policies, None without goals.
    """

    obs: Float[Array, "B D"]
    action: Float[Array, "B A"]
    reward: Float[Array, " B"]
    mask: Float[Array, " B"]
    next_obs: Float[Array, "B D"]
    goal: Goal
    actor_goal: Goal


def one_step(batch: Batch) -> Step:
    """The steps of a batch of chunks of one action."""
    if batch.goals is not None:
        reached, goal, actor_goal = batch.goals.reached, batch.goals.value, batch.goals.actor
        reward, mask = reached - 1, 1 - reached
    elif batch.rewards is None or batch.masks is None:
        raise TypeError("this method needs a window with rewards (pass `relabel` to `make_window`) or goals")
    else:
        reward, mask, goal, actor_goal = batch.rewards[:, 0], batch.masks[:, 0], None, None
    return Step(batch.obs, batch.actions[:, 0], reward, mask, batch.next_obs, goal, actor_goal)


class AbstractModelFree(AbstractConfigured[Nets]):
    """A method that learns from single steps of the data and acts anew at every step.

    By default its critics `q` have target networks and predict returns. Goal-conditioned value losses use
    `Goals.value`; policy losses, including the critic terms in them, use `Goals.actor`.
    """

    cfg: Any = eqx.field(static=True)

    def __init__(self, cfg: ModelFreeConfig, env: EnvSpec, steps: int = 0):
        """As `AbstractConfigured`."""
        sample = SampleSpec(cfg.batch, 1, cfg.goals(env), every_row=True)
        super().__init__(cfg, env, self.sample_spec(sample, cfg), steps)

    def sample_spec(self, sample: SampleSpec, cfg: Any) -> SampleSpec:
        """Returns the request to the sampler: single steps, given as `sample`, and more."""
        del cfg
        return sample

    @property
    def inputs(self) -> tuple[int, int | None, int]:
        """Widths of state, goal and action."""
        return self.env.obs_dim, self.env.goal_dim, self.env.action_dim

    def target_nets(self, nets: Any) -> Any:
        return nets.q

    @abc.abstractmethod
    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        """Returns actions, not clipped; the arguments are those of `act`."""

    def act(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E 1 A"]:
        return jnp.clip(self.action(state, obs, goal, key), -1, 1)[:, None]

    @property
    def step_discount(self) -> Number | None:
        return self.cfg.discount

    def predict(
        self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]
    ) -> Float[Array, " E"] | None:
        if self.step_discount is None:
            return None
        chosen = self.act(state, obs, goal, key)[:, 0]
        return aggregate(q_values(state.nets.q, obs, goal, chosen), "min") / self.cfg.reward_scale


class NStep(NamedTuple):
    """`B` runs of up to n steps towards a goal, as one step whose reward is 1 if they reach it.

    `reached` is discounted for the way, and `carry` is what the value of `next_obs` is worth at the start:
    the discount for the way, or 0 where the goal is reached. Values are discounted probabilities, in [0, 1].
    """

    reached: Float[Array, " B"]
    carry: Float[Array, " B"]
    next_obs: Float[Array, "B D"]
    subgoals: Subgoals


def n_step(batch: Batch, discount: Number) -> NStep:
    """The runs of a batch with subgoals; `discount` is of one step."""
    if batch.subgoals is None:
        raise TypeError("this method needs a batch with subgoals (`SampleSpec.subgoals`)")
    way = discount**batch.subgoals.steps
    reached = batch.subgoals.reached
    return NStep(way * reached, way * (1 - reached), batch.subgoals.next_obs, batch.subgoals)


def require_goals(name: str, env: EnvSpec) -> None:
    """Raises UserError where a method that is only about goals meets an environment without any."""
    if env.goal_dim is None:
        raise UserError(f"--algo={name}: {env.name} has no goals; take an oraclerep task, or another --algo")
