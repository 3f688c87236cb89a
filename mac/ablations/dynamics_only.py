"""MAC's dynamics model alone, for studies of what its chunk length does to its errors."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mac.algorithm import AbstractLossAlgorithm, TrainState
from mac.nn.mlp import MLP
from mac.ops.rollout import residual_model
from mac.types import Batch, EnvSpec, Metrics, SampleSpec


class Dynamics(AbstractLossAlgorithm[MLP]):
    """The network s, a[n] -> s' - s, trained as MAC trains it (eq. 5) and nothing else.

    Its data, its batches and its updates are those of every algorithm, so the same loop trains it.
    """

    env: EnvSpec = eqx.field(static=True)
    sample: SampleSpec = eqx.field(static=True)
    hidden: tuple[int, ...] = eqx.field(static=True)
    lr: float = eqx.field(static=True)
    cooldown: float = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    tau_ema: float = eqx.field(static=True)

    def __init__(
        self, env: EnvSpec, *, chunk: int, batch: int, hidden: tuple[int, ...], lr: float,
        cooldown: float = 0.0, steps: int = 0,
    ):  # fmt: skip
        """`steps`, the length of the run in updates, matters only if the learning rate cools down."""
        self.env, self.sample, self.hidden = env, SampleSpec(batch, chunk), hidden
        self.lr, self.cooldown, self.steps = lr, cooldown, steps
        self.tau_ema = 1.0  # there are no slow copies

    def nets(self, key: Key[Array, ""]) -> MLP:
        obs = self.env.obs_dim
        return MLP((obs, self.sample.chunk * self.env.action_dim), self.hidden, obs, key=key)

    def target_nets(self, nets: MLP) -> tuple[()]:
        del nets
        return ()

    def loss(
        self, nets: MLP, target: Any, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        del target, key
        actions = batch.actions.reshape(len(batch.actions), -1)
        error = residual_model(nets)(batch.obs, actions) - batch.next_obs
        loss = jnp.mean(jnp.square(error))
        return loss, {"model/dynamics_loss": loss}

    def act(
        self,
        state: TrainState,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"] | None,
        key: Key[Array, ""],
    ) -> Float[Array, "E n A"]:
        """Raises TypeError: there is no policy here."""
        raise TypeError("a dynamics model alone has no policy")
