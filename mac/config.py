"""Hyperparameters: those that every method has, and MAC's, which its ablations inherit.

A class of hyperparameters is an `eqx.Module`: an immutable dataclass whose values are checked when it is made
(`__check_init__`, of each class by itself). It is also a pytree. A plain run never traces it, so compiled
code holds its numbers as constants; a sweep puts traced arrays in place of some of them.
"""

import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import ClassVar, Literal

import equinox as eqx
from jaxtyping import Array, Float

from mac.errors import UserError
from mac.types import EnvSpec, GoalDistribution, GoalSpec

Later = Literal["uniform", "geometric"]
DynamicsKind = Literal["deterministic", "gaussian", "flow"]


class CommonConfig(eqx.Module):
    """Hyperparameters that every method has.

    Goal-sampling distributions are three probabilities: the state itself, a later state of its episode, any
    state.
    """

    batch: int = 256
    """items drawn from the data per update: chunks (MAC), or single steps"""
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    """width of each hidden layer, of every network"""
    lr: float = 3e-4
    """learning rate of Adam"""
    cooldown: float = 0.0
    """share of the run, at its end, over which the learning rate falls linearly to 0; in [0, 1]"""
    discount: float = 0.99
    """discount factor γ per environment step, in (0, 1)"""
    tau_ema: float = 0.005
    """rate of the Polyak average of target networks, per update, in (0, 1]"""
    reward_scale: float = 1.0
    """factor of rewards while training; 1000 / (best - worst return) makes an expert's about 1 per step"""
    value_goals: tuple[float, float, float] = (0.2, 0.5, 0.3)
    """probabilities of the goals of models and values: current, later, any (only with goals)"""
    value_goals_later: Later = "uniform"
    """how far ahead a later state is: uniform over what is left, or geometric with the discount"""
    actor_goals: tuple[float, float, float] = (0.0, 1.0, 0.0)
    """probabilities of the goals of the policy: current, later, any (only with goals)"""
    actor_goals_later: Later = "geometric"
    """how far ahead a later state is: uniform over what is left, or geometric with the discount"""

    ACTING: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters that only acting reads, so that a trained policy may be evaluated with other values."""
    STATIC: ClassVar[tuple[str, ...]] = ("cooldown",)
    """Numbers that decide which operations there are."""
    NEED_STEPS: ClassVar[tuple[str, ...]] = ("cooldown",)
    """Hyperparameters that, unless they are 0 or off, make learning rates depend on the run's length."""

    def __check_init__(self):
        self._require_positive("batch")
        self._require("hidden", min(self.hidden, default=0) >= 1, "give at least one width, each at least 1")
        self._require("discount", 0 < self.discount < 1, "must be in (0, 1)")
        self._require("tau_ema", 0 < self.tau_ema <= 1, "must be in (0, 1]")
        self._require("cooldown", 0 <= self.cooldown <= 1, "must be in [0, 1]")
        for name in ("value_goals", "actor_goals"):
            probs = getattr(self, name)
            valid = len(probs) == 3 and min(probs) >= 0 and abs(sum(probs) - 1) < 1e-6
            self._require(name, valid, "give three probabilities that add up to 1")
        self._require("reward_scale", 0 < self.reward_scale < float("inf"), "must be positive and finite")
        self._require("lr", 0 < self.lr < float("inf"), "must be positive and finite")

    @property
    def needs_steps(self) -> str:
        """The flag that makes learning rates depend on the length of the run; empty if none does."""
        return next((self._flag(name) for name in self.NEED_STEPS if getattr(self, name)), "")

    def check_env(self, env: EnvSpec) -> None:
        """Refuses settings that have no effect in an environment.

        Raises:
            UserError: naming the first.
        """
        if env.goal_dim is None:
            goals = ("value_goals", "value_goals_later", "actor_goals", "actor_goals_later")
            self._require_default(*goals, reason=f"{env.name} has no goals")
        else:
            self._require_default("reward_scale", reason=f"{env.name} has goals, where each step costs 1")

    def goal_distribution(self, which: Literal["value", "actor"]) -> GoalDistribution:
        """Returns the goal-sampling distribution of values or of the policy."""
        probs = self.value_goals if which == "value" else self.actor_goals
        later = self.value_goals_later if which == "value" else self.actor_goals_later
        return GoalDistribution(*probs, geometric=later == "geometric", discount=self.discount)

    def goals(self, env: EnvSpec) -> GoalSpec | None:
        """Returns the request to the sampler; None where there are no goals."""
        if env.goal_dim is None:
            return None
        return GoalSpec(env.goal_columns, self.goal_distribution("value"), self.goal_distribution("actor"))

    @classmethod
    def sweepable(cls) -> tuple[str, ...]:
        """Hyperparameters that may differ between configurations trained by one compiled program: plain
        numbers, but for those in `STATIC`. Others decide shapes, or which operations there are.
        """
        hints = typing.get_type_hints(cls)
        return tuple(f.name for f in fields(cls) if hints[f.name] is float and f.name not in cls.STATIC)

    def with_hparams(self, values: Mapping[str, Float[Array, ""]]) -> "CommonConfig":
        """These hyperparameters with other values of some `sweepable` ones, which may be traced.

        The values are not checked: a traced one is unknown. `--sweep` checks its values beforehand.

        Raises:
            TypeError: a hyperparameter that cannot be swept.
        """
        if wrong := sorted(values.keys() - set(self.sweepable())):
            raise TypeError(f"{type(self).__name__} cannot sweep {', '.join(wrong)}")
        names = tuple(values)
        return eqx.tree_at(lambda cfg: [getattr(cfg, name) for name in names], self, list(values.values()))

    def _flag(self, name: str) -> str:
        """A hyperparameter as it is given on the command line."""
        value, flag = getattr(self, name), f"--hp.{name.replace('_', '-')}"
        return flag if value is True else f"{flag}={value}"

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{self._flag(name)}: {rule}")

    def _require_positive(self, *names: str) -> None:
        """For whole numbers."""
        for name in names:
            self._require(name, getattr(self, name) >= 1, "must be at least 1")

    def _require_at_least_0(self, *names: str) -> None:
        """For coefficients."""
        for name in names:
            self._require(name, 0 <= getattr(self, name) < float("inf"), "must be at least 0 and finite")

    def _require_default(self, *names: str, reason: str) -> None:
        """For what a method lacks: a setting that would be ignored in silence is an error instead."""
        for name in names:
            self._require(name, getattr(self, name) == getattr(type(self), name), f"{reason}; leave it out")


