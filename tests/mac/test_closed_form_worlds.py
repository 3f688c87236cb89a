"""Worlds whose values are known in closed form: MAC's own updates find them.

Tables and rules stand in for networks; the sampler, the losses, the optimiser and the loop are MAC's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array

from mac.algorithm import TrainState
from mac.config import Config
from mac.data.sampler import sample
from mac.data.window import index_episodes, make_column
from mac.mac import MAC, AbstractChunkPolicy, Nets
from mac.nn.mlp import MLP, STANDARD, scalar, value_net
from mac.run.mesh import ALL, place, seed_keys, seed_mesh
from mac.run.segment import segment
from mac.types import EnvSpec, Window
from tests.helpers.pytest_params import slow_except
from tests.helpers.toy_env import SPEC, window

CELLS, CHUNK, STEPS = 12, 3, 2000
ALONG, STILL = 0, 1
DISCOUNT = 0.9


class Table(MLP):
    """Numbers in place of a network: one for each cell, cell of the goal, and kind of chunk."""

    value: Array

    def __init__(self, *sizes: int):
        self.dense, self.norm, self.in_sizes, self.style = (), (), sizes, STANDARD
        self.value = jnp.zeros(sizes)

    def __call__(self, *inputs: Array | None) -> Array:
        at = [jnp.rint(x[..., 0]).astype(jnp.int32) for x in inputs if x is not None]
        if len(at) == len(self.in_sizes) and self.in_sizes[-1] == 2:
            at[-1] = jnp.where(at[-1] == 1, ALONG, STILL)
        places = jnp.broadcast_arrays(*(x % size for x, size in zip(at, self.in_sizes, strict=True)))
        return self.value[tuple(places)][..., None]


class FixedPolicy(AbstractChunkPolicy[Config]):
    """A policy that learns nothing; a subclass says which chunks it takes."""

    def nets(self, cfg: Config, sizes: Any, key: Any) -> tuple[None, None]:
        return None, None

    def behavior_loss(self, *args: Any) -> dict[str, Array]:
        return {}


class EitherKind(FixedPolicy):
    """Along the ring and still, in this order."""

    def chunks(self, cfg: Config, nets: Nets, s: Array, g: Any, noise: Array, *, acting: bool) -> Array:
        kinds = jnp.asarray([1.0, 0.0])[: len(noise)]
        return jnp.broadcast_to(kinds[:, None, None], noise.shape)


def ring_nets(goals: bool) -> Nets:
    """Tables of cells in a ring; each chunk goes `CHUNK` cells along or stays."""
    goal = (CELLS,) if goals else ()
    outcome = Table(CELLS, *goal, 2)
    return Nets(
        model=Table(CELLS, 2),
        reward=None if goal else outcome,
        success=outcome if goal else None,
        flow=None,
        policy=None,
        v=Table(CELLS, *goal),
        q=Table(CELLS, *goal, 2),
    )


def start(algo: MAC, nets: Nets) -> TrainState:
    """A fresh state of networks that are made by hand."""
    return TrainState(nets, jax.tree.map(jnp.copy, nets.v), algo.optimiser().init(nets))  # pyright: ignore[reportArgumentType]


def ring_window() -> Window:
    """From each cell one episode that goes once around and more, and one that stays; pays at cell 0.

    With T transitions there are T - 1 - n starts: one for each cell.
    """
    rows = CELLS + CHUNK + 2
    cell = np.arange(CELLS)[:, None] + np.arange(rows) * np.asarray([1, 0])[:, None, None]
    cell = (cell % CELLS).reshape(-1, 1).astype(np.float32)
    action = np.repeat([1.0, 0.0], CELLS * rows).astype(np.float32)[:, None]
    length = np.full(2 * CELLS, rows)
    return Window(
        obs=make_column(cell),
        action=make_column(action),
        reward=jnp.asarray((cell[:, 0] == 0) - 1.0, jnp.float32),
        mask=None,
        episodes=index_episodes(np.cumsum(length) - length, length, CHUNK),
    )


def trained(goals: bool, **changes: Any) -> Nets:
    """The networks after `STEPS` updates of the training loop, from scratch, all of them at once."""
    sizes: dict[str, Any] = {"batch": 128, "hidden": (1,), "chunk": CHUNK, "rollout": 3, "candidates": 2}
    sizes |= {"lr": 0.1, "cooldown": 0.5, "tau_ema": 0.05, "discount": DISCOUNT}
    sizes |= {"value_goals": (0.2, 0.8, 0.0)} if goals else {}
    spec = EnvSpec("ring", 1, 1, 1 if goals else None, (1,), 9, 1.0, (0,) if goals else ())
    algo = MAC(Config(**sizes | changes), spec, STEPS, EitherKind())
    mesh, keys = seed_mesh(1), seed_keys(0, 1)
    rows = place(mesh, ring_window(), ALL)
    state = jax.tree.map(lambda x: x[None], start(algo, ring_nets(goals)))
    state, _ = segment(algo, mesh, rows, keys, jnp.arange(STEPS), state)
    return jax.tree.map(lambda x: np.asarray(x[0]), state.nets)


def assert_model_is_exact(nets: Nets) -> None:
    cell = np.arange(CELLS)
    table: Any = nets.model
    np.testing.assert_allclose(table.value[:, ALONG], (cell + CHUNK) % CELLS - cell, atol=1e-2)
    np.testing.assert_allclose(table.value[:, STILL], 0, atol=1e-2)


@pytest.mark.parametrize("value", slow_except(["bce"], ["squared", "bce"]))
def test_values_on_a_ring_count_the_chunks_to_the_goal(value: str):
    """The goal is reached within chunk number d (from 0), d whole chunks away: V is -(1 - γⁿᵈ)/(1 - γⁿ), or,
    as a probability, γⁿᵈ. All is learned from hindsight goals, the model and what a chunk reaches included.
    """
    nets: Any = trained(True, value=value)
    assert_model_is_exact(nets)
    ahead = (np.arange(CELLS)[None, :] - np.arange(CELLS)[:, None]) % CELLS
    reached = nets.success.value[:, :, ALONG] > 0
    np.testing.assert_array_equal(reached, ahead < CHUNK)
    gamma, chunks = DISCOUNT**CHUNK, ahead // CHUNK
    assert chunks.max() == 3
    v, q = nets.v.value, nets.q.value
    if value == "bce":
        prob = gamma**chunks
        np.testing.assert_allclose(1 / (1 + np.exp(-v)), prob, atol=0.02)
        np.testing.assert_allclose(1 / (1 + np.exp(-q[..., ALONG])), prob, atol=0.02)
    else:
        want = -(1 - gamma**chunks) / (1 - gamma)
        np.testing.assert_allclose(v, want, atol=0.02)
        np.testing.assert_allclose(q[..., ALONG], want, atol=0.02)
    assert (q[..., ALONG] > q[..., STILL]).all()


@pytest.mark.parametrize("reduce", slow_except(["mean"], ["mean", "sum"]))
def test_values_on_a_ring_are_those_of_value_iteration(reduce: Any):
    """Whole chunks away from the paying cell, where the best policy then stays, they have a closed form:
    the return of single steps, divided by n if a chunk's reward is a mean.
    """
    nets: Any = trained(False, chunk_reward=reduce)
    assert_model_is_exact(nets)
    gamma, cell = DISCOUNT**CHUNK, np.arange(CELLS)
    share = CHUNK if reduce == "mean" else 1
    steps = (cell[:, None] + np.arange(CHUNK)[None, :]) % CELLS
    powers = DISCOUNT ** np.arange(CHUNK)
    pay = np.stack([((steps == 0) - 1.0) @ powers, ((cell == 0) - 1.0) * powers.sum()], 1) / share
    want = np.zeros(CELLS)
    for _ in range(200):
        q = pay + gamma * np.stack([want[(cell + CHUNK) % CELLS], want], 1)
        want = q.max(axis=1)
    for chunks in range(4):
        closed = -(1 - gamma**chunks) / (1 - DISCOUNT) / share
        assert want[-CHUNK * chunks % CELLS] == pytest.approx(closed)
    np.testing.assert_allclose(nets.reward.value, pay, atol=1e-2)
    np.testing.assert_allclose(nets.v.value, want, atol=0.03)
    best = q.argmax(axis=1)
    np.testing.assert_allclose(nets.q.value[cell, best], want, atol=0.03)
    np.testing.assert_array_equal(nets.q.value.argmax(axis=1), best)


# A linear world: each action moves the point by itself, and the policy always takes the same one.

MOVE = np.asarray([0.03, -0.01])
PAY = np.asarray([1.0, 2.0])


class Rule(MLP):
    """A known function in place of a network; nothing in it can be trained."""

    rule: Callable[..., Array] = eqx.field(static=True)

    def __init__(self, rule: Callable[..., Array]):
        self.dense, self.norm, self.in_sizes, self.rule = (), (), (), rule
        self.style = STANDARD

    def __call__(self, *inputs: Array | None) -> Array:
        return self.rule(*(x for x in inputs if x is not None))


def moved(a: Array) -> Array:
    """How far a chunk moves the point."""
    return jnp.sum(a.reshape(*a.shape[:-1], -1, 2), axis=-2)


def with_goal(s: Array, g: Array, a: Array) -> Array:
    """Logit of passing the goal's first coordinate, which counts, among the states that begin actions."""
    end, g = s + moved(a), jnp.broadcast_to(g, s.shape)
    return jnp.where((s[..., :1] <= g[..., :1]) & (g[..., :1] < end[..., :1]), 5.0, -5.0)


