"""Tests of the constraint solver against a slow obvious cost function and a general-purpose minimiser."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from envs_mjx.engines.newton_line_search import StoppingCriteria
from envs_mjx.engines.tabletop_mjx.batched_linalg import cholesky_solve
from envs_mjx.engines.tabletop_mjx.constraints import (
    Equalities,
    FrictionCones,
    FrictionLosses,
    JointLimits,
    TabletopProblem,
)
from envs_mjx.engines.tabletop_mjx.solver import newton

pytestmark = pytest.mark.promotion

EXACT = StoppingCriteria(iterations=100, ls_iterations=50, tolerance=1e-15, ls_tolerance=1e-2)
NV, TIES, ENDS, CONES, IMPRATIO = 6, 2, 3, 4, 10.0
END_DOFS, LOSS_DOFS = (0, 3, 3), (4,)


@pytest.fixture(scope="module", autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def problem(seeds: range) -> TabletopProblem:
    """Random problems, one a lane; ties move the first four dofs."""
    lanes = [_arrays(np.random.default_rng(s)) for s in seeds]
    mass, force, equalities, joint_limits, friction_losses, cones = (
        tuple(jnp.asarray(np.stack(x, -1)) for x in zip(*part, strict=True))
        for part in zip(*lanes, strict=True)
    )
    return TabletopProblem(
        mass=mass[0],
        rim_mass=jnp.zeros((0, 1)),
        force=force[0],
        equalities=Equalities(*equalities),
        joint_limits=JointLimits(END_DOFS, *joint_limits),
        friction_losses=FrictionLosses(LOSS_DOFS, *friction_losses),
        cones=FrictionCones(*cones),
        impratio=IMPRATIO,
    )


def _arrays(rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], ...]:
    root, friction = rng.normal(size=(NV, NV)), rng.uniform(0.3, 1.5, CONES)
    return (
        (root @ root.T + 0.1 * np.eye(NV),),
        (rng.normal(size=NV) * 10,),
        (rng.normal(size=(TIES, 4)), rng.normal(size=TIES) * 5, rng.uniform(1, 100, TIES)),
        (rng.choice([-1.0, 1], ENDS), rng.normal(size=ENDS) * 5, rng.uniform(0, 100, ENDS)),
        (rng.normal(size=1), rng.uniform(1, 10, 1), np.array([2.0])),
        (
            rng.normal(size=(3, CONES, NV)),
            rng.normal(size=(3, CONES)) * 5,
            rng.uniform(1, 100, CONES),
            friction / IMPRATIO**0.5,
            friction,
        ),
    )


def lane(p: TabletopProblem, i: int) -> TabletopProblem:
    return jax.tree.map(lambda x: np.asarray(x)[..., min(i, x.shape[-1] - 1)] if x.size else x, p)


def obvious_cost(p: TabletopProblem, acc: np.ndarray) -> float:
    """Returns Gauss cost plus penalties, row by row and cone by cone, as in MuJoCo's documentation."""
    total = 0.5 * acc @ p.mass @ acc - p.force @ acc
    total += 0.5 * np.sum(p.equalities.weight * (p.equalities.jacobian @ acc[:4] - p.equalities.aref) ** 2)
    for row, dof in enumerate(p.joint_limits.dof):
        x = p.joint_limits.side[row] * acc[dof] - p.joint_limits.aref[row]
        total += 0.5 * p.joint_limits.weight[row] * min(x, 0) ** 2
    for row, dof in enumerate(p.friction_losses.dof):
        x, weight, bound = (
            abs(acc[dof] - p.friction_losses.aref[row]),
            p.friction_losses.weight[row],
            p.friction_losses.bound[row],
        )
        total += 0.5 * weight * x**2 if weight * x < bound else bound * x - 0.5 * bound**2 / weight
    for k, mu in enumerate(p.cones.mu):
        x = p.cones.jacobian[:, k] @ acc - p.cones.aref[:, k]
        weight = p.cones.weight[k] * np.array([1, IMPRATIO, IMPRATIO])
        normal, tangent = mu * x[0], np.linalg.norm(p.cones.friction[k] * x[1:])
        if mu * normal + tangent <= 0:
            total += 0.5 * np.sum(weight * x**2)
        elif normal < mu * tangent:
            total += 0.5 * weight[0] / (mu**2 * (1 + mu**2)) * (normal - mu * tangent) ** 2
    return float(total)


class Solved(NamedTuple):
    problem: TabletopProblem
    acc: np.ndarray
    niter: np.ndarray
    gradient: np.ndarray


