"""Small OGBench files for the tests of stores and windows."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mac.data.normalize import Normalizer
from mac.types import EnvSpec

SPEC = EnvSpec("toy-v0", obs_dim=3, action_dim=2, goal_dim=None, tasks=(1,), max_steps=9, control_dt=0.05)


def write(path: Path, lengths: tuple[int, ...], seed: int = 0) -> Path:
    """An OGBench file whose first observation column is the row number."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    terminals = np.zeros(rows, bool)
    terminals[np.cumsum(lengths) - 1] = True
    obs = rng.normal(size=(rows, 3)).astype(np.float32)
    obs[:, 0] = np.arange(rows)
    action = rng.uniform(-1, 1, size=(rows, 2)).astype(np.float32)
    np.savez_compressed(path, observations=obs, actions=action, terminals=terminals)
    return path


def write_pair(folder: Path) -> Path:
    """Writes a training file of three episodes and a validation file of one; returns the first's path."""
    write(folder / "toy-val.npz", (20,), seed=1)
    return write(folder / "toy.npz", (16, 14, 19))


def identity(dim: int = 3) -> Normalizer:
    """A normaliser that changes nothing."""
    return Normalizer(jnp.zeros(dim), jnp.full(dim, 1 - 1e-3))
