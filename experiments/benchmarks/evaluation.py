"""Measures the time of an evaluation, split into physics and policy."""

import time
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from envs_mjx.base import AbstractEnv, EnvState
from envs_mjx.registry import make
from experiments.benchmarks.timed_loops import TimedLoop, time_call
from mac.algorithm import TrainState
from mac.config import Config
from mac.data.normalize import Normalizer
from mac.mac import MAC
from mac.run.evaluate import Policies, evaluate
from mac.run.mesh import seed_keys, seed_mesh
from mac.run.segment import init
from mac.types import Episodes

ENV = "cube-single-play-singletask-task2-v0"
STEPS = 10  # control steps, and decisions, timed separately


@dataclass(frozen=True)
class EvalRow:
    """Figures of one evaluation of untrained policies; the names are the columns of the CSV file.

    Attributes:
        envs: environments that step together, each for one episode.
        total_s: seconds of one whole evaluation, compiled before.
        policy_s: seconds of the evaluation spent on actions, timed separately; `physics_s`: on physics.
        env_steps: control steps of all environments per second of the whole evaluation.
        compile_s: seconds by which the first evaluation takes longer than the second.
    """

    width: int
    envs: int
    engine: str
    total_s: float
    policy_s: float
    physics_s: float
    env_steps: float
    compile_s: float


def measure_evaluation(cfg: Config, envs: int, engine: str) -> EvalRow:
    """Measures one evaluation, of one seed, with a decision at every `cfg.execute`-th control step."""
    env = make(ENV, engine)
    algo, mesh = MAC(cfg, env.spec), seed_mesh(1)
    keys = seed_keys(0, 1)
    state = init(algo, mesh, keys)
    width = env.spec.obs_dim
    policies = Policies(algo, Normalizer(jnp.zeros(width), jnp.ones(width)), state.for_acting())

    def whole() -> Episodes:
        return evaluate(policies, env, envs, keys)

    began = time.perf_counter()
    lengths = np.asarray(whole().length)
    first = time.perf_counter() - began
    total = 1 / time_call(TimedLoop(whole, 1.0)).speed
    # All episodes are stepped until the longest ends.
    steps = int(lengths.max())
    policy, physics = policy_loop(algo, state, envs), physics_loop(env, envs)
    return EvalRow(
        width=cfg.hidden[0],
        envs=envs,
        engine=engine,
        total_s=total,
        policy_s=-(-steps // cfg.execute) / _fastest(policy),
        physics_s=steps / _fastest(physics),
        env_steps=float(lengths.sum()) / total,
        compile_s=first - total,
    )


def policy_loop(algo: MAC, state: TrainState, envs: int) -> TimedLoop:
    """Returns a loop that selects actions of `envs` environments; its work is counted in decisions."""
    first_seed = jax.tree.map(lambda x: x[0], state)
    obs = jnp.zeros((envs, algo.env.obs_dim))

    @eqx.filter_jit
    def decide(state: TrainState, obs: Float[Array, "E D"], keys: Key[Array, " n"]) -> Any:
        return jax.lax.map(lambda key: algo.act(state, obs, None, key), keys)

    return TimedLoop(lambda: decide(first_seed, obs, jr.split(jr.key(1), STEPS)), STEPS)


def physics_loop(env: AbstractEnv, envs: int) -> TimedLoop:
    """Returns a loop that steps `envs` environments at random; its work is counted in control steps."""

    @eqx.filter_jit
    def reset(env: AbstractEnv, keys: Key[Array, " E"]) -> EnvState:
        return jax.vmap(env.reset, in_axes=(0, None))(keys, jnp.asarray(env.spec.tasks[0]))

    @eqx.filter_jit
    def advance(env: AbstractEnv, state: EnvState, actions: Float[Array, "n E A"]) -> EnvState:
        return jax.lax.scan(lambda s, a: (jax.vmap(env.step)(s, a), None), state, actions)[0]

    start = reset(env, jr.split(jr.key(0), envs))
    actions = jr.uniform(jr.key(1), (STEPS, envs, env.spec.action_dim), minval=-1.0, maxval=1.0)
    return TimedLoop(lambda: advance(env, start, actions), STEPS)


def _fastest(timed: TimedLoop) -> float:
    """Returns the best speed of three calls, after one that compiles."""
    time_call(timed)
    return max(time_call(timed).speed for _ in range(3))
