"""Writer of gym datasets in D4RL's schema, from a training of our own expert.

`medium-replay` holds the newest transitions of the training, `medium` those of its last policy. D4RL's own
files of these names come from other policies. Ours have `ours` in their names; attributes and a JSON file in
the same folder hold their provenance.

Source of the schema: Fu et al. 2020, "D4RL".
"""

from pathlib import Path
from typing import Any, NamedTuple

import h5py
import jax
import jax.numpy as jnp
import numpy as np

from experiments.expert_training.online_training import initial_state, rollout_policy
from experiments.expert_training.sac import Transitions
from experiments.expert_training.tasks import build_task
from experiments.expert_training.trainer import ExpertConfig, load_policy
from mac.atomic_files import replace_file, write_json
from mac.errors import UserError
from mac.run.io.checkpoint import CheckpointStore

LEVELS = ("medium", "medium-replay")
LANES = 16
"""Number of parallel environments in which the last policy plays."""
_SOURCE = (
    "made by mac-jax with an expert that it trained itself; results on it are not comparable with those on "
    "D4RL's files"
)


class RecordedDataset(NamedTuple):
    """A written dataset: file, rows, and mean return of its episodes, truncated ones included."""

    path: Path
    rows: int
    mean_return: float


def dataset_path(folder: Path, task: str, level: str) -> Path:
    """Returns the path of a dataset, named after its expert."""
    return folder / f"{task}-ours-{level}.hdf5"


def record_dataset(config: ExpertConfig, folder: Path, level: str, rows: int) -> RecordedDataset:
    """Writes one dataset of the training in `folder`, with at most `rows` rows.

    Raises:
        UserError: there is no training in `folder`, or the disk refuses.
    """
    steps = replayed(config, folder) if level == "medium-replay" else played(config, folder, rows)
    columns = d4rl_columns(steps, rows)
    path, count = dataset_path(folder, config.task, level), len(columns["rewards"])
    ends = columns["terminals"] | columns["timeouts"]
    mean = float(columns["rewards"].sum(dtype=np.float64) / ends.sum())
    facts = {"source": _SOURCE, "expert": "ours", "dataset": path.stem, "rows": count} | config.settings
    facts["mean_return"] = round(mean, 1)
    write_hdf5(path, columns, facts)
    write_json(path.with_suffix(".json"), facts)
    return RecordedDataset(path, count, mean)


def replayed(config: ExpertConfig, folder: Path) -> Transitions:
    """Returns the replay buffer of a training, oldest first, [steps, lanes, ...]."""
    cfg, sac, task = config.online, config.sac, build_task(config.task, config.engine)
    with CheckpointStore(folder / "checkpoints", keep=1) as store:
        template = jax.eval_shape(lambda: initial_state(cfg, sac, task, jnp.asarray(config.seed)))
        saved = store.restore(template, config=config.settings)
    order = np.arange(max(saved.step - cfg.capacity, 0), saved.step) % cfg.capacity
    return jax.tree.map(lambda x: np.asarray(x)[order], saved.state.replay)


def played(config: ExpertConfig, folder: Path, rows: int) -> Transitions:
    """Plays the trained policy with its noise, [steps, lanes, ...]."""
    _, policy, _ = load_policy(folder)
    task = build_task(config.task, config.engine)
    steps = rollout_policy(task, policy, jnp.asarray(config.seed), LANES, -(-rows // LANES), True)
    return jax.tree.map(np.asarray, steps)


def d4rl_columns(steps: Transitions, rows: int) -> dict[str, np.ndarray]:
    """Returns D4RL's arrays of the newest of `steps` [steps, lanes, ...], at most `rows` transitions.

    The transitions of one environment are contiguous. The last one is marked as a timeout. So an episode ends
    where `terminals` or `timeouts` is True, and nowhere else.

    Raises:
        UserError: `rows` is smaller than the number of environments.
    """
    lanes = steps.reward.shape[1]
    length = min(rows // lanes, len(steps.reward))
    if length < 1:
        raise UserError(f"--rows={rows}: a dataset needs at least {lanes} rows, one of each environment")

    def stream(x: Any) -> np.ndarray:
        newest = np.swapaxes(np.asarray(x)[-length:], 0, 1)
        return newest.reshape(-1, *newest.shape[2:])

    terminals, timeouts = stream(steps.mask) == 0, stream(steps.cut).astype(bool)
    timeouts[length - 1 :: length] = True
    return {
        "observations": stream(steps.obs).astype(np.float32),
        "actions": stream(steps.action).astype(np.float32),
        "rewards": stream(steps.reward).astype(np.float32),
        "next_observations": stream(steps.next_obs).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts & ~terminals,
    }


def write_hdf5(path: Path, columns: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Writes the arrays, and `facts` as attributes, all or nothing.

    Raises:
        UserError: the disk refuses.
    """

    def write(file: Any) -> None:
        with h5py.File(file, "w") as target:
            for name, column in columns.items():
                target.create_dataset(name, data=column, compression="gzip")
            for name, value in facts.items():
                target.attrs[name] = str(value)

    replace_file(path, write)
