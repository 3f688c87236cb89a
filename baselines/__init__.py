"""Every algorithm by the name that `--algo` takes: its hyperparameters' class and its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

from mac.algorithm import AbstractAlgorithm
from mac.config import Config as MACConfig
from mac.mac import MAC


class Entry(NamedTuple):
    """One algorithm: `algorithm(config(...), env_spec, steps)` builds it for a run of so many updates."""

    config: type[Any]
    algorithm: Callable[..., AbstractAlgorithm]
    title: str


REGISTRY: dict[str, Entry] = {
    "mac": Entry(MACConfig, MAC, "MAC (Park et al. 2025)"),
}