@pytest.fixture(scope="module")
def solved() -> Solved:
    """Twenty random problems, solved in one batch from a poor start."""
    p = problem(range(20))
    last = jax.jit(lambda p, start: newton(p, start, EXACT))(p, 10 * jnp.ones((NV, 20)))
    return Solved(p, *(np.asarray(x) for x in (last.acc, last.niter, last.gradient)))


def test_the_solution_is_no_worse_than_a_general_minimisers(solved: Solved):
    for i in range(20):
        p, acc = lane(solved.problem, i), solved.acc[:, i]
        other = scipy.optimize.minimize(lambda a, p=p: obvious_cost(p, a), acc + 0.1, method="BFGS")
        assert obvious_cost(p, acc) <= other.fun + 1e-9 * abs(other.fun)
        np.testing.assert_allclose(acc, other.x, atol=1e-3)
    assert solved.niter.max() < 30


def test_scenes_of_a_batch_do_not_depend_on_each_other(solved: Solved):
    """Compares batches of twenty scenes, which shrink to ten and to none, with three, which do not shrink."""
    few = jax.tree.map(lambda x: x[..., 3:6] if x.shape[-1] == 20 else x, solved.problem)
    again = jax.jit(lambda p, start: newton(p, start, EXACT))(few, 10 * jnp.ones((NV, 3)))
    np.testing.assert_allclose(again.acc, solved.acc[:, 3:6], rtol=1e-6, atol=1e-8)


def test_a_solution_given_as_start_is_kept(solved: Solved):
    loose = EXACT._replace(tolerance=1e-8)
    again = jax.jit(lambda p, start: newton(p, start, loose))(solved.problem, jnp.asarray(solved.acc))
    assert np.asarray(again.niter).max() <= 1
    np.testing.assert_allclose(again.acc, solved.acc, atol=1e-7)


def test_the_gradient_is_the_derivative_of_the_obvious_cost():
    p = problem(range(4))
    start = jnp.asarray(np.random.default_rng(0).normal(size=(NV, 4)) * 3)
    gradient = np.asarray(newton(p, start, EXACT._replace(iterations=0)).gradient)
    for i in range(4):
        slope = scipy.optimize.approx_fprime(
            np.asarray(start[:, i]), lambda a, i=i: obvious_cost(lane(p, i), a), 1e-6
        )
        np.testing.assert_allclose(gradient[:, i], slope, rtol=1e-4, atol=1e-2)


@pytest.mark.slow
def test_dofs_that_meet_through_the_core_only_may_be_eliminated():
    """Solves for two dofs, each with two cones of its own, as rim and as part of the core."""
    p = problem(range(8))
    coupled = jnp.asarray((np.arange(NV) < 4)[:, None] == (np.arange(NV) < 4)) & (
        jnp.eye(NV, dtype=bool) | jnp.asarray(np.arange(NV) < 4)[:, None]
    )
    mass = jnp.where(coupled[..., None], p.mass, 0)
    mass = jnp.where((jnp.arange(NV) >= 4)[:, None, None] & jnp.eye(NV, dtype=bool)[..., None], 0.5, mass)
    touched = np.ones((CONES, NV), bool)
    touched[:2, 5] = touched[2:, 4] = False
    cones = FrictionCones(
        jnp.where(jnp.asarray(touched)[None, ..., None], p.cones.jacobian, 0), *jax.tree.leaves(p.cones)[1:]
    )
    whole = TabletopProblem(
        mass, p.rim_mass, p.force, p.equalities, p.joint_limits, p.friction_losses, cones, IMPRATIO
    )
    parted = TabletopProblem(
        mass[:4, :4],
        jnp.full((2, 1), 0.5),
        p.force,
        p.equalities,
        p.joint_limits,
        p.friction_losses,
        cones,
        IMPRATIO,
    )
    solve = jax.jit(lambda p: newton(p, jnp.zeros((NV, 8)), EXACT).acc)
    np.testing.assert_allclose(solve(parted), solve(whole), rtol=1e-6, atol=1e-8)


def test_linear_systems_are_solved_lane_by_lane():
    rng = np.random.default_rng(0)
    root, b = rng.normal(size=(5, 7, 7)), rng.normal(size=(5, 7))
    a = root @ root.transpose(0, 2, 1) + np.eye(7)
    x = cholesky_solve(jnp.asarray(np.moveaxis(a, 0, -1)), jnp.asarray(b.T))
    np.testing.assert_allclose(x.T, np.linalg.solve(a, b[..., None])[..., 0], rtol=1e-9)
