"""The training loop's compiled functions: `init`, `prepare`, and `segment`, the scan over updates.

`scan` over steps of a map over seeds: a step counter that belongs to the loop is the same for all
seeds, so an algorithm may branch on it without computing both sides. Initial weights and updates have
streams of their own (`mac.run.rng_streams`), and each update's key is its stream's folded with its number: a
state and a step number determine everything that follows, and seed k of a group is seed k alone.

Where the seeds are computed is told by a mesh of devices (`mac.run.mesh`).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.batch_axis import share_rows
from mac.data.sampler import sample
from mac.ops.replay import Replay, ReplaySpec, draw, write
from mac.run.mesh import ALL, SEED, map_seeds, over_seeds
from mac.run.rng_streams import Stream, stream
from mac.types import Window


class SeedsReplay:
    """Memories of imagined transitions of the seeds on one device, as the loop fills and reads them."""

    def __init__(self, algo: AbstractAlgorithm, spec: ReplaySpec, window: Window, keys: Key[Array, " s"]):
        self.algo, self.spec, self.window = algo, spec, window
        self.keys = jax.vmap(partial(stream, which=Stream.REPLAY))(keys)

    def _key(self, key: Key[Array, ""], step: Int[Array, ""], purpose: int) -> Key[Array, ""]:
        return jr.fold_in(jr.fold_in(key, step), purpose)

    def refill(self, state: TrainState, step: Int[Array, ""]) -> Replay:
        """The memories at update `step`, of all seeds: as they are, or with rollouts where these are due.

        Rollouts are iterations of a loop whose number depends on the step alone, so that other updates
        compute none. A conditional would copy the memories in every update on GPUs.
        """
        spec, bare, since = self.spec, state.without_memory(), step - self.spec.first

        def roll(number: Int[Array, ""], memory: Replay) -> Replay:
            def one_seed(state: TrainState, key: Key[Array, ""]):
                swept_algo = self.algo.with_hparams(state.swept)
                k_roll = jr.fold_in(self._key(key, step, 0), number)
                with self.algo.numerics.matmuls():
                    return swept_algo.rollout(state, self.window, step, k_roll)

            rows, count = map_seeds(one_seed, bare, self.keys)
            slot = (since // spec.every + number) % spec.kept
            return write(memory, slot, rows, count, room=spec.rows)

        at_once = jnp.where(since == 0, spec.kept, 1) if spec.fill_at_start else 1
        due = (since >= 0) & (since % spec.every == 0)
        return jax.lax.fori_loop(0, jnp.where(due, at_once, 0), roll, state.memory)

    def draw(self, memory: Replay, number: Int[Array, ""], step: Int[Array, ""]) -> Any:
        """Transitions for update `step` of the seed that is `number` of this device."""
        key = self._key(self.keys[number], step, 1)
        return draw(memory, number, key, self.spec.batch, room=self.spec.rows)


def init(
    algo: AbstractAlgorithm,
    mesh: Mesh,
    keys: Key[Array, " S"],
    swept: Mapping[str, Float[Array, " S"]] | None = None,
) -> TrainState:
    """Fresh states of all seeds, leading axis S, each on its seed's device.

    Args:
        swept: hyperparameters whose values each of the S states has for itself, see `TrainState.swept`.
    """
    return init_function(algo, mesh)(keys, dict(swept or {}))


def init_function(algo: AbstractAlgorithm, mesh: Mesh) -> Any:
    """Returns the compiled function that `init` calls with its keys and swept hyperparameters."""

    def one(key: Key[Array, ""], swept: Mapping[str, Float[Array, ""]]) -> TrainState:
        return dataclasses.replace(algo.with_hparams(swept).init(stream(key, Stream.INIT)), swept=swept)

    return jax.jit(lambda *args: map_seeds(one, *args), out_shardings=NamedSharding(mesh, SEED))


def prepare(algo: AbstractAlgorithm, mesh: Mesh, window: Window, state: TrainState) -> TrainState:
    """States of all seeds with what their algorithm takes from the data before the first update."""
    if type(algo).prepare is AbstractAlgorithm.prepare:
        return state
    return _prepare(algo, mesh, window, state)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _prepare(algo: AbstractAlgorithm, mesh: Mesh, window: Window, state: TrainState) -> TrainState:
    def one_device(window: Window, state: TrainState) -> TrainState:
        def one_seed(state: TrainState) -> TrainState:
            ready = algo.with_hparams(state.swept).prepare(state.without_memory(), window)
            return dataclasses.replace(ready, swept=state.swept, memory=state.memory)

        return map_seeds(one_seed, state)

    return over_seeds(one_device, mesh, (ALL, SEED), SEED)(window, state)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def segment(
    algo: AbstractAlgorithm,
    mesh: Mesh | AbstractMesh,
    window: Window,
    keys: Key[Array, " S"],
    steps: Int[Array, " K"],
    state: TrainState,
) -> tuple[TrainState, dict[str, Float[Array, "K S"]]]:
    """Runs the updates numbered `steps` on every seed; `state` is donated.

    Returns the new states and the metrics of every update and seed. Nothing passes between host
    and device, nor between devices, while it runs.
    """

    def one_device(window: Window, keys: Key[Array, " s"], steps: Int[Array, " K"], state: TrainState):
        updates = jax.vmap(partial(stream, which=Stream.UPDATES))(keys)
        replay = algo.replay and SeedsReplay(algo, algo.replay, window, keys)

        def one_step(state: TrainState, step: Int[Array, ""]):
            memory = replay.refill(state, step) if replay else state.memory

            def one_seed(state: TrainState, key: Key[Array, ""], number: Int[Array, ""]):
                k_sample, k_update = jr.split(jr.fold_in(key, step))
                swept_algo = algo.with_hparams(state.swept)
                batch = sample(window, swept_algo.sample, k_sample)
                if replay:
                    batch = dataclasses.replace(batch, imagined=replay.draw(memory, number, step))
                batch = share_rows(batch)
                with algo.numerics.matmuls():
                    new, metrics = swept_algo.update(state, batch, step, k_update)
                return dataclasses.replace(new, swept=state.swept), metrics

            # The memory is not mapped over seeds: slices of it would be copied in every update.
            new, metrics = map_seeds(one_seed, state.without_memory(), updates, jnp.arange(len(keys)))
            return dataclasses.replace(new, memory=memory), metrics

        return jax.lax.scan(one_step, state, steps)

    sharded = over_seeds(
        one_device,
        mesh,
        (ALL, SEED, ALL, SEED),
        (SEED, PartitionSpec(None, "seed")),
        check_vma=algo.numerics.kernels != "fused",  # JAX cannot check interpreted kernels
    )
    return sharded(window, keys, steps, state)