class SameMove(FixedPolicy):
    """The same action at every step."""

    def chunks(self, cfg: Config, nets: Nets, s: Array, g: Any, noise: Array, *, acting: bool) -> Array:
        return jnp.broadcast_to(jnp.asarray(np.tile(MOVE, cfg.chunk), jnp.float32), noise.shape)


def linear_nets(algo: MAC, key: Any) -> Nets:
    """Exact models; V and Q are affine in their inputs."""
    n, k = algo.cfg.chunk, jr.split(key)
    powers = DISCOUNT ** np.arange(n)

    def pay(s: Array, a: Array) -> Array:
        step = a.reshape(*a.shape[:-1], n, 2)
        places = s[..., None, :] + jnp.cumsum(step, axis=-2) - step
        each = jnp.sum(places * jnp.broadcast_to(jnp.asarray(PAY, jnp.float32), places.shape), -1)
        total = jnp.sum(each * jnp.broadcast_to(jnp.asarray(powers, jnp.float32), each.shape), -1)
        return total[..., None] / (n if algo.cfg.chunk_reward == "mean" else 1)

    goal = algo.env.goal_dim
    return Nets(
        model=Rule(lambda s, a: moved(a)),
        reward=Rule(pay) if goal is None else None,
        success=None if goal is None else Rule(with_goal),
        flow=None,
        policy=None,
        v=value_net((2, goal), (), key=k[0]),
        q=value_net((2, goal, 2 * n), (), key=k[1]),
    )


