"""Counts of floating-point operations against sums done by hand."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from mac.data.sampler import sample
from mac.mac import MAC
from mac.nn.mlp import MLP
from mac.run.cost.flops import REST, matmul_flops, operations, sum_operations
from mac.run.cost.hlo_bytes import program_bytes
from mac.types import Batch
from tests.helpers.pytest_params import slow_except
from tests.helpers.toy_env import SPEC, mac, window

SQUARE = 2 * 4 * 4 * 4  # of one product of 4 x 4 matrices
X = jax.ShapeDtypeStruct((4, 4), jnp.float32)


def chain(x: jax.Array, length: int) -> jax.Array:
    return jax.lax.scan(lambda c, _: (c @ c, None), x, length=length)[0]


def test_product_counts_a_multiply_and_an_add_per_term():
    a, b = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
    assert matmul_flops(lambda x, y: x @ y, a, b) == 2 * 3 * 5 * 7


def test_batched_product_counts_every_matrix():
    a = jax.ShapeDtypeStruct((6, 4, 4), jnp.float32)
    assert matmul_flops(jax.vmap(lambda x: x @ x), a) == 6 * SQUARE


def test_elementwise_work_counts_once_per_element():
    # Twice 16 sums or products, 15 sums of 16 numbers, 16 values of tanh; x**3 is two products.
    assert sum_operations(operations(lambda x: jnp.sum(jnp.tanh(x) * 2 + 1), X)) == (0, 16 + 16 + 15, 16)
    assert sum_operations(operations(lambda x: jax.lax.integer_pow(x, 3), X)) == (0, 32, 0)
    assert sum_operations(operations(lambda x: jnp.broadcast_to(x.T[1:2], (4, 4)), X)) == (0, 0, 0)
    assert sum_operations(operations(lambda x: chain(jnp.tanh(x), 3), X)).flops == 3 * SQUARE


def test_what_nothing_depends_on_is_not_counted():
    def f(x):
        return jax.lax.scan(lambda c, _: ((c @ c, jnp.tanh(c) @ c)[0], None), x, length=3)[0]

    assert sum_operations(operations(f, X)) == (3 * SQUARE, 0, 0)


def test_operations_and_gradients_belong_to_the_outermost_scope():
    def f(x, w):
        with jax.named_scope("first part"), jax.named_scope("inner"):
            x = jax.jit(lambda x: x @ w)(x)
        with jax.named_scope("second"):
            x = chain(x, 3)
        return jnp.sum(x @ w)

    def products(*args):
        return {part: ops.matmuls for part, ops in operations(*args).items() if ops.matmuls}

    assert products(f, X, X) == {"first part": SQUARE, "second": 3 * SQUARE, REST: SQUARE}
    grads = products(jax.grad(f, argnums=(0, 1)), X, X)
    # Backwards each product is two; of the last one only the sum's gradient is known beforehand.
    assert grads == {"first part": 3 * SQUARE, "second": 9 * SQUARE, REST: 2 * SQUARE}


def test_loop_counts_as_often_as_it_runs():
    assert matmul_flops(lambda x: chain(chain(x, 3), 4), X) == 7 * SQUARE
    assert matmul_flops(lambda x: jax.lax.map(lambda y: chain(y, 2), jnp.stack([x] * 5)), X) == 10 * SQUARE


def test_branch_counts_its_dearest_side():
    def f(x):
        return jax.lax.cond(x[0, 0] > 0, lambda y: chain(y, 3), lambda y: y @ y, x)

    assert matmul_flops(f, X) == 3 * SQUARE


def test_loop_of_unknown_length_counts_one_iteration():
    def f(x):
        return jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ y, x)

    assert matmul_flops(f, X) == SQUARE


def test_products_inside_jit_and_checkpoint_are_counted():
    assert matmul_flops(jax.jit(lambda x: jax.checkpoint(lambda y: y @ y)(x) @ x), X) == 2 * SQUARE


def test_gradient_costs_two_products_for_each_forward_one():
    # x @ w, then d w = x' @ g and d x = g @ w'.
    grad = jax.grad(lambda x, w: jnp.sum(jnp.square(x @ w)), argnums=(0, 1))
    assert matmul_flops(grad, X, X) == 3 * SQUARE


def products(rows: int, *sizes: int) -> int:
    return 2 * rows * sum(m * n for m, n in pairwise(sizes))


def test_network_counts_the_shared_state_once():
    mlp = MLP((3, 2), (8, 6), 4, key=jr.key(0))
    s, a = jnp.ones((5, 3)), jnp.ones((7, 5, 2))
    assert matmul_flops(mlp, s, a) == products(5, 3, 8) + products(7 * 5, 2, 8, 6, 4)


def test_proposal_counts_policy_and_critic_for_every_candidate():
    algo, envs = mac(), 9
    nets = jax.eval_shape(algo.nets, jr.key(0))
    obs = jax.ShapeDtypeStruct((envs, SPEC.obs_dim), jnp.float32)
    # One hidden layer of 8; 2 observations, chunks of 2 x 2 numbers; 4 candidates.
    policy = products(envs, 2, 8) + products(4 * envs, 4, 8, 4)
    critic = products(envs, 2, 8) + products(4 * envs, 4, 8, 1)
    got = matmul_flops(lambda n, s, k: mac().best_chunk(n, s, None, k, 4), nets, obs, jr.key(0))
    assert got == policy + critic


@pytest.mark.parametrize(
    "field", slow_except(["candidates"], ["rollout", "candidates", "flow_steps", "batch"])
)
def test_update_costs_grow_linearly_with_each_size(field: str):
    def cost(size: int) -> int:
        algo = mac(**{field: size})
        state = jax.eval_shape(algo.init, jr.key(0))
        batch = jax.eval_shape(lambda: _batch(algo))
        return matmul_flops(algo.update, state, batch, jnp.zeros((), jnp.int32), jr.key(0))

    two, four, six = cost(2), cost(4), cost(6)
    assert 0 < four - two == six - four


@pytest.fixture(scope="module")
def update():
    """An update whose loops run once, so that XLA sees all of them, at sizes where products prevail."""
    algo = mac(hidden=(64, 64), batch=64, rollout=1, flow_steps=1, candidates=4)
    state = jax.eval_shape(algo.init, jr.key(0))
    args = (state, jax.eval_shape(lambda: _batch(algo)), jnp.zeros((), jnp.int32), jr.key(0))
    return operations(algo.update, *args), jax.jit(algo.update).lower(*args).compile()


def test_update_costs_what_xla_counts(update):
    parts, compiled = update
    theirs = compiled.cost_analysis() or {}
    assert sum_operations(parts).flops == pytest.approx(theirs["flops"], rel=0.1)
    assert program_bytes(compiled.as_text()) == pytest.approx(theirs["bytes accessed"], rel=0.1)


def test_update_has_the_parts_of_the_algorithm(update):
    parts, _ = update
    assert set(parts) == {"model", "policy", "imagination", "value", "critic", REST}
    assert parts[REST].matmuls == 0 and all(ops.matmuls for part, ops in parts.items() if part != REST)


# Bytes.

PROGRAM = """HloModule small

