"""Diagnostics of MAC while it trains: errors of its model, its critic and its one-step policy.

    drift_n               error of the model after n steps along real actions (RMS, normalised units); of a
                          model that draws its states, of one draw
    motion_n              how far real states move in n steps: the error of predicting "no change"
    imagined_outside_n    share of imagined states outside the data's range, n steps into a rollout
    real_outside          that share among states of the data; 0 in the rows that the range was taken from
    best_of_n_gain        by how much the best of N chunks is better than their mean, under Q
    best_of_n_spreads     the same in standard deviations of Q over states
    policy_spread         how far candidates for one state differ (RMS of an action's entry)
    distil_gap            difference between one-step policy and its teacher, given one noise (same unit)
    distil_q_gap          by how much the student's chunks are worse than the teacher's, under Q
    search_gain           by how much the searched chunk is better than the best of as many plain samples,
                          under the critic that chooses while acting
    short_critic_gap      short critic minus Q, over the policy's chunks: its optimism about how they go on
    short_critic_regret   what Q loses where the short critic chooses among the N chunks

Returns are in the environment's units (`expected_return`). A method without a teacher leaves its part out.
"""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.chunk_dynamics import AbstractChunkDynamics
from mac.config import Config
from mac.data.chunk_sequences import Sequences, sample_sequences
from mac.data.sampler import sample
from mac.nn.mlp import scalar
from mac.ops.flow import euler
from mac.ops.returns import return_of_probability
from mac.ops.rollout import Model, imagine, squared_error
from mac.types import Batch, EnvSpec, Metrics, SampleSpec, Window

STATES = 256
"""States, and real sequences, that one diagnosis looks at: shares are good to 3 in 100."""

EDGE = 1.1
"""Normalised entries lie in [-1, 1], the range of the normaliser's rows; a tenth beyond it is outside."""


@runtime_checkable
class ChunkAlgorithm(Protocol):
    """The methods of MAC and its variants that diagnostics call."""

    @property
    def cfg(self) -> Config: ...
    @property
    def env(self) -> EnvSpec: ...
    @property
    def sample(self) -> SampleSpec: ...
    @property
    def dynamics(self) -> AbstractChunkDynamics: ...

    def sample_chunks(
        self, nets: Any, s: Array, g: Array | None, key: Key[Array, ""], n: int, *, acting: bool = False
    ) -> Array: ...

    def best_chunk(
        self, nets: Any, s: Array, g: Array | None, key: Key[Array, ""], n: int, *, acting: bool = False
    ) -> Array: ...

    def judgement(self, nets: Any, s: Array, g: Array | None, chunks: Array, *, acting: bool) -> Array: ...

    def first_actions(self, chunks: Array) -> Array: ...


def compute_diagnostics(algo: ChunkAlgorithm, nets: Any, window: Window, key: Key[Array, ""]) -> Metrics:
    """All of the above, of networks `nets`, on states and sequences drawn from `window`.

    Drifts are NaN if no episode of the window is as long as a rollout.
    """
    k_batch, k_rows, k_roll, k_choice, k_distil, *k_model = jr.split(key, 7 if algo.dynamics.draws else 5)
    k_drift, k_dream = k_model or (None, None)
    cfg, count, model = algo.cfg, algo.cfg.rollout, algo.dynamics.sampler(algo.cfg, nets.model)
    batch = sample(window, algo.sample._replace(batch=STATES), k_batch)
    real = sample_sequences(window, cfg.chunk, count, STATES, k_rows)
    long_enough = jnp.any(window.episodes.steps >= cfg.chunk * count)

    curves = {
        "drift": jnp.where(long_enough, drift(model, real, k_drift), jnp.nan),
        "motion": jnp.where(long_enough, no_change_error(real), jnp.nan),
        "imagined_outside": outside(imagined(algo, nets, batch, k_roll, k_dream)),
    }
    found = {f"{name}_{cfg.chunk * k}": x[k - 1] for name, x in curves.items() for k in horizons(count)}
    found["real_outside"] = outside(batch.obs)
    found |= best_of_n_gain(algo, nets, batch, k_choice) | distillation(algo, nets, batch, k_distil)
    found |= search_gain(algo, nets, batch, k_choice) | short_critic(algo, nets, batch, k_choice)
    return {f"diagnostics/{name}": value for name, value in found.items()}


def expected_return(cfg: Config, q: Float[Array, "*B"], *, goals: bool) -> Float[Array, "*B"]:
    """Outputs of Q as discounted returns, in the environment's units and with its discount per step.

    With rewards it is their discounted sum; with goals `-(1 - γ**T) / (1 - γ)`, T the steps to success
    (a whole number of chunks, unless value is bce).
    """
    if not goals:
        return (q * cfg.chunk if cfg.chunk_reward == "mean" else q) / cfg.reward_scale
    if cfg.value == "bce":
        return return_of_probability(q, cfg.discount)
    return q * (1 - cfg.discount**cfg.chunk) / (1 - cfg.discount)


def horizons(count: int) -> list[int]:
    """Returns the numbers of chunks, up to `count`, that are logged: 1, 2, 5, 10, ... and the last."""
    round_numbers = (m * 10**e for e in range(len(str(count))) for m in (1, 2, 5))
    return sorted({k for k in round_numbers if k < count} | {count})


