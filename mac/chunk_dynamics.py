"""MAC's models of where a chunk of actions leads: one successor, or a distribution of successors.

The published method predicts one successor, by squared error. Where an environment is random that is the mean
of the successors, a state that may never occur: halfway between the two exits of a teleporter. The paper
names an expressive flow as a remedy and tests none (Park et al. 2025, arXiv 2512.08108, section 4.2):

    deterministic    the change of the state, by squared error (eq. 5)
    gaussian         mean and standard deviation of each entry's change, by maximum likelihood
    flow             a flow-matching model of the change, sampled in Euler steps

All three are one `MLP`, so that it is frozen, rounded and fused as any other (`mac.nn.frozen`).
"""

import abc

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.config import Config, DynamicsKind
from mac.nn.dynamics_ensemble import bounded_log_std
from mac.nn.frozen import Numerics
from mac.nn.gaussian_policy import normal_log_prob
from mac.nn.mlp import MLP, Network, broadcast_add
from mac.ops.flow import euler, flow_matching_loss
from mac.ops.losses import mse
from mac.ops.rollout import Model, residual_model

WIDE_START = 1.6094
"""Added to what a network says of its spread, so that standard deviations begin at about 1 (log 5: 5/6 of the
range of their logarithms). Narrow starts have slopes so steep that Adam is slow for 1000 updates."""


class AbstractChunkDynamics(eqx.Module):
    """The model s, a[n] -> s', of which MAC has one network, `Nets.model`.

    It has no state: the hyperparameters `cfg` and the network are arguments.

    Attributes:
        numerics: that of the algorithm, for networks without gradient.
    """

    numerics: Numerics = eqx.field(static=True, kw_only=True, default=Numerics())

    @property
    @abc.abstractmethod
    def draws(self) -> bool:
        """Whether successors are drawn at random, so that `loss` and `successor` need keys."""

    @abc.abstractmethod
    def net(self, cfg: Config, obs: int, chunk: int, key: Key[Array, ""]) -> MLP:
        """A fresh network; `obs` and `chunk` are the sizes of a state and of a flat chunk."""

    @abc.abstractmethod
    def loss(
        self,
        cfg: Config,
        net: Network,
        s: Float[Array, "B D"],
        a: Float[Array, "B A"],
        after: Float[Array, "B D"],
        key: Key[Array, ""] | None,
    ) -> Float[Array, ""]:
        """Loss of the states `after` chunks `a` of the data."""

    @abc.abstractmethod
    def successor(
        self,
        cfg: Config,
        net: Network,
        s: Float[Array, "*B D"],
        a: Float[Array, "*B A"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*B D"]:
        """A state after each chunk; the predicted one, or one drawn at random."""

    def sampler(self, cfg: Config, net: Network) -> Model:
        """The model with its network, for `imagine` and `open_loop`: states within `Config.state_bound`."""

        def sample(s: Float[Array, "*B D"], a: Float[Array, "*B A"], *key: Key[Array, ""]) -> Array:
            after, bound = self.successor(cfg, net, s, a, *key), cfg.state_bound
            return jnp.clip(after, -bound, bound) if bound else after

        return sample


class DeterministicDynamics(AbstractChunkDynamics):
    """The published model: the mean of the successors (eq. 5)."""

    @property
    def draws(self) -> bool:
        return False

    def net(self, cfg: Config, obs: int, chunk: int, key: Key[Array, ""]) -> MLP:
        return MLP((obs, chunk), cfg.hidden, obs, key=key)

    def loss(
        self, cfg: Config, net: Network, s: Array, a: Array, after: Array, key: Key[Array, ""] | None
    ) -> Float[Array, ""]:
        del cfg, key
        return mse(residual_model(net)(s, a), after)

    def successor(
        self, cfg: Config, net: Network, s: Array, a: Array, key: Key[Array, ""] | None = None
    ) -> Float[Array, "*B D"]:
        del cfg, key
        return residual_model(net)(s, a)


class GaussianDynamics(AbstractChunkDynamics):
    """Independent normal changes of each entry; standard deviations within `dynamics_ensemble.LOG_STD`.

    One mode: for two exits of a teleporter it is as wide as they are apart.
    """

    @property
    def draws(self) -> bool:
        return True

    def net(self, cfg: Config, obs: int, chunk: int, key: Key[Array, ""]) -> MLP:
        return MLP((obs, chunk), cfg.hidden, 2 * obs, key=key)

    def change(
        self, net: Network, s: Float[Array, "*B D"], a: Float[Array, "*B A"]
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
        """Means of the change of each entry, and logarithms of its standard deviation."""
        mean, spread = jnp.split(net(s, a), 2, axis=-1)
        return mean, bounded_log_std(spread + WIDE_START)

    def loss(
        self, cfg: Config, net: Network, s: Array, a: Array, after: Array, key: Key[Array, ""] | None
    ) -> Float[Array, ""]:
        """Mean over the batch of minus the logarithm of the density, summed over entries."""
        del cfg, key
        mean, log_std = self.change(net, s, a)
        return -jnp.mean(normal_log_prob(after - s, mean, log_std))

    def successor(
        self, cfg: Config, net: Network, s: Array, a: Array, key: Key[Array, ""] | None = None
    ) -> Float[Array, "*B D"]:
        del cfg
        assert key is not None
        mean, log_std = self.change(net, s, a)
        return broadcast_add(s, mean + jnp.exp(log_std) * jr.normal(key, mean.shape))


class FlowDynamics(AbstractChunkDynamics):
    """Changes of any distribution: a velocity field from standard normal noise to changes.

    Changes are measured in units of `dynamics_scale`: noise much wider than they are leaves its mark on them.
    """

    @property
    def draws(self) -> bool:
        return True

    def net(self, cfg: Config, obs: int, chunk: int, key: Key[Array, ""]) -> MLP:
        return MLP((obs, chunk, obs, 1), cfg.hidden, obs, key=key)

    def loss(
        self, cfg: Config, net: Network, s: Array, a: Array, after: Array, key: Key[Array, ""] | None
    ) -> Float[Array, ""]:
        assert key is not None
        return flow_matching_loss(lambda x, t: net(s, a, x, t), (after - s) / cfg.dynamics_scale, key)

    def successor(
        self, cfg: Config, net: Network, s: Array, a: Array, key: Key[Array, ""] | None = None
    ) -> Float[Array, "*B D"]:
        assert key is not None
        lead = jnp.broadcast_shapes(s.shape[:-1], a.shape[:-1])
        noise, unroll = jr.normal(key, (*lead, s.shape[-1])), self.numerics.unrolls()
        change = euler(lambda x, t: net(s, a, x, t), noise, cfg.dynamics_steps, unroll=unroll)
        return broadcast_add(s, cfg.dynamics_scale * change)


KINDS: dict[DynamicsKind, type[AbstractChunkDynamics]] = {
    "deterministic": DeterministicDynamics,
    "gaussian": GaussianDynamics,
    "flow": FlowDynamics,
}
"""By the values of `Config.dynamics`."""


def make_dynamics(cfg: Config, numerics: Numerics) -> AbstractChunkDynamics:
    """The component that `--hp.dynamics` names; `numerics` is the algorithm's."""
    return KINDS[cfg.dynamics](numerics=numerics)