class Config(CommonConfig):
    """Hyperparameters of MAC; the defaults are the paper's for single-task reward data."""

    discount: float = 0.999
    """discount factor γ per environment step, in (0, 1)"""
    chunk: int = 10
    """actions per chunk, n"""
    rollout: int = 10
    """imagined chunks per rollout, H"""
    rollout_batch: int = 1024
    """rollouts per update, from the first states of the batch; at most `batch` of them exist"""
    candidates: int = 8
    """chunks sampled per choice while training, N"""
    candidates_test: int = 32
    """chunks sampled per choice while acting, N"""
    flow_steps: int = 10
    """Euler steps of the flow policy that the one-step policy imitates, F"""
    flow_steps_test: int = 0
    """Euler steps of the flow policy while acting; 0 acts with the one-step policy, as the paper does"""
    lam: float = 1.0
    """λ of the imagined returns, in [0, 1]"""
    chunk_reward: Literal["mean", "sum"] = "mean"
    """a chunk's reward: discounted mean of its rewards (the paper's runs) or sum (its eq. 6)"""
    value: Literal["squared", "bce"] = "squared"
    """loss of V and Q: squared error, or cross-entropy of values in [0, 1] (only with goals: the
    discounted probability of success)"""
    release_bce: bool = False
    """a known bug of the authors' code: with value bce, Q's target takes the logit of V for its value"""
    execute: int = 1
    """actions of a chunk executed before planning anew, 1 to `chunk`"""
    dynamics: DynamicsKind = "deterministic"
    """model of the state after a chunk: one state, a normal distribution, or a flow of any distribution"""
    dynamics_steps: int = 10
    """Euler steps of the flow that draws states (dynamics flow)"""
    dynamics_scale: float = 1.0
    """unit of the changes of state that the flow draws, about their size (dynamics flow)"""
    dynamics_samples: int = 1
    """states drawn after the first chunk, over whose values Q's target averages (dynamics gaussian, flow)"""
    state_bound: float = 0.0
    """imagined states are clipped to this on both sides of 0, in normalised units: with minmax the data lie
    in [-1, 1]; 0 = off"""
    critic_chunk: int = 0
    """first actions of a chunk that a second, short critic judges, h: it learns from Q, and chooses while
    acting; at least `execute`; 0 = off, Q chooses"""
    critic_expectile: float = 0.9
    """expectile of Q, over the ways in which chunks go on, that the short critic is; in (0, 1)"""
    long_critic_test: bool = False
    """acts by Q although there is a short critic (with critic-chunk)"""
    search_rounds: int = 1
    """rounds that share the `candidates` of a choice, of which each samples around the best noises before
    it; 1 = best-of-N"""
    search_rounds_test: int = 1
    """the same while acting, of `candidates-test`"""
    search_elites: float = 0.5
    """best noises that the next round samples around, as a share of a round; in (0, 1]"""

    ACTING: ClassVar[tuple[str, ...]] = (
        "candidates_test", "flow_steps_test", "execute", "long_critic_test", "search_rounds_test",
    )  # fmt: skip
    STATIC: ClassVar[tuple[str, ...]] = (*CommonConfig.STATIC, "lam", "search_elites", "state_bound")

    def __check_init__(self):
        self._require_positive(
            "chunk", "rollout", "rollout_batch", "candidates", "candidates_test", "flow_steps"
        )
        self._require("flow_steps_test", self.flow_steps_test >= 0, "must be at least 0")
        self._require(
            "execute", 1 <= self.execute <= self.chunk, f"must be 1 to --hp.chunk={self.chunk}; change either"
        )
        self._require("lam", 0 <= self.lam <= 1, "must be in [0, 1]")
        self._require("release_bce", not self.release_bce or self.value == "bce", "needs --hp.value bce")
        self._check_long_chunks()
        self._require_positive("dynamics_steps", "dynamics_samples")
        self._require_at_least_0("state_bound")
        self._require("dynamics_scale", 0 < self.dynamics_scale < float("inf"), "must be positive and finite")
        if self.dynamics == "deterministic":
            self._require_default("dynamics_samples", reason="a deterministic model has one successor")
        if self.dynamics != "flow":
            reason = f"--hp.dynamics={self.dynamics} has no flow"
            self._require_default("dynamics_steps", "dynamics_scale", reason=reason)

    def _check_long_chunks(self) -> None:
        """Checks what chooses among chunks: the short critic, and the search."""
        h, execute = self.critic_chunk, self.execute
        self._require("critic_chunk", 0 <= h <= self.chunk, f"must be 0 to --hp.chunk={self.chunk}")
        judged = h == 0 or self.long_critic_test or execute <= h
        self._require("critic_chunk", judged, f"must be at least --hp.execute={execute}; change either")
        self._require("critic_expectile", 0 < self.critic_expectile < 1, "must be in (0, 1)")
        self._require("long_critic_test", h > 0 or not self.long_critic_test, "needs --hp.critic-chunk")
        self._require("search_elites", 0 < self.search_elites <= 1, "must be in (0, 1]")
        for suffix in ("", "_test"):
            rounds, n = getattr(self, f"search_rounds{suffix}"), getattr(self, f"candidates{suffix}")
            rule = f"must be at least 1 and divide --hp.candidates{suffix.replace('_', '-')}={n}"
            self._require(f"search_rounds{suffix}", rounds >= 1 and n % rounds == 0, rule)

    def elites(self, rounds: int, candidates: int) -> int:
        """Best noises that a round of the search samples around: at least 1."""
        return max(1, round(self.search_elites * candidates / rounds))
