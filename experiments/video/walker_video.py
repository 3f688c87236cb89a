"""Films of walkers: in a maze from above, with their paths; on a plane from the side."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import mujoco
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon, Rectangle

from envs_mjx.locomotion.gym_env import GymEnv
from envs_mjx.locomotion.maze_env import SUCCESS_RADIUS, MazeEnv
from envs_mjx.locomotion.mazes import TELEPORT_RADIUS, UNIT
from envs_mjx.locomotion.walkers import Walker
from experiments.launch.saved_run import SavedRun
from experiments.video.outlines import convex_hull
from experiments.video.record import play_ours
from experiments.video.vector_drawing import COLUMNS, STATUS_COLORS, fit_width

BODY, PATH, PLAN, GOAL, WALL, TELEPORT = "#3c78d8", "#f0a30a", "#d6006e", "#2e8b57", "#5b6673", "#8e44ad"
WIDTH, HEAD, LABEL, GAP = 2.7, 0.4, 0.3, 0.12  # inches: panel, title, seed's label, gap between panels
SPAN, SKY = (-2.0, 4.0), (-0.3, 2.3)  # range of the view from the side, m: along x from the torso, and up
_ROUND = np.stack([f(np.linspace(0, 2 * np.pi, 12, endpoint=False)) for f in (np.cos, np.sin)], axis=1)


class WalkerRecording(NamedTuple):
    """Recorded episodes on the host. Axis T: the start, then each control step; ended episodes are frozen.

    Attributes:
        qpos: [T, S, nq], as in `Walker.model`.
        reward: [T, S] reward of the step, 0 for the start.
        t: [T, S] control steps taken; success, done: [T, S] values after the last of them.
        target: position to reach, [S, 2], m; None on a plane.
        plans: positions of the plan that is followed, [T, S, H, 2], m; None without plans, or on a plane.
    """

    qpos: np.ndarray
    reward: np.ndarray
    t: np.ndarray
    success: np.ndarray
    done: np.ndarray
    target: np.ndarray | None
    plans: np.ndarray | None = None


def film_walker(
    run: SavedRun, env: MazeEnv | GymEnv, task: int, draw: int, noise: float = 0.0
) -> WalkerRecording:
    """Records the first episode of each seed of a walker, as `record.film_ours` does of a scene."""
    parts, state, plans = play_ours(run, env, task, draw, noise, _look)
    if not isinstance(env, MazeEnv):
        return WalkerRecording(*parts, None)  # pyright: ignore[reportCallIssue]
    positions = None if plans is None else plans[..., :2]  # the observations of mazes begin with them
    return WalkerRecording(*parts, np.asarray(state.target), positions)  # pyright: ignore[reportCallIssue]


def _look(state: Any) -> tuple[Any, ...]:
    return state.motion.qpos, state.reward, state.t, state.success, state.done


def returns(track: WalkerRecording) -> np.ndarray:
    """Returns the sum of rewards so far, [T, S]; the last reward of an episode is counted once."""
    moved = np.diff(track.t, axis=0, prepend=np.zeros_like(track.t[:1])) > 0
    return np.cumsum(np.where(moved, track.reward, 0.0), axis=0)


def walker_caption(walker: Walker, track: WalkerRecording, k: int, s: int) -> tuple[str, str]:
    """Returns the status of seed `s` at frame `k`, as text, and its colour."""
    time = f"{track.t[k, s] * walker.control_dt:6.2f} s"
    if walker.maze is None:
        return f"{time}   return {returns(track)[k, s]:,.1f}", STATUS_COLORS["running"]
    status_text = "success" if track.success[k, s] else "failed" if track.done[k, s] else "running"
    return time + ("" if status_text == "running" else f"   {status_text}"), STATUS_COLORS[status_text]


def shadow(walker: Walker, data: mujoco.MjData, axes: tuple[int, int]) -> list[np.ndarray]:
    """Returns outlines of the walker's geoms (spheres and capsules) along the third axis: corners [n, 2]."""
    model, found = walker.model, []
    for geom in np.flatnonzero(model.geom_bodyid > 0):
        radius, half = model.geom_size[geom, :2]
        if model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_CAPSULE:
            half = 0.0
        along = data.geom_xmat[geom].reshape(3, 3)[:, 2] * half
        ends = np.stack([data.geom_xpos[geom] + along, data.geom_xpos[geom] - along])[:, list(axes)]
        found.append(convex_hull((ends[:, None] + radius * _ROUND).reshape(-1, 2)))
    return found


