"""The artefact: a zip file of a StableHLO program, its header, and a loader.

The program holds the networks' weights, the normaliser, and all of acting, such as flow and best-of-N. It
maps observations (and goals) in the environment's units, and the task, number and decision of each episode,
to chunks of actions. It derives the noise from these numbers as the run's own evaluations do.
"""

import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.launch.saved_run import SavedRun
from mac.atomic_files import replace_file
from mac.errors import UserError, one_line
from mac.nn.frozen import Numerics
from mac.run.evaluate import Policies, episode_keys, evaluation_keys, select_actions
from mac.run.io.run_metadata import run_provenance

PLATFORMS = ("cpu", "cuda")
LOADER = Path(__file__).with_name("loader.py")
HEADER, PROGRAM = "header.json", "policy.stablehlo"
FORMAT = 1


class Actor(NamedTuple):
    """The function to export, and the shapes of its arguments for a batch.

    Attributes:
        call: `call(obs, [goal,] task, episode, decision)` gives chunks of actions, [B, n, A].
    """

    call: Any
    run: SavedRun
    seed: int

    def arguments(self, batch: Any) -> list[jax.ShapeDtypeStruct]:
        """Arguments of `call` for a batch, which may be symbolic."""
        env = self.run.algo.env
        widths = [env.obs_dim, *([] if env.goal_dim is None else [env.goal_dim])]
        floats = [jax.ShapeDtypeStruct((batch, width), jnp.float32) for width in widths]
        return floats + [jax.ShapeDtypeStruct((batch,), jnp.int32)] * 3


def actor(run: SavedRun, seed: int) -> Actor:
    """The policy of one seed as one function, with matmuls in float32 on every platform.

    Raises:
        UserError: it acts with a history, or there is no such seed.
    """
    if run.algo.history:
        raise UserError(
            f"{run.settings.algo} acts with the last {run.algo.history} steps, which an artefact does not "
            "keep; use mac.load"
        )
    if seed not in run.numbers:
        raise UserError(f"--seed={seed}: {run.folder} has seeds {run.numbers[0]} to {run.numbers[-1]}")
    at = run.numbers.index(seed)
    algo = run.algo.with_numerics(Numerics("float32", "plain"))
    state = jax.tree.map(lambda x: jnp.asarray(x[at : at + 1]), run.state)
    policies = Policies(algo, run.normalizer, state)
    key = evaluation_keys(jnp.asarray([seed]), run.step)
    goals = algo.env.goal_dim is not None

    def call(obs: jax.Array, *others: jax.Array) -> jax.Array:
        goal, (task, episode, decision) = (others[0] if goals else None), others[-3:]
        noise = episode_keys(key, task, episode)[1]
        with jax.default_matmul_precision("highest"):
            found = select_actions(
                policies, obs[None], None if goal is None else goal[None], noise, decision[None]
            )
        return jnp.clip(found[0], -1, 1)

    return Actor(call, run, seed)


def header_of(policy: Actor, batch: int, chunk: int) -> dict[str, Any]:
    """Facts about the policy that its user needs, as JSON data."""
    run, env = policy.run, policy.run.algo.env
    facts = run_provenance()
    return {
        "format": FORMAT,
        "algo": run.settings.algo,
        "env": run.settings.env,
        "seed": policy.seed,
        "updates": run.step,
        "obs_dim": env.obs_dim,
        "goal_dim": env.goal_dim,
        "goal_columns": list(env.goal_columns),
        "action_dim": env.action_dim,
        "action_low": -1.0,
        "action_high": 1.0,
        "chunk": chunk,
        "tasks": list(env.tasks),
        "batch": batch or "any",
        "run": str(run.folder.absolute()),
        "git": facts["git"],
        "jax": jax.__version__,
    }


def write_artefact(policy: Actor, out: Path, batch: int) -> dict[str, Any]:
    """Writes the artefact; returns its header.

    Args:
        batch: rows of a call; 0 for any number.
    Raises:
        UserError: flatbuffers is missing, the program cannot be exported, or the file cannot be written.
    """
    try:
        import flatbuffers  # noqa: F401  # pyright: ignore[reportMissingImports]
        import jax.export as export
    except ImportError as error:
        raise UserError(
            f"exporting needs flatbuffers ({one_line(error)}); pip install -e '.[export]'"
        ) from error
    size: Any = batch or export.symbolic_shape("B")[0]
    try:
        program = export.export(jax.jit(policy.call), platforms=PLATFORMS)(*policy.arguments(size))
    except Exception as error:  # JAX has many classes of errors for what no symbolic shape can express
        if batch:
            raise
        raise UserError(
            f"{policy.run.settings.algo} cannot be exported for any number of rows ({one_line(error)}); "
            "name the number with --batch"
        ) from error
    _, chunk, _ = program.out_avals[0].shape
    header = header_of(policy, batch, int(chunk)) | {"platforms": list(PLATFORMS)}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(HEADER, json.dumps(header, indent=2) + "\n")
        file.writestr(PROGRAM, bytes(program.serialize()))
        file.write(LOADER, LOADER.name)
    replace_file(out, lambda file: file.write(content.getvalue()))
    return header


def largest_difference(policy: Actor, out: Path, batch: int) -> float:
    """The largest difference between the artefact's actions and the run's own, on random observations."""
    from experiments.policy_export.loader import ExportedPolicy

    loaded = ExportedPolicy(out)
    count = batch or 3
    rng = np.random.default_rng(0)
    env = policy.run.algo.env
    center, width = (np.asarray(x) for x in (policy.run.normalizer.center, policy.run.normalizer.width))
    obs = (center + width * rng.uniform(-1, 1, (count, env.obs_dim))).astype(np.float32)
    goal = None if env.goal_dim is None else obs[::-1][:, list(env.goal_columns)]
    own = policy.run.policy(policy.seed)
    loaded.reset()
    mine = own(obs, goal)
    return float(np.abs(loaded(obs, goal) - mine).max())
