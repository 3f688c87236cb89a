"""Platform that the program being traced is for."""

import jax


def target_platform() -> str:
    """Returns the platform of the program that is being traced: "cpu", "gpu" or "tpu".

    It is that of the mesh whose devices the program is for, and JAX's default where no mesh is set. The two
    differ when a program is compiled for a card that is not in this machine. JAX keeps traces under
    different meshes apart, so a compiled function may depend on the answer.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform
