"""Exports a saved policy to one file that acts without this project: `python experiments/export.py RUN`."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from experiments.cli.arguments import read_flags, start_jax
from experiments.cli.exit_status import exit_status
from experiments.launch.saved_run import open_run
from experiments.policy_export.artefact import Actor, actor, largest_difference, write_artefact
from mac.errors import UserError
from mac.formatting import counted

PROGRAM = "python experiments/export.py"
TOLERANCE = 1e-5
"""Largest difference of an exported policy's actions from the run's own."""
_NAMES = {"jax": "policy.jaxpolicy", "onnx": "policy.onnx"}


@dataclass(frozen=True)
class Args:
    """Exports the policy of one seed to a file that acts without this project."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """folder of the run, which stays as it is except for the new file"""
    out: Path | None = None
    """file to write; None = policy.jaxpolicy or policy.onnx in the run's folder"""
    format: Literal["jax", "onnx"] = "jax"
    """`jax` writes a StableHLO program for CPUs and CUDA (extra `export`), `onnx` a model (extra `onnx`)"""
    seed: int | None = None
    """number of the seed; None = the run's first"""
    step: int | None = None
    """update whose checkpoint is exported; None = the newest"""
    batch: int = 0
    """rows of a call; 0 = any number (of onnx: 1)"""
    time: bool = False
    """also print the milliseconds per call on this machine, for 1 and 64 rows"""

    def __post_init__(self):
        for name in ("seed", "step", "batch"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 2**31:
                raise UserError(f"--{name}={value}: must be at least 0, and below 2**31")


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: export_policy(read_flags(Args, argv, PROGRAM)),
        short_of_memory="export for fewer rows with --batch",
        interrupted="nothing was written",
    )


def export_policy(ask: Args) -> int:
    """Does what the flags say; returns the exit status.

    Raises:
        UserError: the run cannot be exported, or the exported policy acts otherwise.
    """
    start_jax(1)
    run = open_run(ask.run, ask.step)
    policy = actor(run, run.numbers[0] if ask.seed is None else ask.seed)
    out = ask.out or ask.run / _NAMES[ask.format]
    if ask.format == "onnx":
        from experiments.policy_export.to_onnx import write_onnx

        header, difference = write_onnx(policy, out, ask.batch or 1)
    else:
        header = write_artefact(policy, out, ask.batch)
        difference = largest_difference(policy, out, ask.batch)
    print(f"policy       {run.title}, seed {policy.seed}, after {run.step:,} updates")
    actions = counted(header["chunk"], "action")
    goals = f" and goals of {header['goal_dim']}" if header["goal_dim"] else ""
    print(f"call         {header['batch']} rows of {header['obs_dim']} numbers{goals}; {actions} for each")
    print(f"checked      actions differ by at most {difference:.1e} from the run's own")
    if not difference <= TOLERANCE:  # so is NaN
        raise UserError(f"{out}: actions differ by {difference:.1e}, more than {TOLERANCE}; do not use it")
    if ask.time:
        print_times(policy, out, ask)
    print(f"  {out}")
    return 0


def print_times(policy: Actor, out: Path, ask: Args) -> None:
    """Prints milliseconds per call and per action; a call returns a chunk of actions for each row."""
    for rows in [ask.batch] if ask.batch or ask.format == "onnx" else [1, 64]:
        call, chunk = caller(policy, out, ask.format, rows or 1)
        milliseconds = fastest(call)
        each = milliseconds / chunk
        print(f"time         {rows or 1} rows: {milliseconds:.3f} ms per call, {each:.3f} ms per action")


def caller(policy: Actor, out: Path, form: str, rows: int) -> tuple[Callable[[], Any], int]:
    """One decision of the exported policy, and the actions of a chunk."""
    env = policy.run.algo.env
    obs = np.tile(np.asarray(policy.run.normalizer.center), (rows, 1))
    goal = None if env.goal_dim is None else obs[:, list(env.goal_columns)]
    if form == "onnx":
        from experiments.policy_export.to_onnx import session_call

        return session_call(policy, out, obs, goal)
    from experiments.policy_export.loader import ExportedPolicy

    loaded = ExportedPolicy(out)

    def decide() -> Any:
        loaded.reset()
        return loaded(obs, goal)

    return decide, loaded.header["chunk"]


def fastest(call: Callable[[], Any], repeats: int = 20) -> float:
    """Milliseconds of the fastest of several calls, after one that compiles."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
