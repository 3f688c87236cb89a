"""The specification of a generated dataset: everything that its content depends on."""

import importlib.metadata
from typing import Any, NamedTuple

from envs_mjx import experts
from envs_mjx.action_noise import check_sigma
from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from envs_mjx.locomotion.maze_paths import STYLES as MAZE_STYLES
from envs_mjx.locomotion.walkers import MAZES
from envs_mjx.registry import TaskId, parse
from mac.errors import UserError

LANES = {"c": 64, "mjx": 1024, "warp": 1024}
"""Episodes simulated together on each engine. On `c` they are enough to keep the JAX part cheap, on the
others enough to fill an accelerator."""
_ROWS = {"navigate": 1001, "stitch": 201, "explore": 501}
_MAX_SHARDS = 10_000  # ten times what the largest dataset of OGBench has


OPTIONAL = ("action_noise", "mix")
"""Options that a record leaves out where they are off."""


class DatasetSpec(NamedTuple):
    """The specification of a dataset.

    Attributes:
        dataset: name such as `puzzle-4x5-play-v0`.
        episodes: training episodes; there are a tenth as many for validation.
        per_shard: training episodes in each pair of files.
        seed: same seed, same episodes.
        engine: `c`, or another engine of `registry.ENGINES`.
        lanes: episodes simulated together; part of the data's identity, as XLA's rounding depends on it.
        expert_checksum: checksum of the trained expert, for walkers without a scripted one; else None.
        action_noise: standard deviation of noise on executed actions; recorded ones have none.
        mix: shares of episodes by style, such as `play=0.8,random=0.2` (`style_mix`); empty if all are of the
            dataset's own style.
    """

    dataset: str
    episodes: int
    per_shard: int
    seed: int = 0
    engine: str = "c"
    lanes: int = LANES["c"]
    expert_checksum: str | None = None
    action_noise: float = 0.0
    mix: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the values that identify the data, by name; without those of options that are off."""
        found = {name: value for name, value in self._asdict().items() if value is not None}
        return {name: value for name, value in found.items() if value or name not in OPTIONAL}


def episode_rows(dataset: str) -> int:
    """Returns the rows of an episode of a dataset, as in OGBench: its transitions and the final state.

    The action of the final state means nothing. Episodes of the humanoid and of `giant-navigate` are twice as
    long.

    Args:
        dataset: name such as `scene-play-v0` or `antmaze-giant-navigate-v0`. The result is meaningless for
            datasets without a fixed episode length, such as `hopper-medium-v2`.
    """
    task_id = parse(dataset)
    family, style = task_id.family, task_id.style
    if style not in _ROWS:
        return EPISODE_ROWS
    longer = family.startswith("humanoid") + (family.endswith("-giant") and style == "navigate")
    return (_ROWS[style] - 1) * 2**longer + 1


def family_and_style(spec: DatasetSpec) -> tuple[str, str]:
    """Returns family and style of a specification, after checking that it can be generated.

    Raises:
        UserError: if it cannot.
    """
    task_id = parse(spec.dataset)
    family, style = task_id.family, task_id.style
    if task_id.name != task_id.dataset or style not in (MAZE_STYLES if family in MAZES else experts.STYLES):
        raise UserError(_no_dataset(task_id))
    if (spec.expert_checksum is None) != (family not in MAZES or family.startswith("point")):
        raise UserError(_wrong_expert(spec))
    if spec.engine not in LANES:
        raise UserError(f"unknown physics engine {spec.engine!r}; choose {' or '.join(LANES)}")
    for name in ("episodes", "per_shard", "lanes"):
        if getattr(spec, name) < 1:
            raise UserError(f"{name}={getattr(spec, name)}: must be at least 1")
    if spec.episodes / spec.per_shard > _MAX_SHARDS or spec.episodes >= 2**31:
        raise UserError(
            f"{spec.episodes:,} episodes, {spec.per_shard:,} in each file, are too many files; "
            "ask for fewer rows or larger shards"
        )
    check_sigma("action_noise", spec.action_noise)
    if not 0 <= spec.seed < 2**31:
        raise UserError(f"seed={spec.seed}: must be in [0, 2**31)")
    return family, style


def _no_dataset(task_id: TaskId) -> str:
    name, proper = task_id.name, task_id.dataset
    if proper == name:
        return f"{name} cannot be generated; download it, or see experiments/train_expert.py"
    return f"{name!r} is not the name of a dataset; try {proper}"


def _wrong_expert(spec: DatasetSpec) -> str:
    if spec.expert_checksum is not None:
        return f"{spec.dataset} is made by a script; leave out --expert"
    body = spec.dataset.partition("maze")[0]
    return (
        f"{spec.dataset} needs a trained expert: run `python experiments/train_expert.py --task {body} "
        "--out FOLDER`, then `python experiments/generate_data.py` with --expert FOLDER"
    )


def generation_versions() -> dict[str, str]:
    """Returns the versions of the packages that the bits of an episode may depend on."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "mujoco")}
