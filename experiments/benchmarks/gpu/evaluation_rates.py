"""Speed of evaluation by physics engine and number of environments, and success of the scripted expert."""

import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from baselines import get_algorithm
from envs_mjx.base import AbstractEnv, EnvState
from envs_mjx.datagen.data_policy import TabletopDataPolicy
from envs_mjx.datagen.simulate_episodes import SEGMENT_STEPS, EpisodeJob, Simulator
from envs_mjx.manipulation.scenes import build_scene
from envs_mjx.registry import engine_for, make
from experiments.benchmarks.evaluation import policy_loop
from experiments.benchmarks.gpu.device_rates import median_seconds
from experiments.benchmarks.gpu.training_rates import TINY
from experiments.launch.settings import parse_command_line
from mac.data.normalize import Normalizer
from mac.run.evaluate import Policies, evaluate, evaluation_keys
from mac.run.mesh import seed_keys, seed_mesh
from mac.run.segment import init

ENV = "cube-single-play-singletask-task2-v0"
FAMILY, STYLE = "cube-single", "play"
SEEDS, EPISODES = 4, 15
"""Of an evaluation in a run of four seeds: 60 episodes."""
STEPS = 10  # control steps, or decisions, per timed call
STARTS = 16  # different initial states, which are repeated in larger batches
EXPERT_EPISODES, EXPERT_STEPS = 300, 4 * SEGMENT_STEPS


def _policies(env: AbstractEnv, seeds: int, tiny: bool) -> tuple[Policies, int]:
    """Returns untrained policies with the paper's settings, and how many actions they execute a decision."""
    flags = ["--env", ENV, "--preset", "paper", "--seeds", str(seeds), *(TINY if tiny else ())]
    settings, _ = parse_command_line(flags)
    algo = get_algorithm(settings.algo).algorithm(settings.hp, env.spec, settings.steps)
    state = init(algo, seed_mesh(1), seed_keys(0, seeds))
    width = env.spec.obs_dim
    state = jax.device_put(state.for_acting(), jax.local_devices()[0])
    return Policies(algo, Normalizer(jnp.zeros(width), jnp.ones(width)), state), settings.hp.execute


def measure_steps(engine: str, envs: int, tiny: bool) -> dict[str, Any]:
    """Measures control steps of a batch of environments under random actions, and decisions of a policy.

    `steps_per_s` are control steps of all environments per second when a policy decides as often as the
    paper's does.
    """
    env = make(ENV, engine)
    policies, execute = _policies(env, 1, tiny)
    steps = 2 if tiny else STEPS

    @eqx.filter_jit
    def reset(env: AbstractEnv, keys: Key[Array, " E"]) -> EnvState:
        return jax.vmap(env.reset, in_axes=(0, None))(keys, jnp.asarray(env.spec.tasks[0]))

    @eqx.filter_jit
    def advance(env: AbstractEnv, state: EnvState, actions: Float[Array, "n E A"]) -> EnvState:
        return jax.lax.scan(lambda s, a: (jax.vmap(env.step)(s, a), None), state, actions)[0]

    few = reset(env, jr.split(jr.key(0), min(envs, STARTS)))
    start = jax.tree.map(lambda x: x[jnp.arange(envs) % len(x)], few)
    actions = jr.uniform(jr.key(1), (steps, envs, env.spec.action_dim), minval=-1.0, maxval=1.0)
    began = time.perf_counter()
    run = advance.lower(env, start, actions).compile()
    compile_s = time.perf_counter() - began
    physics_ms = 1e3 * median_seconds(lambda: run(env, start, actions), 3) / steps
    deciding = policy_loop(policies.algo, policies.state, envs)  # pyright: ignore[reportArgumentType]
    policy_ms = 1e3 * median_seconds(deciding.call, 3) / deciding.work
    return {
        "engine": engine,
        "envs": envs,
        "physics_ms": physics_ms,
        "policy_ms": policy_ms,
        "execute": execute,
        "steps_per_s": 1e3 * envs / (physics_ms + policy_ms / execute),
        "compile_s": compile_s,
    }


def measure_evaluation(engine: str, tiny: bool) -> dict[str, Any]:
    """Measures a whole evaluation of four untrained seeds, as in training: compiling, and the second call."""
    seeds, episodes = (2, 1) if tiny else (SEEDS, EPISODES)
    env = make(ENV, engine)
    policies, _ = _policies(env, seeds, tiny)
    keys = evaluation_keys(jnp.arange(seeds), 0)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        result = jax.block_until_ready(evaluate(policies, env, episodes, keys))
        seconds.append(time.perf_counter() - began)
    return {
        "engine": engine,
        "episodes": seeds * episodes,
        "seconds": seconds[1],
        "compile_s": seconds[0] - seconds[1],
        "steps_per_s": float(np.asarray(result.length).sum()) / seconds[1],
        "dropped": int(np.asarray(result.dropped).sum()),
        "unstable": int(np.asarray(result.unstable).sum()),
    }


def measure_expert(engine: str, tiny: bool) -> dict[str, Any]:
    """Measures the success of OGBench's scripted expert on an engine, and control steps with it.

    Each episode goes from target to target for `EXPERT_STEPS` control steps.
    """
    scene = build_scene(FAMILY)
    policy = TabletopDataPolicy(STYLE, scene, engine_for(FAMILY, engine), EXPERT_STEPS + 1)
    episodes = 4 if tiny else EXPERT_EPISODES
    times: list[float] = []
    batch = Simulator(policy, seed=0, lanes=episodes).run(
        [EpisodeJob(0, i) for i in range(episodes)], lambda _: times.append(time.perf_counter())
    )
    # The first segment compiles; one tick follows each of them, and one the last row.
    seconds = (times[-2] - times[0]) / (EXPERT_STEPS // SEGMENT_STEPS - 1)
    targets, hits = (int(np.asarray(x).sum()) for x in batch.events)
    return {
        "engine": engine,
        "envs": episodes,
        "targets": targets,
        "hits": hits,
        "healthy": int(batch.healthy.sum()),
        "dropped": int(batch.dropped.sum()),
        "steps_per_s": SEGMENT_STEPS * episodes / seconds,
    }
