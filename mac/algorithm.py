"""What every algorithm is: an immutable object with pure methods over an arrays-only state."""

import abc
import copy
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from mac.config import CommonConfig
from mac.errors import UserError
from mac.types import Batch, EnvSpec, Metrics, Number, SampleSpec, Window

Nets = TypeVar("Nets", bound=eqx.Module)
Rate = Number | optax.Schedule


class TrainState(eqx.Module):
    """All that training changes: arrays only, so it may be scanned, vmapped, donated and saved.

    Attributes:
        nets: the networks that gradients train, by name.
        target: slow copies of those of `nets` that the algorithm names in `target_nets`.
        opt_state: the optimiser's state.
        swept: values of hyperparameters that this state is trained with in place of the algorithm's own
            (`AbstractAlgorithm.with_hparams`), by name; usually none.
    """

    nets: Any
    target: Any
    opt_state: Any
    swept: dict[str, Float[Array, "*S"]] = eqx.field(default_factory=dict)


class AbstractAlgorithm(eqx.Module):
    """An algorithm for one environment; every field is static, so it is hashable and holds no array."""

    env: eqx.AbstractVar[EnvSpec]
    sample: eqx.AbstractVar[SampleSpec]

    @abc.abstractmethod
    def init(self, key: Key[Array, ""]) -> TrainState:
        """A fresh state; call it inside `jit`, so that targets and networks own separate buffers."""

    @abc.abstractmethod
    def update(
        self, state: TrainState, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        """One gradient step on one batch. `step` counts updates from 0 and is owned by the loop."""

    @abc.abstractmethod
    def act(
        self,
        state: TrainState,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"] | None,
        key: Key[Array, ""],
    ) -> Float[Array, "E n A"]:
        """Actions in [-1, 1] for normalised observations, to be executed open loop, `n` per call.

        `goal`, normalised too, is None in environments without goals.
        """

    def with_hparams(self, swept: Mapping[str, Float[Array, ""]]) -> Any:
        """This algorithm with other values of some hyperparameters, which may be traced.

        So one compiled program trains many configurations. The loop calls it before every other method.

        Raises:
            TypeError: this algorithm has no such hyperparameters.
        """
        if swept:
            raise TypeError(f"{type(self).__name__} has no hyperparameters {', '.join(swept)}")
        return self

    # What evaluations also report, of an algorithm that has it.

    @property
    def step_discount(self) -> Number | None:
        """Discount factor per environment step of what `predict` predicts; None if it predicts nothing."""
        return None

    def predict(
        self,
        state: TrainState,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"] | None,
        key: Key[Array, ""],
    ) -> Float[Array, " E"] | None:
        """Return that the algorithm expects from acting as `act` does, given the same arguments.

        It is in the units of `mac.run.report.episode_returns.realised_return`, with which evaluations
        compare it.
        """
        del state, obs, goal, key
        return None

    def diagnose(self, state: TrainState, window: Window, key: Key[Array, ""]) -> Metrics:
        """Metrics named `diagnostics/...` that tell what to mend, from data of `window`; at evaluations."""
        del state, window, key
        return {}


def polyak(target: Any, online: Any, rate: Number) -> Any:
    """`rate * online + (1 - rate) * target`, leaf by leaf."""
    return jax.tree.map(lambda t, o: (1 - rate) * t + rate * o, target, online)


def linear_cooldown(lr: Number, steps: int, share: float) -> optax.Schedule:
    """Constant `lr`, which falls linearly to 0 over the last `share` of `steps` updates."""
    fall = max(round(share * steps), 1)
    return optax.linear_schedule(lr, 0.0, fall, transition_begin=steps - fall)


def adam_by_network(rates: dict[str, Rate], other: Rate) -> optax.GradientTransformation:
    """Adam with a learning rate of its own for the networks named in `rates`, and `other` for the rest."""
    return by_network({name: optax.adam(rate) for name, rate in rates.items()}, optax.adam(other))


def by_network(
    own: Mapping[str, optax.GradientTransformation], other: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An optimiser of its own for each network named in `own`, and `other` for the rest."""

    def names(params: Any) -> Any:
        label = lambda path, _: path[0].name if path[0].name in own else ""  # noqa: E731
        return jax.tree_util.tree_map_with_path(label, params)

    return optax.multi_transform({**own, "": other}, names)


def at_some_updates(
    inner: optax.GradientTransformation, turn: Callable[[Int[Array, ""]], Bool[Array, ""]], *, coast: bool
) -> optax.GradientTransformationExtraArgs:
    """`inner`, fed with gradients at some updates only; needs the update's number as `step`.

    Args:
        turn: whether the update of that number is one of them.
        coast: between turns `inner` sees gradients of 0, so that momentum moves the weights on; otherwise it
            rests, and neither weights nor its state change.
    """
    inner = optax.with_extra_args_support(inner)

    def update(grads: Any, state: Any, params: Any = None, *, step: Int[Array, ""], **extra: Any) -> Any:
        now = turn(step)

        def when(there: Any, otherwise: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(now, x, y), there, otherwise)

        zeros = jax.tree.map(jnp.zeros_like, grads)
        if coast:
            return inner.update(when(grads, zeros), state, params, step=step, **extra)
        updates, after = inner.update(grads, state, params, step=step, **extra)
        return when(updates, zeros), when(after, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)  # pyright: ignore[reportArgumentType]


class AbstractLossAlgorithm(AbstractAlgorithm, Generic[Nets]):
    """An algorithm that is one loss: one joint gradient step of Adam, then slow targets."""

    lr: eqx.AbstractVar[float]
    cooldown: eqx.AbstractVar[float]
    steps: eqx.AbstractVar[int]
    tau_ema: eqx.AbstractVar[float]

    @abc.abstractmethod
    def nets(self, key: Key[Array, ""]) -> Nets:
        """Freshly initialised networks."""

    @abc.abstractmethod
    def target_nets(self, nets: Nets) -> Any:
        """The part of `nets` that has a slow copy."""

    @abc.abstractmethod
    def loss(
        self, nets: Nets, target: Any, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The sum of all losses on one batch, and what to log."""

    def init(self, key: Key[Array, ""]) -> TrainState:
        nets = self.nets(key)
        target = jax.tree.map(jnp.copy, self.target_nets(nets))
        return TrainState(nets, target, self.optimiser().init(nets))  # pyright: ignore[reportArgumentType]

    def update(
        self, state: TrainState, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        grads, metrics = jax.grad(self.loss, has_aux=True)(state.nets, state.target, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of an integer count
            optimiser = optax.with_extra_args_support(self.optimiser())
            updates, opt_state = optimiser.update(grads, state.opt_state, state.nets, step=step)
        # The slow copy follows the weights from *before* this update, as in the paper's runs.
        target = self.update_target(state.target, self.target_nets(state.nets), step)
        return TrainState(optax.apply_updates(state.nets, updates), target, opt_state), metrics

    def update_target(self, target: Any, online: Any, step: Int[Array, ""]) -> Any:
        """The target networks after update number `step`."""
        del step
        return polyak(target, online, self.tau_ema)

    def optimiser(self) -> optax.GradientTransformation:
        return optax.adam(self.rate)

    @property
    def rate(self) -> Rate:
        """Learning rate of every network, by the number of updates if it is not constant."""
        return linear_cooldown(self.lr, self.steps, self.cooldown) if self.cooldown else self.lr


class AbstractConfigured(AbstractLossAlgorithm[Nets]):
    """An algorithm that is one loss, with the settings that every method has in its configuration."""

    cfg: CommonConfig = eqx.field(static=True)
    env: EnvSpec = eqx.field(static=True)
    sample: SampleSpec = eqx.field(static=True)
    lr: float = eqx.field(static=True)
    cooldown: float = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    tau_ema: float = eqx.field(static=True)

    def __init__(self, cfg: CommonConfig, env: EnvSpec, sample: SampleSpec, steps: int):
        """`steps`, the length of the run in updates, matters only to learning rates that depend on it.

        Raises:
            UserError: they do, and it is not given.
        """
        if cfg.needs_steps and steps < 1:
            raise UserError(f"steps={steps}: {cfg.needs_steps} needs the length of the run")
        self.cfg, self.env, self.sample = cfg, env, sample._replace(reward_scale=cfg.reward_scale)
        self.lr, self.cooldown, self.tau_ema = cfg.lr, cfg.cooldown, cfg.tau_ema
        self.steps = steps if cfg.needs_steps else 0

    def with_hparams(self, swept: Mapping[str, Float[Array, ""]]) -> Any:
        if not swept:
            return self
        other, cfg = copy.copy(self), self.cfg.with_hparams(swept)
        goals = self.sample.goals and cfg.goals(self.env)
        sample = self.sample._replace(goals=goals, reward_scale=cfg.reward_scale)
        for name, value in (("cfg", cfg), ("sample", sample), ("lr", cfg.lr), ("tau_ema", cfg.tau_ema)):
            object.__setattr__(other, name, value)  # past Equinox's check that static fields hold no arrays
        return other
