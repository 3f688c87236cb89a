"""The scripted cube expert against OGBench's own, and facts about its plans and targets."""

from collections.abc import Iterator

import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import ogbench  # noqa: F401  (registers the environments)
import pytest
from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

from envs_mjx import oracles
from envs_mjx.cube import Readings

PLANS = 40
CUBES = 4
plan_from_draws = jax.jit(oracles.plan_from_draws)
target_from_draws = jax.jit(oracles.target_from_draws)
act = jax.jit(oracles.act)
plan_row = jax.jit(oracles.plan_row)


class Tape:
    """Stands in for NumPy's random module and generator: hands out recorded draws in order."""

    def __init__(self, values: list) -> None:
        self.values = iter(values)

    def uniform(self, low: float = 0.0, high: float = 1.0, size: object = None) -> np.ndarray:
        return np.asarray(low) + np.asarray(next(self.values), float) * (np.asarray(high) - np.asarray(low))

    def normal(self, loc: float, scale: float, size: tuple[int, int]) -> np.ndarray:
        return np.asarray(next(self.values), float)[: size[0]]

    def choice(self, items: list) -> object:
        return items[int(float(next(self.values)) * len(items))]


def f32(x: object) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def random_readings(seed: int, cubes: int = CUBES) -> Readings:
    rng = np.random.default_rng(seed)
    return Readings(
        effector_pos=f32(rng.uniform([0.25, -0.35, 0.02], [0.6, 0.35, 0.35])),
        effector_yaw=f32(rng.uniform(-np.pi, np.pi)),
        gripper_opening=f32(rng.uniform()),
        gripper_contact=f32(0.0),
        cube_pos=f32(
            np.column_stack([rng.uniform([0.3, -0.3], [0.55, 0.3], (cubes, 2)), np.full(cubes, 0.02)])
        ),
        cube_quat=jnp.zeros((cubes, 4)),  # the expert goes by yaw alone
        cube_yaw=f32(rng.uniform(-np.pi, np.pi, cubes)),
    )


def random_draws(seed: int) -> oracles.PlanDraws:
    rng = np.random.default_rng(1000 + seed)
    shapes = oracles.PlanDraws(3, (), 2, 3, 10, None)
    draws = {k: f32(rng.uniform(size=v)) for k, v in shapes._asdict().items() if k != "noise"}
    return oracles.PlanDraws(**draws, noise=f32(rng.normal(size=(oracles.MAX_ROWS, 5))))


def random_target(seed: int) -> oracles.Target:
    rng = np.random.default_rng(2000 + seed)
    pos = np.append(rng.uniform([0.3, -0.3], [0.55, 0.3]), 0.02)
    yaw = f32(rng.uniform(0, 2 * np.pi))
    return oracles.Target(jnp.asarray(rng.integers(CUBES)), f32(pos), yaw)


def info_of(readings: Readings, target: oracles.Target, time: float) -> dict:
    """The same facts as OGBench's step info."""
    info = {
        "time": np.array([time]),
        "proprio/effector_pos": np.asarray(readings.effector_pos, float),
        "proprio/effector_yaw": np.asarray(readings.effector_yaw, float)[None],
        "proprio/gripper_opening": np.asarray(readings.gripper_opening, float)[None],
        "privileged/target_block": int(target.cube),
        "privileged/target_block_pos": np.asarray(target.pos, float),
        "privileged/target_block_yaw": np.asarray(target.yaw, float)[None],
    }
    for i, (pos, yaw) in enumerate(zip(readings.cube_pos, readings.cube_yaw, strict=True)):
        info[f"privileged/block_{i}_pos"] = np.asarray(pos, float)
        info[f"privileged/block_{i}_yaw"] = np.asarray(yaw, float)[None]
    return info


@pytest.fixture(scope="module")
def package_env() -> Iterator[gymnasium.Env]:
    env = gymnasium.make("cube-quadruple-v0", terminate_at_goal=False, mode="data_collection")
    env.reset(seed=0)
    yield env
    env.close()


def package_oracle(
    env: gymnasium.Env, draws: oracles.PlanDraws, info: dict, monkeypatch: pytest.MonkeyPatch
) -> CubePlanOracle:
    """OGBench's expert, reset with our random draws in the order in which it asks for them."""
    lift, jitter = np.asarray(draws.lift), np.asarray(draws.jitter)
    tape = Tape([draws.end_pos, draws.end_yaw, *lift, draws.clear, *jitter, draws.noise])
    expert = CubePlanOracle(env=env, noise=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "uniform", tape.uniform)
        patch.setattr(np.random, "normal", tape.normal)
        expert.reset(None, info)
    return expert


def angle_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs((a - b + np.pi) % (2 * np.pi) - np.pi)


def test_plans_equal_the_packages_row_by_row(package_env, monkeypatch) -> None:
    lengths = set()
    for seed in range(PLANS):
        readings, target, draws = random_readings(seed), random_target(seed), random_draws(seed)
        plan = plan_from_draws(draws, readings, target)
        expert = package_oracle(package_env, draws, info_of(readings, target, 0.0), monkeypatch)
        assert int(plan.length) == len(expert._plan)
        lengths.add(int(plan.length))
        ours = np.stack([plan_row(plan, jnp.asarray(i)) for i in range(int(plan.length))])
        np.testing.assert_allclose(np.delete(ours, 3, 1), np.delete(expert._plan, 3, 1), atol=2e-6)
        assert angle_between(ours[:, 3], expert._plan[:, 3]).max() < 5e-6
    assert lengths <= {87, 88, 89, 90} and len(lengths) >= 3


