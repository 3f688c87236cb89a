"""The algorithm interface: an immutable object with pure methods over an arrays-only state."""

import abc
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from mac.config import CommonConfig
from mac.errors import UserError
from mac.nn.frozen import Numerics
from mac.ops.optimisers import Rate, linear_cooldown, polyak
from mac.ops.replay import ReplaySpec, empty_replay
from mac.types import Batch, EnvSpec, Metrics, Number, Past, SampleSpec, Window

Nets = TypeVar("Nets", bound=eqx.Module)
Cfg = TypeVar("Cfg", bound=CommonConfig)


class TrainState(eqx.Module):
    """All that training changes: arrays only, so it may be scanned, vmapped, donated and saved.

    Attributes:
        nets: the networks that gradients train, by name.
        target: target networks (Polyak averages) of those of `nets` that `target_nets` returns, and other
            arrays that losses read and gradients do not train.
        opt_state: the optimiser's state.
        swept: values of hyperparameters that this state is trained with in place of the algorithm's own
            (`AbstractAlgorithm.with_hparams`), by name; usually none.
        memory: imagined transitions (`AbstractAlgorithm.replay`), `mac.ops.replay.Replay`; usually none.
    """

    nets: Any
    target: Any
    opt_state: Any
    swept: dict[str, Float[Array, "*S"]] = eqx.field(default_factory=dict)
    memory: Any = ()

    def without_memory(self) -> "TrainState":
        """This state as updates and metrics need it."""
        return dataclasses.replace(self, memory=())

    def for_acting(self) -> "TrainState":
        """This state as `AbstractAlgorithm.act` needs it: a third of the arrays."""
        return dataclasses.replace(self, opt_state=(), memory=())


class _HasEnv:
    # Declared outside `AbstractAlgorithm`, where it would be a field and come before `cfg` in constructors.
    env: EnvSpec