def draw_walker(
    walker: Walker, track: WalkerRecording, numbers: list[int], title: str, frames: list[int]
) -> Iterator[np.ndarray]:
    """Draws the control steps `frames`, uint8[height, width, 3] each; `numbers` are the seeds' labels."""
    box = _view(walker)
    high = WIDTH * (box[1][1] - box[1][0]) / (box[0][1] - box[0][0])
    rows, columns = -(-len(numbers) // COLUMNS), min(len(numbers), COLUMNS)
    wide, tall = max(columns * (WIDTH + GAP) + GAP, 5.6), HEAD + rows * (high + LABEL + GAP)
    figure = Figure(figsize=(wide, tall), dpi=100, facecolor="white")
    canvas, panels = FigureCanvasAgg(figure), []
    head = figure.text(0.5, 1 - HEAD / 2 / tall, title, ha="center", va="center", weight="bold")
    fit_width(head, canvas, 11)
    left = (wide - columns * (WIDTH + GAP) + GAP) / 2
    for s, number in enumerate(numbers):
        row, column = divmod(s, COLUMNS)
        x, y = left + column * (WIDTH + GAP), HEAD + row * (high + LABEL + GAP) + LABEL
        axes = figure.add_axes((x / wide, 1 - (y + high) / tall, WIDTH / wide, high / tall))
        axes.set_title(f"seed {number}", loc="left", fontsize=9.5, weight="bold", pad=3)
        panels.append(_Panel(axes, walker, track, s))
    for k in frames:
        for panel in panels:
            panel.show(k)
        canvas.draw()
        yield np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _view(walker: Walker) -> tuple[tuple[float, float], tuple[float, float]]:
    if walker.maze is None:
        return SPAN, SKY
    low, high = walker.maze.xy((0, 0)) - UNIT / 2, walker.maze.xy(walker.maze.walls.shape) - UNIT / 2
    return (low[0], high[0]), (low[1], high[1])


class _Panel:
    """One seed: artists that follow the walker, over a static background."""

    def __init__(self, axes: Axes, walker: Walker, track: WalkerRecording, s: int):
        self.axes, self.walker, self.track, self.s = axes, walker, track, s
        self.data, self.plane = mujoco.MjData(walker.model), (0, 2) if walker.maze is None else (0, 1)
        right, up = _view(walker)
        axes.set(xlim=right, ylim=up, aspect="equal", yticks=[])
        axes.tick_params(direction="in", labelbottom=False)  # marks every metre, to show motion
        if walker.maze is None:
            axes.axhspan(up[0], 0.0, color="#ddd8ce", zorder=0)
        else:
            axes.set_xticks([])
            self._draw_maze()
        self.path = axes.plot([], [], color=PATH, lw=1.2, zorder=2)[0]
        self.plan = axes.plot([], [], color=PLAN, lw=0.8, ls=":", marker=".", ms=2.5, zorder=2)[0]
        geoms = int((walker.model.geom_bodyid > 0).sum())
        style: Any = {"facecolor": BODY, "edgecolor": "#1f2933", "lw": 0.4, "zorder": 3}
        self.pieces = [Polygon(np.zeros((3, 2)), **style) for _ in range(geoms)]
        for piece in self.pieces:
            axes.add_patch(piece)

    def show(self, k: int) -> None:
        """Moves all artists to the state after control step `k`."""
        track, s = self.track, self.s
        self.data.qpos[:] = track.qpos[k, s]
        mujoco.mj_kinematics(self.walker.model, self.data)
        for patch, corners in zip(self.pieces, shadow(self.walker, self.data, self.plane), strict=True):
            patch.set_xy(corners)
        if self.walker.maze is None:
            self.axes.set_xlim(*(np.asarray(SPAN) + track.qpos[k, s, 0]))
        else:
            path = track.qpos[: k + 1, s, :2].copy()
            path[1:][np.linalg.norm(np.diff(path, axis=0), axis=1) > UNIT / 2] = np.nan  # a teleport
            self.path.set_data(*path.T)
            if track.plans is not None:
                self.plan.set_data(*([[], []] if track.done[k, s] else track.plans[k, s].T))
        text, color = walker_caption(self.walker, track, k, s)
        self.axes.set_title(text, loc="right", fontsize=9, color=color, pad=3)

    def _draw_maze(self) -> None:
        maze, target = self.walker.maze, self.track.target
        assert maze is not None and target is not None
        for corner in maze.xy(np.argwhere(maze.walls)) - UNIT / 2:
            self.axes.add_patch(Rectangle(corner, UNIT, UNIT, color=WALL, lw=0, zorder=1))
        for places, fill in ((maze.entrances, True), (maze.exits, False)):
            for place in places:
                self.axes.add_patch(Circle(place, TELEPORT_RADIUS, color=TELEPORT, fill=fill, alpha=0.5))
        radius = SUCCESS_RADIUS[self.walker.body]
        self.axes.add_patch(Circle(target[self.s], radius, color=GOAL, alpha=0.8, zorder=2))