def linear(goals: bool = False, steps: int = 0, **changes: Any) -> MAC:
    sizes: dict[str, Any] = {"batch": 16, "hidden": (1,), "candidates": 1, "discount": DISCOUNT}
    spec = SPEC._replace(goal_dim=2, goal_columns=(0, 1)) if goals else SPEC
    return MAC(Config(**sizes | changes), spec, steps, SameMove())


@pytest.mark.parametrize(("chunk", "rollout"), slow_except([(25, 4)], [(10, 10), (1, 100), (25, 4)]))
@pytest.mark.parametrize("goals", [False, True], ids=["rewards", "goals"])
def test_imagined_returns_are_those_of_a_hundred_single_steps(chunk: int, rollout: int, goals: bool):
    """V's output is 0 and its target network's a constant, so the loss is the mean square of the returns."""
    algo = linear(goals, chunk=chunk, rollout=rollout, chunk_reward="sum", lr=1e-3)
    batch = sample(window(chunk, length=80), algo.sample, jr.key(0))
    nets, end = linear_nets(algo, jr.key(1)), -3.0
    zero = jax.tree.map(jnp.zeros_like, nets.v)
    slow = eqx.tree_at(lambda v: v.dense[0].bias, zero, jnp.asarray([end]))
    metrics = jax.jit(algo.loss)(dataclasses.replace(nets, v=zero), slow, batch, jr.key(2))[1]
    square, gamma = [], DISCOUNT**chunk
    for b, start in enumerate(np.asarray(batch.obs, np.float64)):
        path = start + np.arange(101)[:, None] * MOVE
        place = None if batch.goals is None else float(batch.goals.value[b, 0])
        ret = end
        for k in reversed(range(rollout)):
            first = chunk * k
            if place is None:
                within = sum(DISCOUNT**j * PAY @ path[first + j] for j in range(chunk))
                ret = within + gamma * ret
            else:
                ret = 0.0 if path[first, 0] <= place < path[first + chunk, 0] else -1 + gamma * ret
            square.append(ret**2)
    assert float(metrics["value/loss"]) == pytest.approx(np.mean(square), rel=1e-4)
    assert len(np.unique(np.round(square, 6))) > rollout


def test_values_of_the_linear_world_sum_its_single_steps():
    """Sum over t of γᵗ w·(s + t m), divided by n: affine in s, so that V and Q can be exact."""
    steps = 3000
    algo = linear(steps=steps, chunk=5, rollout=4, lr=0.02, cooldown=0.5, tau_ema=0.05)
    data = window(5, length=80)

    @jax.jit
    def run(state: TrainState) -> TrainState:
        def one(state: TrainState, step: Array) -> tuple[TrainState, None]:
            k_sample, k_update = jr.split(jr.fold_in(jr.key(0), step))
            return algo.update(state, sample(data, algo.sample, k_sample), step, k_update)[0], None

        return jax.lax.scan(one, state, jnp.arange(steps))[0]

    nets = run(start(algo, linear_nets(algo, jr.key(1)))).nets
    s = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (50, 2)), jnp.float32)
    want = np.asarray(s) @ PAY / (1 - DISCOUNT) + PAY @ MOVE * DISCOUNT / (1 - DISCOUNT) ** 2
    a = jnp.broadcast_to(jnp.asarray(np.tile(MOVE, 5), jnp.float32), (50, 10))
    np.testing.assert_allclose(scalar(nets.v, s, None), want / 5, atol=0.02)
    np.testing.assert_allclose(scalar(nets.q, s, None, a), want / 5, atol=0.02)
