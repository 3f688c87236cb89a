"""Devices of a run: how seeds and their batches are spread over them.

Seeds are spread evenly over the devices, and mapped within each: by `vmap` on accelerators, where
one seed's matmuls are too small to fill the chip; by `lax.map` on CPU, where XLA's batched
matmuls are slower than single ones. A CPU counts as several devices (`use_cpu_devices`), because
two seeds in parallel use two cores better than one seed's small matmuls split in two.

Devices that seeds leave over share the batch of each seed (`run_mesh`). The update is the one of the whole
batch: XLA splits it, and sums gradients over the devices, so numbers change by rounding and no more. The
devices may be those of several processes, which then all call these functions with the same arguments.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from mac.batch_axis import BATCH
from mac.cgroup_limits import cores
from mac.errors import UserError
from mac.target_platform import target_platform

SEED, ALL = PartitionSpec("seed"), PartitionSpec()


def use_cpu_devices(seeds: int) -> None:
    """Lets the CPU count as as many devices as divide `seeds` evenly; call before JAX starts."""
    jax.config.update("jax_num_cpu_devices", _even_share(seeds, cores()))


def _even_share(seeds: int, most: int) -> int:
    return max(n for n in range(1, min(seeds, most) + 1) if seeds % n == 0)


def seed_mesh(seeds: int) -> Mesh:
    """The largest group of local devices that takes the same number of seeds each."""
    devices = jax.local_devices()
    return jax.make_mesh(
        (_even_share(seeds, len(devices)),),
        ("seed",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=devices[: _even_share(seeds, len(devices))],
    )


def mesh_shape(
    seeds: int, batch: int, devices: int, processes: int = 1, *, share: int = 0, on_cpu: bool = False
) -> tuple[int, int]:
    """Returns over how many devices seeds are spread, and how many share the batch of each seed.

    Seeds come first: more devices share a batch only where seeds leave them idle.

    Args:
        batch: examples of a seed's batch.
        devices, processes: in all, the same number of devices in each process. All processes take part.
        share: devices that share a batch; 0 leaves it to this function, which takes 1 on CPUs if it can.
    Raises:
        UserError: it cannot be done.
    """
    counts = [share] if share else [n for n in range(1, devices + 1) if batch % n == 0]
    found = [
        (n, b)
        for n in range(1, min(seeds, devices) + 1)
        for b in counts
        if seeds % n == 0 and batch % b == 0 and n * b <= devices and n * b % processes == 0
    ]
    if on_cpu and not share:
        found = [each for each in found if each[1] == 1] or found
    if not found:
        wanted = f"--run.batch-devices={share}" if share else f"{processes} processes"
        raise UserError(
            f"{wanted}: {devices} devices in {processes} processes cannot share {seeds} seeds with batches "
            f"of {batch} evenly; take numbers of seeds, processes and devices that divide each other"
        )
    return max(found)


def run_mesh(seeds: int, batch: int, share: int = 0) -> Mesh:
    """The mesh of a run on the devices of all processes, as `mesh_shape` chooses it.

    Its axes are `seed` and, where devices share batches, `batch`.
    """
    count, on_cpu = jax.process_count(), jax.default_backend() == "cpu"
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    own = [[each for each in devices if each.process_index == number] for number in range(count)]
    least = min(map(len, own))  # of any process: hosts may differ
    shape = mesh_shape(seeds, batch, count * least, count, share=share, on_cpu=on_cpu)
    if count == 1 and shape == (_even_share(seeds, least), 1):
        return seed_mesh(seeds)
    taking_part = shape[0] * shape[1] // count
    chosen = [device for each in own for device in each[:taking_part]]
    grid = np.asarray(chosen, object).reshape(shape)
    auto = jax.sharding.AxisType.Auto
    if shape[1] == 1:
        return Mesh(grid[:, 0], ("seed",), axis_types=(auto,))
    return Mesh(grid, ("seed", BATCH), axis_types=(auto, auto))


def place(mesh: Mesh, tree: Any, spec: PartitionSpec) -> Any:
    """Puts `tree` on the mesh's devices: shared out by seed (`SEED`) or a copy on each (`ALL`).

    Where the devices are those of several processes, each has the whole of `tree` on its host and takes its
    part, and nothing passes between them.
    """
    sharding = NamedSharding(mesh, spec)
    if not mesh.is_multi_process:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: _place_part(x, sharding), tree)


def _place_part(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x if x.sharding.is_equivalent_to(sharding, x.ndim) else jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jr.wrap_key_data(_place_part(jr.key_data(x), sharding))
    here = np.asarray(x)
    return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])


def fetch(tree: Any) -> Any:
    """Copies on the host, in every process, of arrays that may be spread over the devices of several."""
    leaves = jax.tree.leaves(tree)
    if all(x.is_fully_addressable or x.is_fully_replicated for x in leaves if isinstance(x, jax.Array)):
        return jax.device_get(tree)
    return jax.device_get(_copy_to_all(tree, leaves[0].sharding.mesh))


@partial(jax.jit, static_argnums=1)
def _copy_to_all(tree: Any, mesh: Mesh) -> Any:
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, ALL))


def over_seeds(
    f: Callable[..., Any], mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any, **how: Any
) -> Any:
    """`f`, called on each group of devices with its seeds; a group that shares batches is split by XLA."""
    if BATCH not in mesh.axis_names:
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **how)
    mapped = jax.shard_map(
        f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={"seed"}, check_vma=False
    )

    def whole(*args: Any) -> Any:
        # Left to itself, XLA may spread a result over the devices of a batch.
        specs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_specs)
        return jax.lax.with_sharding_constraint(mapped(*args), specs)

    return whole


def seed_keys(seed: int, seeds: int) -> Key[Array, " S"]:
    """Keys of seeds `seed`, ..., `seed + seeds - 1`; each depends on its own number only."""
    return jax.vmap(jr.key)(jnp.arange(seed, seed + seeds))


def map_seeds(f: Callable[..., Any], *args: Any) -> Any:
    """Maps `f` over the leading (seed) axis, the way that suits the device."""
    if target_platform() == "cpu":
        return jax.lax.map(lambda xs: f(*xs), args)
    if len(jax.tree.leaves(args)[0]) == 1:
        # XLA on GPU chooses transposed layouts for networks with an axis of length 1.
        return jax.tree.map(lambda x: x[None], f(*jax.tree.map(lambda x: x[0], args)))
    return jax.vmap(f)(*args)
