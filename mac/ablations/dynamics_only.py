"""MAC's dynamics model alone, for studies of what its chunk length does to its errors."""

from typing import Any

from jaxtyping import Array, Float, Key

from mac.algorithm import AbstractLossAlgorithm, TrainState
from mac.chunk_dynamics import AbstractChunkDynamics, make_dynamics
from mac.config import Config
from mac.nn.mlp import MLP
from mac.types import Batch, Metrics, SampleSpec


class Dynamics(AbstractLossAlgorithm[Config, MLP]):
    """The network `model` of MAC, trained as MAC trains it (eq. 5) and nothing else.

    Its data, its batches and its updates are those of every algorithm, so the same loop trains it. Of MAC's
    hyperparameters it reads `batch`, `chunk`, `hidden`, `lr`, `cooldown` and those of `dynamics`.
    """

    @property
    def dynamics(self) -> AbstractChunkDynamics:
        """What the network predicts, and how."""
        return make_dynamics(self.cfg, self.numerics)

    @property
    def sample(self) -> SampleSpec:
        return SampleSpec(self.cfg.batch, self.cfg.chunk)

    def nets(self, key: Key[Array, ""]) -> MLP:
        return self.dynamics.net(self.cfg, self.env.obs_dim, self.cfg.chunk * self.env.action_dim, key)

    def target_nets(self, nets: MLP) -> tuple[()]:
        del nets
        return ()

    def loss(
        self, nets: MLP, target: Any, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        del target
        actions = batch.actions.reshape(len(batch.actions), -1)
        loss = self.dynamics.loss(self.cfg, nets, batch.obs, actions, batch.next_obs, key)
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