class AbstractAlgorithm(_HasEnv, eqx.Module):
    """An algorithm for one environment, its field `env`: immutable, with pure methods.

    It is hashable, and holds arrays only where hyperparameters are swept (`with_hparams`).

    Classes of algorithms are abstract or final: no concrete class has subclasses, and a method with a body is
    not overridden. Exceptions are hooks: methods whose docstring begins with "Hook", which may be overridden
    once.

    Attributes:
        numerics: arithmetic of the networks (`with_numerics`).
    """

    numerics: Numerics = eqx.field(static=True, kw_only=True, default=Numerics())

    @property
    @abc.abstractmethod
    def sample(self) -> SampleSpec:
        """Request to the sampler: what a batch holds."""

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

    @property
    def history(self) -> int:
        """Hook: past steps that acting sees, C; 0, the default, if `act` needs the current state only."""
        return 0

    def act_after(
        self,
        state: TrainState,
        past: Past,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"] | None,
        key: Key[Array, ""],
    ) -> Float[Array, "E n A"]:
        """Hook: `act` with the last `history` steps of each episode; called in its place if `history` > 0."""
        del past
        return self.act(state, obs, goal, key)

    def planned_states(
        self,
        state: TrainState,
        past: Past | None,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"] | None,
        key: Key[Array, ""],
    ) -> Float[Array, "E T D"] | None:
        """Hook: states that `act`, called with the same arguments, plans to pass; None where it plans none.

        For films. `past` is None where the algorithm has no `history`.
        """
        del state, past, obs, goal, key
        return None

    def prepare(self, state: TrainState, window: Window) -> TrainState:
        """Hook: the state before the first update, given the data; by default as it is.

        For statistics of the data that never change later, such as quantiles: they belong into
        `TrainState.target`. Where windows rotate, `window` is the first.
        """
        del window
        return state

    @property
    def replay(self) -> ReplaySpec | None:
        """Hook: the sizes of a memory of imagined transitions; None, the default, if there is none.

        The loop keeps it in `TrainState.memory`, calls `rollout` when it is due, and puts a draw into
        `Batch.imagined`.
        """
        return None

    def rollout(
        self, state: TrainState, window: Window, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[Any, Int[Array, ""]]:
        """Hook: transitions for the memory at the beginning of update `step`, and how many of them count.

        They are arrays of `replay.rows` rows, the valid ones first. `state` comes without its memory.
        """
        del state, window, step, key
        raise NotImplementedError(f"{type(self).__name__} has no model to imagine with")

    def with_hparams(self, values: Mapping[str, Float[Array, ""]]) -> "AbstractAlgorithm":
        """Hook: this algorithm with other values of some hyperparameters, which may be traced.

        So one compiled program trains many configurations. The loop calls it before every other method.

        Raises:
            TypeError: this algorithm has no such hyperparameters (the default: it has none).
        """
        if values:
            raise TypeError(f"{type(self).__name__} has no hyperparameters {', '.join(values)}")
        return self

    def with_numerics(self, numerics: Numerics) -> "AbstractAlgorithm":
        """Hook: this algorithm with networks of other arithmetic.

        The loop traces every algorithm within `numerics.matmuls()`. Networks without gradient are the
        algorithm's own to mark, with `numerics.freeze`; one that marks none trains as in "tf32" for "bf16".

        Raises:
            UserError: the class has a constructor that does not take `numerics`.
        """
        return replace_numerics(self, numerics)

    # What evaluations also report, of an algorithm that has it.

    @property
    def step_discount(self) -> Number | None:
        """Hook: discount factor per environment step of what `predict` predicts; None, the default, if it
        predicts nothing."""
        return None

    def predict(
        self,
        state: TrainState,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"] | None,
        key: Key[Array, ""],
    ) -> Float[Array, " E"] | None:
        """Hook: return that the algorithm expects from acting as `act` does, given the same arguments.

        It is in the units of `mac.run.report.realized_return.realised_return`, with which evaluations
        compare it.
        """
        del state, obs, goal, key
        return None

    def diagnose(self, state: TrainState, window: Window, key: Key[Array, ""]) -> Metrics:
        """Hook: metrics named `diagnostics/...` that tell what to mend, from data of `window`; at
        evaluations."""
        del state, window, key
        return {}


Module = TypeVar("Module", bound=eqx.Module)


def replace_numerics(module: Module, numerics: Numerics) -> Module:
    """A module with another value of its field `numerics`.

    Raises:
        UserError: its class has a constructor that does not take the field.
    """
    name = type(module).__name__
    if "numerics" not in inspect.signature(type(module)).parameters:
        raise UserError(
            f"--run.precision, --run.kernels: the constructor of {name} does not take `numerics`; "
            "leave them out"
        )
    return dataclasses.replace(module, numerics=numerics)  # pyright: ignore[reportArgumentType]


class AbstractLossAlgorithm(AbstractAlgorithm, Generic[Cfg, Nets]):
    """An algorithm that is one loss: a joint gradient step of Adam, then an update of the target networks.

    `Cfg` and `Nets` are the classes of its hyperparameters and of its networks. `steps`, the length of the
    run in updates, matters only to learning rates that depend on it.
    """

    cfg: Cfg
    env: EnvSpec = eqx.field(static=True)
    steps: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        self.cfg.check_env(self.env)
        if self.cfg.needs_steps and self.steps < 1:
            raise UserError(f"steps={self.steps}: {self.cfg.needs_steps} needs the length of the run")

    @abc.abstractmethod
    def nets(self, key: Key[Array, ""]) -> Nets:
        """Freshly initialised networks."""

    @abc.abstractmethod
    def target_nets(self, nets: Nets) -> Any:
        """Returns what `TrainState.target` starts with: the networks of `nets` that have target networks.

        Other arrays that no gradient trains may stand there; they need an `update_target` of their own.
        """

    @abc.abstractmethod
    def loss(
        self, nets: Nets, target: Any, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The sum of all losses on one batch, and what to log."""

    def init(self, key: Key[Array, ""]) -> TrainState:
        nets = self.nets(key)
        target = jax.tree.map(jnp.copy, self.target_nets(nets))
        opt_state = self.optimiser().init(nets)  # pyright: ignore[reportArgumentType]
        memory = () if self.replay is None else empty_replay(self.replay, self.imagined_row())
        return TrainState(nets, target, opt_state, memory=memory)

    def imagined_row(self) -> Any:
        """Hook: one transition of the memory, as zeros; needed where there is a `replay`."""
        raise NotImplementedError(f"{type(self).__name__} has a memory, but no form of its rows")

    def update(
        self, state: TrainState, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        frozen = self.numerics.freeze(state.target)
        grads, metrics = jax.grad(self.loss, has_aux=True)(state.nets, frozen, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of an integer count
            optimiser = optax.with_extra_args_support(self.optimiser())
            updates, opt_state = optimiser.update(grads, state.opt_state, state.nets, step=step)
        # Target networks average the weights from *before* this update, as in the paper's runs.
        target = self.update_target(state.target, self.target_nets(state.nets), batch, step)
        return TrainState(optax.apply_updates(state.nets, updates), target, opt_state), metrics

    def update_target(self, target: Any, online: Any, batch: Batch, step: Int[Array, ""]) -> Any:
        """Hook: the target networks after update number `step`; by default Polyak averages."""
        del batch, step
        return polyak(target, online, self.cfg.tau_ema)

    def optimiser(self) -> optax.GradientTransformation:
        """Hook: the optimiser of all networks; by default Adam."""
        return optax.adam(self.rate)

    @property
    def rate(self) -> Rate:
        """Learning rate of every network, by the number of updates if it is not constant."""
        return self.rate_of(self.cfg.lr)

    def rate_of(self, lr: Number, first: int = 0, every: int = 1) -> Rate:
        """Returns the learning rate `lr`, which cools down at the run's end.

        An optimiser that rests counts only its own steps; the rate at each is that of the run's update.

        Args:
            first: update of the run in which the optimiser takes its first step.
            every: updates from one step to the next.
        """
        if not self.cfg.cooldown:
            return lr
        falling = linear_cooldown(lr, self.steps, self.cfg.cooldown)
        return falling if (first, every) == (0, 1) else (lambda count: falling(every * count + first))

    def cosine_of(self, lr: Number, first: int = 0) -> Rate:
        """Returns the learning rate `lr` that falls to 0 over the run as half a cosine wave.

        Args:
            first: as of `rate_of`.
        """
        return optax.cosine_decay_schedule(lr, max(self.steps - first, 1))

    def with_hparams(self, values: Mapping[str, Float[Array, ""]]) -> AbstractAlgorithm:
        if not values:
            return self
        return eqx.tree_at(lambda algo: algo.cfg, self, self.cfg.with_hparams(values))
