"""Ensembles of stochastic dynamics models, whose disagreement and spread tell what the data do not cover."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Key

from mac.nn.gaussian_policy import normal_log_prob
from mac.nn.mlp import MLP, STANDARD, Style, broadcast_add
from mac.target_platform import target_platform

LogStd = Literal["bounded", "learned"]
LOG_STD = (-5.0, 1.0)
"""Range of bounded logarithms of standard deviations."""
LOG_VAR = (-10.0, 0.5)
"""Range of logarithms of variances that learned bounds begin with."""


def bounded_log_std(spread: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Logarithms of standard deviations, within `LOG_STD`, of unbounded numbers."""
    low, high = LOG_STD
    return jax.nn.sigmoid(spread) * (high - low) + low


class Gaussians(NamedTuple):
    """Independent normal entries, as each of E members predicts them."""

    mean: Float[Array, "E *B D"]
    log_std: Float[Array, "E *B D"]

    def log_prob(self, x: Float[Array, "*B D"], beta: float = 0.0) -> Float[Array, " E *B"]:
        """Logarithm of each member's density, summed over entries, weighted by their variances to `beta`."""
        wide = jnp.broadcast_to(x, self.mean.shape)
        if not beta:
            return normal_log_prob(wide, self.mean, self.log_std)
        entry = normal_log_prob(wide[..., None], self.mean[..., None], self.log_std[..., None])
        return jnp.sum(sg(jnp.exp(2 * beta * self.log_std)) * entry, axis=-1)

    def spread(self) -> Float[Array, "*B"]:
        """Largest norm of a member's standard deviations. Source: Yu et al. 2020 (MOPO)."""
        return jnp.max(jnp.linalg.norm(jnp.exp(self.log_std), axis=-1), axis=0)

    def sample_by_entry(self, key: Key[Array, ""]) -> Float[Array, "*B D"]:
        """Samples, each entry of a member of its own, chosen at random.

        Source: the released LEQ of MAC's authors.
        """
        k_member, k_noise = jr.split(key)
        shape = self.mean.shape[1:]
        member = jr.randint(k_member, (1, *shape), 0, len(self.mean))
        mean, log_std = (jnp.take_along_axis(x, member, axis=0)[0] for x in self)
        return mean + jnp.exp(log_std) * jr.normal(k_noise, shape)


def map_members(f: Callable[..., Any], *members: Any) -> Any:
    """Maps `f` over the leading axis of modules, the way that suits the device (`mac.run.mesh`)."""
    if target_platform() == "cpu":
        return jax.lax.map(lambda each: f(*each), members)
    return jax.vmap(f)(*members)


