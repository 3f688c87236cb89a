"""Environment variables of JAX: those that these programs do not follow, and those that they set.

Results depend on the former. Imports only Python's own modules, since `doctor.py` uses it.
"""

import os

_FIXED: dict[str, bool | int | str] = {
    # States and checkpoints are float32, and one compiled program runs many updates.
    "JAX_ENABLE_X64": False,
    "JAX_DISABLE_JIT": False,
    # The same seed gives the same numbers on every machine.
    "JAX_THREEFRY_PARTITIONABLE": True,
    "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
    "JAX_RANDOM_SEED_OFFSET": 0,
    # MJX relies on promotion.
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
}
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
_MEMORY = (
    PREALLOCATE,
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
_TRUE, _FALSE = ("y", "yes", "t", "true", "on", "1"), ("", "n", "no", "f", "false", "off", "0")


def ignored() -> dict[str, str]:
    """The variables that are set to another value than these programs need, with that value."""
    return {name: os.environ[name] for name in _FIXED if name in os.environ and not _fits(name)}


def _fits(name: str) -> bool:
    text, wanted = os.environ[name].lower(), _FIXED[name]
    if isinstance(wanted, bool):
        return text in (_TRUE if wanted else _FALSE)
    return text == str(wanted)


def take_memory_as_needed() -> None:
    """Lets JAX, here and in processes that are started, take a GPU's memory as it needs it.

    By default JAX takes three quarters of a GPU at its start, and a second program finds no room, such as an
    evaluation beside a training run. Whoever sets one of JAX's variables for memory gets what JAX does then.
    Must be called before JAX starts its backends.
    """
    if not any(name in os.environ for name in _MEMORY):
        os.environ[PREALLOCATE] = "false"


def set_required() -> list[str]:
    """Gives JAX, here and in processes that are started, the values that are needed; returns notes on it."""
    import jax

    notes = []
    for name, value in ignored().items():
        jax.config.update(name.lower(), _FIXED[name])
        del os.environ[name]
        notes.append(
            f"note: {name}={value} is ignored; results would not be comparable, or nothing would run"
        )
    return notes
