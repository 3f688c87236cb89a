"""Shared parts of methods with critics of single steps, and a policy that acts at every step."""

import abc
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mac.algorithm import AbstractLossAlgorithm, Nets, TrainState
from mac.config import CommonConfig
from mac.errors import UserError, no_rewards
from mac.nn.critics import Combine, aggregate, q_values
from mac.nn.mlp import Activation, Style
from mac.types import Batch, EnvSpec, Number, SampleSpec, Subgoals, SubgoalSpec

Goal = Float[Array, "*B G"] | None
Cfg = TypeVar("Cfg", bound="ActorCriticConfig")


class ActorCriticConfig(CommonConfig):
    """Hyperparameters of networks for values, critics and policies."""

    activation: Activation = "gelu"
    """what follows each hidden layer's matmul"""
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


class FlowChoiceConfig(ActorCriticConfig):
    """Hyperparameters of methods that act by best-of-N samples of a flow."""

    candidates: int = 32
    """samples per choice while acting: of actions, or of where to be"""
    flow_steps: int = 10
    """Euler steps of flow policies while acting"""

    ACTING = ("candidates", "flow_steps")

    def __check_init__(self):
        self._require_positive("candidates", "flow_steps")


class NStepConfig(ActorCriticConfig):
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

    def __check_init__(self):
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
        raise no_rewards(or_goals=True)
    else:
        reward, mask, goal, actor_goal = batch.rewards[:, 0], batch.masks[:, 0], None, None
    return Step(batch.obs, batch.actions[:, 0], reward, mask, batch.next_obs, goal, actor_goal)


def single_steps(cfg: ActorCriticConfig, env: EnvSpec) -> SampleSpec:
    """Returns the request for single steps of the data."""
    return SampleSpec(cfg.batch, 1, cfg.goals(env), every_row=True, reward_scale=cfg.reward_scale)


class AbstractActorCritic(AbstractLossAlgorithm[Cfg, Nets]):
    """A method that learns critics `nets.q` from single steps of the data and acts anew at every step.

    Goal-conditioned value losses use `Goals.value`; policy losses, including the critic terms in them, use
    `Goals.actor`.
    """

    @abc.abstractmethod
    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        """Returns actions, not clipped; the arguments are those of `act`."""

    @property
    def sample(self) -> SampleSpec:
        return self.sample_spec(single_steps(self.cfg, self.env))

    def sample_spec(self, steps: SampleSpec) -> SampleSpec:
        """Hook: the request to the sampler: single steps, given as `steps`, and by default nothing more."""
        return steps

    @property
    def inputs(self) -> tuple[int, int | None, int]:
        """Widths of state, goal and action."""
        return self.env.obs_dim, self.env.goal_dim, self.env.action_dim

    def act(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E 1 A"]:
        return jnp.clip(self.action(state, obs, goal, key), -1, 1)[:, None]

    @property
    def step_discount(self) -> Number:
        return self.cfg.discount

    def predict(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, " E"]:
        return self.to_return(self.policy_q(state, obs, goal, key))

    def policy_q(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, " E"]:
        """Hook: output of the critics for what `act` does; by default their minimum at its action."""
        action = self.act(state, obs, goal, key)[:, 0]
        return aggregate(q_values(state.nets.q, obs, goal, action), "min")

    def to_return(self, q: Float[Array, " E"]) -> Float[Array, " E"]:
        """Hook: the return that an output of the critics stands for; by default the scaled return."""
        return q / self.cfg.reward_scale


class NStep(NamedTuple):
    """`B` runs of up to n steps towards a goal, as one step whose reward is 1 if they reach it.

    `reached` is discounted by the steps taken. `bootstrap_discount` weighs the value of `next_obs`: the
    discount of the steps taken, or 0 where the goal is reached. Values are discounted probabilities, in
    [0, 1].
    """

    reached: Float[Array, " B"]
    bootstrap_discount: Float[Array, " B"]
    next_obs: Float[Array, "B D"]
    subgoals: Subgoals


def n_step(batch: Batch, discount: Number) -> NStep:
    """The runs of a batch with subgoals; `discount` is of one step."""
    if batch.subgoals is None:
        raise TypeError("this method needs a batch with subgoals (`SampleSpec.subgoals`)")
    gamma = discount**batch.subgoals.steps
    reached = batch.subgoals.reached
    return NStep(gamma * reached, gamma * (1 - reached), batch.subgoals.next_obs, batch.subgoals)


def require_goals(name: str, env: EnvSpec) -> None:
    """Raises UserError where a method that is only about goals meets an environment without any."""
    if env.goal_dim is None:
        raise UserError(f"--algo={name}: {env.name} has no goals; take an oraclerep task, or another --algo")


def require_rewards(name: str, env: EnvSpec) -> None:
    """Refuses environments with goals.

    Raises:
        UserError: the environment has goals instead of rewards.
    """
    if env.goal_dim is not None:
        raise UserError(f"--algo={name}: {env.name} has goals; take a single task, or another --algo")
