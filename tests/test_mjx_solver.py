"""The constraint solver against a slow obvious cost function and a general-purpose minimiser."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from envs_mjx.mjx_solver import Limits, Problem, _hessian, _iterate, newton

EXACT = Limits(iterations=100, ls_iterations=50, tolerance=1e-15, ls_tolerance=1e-2)


@pytest.fixture(scope="module", autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def random_problem(seed: int, nv: int = 6, equalities: int = 2, limits: int = 3, cones: int = 4) -> Problem:
    """Random rows with MuJoCo's relations between the weights of a cone's rows, impratio 10."""
    rng = np.random.default_rng(seed)
    rows, impratio = equalities + limits + 3 * cones, 10
    root, friction = rng.normal(size=(nv, nv)), rng.uniform(0.3, 1.5, (cones, 2))
    mass = root @ root.T + 0.1 * np.eye(nv)
    force, weight = rng.normal(size=nv) * 10, rng.uniform(1, 100, rows)
    cone_weight = weight[equalities + limits :].reshape(-1, 3)
    cone_weight[:, 1:] = cone_weight[:, :1] * impratio * (friction / friction[:, :1]) ** 2
    jacobian, aref = rng.normal(size=(rows, nv)), rng.normal(size=rows) * 5
    arrays = (
        mass,
        force,
        np.linalg.solve(mass, force),
        jacobian,
        aref,
        weight,
        friction[:, 0] / impratio**0.5,
        friction,
    )
    return Problem(*arrays, equalities=equalities)  # pyright: ignore[reportArgumentType]


def obvious_cost(p: Problem, acc: np.ndarray) -> float:
    """Gauss cost plus penalties, row by row and cone by cone, as MuJoCo's documentation defines them."""
    residual = p.jacobian @ acc - p.aref
    total = 0.5 * (p.mass @ acc - p.force) @ (acc - p.free)
    first_cone = len(residual) - 3 * len(p.mu)
    for row in range(first_cone):
        if row < p.equalities or residual[row] < 0:
            total += 0.5 * p.weight[row] * residual[row] ** 2
    for i, mu in enumerate(p.mu):
        rows = slice(first_cone + 3 * i, first_cone + 3 * i + 3)
        normal, tangent = residual[rows][0] * mu, np.linalg.norm(residual[rows][1:] * p.friction[i])
        if mu * normal + tangent <= 0:
            total += 0.5 * np.sum(p.weight[rows] * residual[rows] ** 2)
        elif normal < mu * tangent:
            total += 0.5 * p.weight[rows][0] / (mu**2 * (1 + mu**2)) * (normal - mu * tangent) ** 2
    return float(total)


class Solved(NamedTuple):
    """A problem, two starts that were solved in one batch, and derivatives at the point `probe`."""

    problem: Problem
    acc: np.ndarray
    niter: np.ndarray
    again: np.ndarray
    niter_again: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    probe: np.ndarray


def solve_and_probe(p: Problem, probe: jax.Array) -> tuple[jax.Array, ...]:
    p = p._replace(equalities=2)
    first = newton(p, 10 * jnp.ones(6), EXACT)
    again = newton(p, first.acc, EXACT._replace(tolerance=1e-8))
    residual = p.jacobian @ probe - p.aref
    curvature = p.mass + _hessian(p, residual)
    return first.acc, first.niter, again.acc, again.niter, _iterate(p, probe, residual).gradient, curvature


@pytest.fixture(scope="module")
def solved() -> list[Solved]:
    """Twenty random problems, solved in one batch from a poor warm start, and then from the solution."""
    problems = [random_problem(seed) for seed in range(20)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(p._replace(equalities=None) for p in problems))
    probes = np.random.default_rng(0).normal(size=(20, 6)) * 3
    columns = jax.jit(jax.vmap(solve_and_probe))(stacked, jnp.asarray(probes))
    rows = zip(problems, *map(np.asarray, columns), probes, strict=True)
    return [Solved(*row) for row in rows]


def test_the_solution_is_no_worse_than_a_general_minimisers(solved: list[Solved]):
    for s in solved:
        other = scipy.optimize.minimize(lambda a, s=s: obvious_cost(s.problem, a), s.acc + 0.1, method="BFGS")
        assert obvious_cost(s.problem, s.acc) <= other.fun + 1e-9 * abs(other.fun)
        np.testing.assert_allclose(s.acc, other.x, atol=1e-3)
        assert s.niter < 30


def test_a_solution_given_as_warm_start_is_kept_in_at_most_one_iteration(solved: list[Solved]):
    for s in solved:
        assert s.niter_again <= 1
        np.testing.assert_allclose(s.again, s.acc, atol=1e-7)


def test_gradient_and_hessian_are_derivatives_of_the_obvious_cost(solved: list[Solved]):
    for s in solved:
        slope = scipy.optimize.approx_fprime(s.probe, lambda a, s=s: obvious_cost(s.problem, a), 1e-6)
        np.testing.assert_allclose(s.gradient, slope, rtol=1e-4, atol=1e-2)
        steps = 1e-4 * np.eye(6)
        second = [
            [
                obvious_cost(s.problem, s.probe + a + b)
                - obvious_cost(s.problem, s.probe + a - b)
                - obvious_cost(s.problem, s.probe - a + b)
                + obvious_cost(s.problem, s.probe - a - b)
                for a in steps
            ]
            for b in steps
        ]
        np.testing.assert_allclose(
            s.hessian, np.array(second) / 4e-8, rtol=1e-3, atol=1e-3 * np.abs(s.hessian).max()
        )


def test_a_scene_without_cones_is_solved():
    problem = random_problem(0, cones=0)
    arrays = problem._replace(equalities=None)
    solve = jax.jit(lambda p: newton(p._replace(equalities=2), jnp.zeros(6), EXACT).acc)
    acc = np.asarray(solve(jax.tree.map(jnp.asarray, arrays)))
    assert obvious_cost(problem, acc) < min(obvious_cost(problem, acc + d) for d in 1e-3 * np.eye(6))
