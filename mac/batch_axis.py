"""The mesh axis over which one seed's batch is shared out among devices.

Programs are written for the whole batch. Where the mesh of the program being traced has an axis `batch`, its
partitioner splits what has a row for each example, and adds the sums over all rows (gradients, above all).
These functions tell it where to begin; without such an axis they change nothing.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

BATCH = "batch"


def batch_devices() -> int:
    """Returns the number of devices that share a batch in the program that is being traced."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(BATCH, 1)


def share_rows(tree: Any) -> Any:
    """Arrays whose leading axis is shared out over the devices of a batch, if it divides evenly."""
    count = batch_devices()
    if count == 1:
        return tree

    def share(x: Any) -> Any:
        even = x.ndim > 0 and x.shape[0] % count == 0
        return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH)) if even else x

    return jax.tree.map(share, tree)
