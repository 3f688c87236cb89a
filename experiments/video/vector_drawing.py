"""Vector drawing of tabletop scenes, from above and from the side; needs no graphics driver."""

from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon
from matplotlib.text import Text

from envs_mjx.manipulation.assets import ARM, GRIPPER
from envs_mjx.manipulation.observation import Objects
from envs_mjx.manipulation.scenes import Scene
from experiments.video.outlines import Shape, View, convex_hull, cube_corners, pieces, views
from experiments.video.record import EpisodeRecording, caption, status

COLUMNS = 4  # seeds in a row
CUBES = ("#e6194b", "#3c78d8", "#f0a30a", "#2e8b57", "#8e44ad", "#00a5a8", "#b5651d", "#d147a3")
BUTTONS = ("#f0455a", "#3c78d8")  # state 0, state 1
ARM_COLOR, GRIP_COLOR, WOOD, LINE, EDGE = "#5b6673", "#1f2933", "#c9b79c", "#8a8f98", "#333333"
STATUS_COLORS = {"running": "#444444", "success": "#1a7f37", "failed": "#b42318"}
BUTTON_RADIUS = 0.017  # m
LINKS = ("shoulder_link", "upper_arm_link", "forearm_link", "wrist_1_link", "wrist_2_link", "wrist_3_link")