%body (arg.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg.1), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%arg.1), index=1
  %y = f32[8,4]{1,0} negate(%x)
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %y)
}

%test (arg.2: (s32[], /*index=1*/f32[8,4])) -> pred[] {
  %arg.2 = (s32[], f32[8,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%arg.2), index=0
  ROOT %less = pred[] compare(%j, %j), direction=LT
}

ENTRY %main (p.1: f32[8,4], p.2: u16[3]) -> f32[8,4] {
  %p.1 = f32[8,4]{1,0} parameter(0)
  %p.2 = u16[3]{0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %p.1)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%test, body=%body, TURNS
  %got = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  %wide = f32[3]{0} convert(%p.2)
  ROOT %sum = f32[8,4]{1,0} add(%got, /*index=1*/%p.1), metadata={op_name="a(b)"}
}
"""


def test_body_of_a_loop_is_read_and_written_in_every_iteration():
    five = PROGRAM.replace("TURNS", 'backend_config={"known_trip_count":{"n":"5"}}')
    turn = 2 * 8 * 4 * 4 + (4 + 4 + 1)  # negate, and compare
    rest = 3 * 8 * 4 * 4 + 3 * (2 + 4)  # add, and convert
    assert program_bytes(five) == 5 * turn + rest
    assert program_bytes(PROGRAM) == turn + rest


def test_traffic_of_a_compiled_loop_grows_with_its_turns():
    def traffic(length: int) -> int:
        return program_bytes(jax.jit(lambda x: chain(x, length)).lower(X).compile().as_text() or "")

    # Each product reads two matrices and writes one, of 64 bytes; its result may be copied for the next turn.
    assert 3 * 64 <= (traffic(60) - traffic(20)) / 40 <= 6 * 64


def _batch(algo: MAC) -> Batch:
    return sample(window(), algo.sample, jr.key(0))
