"""Renders a film of a saved run, seeds side by side: `python experiments/render_video.py RUN --task 3`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from envs_mjx.action_noise import check_sigma
from envs_mjx.locomotion.gym_env import GymEnv
from envs_mjx.locomotion.maze_env import MazeEnv
from envs_mjx.locomotion.walkers import build_walker
from envs_mjx.manipulation.env import ManipEnv
from envs_mjx.manipulation.scenes import FAMILIES, build_scene
from envs_mjx.registry import TaskId, make
from experiments.cli.arguments import read_flags, start_jax
from experiments.cli.exit_status import exit_status
from experiments.cli.standard_streams import ignore_write_errors
from experiments.evaluate import Engine
from experiments.launch.saved_run import (
    SavedRun,
    by_environment,
    evaluation_engine,
    evaluation_noise,
    open_run,
    require_environment,
)
from experiments.launch.settings import read_settings
from experiments.video import encode
from experiments.video.mujoco_render import render, require_drawing, try_drawing
from experiments.video.record import EpisodeRecording, film_ours, record_in_ogbench
from experiments.video.vector_drawing import draw
from experiments.video.walker_video import WalkerRecording, draw_walker, film_walker, returns
from mac.errors import UserError
from mac.formatting import counted

PROGRAM = "python experiments/render_video.py"
PICTURES = 200  # default for the largest number of pictures in a film
PICTURE_SECONDS = 0.05  # duration of each picture


@dataclass(frozen=True)
class Args:
    """Renders a film of one episode of each policy of a run, side by side."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """folder of the run"""
    task: int | None = None
    """task to play, 1 to 5; None = the first of the run's environment"""
    engine: Engine = "auto"
    """physics: `c`, `mjx` or `warp` as in training (auto = the best one for this machine), or the original
    `ogbench`"""
    out: Path | None = None
    """file of the film, .gif or .mp4; None = view-taskT-ENGINE.gif in the run's folder, with -noiseSIGMA
    after the engine if that is not the run's own"""
    renderer: Literal["auto", "mujoco", "drawing"] = "auto"
    """`mujoco` needs EGL or OSMesa; `drawing` works everywhere; mazes and gym walkers have only `drawing`"""
    step: int | None = None
    """update whose checkpoint is played; None = the newest"""
    noise: float | None = None
    """standard deviation of noise on every executed action; None = that of the run's own evaluations"""
    seed: int = 0
    """episode: 0 = the first of the run's own evaluation after that update, other numbers = others"""
    every: int | None = None
    """control steps per picture; None = for at most 200 pictures"""

    def __post_init__(self):
        for name, least in {"task": 1, "step": 0, "seed": 0, "every": 1}.items():
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31:
                raise UserError(f"--{name}={value}: must be at least {least}, and below 2**31")
        if self.noise is not None:
            check_sigma("--noise", self.noise)


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: view(read_flags(Args, argv, PROGRAM)),
        short_of_memory="take a larger --every, or engine c",
        interrupted="no film was written",
    )


def view(args: Args) -> int:
    """Renders the film that the flags describe; returns the exit status."""
    ignore_write_errors()
    settings = read_settings(args.run)
    trained_on, wanted = settings.task_id, () if args.task is None else (args.task,)
    require_environment(trained_on)
    ((env, (task, *_)),) = by_environment(trained_on, wanted, "--task")
    if env.collection == "registered":
        raise UserError(f"{env.name} is an environment of a plug-in, which these programs cannot draw")
    start_jax(1)
    engine = evaluation_engine(env, args.engine)
    is_walker = env.family not in FAMILIES
    if is_walker and (engine == "ogbench" or args.renderer == "mujoco"):
        raise UserError("mazes and gym walkers are filmed on engine c, mjx or warp, by --renderer drawing")
    noise = evaluation_noise(settings, args.noise, engine)
    other = "" if noise == settings.eval.noise else f"-noise{noise:g}"
    out = args.out or args.run / f"view-task{task}-{engine}{other}.gif"
    encode.check_film_file(out)
    run = open_run(args.run, args.step)
    renderer = "drawing" if is_walker else choose_renderer(args.renderer)
    if trained_on.task not in (None, task):
        print(f"note: the run was trained on task {trained_on.task}, not on task {task}")
    seeds = counted(len(run.numbers), "seed")
    disturbed = f", noise {noise:g} on executed actions" if noise else ""
    print(
        f"playing      task {task} on engine {engine}: {seeds}, after {run.step:,} updates{disturbed}",
        flush=True,
    )
    film = record_film(run, env, task, engine, args.seed, noise)
    frames = pick_frames(len(film.t), args.every)
    print(f"{outcome(film)}; {len(frames)} pictures by {renderer}", flush=True)
    title = f"{run.title}   task {task}, engine {engine}, {run.step:,} updates"
    title += f", noise {noise:g}" if noise else ""
    family = env.family
    if isinstance(film, WalkerRecording):
        pictures = draw_walker(build_walker(family), film, run.numbers, title, frames)
    else:
        paint = render if renderer == "mujoco" else draw
        pictures = paint(build_scene(family), film, run.numbers, title, frames)
    encode.write_film(out, pictures, PICTURE_SECONDS)
    print(f"  {out}")
    return 0


def choose_renderer(renderer: str) -> str:
    """Returns `mujoco` or `drawing`; `auto` is MuJoCo's if the system has offscreen rendering.

    Raises:
        UserError: `mujoco` was chosen, and cannot draw on this machine.
    """
    if renderer == "auto":
        return "mujoco" if try_drawing().platform else "drawing"
    if renderer == "mujoco":
        require_drawing()
    return renderer


def record_film(
    run: SavedRun, task_id: TaskId, task: int, engine: str, draw_number: int, noise: float
) -> EpisodeRecording | WalkerRecording:
    """Plays `task` in an environment, one episode of each seed; `noise` disturbs their actions."""
    if engine == "ogbench":
        return record_in_ogbench(run, task_id.name, task, draw_number)
    env = make(task_id, engine)
    if isinstance(env, MazeEnv | GymEnv):
        return film_walker(run, env, task, draw_number, noise)
    assert isinstance(env, ManipEnv)
    return film_ours(run, env, task, draw_number, noise)


def outcome(film: EpisodeRecording | WalkerRecording) -> str:
    """Returns the number of successful seeds as text, or the returns of gym walkers."""
    if isinstance(film, WalkerRecording) and film.target is None:
        return "return       " + ", ".join(f"{value:,.1f}" for value in returns(film)[-1])
    return f"success      {int(film.success[-1].sum())} of {film.success.shape[1]} seeds"


def pick_frames(steps: int, every: int | None) -> list[int]:
    """Returns every `every`-th of `steps` control steps, and always the last."""
    stride = every or -(-steps // PICTURES)
    return [*range(0, steps - 1, stride), steps - 1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