class Panel:
    """One view of one seed: artists that follow the scene, over a static background."""

    def __init__(self, axes: Axes, view: View, scene: Scene, target: Objects):
        self.axes, self.view, self.scene, self.target = axes, view, scene, target
        model = scene.model
        axes.set(xlim=view.right, ylim=view.up, aspect="equal", xticks=[], yticks=[])
        axes.set_facecolor("#f7f6f3")
        for spine in axes.spines.values():
            spine.set_color("#d0d0d0")
        if view.axes[1] == 2:
            axes.axhspan(view.up[0], 0.0, color="#ddd8ce", zorder=0)
        self._draw_targets()
        self._draw_furniture()
        bodies = ("drawer_link", "windowb_a", "windowb_b") if scene.slides else ()
        self.moving = [piece for body in bodies for piece in pieces(model, body)]
        self.polygons = [self._patch(WOOD, 0.55, 2) for _ in self.moving]
        self.cubes = [self._patch(CUBES[i % len(CUBES)], 0.95, 5) for i in range(scene.cubes)]
        self.buttons = [self._button(i) for i in range(scene.buttons)]
        self.arm = axes.plot([], [], color=ARM_COLOR, lw=5, alpha=0.45, solid_capstyle="round", zorder=6)[0]
        self.fingers = [
            axes.plot([], [], color=GRIP_COLOR, lw=2.5, alpha=0.9, solid_capstyle="round", zorder=7)[0]
            for _ in range(2)
        ]
        self.handles = [
            axes.plot([], [], "o", ms=5, mec="white", mew=0.8, zorder=8)[0] for _ in range(scene.slides)
        ]
        self.artists = [*self.polygons, *self.cubes, *self.buttons, self.arm, *self.fingers, *self.handles]
        for artist in self.artists:
            artist.set_animated(True)
        self.links = [model.body(ARM + name).id for name in LINKS]
        self.pads = [model.body(ARM + GRIPPER + f"{side}_pad").id for side in ("right", "left")]
        self.knuckles = [model.body(ARM + GRIPPER + f"{side}_driver").id for side in ("right", "left")]

    def show(self, data: mujoco.MjData, buttons: np.ndarray) -> list:
        """Moves all artists to the scene of `data`, whose kinematics are fresh; returns them."""
        scene, (i, j) = self.scene, self.view.axes
        for piece, patch in zip(self.moving, self.polygons, strict=True):
            patch.set_xy(self._project(data, piece))
        for number, patch in enumerate(self.cubes):
            body = scene.model.body(f"object_{number}").id
            patch.set_xy(convex_hull(cube_corners(data.xpos[body], data.xmat[body].reshape(3, 3))[:, (i, j)]))
        for number, patch in enumerate(self.buttons):
            patch.set_facecolor(BUTTONS[int(buttons[number])])
            self._place_button(patch, number, data.qpos[scene.button_qpos[number]])
        pinch = data.site_xpos[scene.sites[0]]
        wrist = data.site_xpos[scene.sites[1]]
        chain = np.stack([*data.xpos[self.links], wrist])
        self.arm.set_data(chain[:, i], chain[:, j])
        for finger, knuckle, pad in zip(self.fingers, self.knuckles, self.pads, strict=True):
            tip = data.xpos[pad] + (pinch - data.xpos[self.pads].mean(axis=0))
            points = np.stack([wrist, data.xpos[knuckle], data.xpos[pad], tip])
            finger.set_data(points[:, i], points[:, j])
        for number, mark in enumerate(self.handles):
            at = scene.handle[number] + data.qpos[scene.slide_qpos[number]] * scene.handle_axis[number]
            mark.set_data([at[i]], [at[j]])
            mark.set_color(BUTTONS[int(buttons[number])])
        return self.artists

    def _project(self, data: mujoco.MjData, piece: Shape) -> np.ndarray:
        corners = data.xpos[piece.body] + piece.corners @ data.xmat[piece.body].reshape(3, 3).T
        return convex_hull(corners[:, self.view.axes])

    def _patch(self, color: str, alpha: float, order: int) -> Polygon:
        patch = Polygon(
            np.zeros((3, 2)), facecolor=color, edgecolor="#333333", lw=0.7, alpha=alpha, zorder=order
        )
        self.axes.add_patch(patch)
        return patch

    def _button(self, number: int) -> Polygon | Circle:
        ring: dict[str, Any] = dict(edgecolor=EDGE, lw=0.8, zorder=4)
        top = self.scene.button_top[number]
        if self.view.axes[1] == 1:
            patch: Polygon | Circle = Circle((top[0], top[1]), BUTTON_RADIUS, **ring)
        else:
            patch = Polygon(np.zeros((4, 2)), **ring)
        self.axes.add_patch(patch)
        return patch

    def _place_button(self, patch: Polygon | Circle, number: int, depth: float) -> None:
        if isinstance(patch, Polygon):
            x, _, z = self.scene.button_top[number]
            high, r = z + depth, BUTTON_RADIUS
            patch.set_xy([(x - r, z - 0.04), (x + r, z - 0.04), (x + r, high), (x - r, high)])

    def _draw_furniture(self) -> None:
        """Draws static bodies: the frames of drawer and window, and from the side the boxes of buttons."""
        model = self.scene.model
        names = ["drawer_base", "window"] if self.scene.slides else []
        names += [f"buttonbox_{i}" for i in range(self.scene.buttons)] if self.view.axes[1] == 2 else []
        data = mujoco.MjData(model)
        mujoco.mj_kinematics(model, data)
        for piece in (piece for name in names for piece in pieces(model, name)):
            corners = self._project(data, piece)
            self.axes.add_patch(Polygon(corners, facecolor="#e3ddd2", edgecolor="#cfc6b8", lw=0.6, zorder=1))

    def _draw_targets(self) -> None:
        """Draws desired states: dashed cubes, rings in the button state's colour, crosses for handles."""
        (i, j), scene = self.view.axes, self.scene
        for number, pos in enumerate(self.target.cubes):
            color = CUBES[number % len(CUBES)]
            corners = convex_hull(cube_corners(pos, np.eye(3))[:, (i, j)])
            self.axes.add_patch(Polygon(corners, facecolor=color, alpha=0.18, lw=0, zorder=3))
            self.axes.add_patch(
                Polygon(corners, fill=False, edgecolor=color, lw=1.3, ls=(0, (3, 2)), zorder=3)
            )
        if j == 1:
            for top, wanted in zip(scene.button_top, self.target.buttons, strict=True):
                ring = Circle(
                    (top[0], top[1]), 0.03, fill=False, edgecolor=BUTTONS[int(wanted)], lw=2.5, zorder=3
                )
                self.axes.add_patch(ring)
        for base, axis, wanted in zip(scene.handle, scene.handle_axis, self.target.slides, strict=True):
            at = base + wanted * axis
            self.axes.plot([at[i]], [at[j]], "x", color="#333333", ms=7, mew=1.8, zorder=9)


def legend(scene: Scene) -> list[str]:
    """Returns the legend of the marks, in lines that fit two seeds side by side."""
    lines = [["dashed: desired positions of cubes"]] if scene.cubes else [[]]
    if scene.buttons:
        lines[0] += ["button: red 0, blue 1", "ring: desired state"]
    if scene.slides:
        lines += [["dot: handle of drawer or window, red if locked", "cross: desired position"]]
    return ["   ·   ".join(line) for line in lines]


