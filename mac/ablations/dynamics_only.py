"""MAC's dynamics model alone, for studies of what its chunk length does to its errors."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mac.algorithm import AbstractLossAlgorithm, TrainState
from mac.config import Config
from mac.nn.mlp import MLP
from mac.ops.rollout import residual_model
from mac.types import Batch, Metrics, SampleSpec


class Dynamics(AbstractLossAlgorithm[Config, MLP]):
    """The network s, a[n] -> s' - s, trained as MAC trains it (eq. 5) and nothing else.

    Its data, its batches and its updates are those of every algorithm, so the same loop trains it. Of MAC's
    hyperparameters it reads `batch`, `chunk`, `hidden`, `lr` and `cooldown`.
    """

    @property
    def sample(self) -> SampleSpec:
        return SampleSpec(self.cfg.batch, self.cfg.chunk)

    def nets(self, key: Key[Array, ""]) -> MLP:
        obs = self.env.obs_dim
        return MLP((obs, self.cfg.chunk * self.env.action_dim), self.cfg.hidden, obs, key=key)

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
        """Raises TypeError: it has no policy."""
        raise TypeError("a dynamics model alone has no policy")