class DynamicsEnsemble(eqx.Module):
    """Networks that predict the change of a state, maybe with the reward behind it, as normal densities.

    Members start independently and learn from the same batches.

    Source: Chua et al. 2018 (PETS); Janner et al. 2019 (MBPO).
    """

    members: MLP  # s, a -> mean of the change, and an unbounded number for its spread; leading axis E
    bounds: tuple[Float[Array, " D"], Float[Array, " D"]] | None  # learned, of the logarithms of variances
    obs_dim: int = eqx.field(static=True)

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        members: int,
        *,
        key: Key[Array, ""],
        reward: bool = False,
        log_std: LogStd = "bounded",
        style: Style = STANDARD,
    ):
        """Makes an ensemble.

        Args:
            members: their number, E.
            reward: whether the reward is an entry after those of the state.
            log_std: logarithms of standard deviations in `LOG_STD`; or between bounds that are learned.
        """
        width = obs_dim + int(reward)

        def member(key: Key[Array, ""]) -> MLP:
            return MLP((obs_dim, action_dim), hidden, 2 * width, key=key, style=style)

        self.members = jax.vmap(member)(jr.split(key, members))
        low, high = (jnp.full(width, bound) for bound in LOG_VAR)
        self.bounds = (low, high) if log_std == "learned" else None
        self.obs_dim = obs_dim

    def __call__(self, s: Float[Array, "*B D"], a: Float[Array, "*B A"]) -> Gaussians:
        """Each member's density of the next state, and of the reward if it is predicted too."""
        mean, spread = jnp.split(map_members(lambda net: net(s, a), self.members), 2, axis=-1)
        return Gaussians(broadcast_add(mean, self._still(s, mean.shape[-1])), self._log_std(spread))

    def sample(
        self, s: Float[Array, "B D"], a: Float[Array, "B A"], key: Key[Array, ""]
    ) -> Float[Array, "B P"]:
        """Samples what each member predicts for rows of its own: a random share of all, equal but for one.

        So a row's member is uniform, and no member evaluates rows that others are asked for.
        """
        k_deal, k_noise = jr.split(key)
        members, rows = len(jax.tree.leaves(self.members)[0]), len(s)
        share = -(-rows // members)
        dealt = jr.permutation(k_deal, members * share)  # numbers from `rows` on are padding
        hands = [x[jnp.minimum(dealt, rows - 1)].reshape(members, share, -1) for x in (s, a)]
        out = map_members(lambda net, s, a: net(s, a), self.members, *hands)
        out = out.reshape(members * share, -1)[jnp.argsort(dealt)[:rows]]
        mean, spread = jnp.split(out, 2, axis=-1)
        noise = jr.normal(k_noise, mean.shape)
        return mean + self._still(s, mean.shape[-1]) + jnp.exp(self._log_std(spread)) * noise

    def _still(self, s: Float[Array, "*B D"], width: int) -> Float[Array, "*B P"]:
        """The prediction that nothing changes: the state, and zeros for what is predicted besides."""
        return jnp.concatenate([s, jnp.zeros((*s.shape[:-1], width - self.obs_dim))], axis=-1)

    def _log_std(self, spread: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        if self.bounds is None:
            return bounded_log_std(spread)
        low, high = (jnp.broadcast_to(bound, spread.shape) for bound in self.bounds)
        log_var = high - jax.nn.softplus(high - spread)
        return (low + jax.nn.softplus(log_var - low)) / 2

    def loss(
        self,
        s: Float[Array, "B D"],
        a: Float[Array, "B A"],
        after: Float[Array, "B P"],
        counts: Float[Array, " B"] | None = None,
        *,
        beta: float = 0.0,
    ) -> Float[Array, ""]:
        """Mean over members and batch of minus the logarithm of the density, summed over entries.

        `after` is the next state, with the reward behind it where that is predicted too. `counts` is 0 for
        steps that are left out, else 1. Learned bounds are drawn together by a hundredth of their distance.

        Args:
            beta: each entry's term has its variance to this power as a weight, through which no gradient
                passes. Source: Seitzer et al. 2022 (arXiv 2203.09168), eq. 5.
        """
        log_prob = self(s, a).log_prob(after, beta)
        if counts is None:
            loss = -jnp.mean(log_prob)
        else:
            share = counts / jnp.maximum(jnp.sum(counts), 1)
            loss = -jnp.mean(jnp.sum(log_prob * jnp.broadcast_to(share, log_prob.shape), axis=-1))
        if self.bounds is not None:
            loss = loss + 0.01 * jnp.sum(self.bounds[1] - self.bounds[0])
        return loss

    def decay_loss(self, decay: Sequence[float]) -> Float[Array, ""]:
        """Half the squared weights of each layer times its `decay`, a mean over members to add to `loss`.

        It is multiplied by half the number of entries, since published decays go with twice the likelihood's
        mean over entries. Source: Chua et al. 2018 (PETS); Sun (2023, OfflineRL-Kit).
        """
        layers = zip(decay, self.members.dense, strict=True)
        squares = [0.5 * rate * jnp.sum(jnp.square(dense.weight)) for rate, dense in layers]
        members, _, outputs = self.members.dense[-1].weight.shape
        return 0.5 * (outputs // 2) / members * sum(squares, jnp.zeros(()))