def test_actions_and_end_of_plan_equal_the_packages(package_env, monkeypatch) -> None:
    for seed in range(5):
        readings, target, draws = random_readings(seed), random_target(seed), random_draws(seed)
        start = 0.05 * 7 * seed  # time of the step at which the plan begins; 0.05 s per control step
        plan = plan_from_draws(draws, readings, target)
        expert = package_oracle(package_env, draws, info_of(readings, target, start), monkeypatch)
        for step in range(int(plan.length)):
            here = random_readings(100 * seed + step)
            theirs = expert.select_action(None, info_of(here, target, start + 0.05 * step))
            ours, plan, done = act(plan, here)
            assert bool(done) == expert.done == (step == int(plan.length) - 1)
            # 1e-4 of full scale is 5e-6 m; the yaw may flip sign where the plan crosses pi.
            flips = np.abs(np.abs(expert._plan[step, 3]) - np.pi) < 1e-4
            keep = np.array([True, True, True, not flips, True])
            np.testing.assert_allclose(np.asarray(ours)[keep], theirs[keep], atol=1e-4)


def test_targets_equal_the_packages(package_env) -> None:
    raw = package_env.unwrapped
    rng = np.random.default_rng(0)
    stacked = 0
    for trial in range(60):
        cube_pos = np.asarray(random_readings(trial).cube_pos, float)
        for child, parent in rng.permutation(CUBES).reshape(-1, 2)[: trial % 3]:
            shift = rng.choice([0.01, 0.03])  # on top of it, or beside it and higher
            cube_pos[child] = cube_pos[parent] + [shift, 0.0, 0.04]
        for i, pos in enumerate(cube_pos):
            raw._data.joint(f"object_joint_{i}").qpos[:3] = pos
        draws = oracles.TargetDraws(*(f32(rng.uniform(size=n)) for n in [(), (), (), 2, ()]))
        ours = target_from_draws(draws, f32(cube_pos), 0.4)
        stack = bool(draws.stack < 0.4)
        raw._np_random = Tape([draws.cube, draws.stack, draws.base if stack else draws.xy, draws.yaw])
        _, theirs = raw.set_new_target(p_stack=0.4)
        assert int(ours.cube) == theirs["privileged/target_block"]
        np.testing.assert_allclose(ours.pos, theirs["privileged/target_block_pos"], atol=1e-6)
        assert angle_between(np.asarray(ours.yaw), theirs["privileged/target_block_yaw"]).max() < 1e-5
        stacked += stack
    raw._np_random = None
    assert 10 < stacked < 50


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_of_a_cube_do_not_change_the_plan(quarters: int) -> None:
    readings, target, draws = random_readings(0), random_target(0), random_draws(0)
    plan = plan_from_draws(draws, readings, target)
    turned = readings._replace(cube_yaw=readings.cube_yaw + quarters * jnp.pi / 2)
    np.testing.assert_allclose(plan.keys, plan_from_draws(draws, turned, target).keys, atol=3e-6)


def test_arm_turns_by_an_eighth_at_most_to_grasp_and_to_place() -> None:
    for seed in range(20):
        plan = plan_from_draws(random_draws(seed), random_readings(seed), random_target(seed))
        turns = np.abs(np.diff(plan.keys[:10, 3]))
        # Start to above the cube, and lifted to above the target in two halves.
        assert turns.max() < np.pi / 4 + 1e-5 and turns[4] + turns[5] < np.pi / 4 + 1e-5
        np.testing.assert_allclose(np.delete(turns, [0, 4, 5]), 0.0, atol=1e-6)


def test_plan_noise_is_a_tenth_of_a_full_action_before_smoothing() -> None:
    readings, target = random_readings(0), random_target(0)
    plans = jax.jit(jax.vmap(lambda k: oracles.build_plan(k, readings, target)))(jr.split(jr.key(0), 300))
    keep = np.arange(oracles.MAX_ROWS)[None] < np.asarray(plans.length)[:, None]
    noise = np.asarray(plans.noise)[keep]
    # Taps exp(-2 k^2), k = -2..2, over their sum 1.27137: the squares add up to 0.6416, root 0.801.
    expected = 0.801 * 0.1 * np.array([0.05, 0.05, 0.05, 0.3, 1.0])
    np.testing.assert_allclose(noise.std(0), expected, rtol=0.03)


@pytest.mark.parametrize(
    ("family", "low", "high"),
    [
        ("single", 0.0, 0.0),
        ("double", 0.0, 0.25),
        ("triple", 0.05, 0.35),
        ("quadruple", 0.1, 0.5),
        ("octuple", 0.0, 0.35),
    ],
)
def test_stacking_probability_lies_in_the_familys_range(family: str, low: float, high: float) -> None:
    p = jax.vmap(lambda k: oracles.stack_probability(k, f"cube-{family}"))(jr.split(jr.key(0), 400))
    assert low <= p.min() <= low + 0.03 * (high - low) and high - 0.03 * (high - low) <= p.max() <= high


def test_lone_cube_is_never_stacked_and_targets_fill_the_table() -> None:
    readings = random_readings(0, cubes=1)
    targets = jax.jit(jax.vmap(lambda k: oracles.choose_target(k, readings, 1.0)))(jr.split(jr.key(0), 500))
    pos = np.asarray(targets.pos)
    np.testing.assert_allclose(pos[:, 2], 0.02)
    assert (pos[:, :2] >= [0.3, -0.3]).all() and (pos[:, :2] <= [0.55, 0.3]).all()
    # Uniform: 500 draws leave the outer 5% of a side empty with probability 0.95^500 = 7e-12.
    span = np.array([0.25, 0.6])
    assert (pos[:, :2].min(0) < np.array([0.3, -0.3]) + 0.05 * span).all()
    assert (pos[:, :2].max(0) > np.array([0.55, 0.3]) - 0.05 * span).all()
