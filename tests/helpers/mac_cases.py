"""MAC with perturbed weights on a batch: its losses and gradients, and those of `algorithm_1`."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from mac.data.sampler import sample
from mac.mac import MAC, Nets
from mac.nn.mlp import MLP, scalar
from mac.types import Batch
from tests.helpers.numpy_mac import algorithm_1, double, draws, fresh, perturb
from tests.helpers.toy_env import falling_window, window

OWN_LOSS = {
    "model": "model/dynamics_loss",
    "reward": "model/reward_loss",
    "success": "model/success_loss",
    "termination": "model/termination_loss",
    "flow": "policy/flow_loss",
    "policy": "policy/distil_loss",
    "v": "value/loss",
    "q": "critic/loss",
    "q_short": "critic/short_loss",
}
"""Loss that trains each network."""

leaves = jax.tree.leaves
jit_loss = jax.jit(MAC.loss, static_argnums=0)


def own_losses(algo: MAC) -> dict[str, str]:
    """`OWN_LOSS` of the networks that the algorithm has."""
    absent = {"success" if algo.env.goal_dim is None else "reward"}
    absent |= set() if algo.env.recorded else {"termination"}
    absent |= set() if algo.cfg.critic_chunk else {"q_short"}
    return {net: metric for net, metric in OWN_LOSS.items() if net not in absent}


@partial(jax.jit, static_argnums=0)
def slopes(algo: MAC, nets: Nets, target: MLP, batch: Batch, key: jax.Array) -> dict[str, Nets]:
    """Gradient of each network's own loss with respect to all networks."""

    def own(nets: Nets) -> dict[str, jax.Array]:
        metrics = algo.loss(nets, target, batch, key)[1]
        return {net: metrics[metric] for net, metric in own_losses(algo).items()}

    return jax.jacrev(own)(nets)


def touched(gradients: dict[str, Nets]) -> dict[str, set[str]]:
    """Returns the networks that the gradient of each loss reaches."""
    return {
        loss: {net for net in OWN_LOSS if any(np.any(leaf) for leaf in leaves(getattr(by_net, net)))}
        for loss, by_net in gradients.items()
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """No bias, scale or target network is trivial."""

    algo: MAC
    nets: Nets
    target: MLP
    batch: Batch
    key: jax.Array

    def loss(self) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jit_loss(self.algo, self.nets, self.target, self.batch, self.key)

    def gradients(self) -> dict[str, Nets]:
        return slopes(self.algo, self.nets, self.target, self.batch, self.key)

    def by_hand(self, nets: Nets) -> dict[str, float]:
        size = (self.algo.cfg.batch, self.algo.cfg.chunk * self.algo.env.action_dim)
        with jax.numpy_rank_promotion("allow"):
            draw = draws(self.algo.cfg, size, self.key)
        return algorithm_1(nets, double(self.nets), double(self.target), self.batch, self.algo.cfg, draw)

    def slopes_along_random_directions(
        self, gradients: dict[str, Nets], net: str
    ) -> Iterator[tuple[float, float]]:
        """Of a network's own loss: by `gradients`, and by central differences of NumPy's."""
        return slopes_of(double(self.nets), net, getattr(gradients[net], net), self.by_hand, count=3)


def slopes_of(
    nets: Any, net: str, gradient: Any, by_hand: Callable[[Any], dict[str, float]], count: int
) -> Iterator[tuple[float, float]]:
    """Slopes of a network's own loss along `count` random directions of its weights, in pairs: by
    `gradient`, and by central differences of the loss that `by_hand` gives for float64 networks.
    """
    own, step = getattr(nets, net), 1e-5
    for seed in range(count):
        direction = perturb(jax.tree.map(np.zeros_like, own), seed, scale=1.0)
        ends = []
        for move in (step, -step):
            moved = jax.tree.map(lambda x, d, move=move: x + move * np.asarray(d), own, direction)
            ends.append(by_hand(eqx.tree_at(lambda n: getattr(n, net), nets, moved))[net])
        pairs = zip(leaves(gradient), leaves(direction), strict=True)
        got = sum(float(np.sum(np.asarray(g) * np.asarray(d))) for g, d in pairs)
        yield got, (ends[0] - ends[1]) / (2 * step)


def draw_batch(algo: MAC, key: jax.Array) -> Batch:
    rows = falling_window if algo.env.recorded else window
    return jax.jit(sample, static_argnums=1)(rows(algo.cfg.chunk), algo.sample, key)


def make_case(algo: MAC) -> Case:
    """A case of the point, with rewards of any size or with goals."""
    nets = perturb(fresh(algo).nets, seed=1)
    batch = draw_batch(algo, jr.key(2))
    if batch.goals is not None:
        # Half of the data's chunks seem to reach their goal, so that some of the imagined ones do.
        a = batch.actions.reshape(len(batch.actions), -1)
        middle = jnp.median(scalar(nets.success, batch.obs, batch.goals.value, a))
        nets = eqx.tree_at(lambda n: n.success.dense[-1].bias, nets, replace_fn=lambda b: b - middle)
    # Rewards other than the point's -1 and 0, so that their order within a chunk counts.
    rewards = jnp.asarray(np.random.default_rng(3).normal(size=batch.actions.shape[:2]), jnp.float32)
    return Case(algo, nets, perturb(nets.v, seed=4), dataclasses.replace(batch, rewards=rewards), jr.key(5))


def assert_first_step_of_adam(before: Any, after: Any, gradients: Any, lr: float) -> None:
    """Every weight moved against its gradient, by the learning rate whatever the gradient's size."""
    for x, y, g in zip(leaves(before), leaves(after), leaves(gradients), strict=True):
        clear = np.abs(g) > 1e-5
        np.testing.assert_allclose(np.asarray(y - x)[clear], -lr * np.sign(g)[clear], rtol=2e-3)
        assert np.max(np.abs(y - x)) <= 1.001 * lr


def assert_followed(before: Any, after: Any, online: Any, rate: float) -> None:
    """The target network `before` became `after`, by its rate towards the weights `online`."""
    for slow, got, fast in zip(leaves(before), leaves(after), leaves(online), strict=True):
        np.testing.assert_allclose(got, (1 - rate) * slow + rate * fast, rtol=1e-5, atol=1e-6)
