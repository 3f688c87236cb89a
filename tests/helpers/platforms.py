"""Devices that may not be here, but can be traced for."""

from jax.sharding import AbstractDevice, AbstractMesh, AxisType


def mesh_of(platform: str) -> AbstractMesh:
    """Returns a mesh of one device of "cpu", "gpu" or "tpu", under `jax.sharding.use_abstract_mesh`."""
    # JAX 0.12 lowers kernels for GPUs that it knows.
    kind = "NVIDIA H100 80GB HBM3" if platform == "gpu" else "a device"
    device = AbstractDevice(kind, None, platform)
    return AbstractMesh((1,), ("seed",), (AxisType.Auto,), abstract_device=device)