def draw(
    scene: Scene, film: EpisodeRecording, numbers: list[int], title: str, frames: list[int]
) -> Iterator[np.ndarray]:
    """Draws the control steps `frames`, uint8[height, width, 3] each; `numbers` are the seeds' labels."""
    sheet = _Sheet(scene, film, numbers, title)
    return (sheet.picture(k) for k in frames)


def fit_width(text: Text, canvas: FigureCanvasAgg, size: float) -> None:
    """Sets a line to the first of `size`, `size - 0.5`, ... 5 points at which it fits the picture.

    Sizes are tried one by one: letters are whole pixels wide, so width is not proportional to size.
    """
    room = 0.98 * canvas.figure.bbox.width
    text.set_fontsize(size)
    while size > 5 and text.get_window_extent(canvas.get_renderer()).width > room:
        size -= 0.5
        text.set_fontsize(size)


class _Sheet:
    """Layout of the picture. The static background is drawn once; lengths are in inches."""

    WIDTH, GAP, HEAD, LABEL, LINE_HEIGHT = 2.7, 0.12, 0.36, 0.36, 0.16

    def __init__(self, scene: Scene, film: EpisodeRecording, numbers: list[int], title: str):
        self.scene, self.film, self.data = scene, film, mujoco.MjData(scene.model)
        self.views, legend_lines = views(scene), legend(scene)
        shapes = [(view.up[1] - view.up[0]) / (view.right[1] - view.right[0]) for view in self.views]
        self.heights = [self.WIDTH * shape for shape in shapes]
        rows, columns = -(-len(numbers) // COLUMNS), min(len(numbers), COLUMNS)
        block, foot = sum(self.heights) + self.GAP + self.LABEL, self.LINE_HEIGHT * (len(legend_lines) + 1)
        self.wide = max(columns * (self.WIDTH + self.GAP) + self.GAP, 5.6)
        self.tall = rows * block + self.HEAD + foot
        self.figure = Figure(figsize=(self.wide, self.tall), dpi=100, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        fit_width(self._text(self.wide / 2, 0.24, title, ha="center", weight="bold"), self.canvas, 11)
        for line, text in enumerate(reversed(legend_lines)):
            low = self.tall - self.LINE_HEIGHT * (line + 0.8)
            self._text(self.wide / 2, low, text, ha="center", fontsize=7.5, color="#555555")
        left = (self.wide - columns * (self.WIDTH + self.GAP) + self.GAP) / 2
        self.panels, self.labels = [], []
        for s, number in enumerate(numbers):
            row, column = divmod(s, COLUMNS)
            x, y = left + column * (self.WIDTH + self.GAP), self.HEAD + row * block + self.LABEL - 0.08
            self._text(x, y - 0.12, f"seed {number}", fontsize=9.5, weight="bold")
            self.labels.append(
                self._text(x + self.WIDTH, y - 0.12, "", fontsize=9, ha="right", animated=True)
            )
            self.panels.append(self._pair(s, x, y))
        self.canvas.draw()
        self.background = self.canvas.copy_from_bbox(self.figure.bbox)

    def picture(self, k: int) -> np.ndarray:
        """Draws all seeds after control step `k`."""
        scene, film = self.scene, self.film
        self.canvas.restore_region(self.background)
        for s, (pair, label) in enumerate(zip(self.panels, self.labels, strict=True)):
            self.data.qpos[:] = film.qpos[k, s]
            mujoco.mj_kinematics(scene.model, self.data)
            for panel in pair:
                for artist in panel.show(self.data, film.buttons[k, s]):
                    panel.axes.draw_artist(artist)
            label.set(text=caption(scene, film, k, s), color=STATUS_COLORS[status(film, k, s)])
            self.figure.draw_artist(label)
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()

    def _pair(self, s: int, x: float, y: float) -> list[Panel]:
        """Creates the two views of seed `s`, one below the other; x, y is their upper left corner."""
        target, pair = Objects(*(part[s] for part in self.film.target)), []
        for view, height in zip(self.views, self.heights, strict=True):
            place = (x / self.wide, 1 - (y + height) / self.tall, self.WIDTH / self.wide, height / self.tall)
            axes = self.figure.add_axes(place)
            axes.text(0.02, 0.97, view.name, transform=axes.transAxes, fontsize=7, color=LINE, va="top")
            pair.append(Panel(axes, view, self.scene, target))
            y += height + self.GAP / 2
        return pair

    def _text(self, x: float, y: float, text: str, **style: Any) -> Text:
        return self.figure.text(x / self.wide, 1 - y / self.tall, text, va="center", **style)
