"""Counts of floating-point operations against sums done by hand."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from mac.data.sampler import sample
from mac.mac import MAC
from mac.nn.mlp import MLP
from mac.run.flops import product_flops
from mac.types import Batch
from tests.toy import SPEC, mac, window

SQUARE = 2 * 4 * 4 * 4  # of one product of 4 x 4 matrices
X = jax.ShapeDtypeStruct((4, 4), jnp.float32)


def chain(x: jax.Array, length: int) -> jax.Array:
    return jax.lax.scan(lambda c, _: (c @ c, None), x, length=length)[0]


def test_product_counts_a_multiply_and_an_add_per_term():
    a, b = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
    assert product_flops(lambda x, y: x @ y, a, b) == 2 * 3 * 5 * 7


def test_batched_product_counts_every_matrix():
    a = jax.ShapeDtypeStruct((6, 4, 4), jnp.float32)
    assert product_flops(jax.vmap(lambda x: x @ x), a) == 6 * SQUARE


def test_elementwise_work_is_not_counted():
    assert product_flops(lambda x: jnp.sum(jnp.tanh(x) * 2), X) == 0


def test_loop_counts_as_often_as_it_runs():
    assert product_flops(lambda x: chain(chain(x, 3), 4), X) == 7 * SQUARE
    assert product_flops(lambda x: jax.lax.map(lambda y: chain(y, 2), jnp.stack([x] * 5)), X) == 10 * SQUARE


def test_branch_counts_its_dearest_side():
    def f(x):
        return jax.lax.cond(x[0, 0] > 0, lambda y: chain(y, 3), lambda y: y @ y, x)

    assert product_flops(f, X) == 3 * SQUARE


def test_loop_of_unknown_length_counts_one_turn():
    def f(x):
        return jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ y, x)

    assert product_flops(f, X) == SQUARE


def test_products_inside_jit_and_checkpoint_are_counted():
    assert product_flops(jax.jit(lambda x: jax.checkpoint(lambda y: y @ y)(x) @ x), X) == 2 * SQUARE


def test_gradient_costs_two_products_for_each_forward_one():
    # x @ w, then d w = x' @ g and d x = g @ w'.
    grad = jax.grad(lambda x, w: jnp.sum(jnp.square(x @ w)), argnums=(0, 1))
    assert product_flops(grad, X, X) == 3 * SQUARE


def products(rows: int, *sizes: int) -> int:
    return 2 * rows * sum(m * n for m, n in pairwise(sizes))


def test_network_counts_the_shared_state_once():
    mlp = MLP((3, 2), (8, 6), 4, key=jr.key(0))
    s, a = jnp.ones((5, 3)), jnp.ones((7, 5, 2))
    assert product_flops(mlp, s, a) == products(5, 3, 8) + products(7 * 5, 2, 8, 6, 4)


def test_proposal_counts_policy_and_critic_for_every_candidate():
    algo, envs = mac(), 9
    nets = jax.eval_shape(algo.nets, jr.key(0))
    obs = jax.ShapeDtypeStruct((envs, SPEC.obs_dim), jnp.float32)
    # One hidden layer of 8; 2 observations, chunks of 2 x 2 numbers; 4 candidates.
    policy = products(envs, 2, 8) + products(4 * envs, 4, 8, 4)
    critic = products(envs, 2, 8) + products(4 * envs, 4, 8, 1)
    got = product_flops(lambda n, s, k: mac().propose(n, s, None, k, 4), nets, obs, jr.key(0))
    assert got == policy + critic


@pytest.mark.parametrize("field", ["rollout", "candidates", "flow_steps", "batch"])
def test_update_costs_grow_linearly_with_each_size(field: str):
    def cost(size: int) -> int:
        algo = mac(**{field: size})
        state = jax.eval_shape(algo.init, jr.key(0))
        batch = jax.eval_shape(lambda: _batch(algo))
        return product_flops(algo.update, state, batch, jnp.zeros((), jnp.int32), jr.key(0))

    two, four, six = cost(2), cost(4), cost(6)
    assert 0 < four - two == six - four


def _batch(algo: MAC) -> Batch:
    return sample(window(), algo.sample, jr.key(0))
