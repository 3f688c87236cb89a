"""Devices that may not be here, but can be traced for."""

from jax.sharding import AbstractDevice, AbstractMesh, AxisType


def mesh_of(platform: str) -> AbstractMesh:
    """Returns a mesh of one device of "cpu", "gpu" or "tpu", under `jax.sharding.use_abstract_mesh`."""
    device = AbstractDevice("a device", None, platform)
    return AbstractMesh((1,), ("seed",), (AxisType.Auto,), abstract_device=device)
