"""MAC in JAX: the names that users of the library need, each imported from its module at its first use.

So `import mac` is fast, and a module of the package that needs no JAX does not wait for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mac.actor_critic import AbstractActorCritic, ActorCriticConfig
    from mac.algorithm import AbstractAlgorithm, AbstractLossAlgorithm, TrainState
    from mac.config import CommonConfig, Config
    from mac.data.convert import prepare
    from mac.data.normalize import Normalizer
    from mac.data.store import Store
    from mac.data.window import make_held_out, make_window
    from mac.errors import UserError
    from mac.mac import MAC, AbstractChunkPolicy
    from mac.run.evaluate import evaluate
    from mac.run.mesh import use_cpu_devices
    from mac.run.policy import Policy, load
    from mac.run.report.progress import open_progress
    from mac.run.train import RunConfig, TrainJob, TrainResult, train
    from mac.types import Batch, EnvSpec, Episodes, Metrics, SampleSpec, Window

__all__ = [
    "MAC",
    "AbstractActorCritic",
    "AbstractAlgorithm",
    "AbstractChunkPolicy",
    "AbstractLossAlgorithm",
    "ActorCriticConfig",
    "Batch",
    "CommonConfig",
    "Config",
    "EnvSpec",
    "Episodes",
    "Metrics",
    "Normalizer",
    "Policy",
    "RunConfig",
    "SampleSpec",
    "Store",
    "TrainJob",
    "TrainResult",
    "TrainState",
    "UserError",
    "Window",
    "evaluate",
    "load",
    "make_held_out",
    "make_window",
    "open_progress",
    "prepare",
    "train",
    "use_cpu_devices",
]

_NAMES = {
    "mac.algorithm": ("AbstractAlgorithm", "AbstractLossAlgorithm", "TrainState"),
    "mac.config": ("CommonConfig", "Config"),
    "mac.data.convert": ("prepare",),
    "mac.data.normalize": ("Normalizer",),
    "mac.data.store": ("Store",),
    "mac.data.window": ("make_held_out", "make_window"),
    "mac.errors": ("UserError",),
    "mac.mac": ("MAC", "AbstractChunkPolicy"),
    "mac.actor_critic": ("AbstractActorCritic", "ActorCriticConfig"),
    "mac.run.evaluate": ("evaluate",),
    "mac.run.policy": ("Policy", "load"),
    "mac.run.report.progress": ("open_progress",),
    "mac.run.mesh": ("use_cpu_devices",),
    "mac.run.train": ("RunConfig", "TrainJob", "TrainResult", "train"),
    "mac.types": ("Batch", "EnvSpec", "Episodes", "Metrics", "SampleSpec", "Window"),
}
_MODULE = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