def drift(model: Model, real: Sequences, k_model: Key[Array, ""] | None = None) -> Float[Array, " L"]:
    """Error of `model`, run open loop with the real actions, after each of L chunks; RMS over entries.

    `k_model` is the key of a model that draws its states.
    """
    return jnp.sqrt(jnp.mean(squared_error(model, *real, k_model), axis=-1))


def no_change_error(real: Sequences) -> Float[Array, " L"]:
    """Returns the distance of the states after each of L chunks from the first, RMS over entries."""
    return drift(lambda obs, _: obs, real)


def imagined(
    algo: ChunkAlgorithm,
    nets: Any,
    batch: Batch,
    key: Key[Array, ""],
    k_model: Key[Array, ""] | None = None,
) -> Float[Array, "T B D"]:
    """States after each chunk of rollouts such as V is trained on."""
    goal, n = batch.goals and batch.goals.value, algo.cfg.candidates

    def policy(s: Array, key: Key[Array, ""]) -> Array:
        return algo.best_chunk(nets, s, goal, key, n)

    model = algo.dynamics.sampler(algo.cfg, nets.model)
    return imagine(policy, model, batch.obs, algo.cfg.rollout, key, k_model).next_obs


def outside(obs: Float[Array, "*T B D"]) -> Float[Array, "*T"]:
    """Share of states with an entry beyond the data's range."""
    return jnp.mean(jnp.any(jnp.abs(obs) > EDGE, axis=-1).astype(obs.dtype), axis=-1)


def candidates(algo: ChunkAlgorithm, nets: Any, batch: Batch, key: Key[Array, ""]) -> Float[Array, "N B A"]:
    """Chunks among which acting would choose in the batch's states; the same for the same key."""
    goal = batch.goals and batch.goals.value
    raw = algo.sample_chunks(nets, batch.obs, goal, key, algo.cfg.candidates_test, acting=True)
    return jnp.clip(raw, -1, 1)


def best_of_n_gain(algo: ChunkAlgorithm, nets: Any, batch: Batch, key: Key[Array, ""]) -> Metrics:
    """Measures the gain of best-of-N over the mean candidate; nothing if N is 1."""
    if algo.cfg.candidates_test == 1:
        return {}
    goal = batch.goals and batch.goals.value
    chunks = candidates(algo, nets, batch, key)
    q = scalar(nets.q, batch.obs, goal, chunks)
    found = gain(expected_return(algo.cfg, q, goals=goal is not None))
    return found | {"policy_spread": jnp.sqrt(jnp.mean(jnp.var(chunks, axis=0)))}


def gain(q: Float[Array, "N B"]) -> Metrics:
    """Returns the best of N values minus their mean, averaged over B states."""
    mean = jnp.mean(q, axis=0)
    better = jnp.mean(jnp.max(q, axis=0) - mean)
    return {"best_of_n_gain": better, "best_of_n_spreads": better / jnp.maximum(jnp.std(mean), 1e-6)}


def search_gain(algo: ChunkAlgorithm, nets: Any, batch: Batch, key: Key[Array, ""]) -> Metrics:
    """Measures the search against best-of-N of equal cost; nothing where acting does not search."""
    cfg, s, goal = algo.cfg, batch.obs, batch.goals and batch.goals.value
    if cfg.search_rounds_test == 1:
        return {}
    plain = candidates(algo, nets, batch, key)
    found = algo.best_chunk(nets, s, goal, key, cfg.candidates_test, acting=True)
    best, searched = (
        expected_return(cfg, algo.judgement(nets, s, goal, chunks, acting=True), goals=goal is not None)
        for chunks in (plain, found)
    )
    return {"search_gain": jnp.mean(searched - jnp.max(best, axis=0))}


def short_critic(algo: ChunkAlgorithm, nets: Any, batch: Batch, key: Key[Array, ""]) -> Metrics:
    """Compares the short critic with Q on the policy's chunks; nothing without one."""
    if nets.q_short is None:
        return {}
    s, goal = batch.obs, batch.goals and batch.goals.value
    chunks = candidates(algo, nets, batch, key)
    q, short = (
        expected_return(algo.cfg, output, goals=goal is not None)
        for output in (
            scalar(nets.q, s, goal, chunks),
            scalar(nets.q_short, s, goal, algo.first_actions(chunks)),
        )
    )
    chosen = jnp.take_along_axis(q, jnp.argmax(short, axis=0)[None], axis=0)[0]
    return {
        "short_critic_gap": jnp.mean(short - q),
        "short_critic_regret": jnp.mean(jnp.max(q, axis=0) - chosen),
    }


def distillation(algo: ChunkAlgorithm, nets: Any, batch: Batch, key: Key[Array, ""]) -> Metrics:
    """Returns the distance of the one-step policy from its flow teacher; nothing where one is missing."""
    if nets.flow is None or nets.policy is None:
        return {}
    s, goal = batch.obs, batch.goals and batch.goals.actor
    noise = jr.normal(key, (len(s), batch.actions[0].size))
    taught = euler(lambda x, t: nets.flow(s, goal, x, t), noise, algo.cfg.flow_steps)
    student, teacher = (jnp.clip(chunk, -1, 1) for chunk in (nets.policy(s, goal, noise), taught))

    def predicted(chunk: Array) -> Array:
        return expected_return(algo.cfg, scalar(nets.q, s, goal, chunk), goals=goal is not None)

    return {
        "distil_gap": jnp.sqrt(jnp.mean(jnp.square(student - teacher))),
        "distil_q_gap": jnp.mean(predicted(teacher) - predicted(student)),
    }
