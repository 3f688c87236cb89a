"""Pictures by MuJoCo's own renderer, on systems with offscreen rendering (EGL or OSMesa)."""

import copy
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import mujoco
import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont

from envs_mjx.manipulation.observation import Objects
from envs_mjx.manipulation.scenes import Scene
from experiments.doctor_checks.probes import drawing_remedy
from experiments.video.record import EpisodeRecording, caption, status
from experiments.video.vector_drawing import BUTTONS, COLUMNS, CUBES, STATUS_COLORS
from mac.errors import UserError, one_line

PLATFORMS = ("egl", "osmesa")
WIDTH, HEIGHT, LABEL, TITLE, FOOT = 320, 300, 26, 34, 22  # pixels: scene; label, title, legend
CAMERA = "front_pixels"
PLACE = "#ffd43b"  # colour of the balls at the desired positions of handles

_TRIAL = """
import mujoco
from mujoco.{platform} import GLContext
context = GLContext(8, 8)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
"""


class Drawing(NamedTuple):
    """Offscreen platform that works on this machine, None if none does; and the errors of the others."""

    platform: str | None
    why: str = ""


@functools.cache
def try_drawing() -> Drawing:
    """Tries EGL and OSMesa, in other processes, because a missing library may kill the process."""
    wanted, reasons = os.environ.get("MUJOCO_GL", "").lower(), []
    for name in [wanted] if wanted in PLATFORMS else PLATFORMS:
        environment = {k: v for k, v in os.environ.items() if k != "PYOPENGL_PLATFORM"}
        trial = [sys.executable, "-P", "-W", "ignore", "-c", _TRIAL.format(platform=name)]
        try:
            done = subprocess.run(trial, env=environment, capture_output=True, timeout=60)
        except subprocess.TimeoutExpired:
            reasons.append(f"{name}: no answer within 60 s")
            continue
        if done.returncode == 0:
            return Drawing(name, "; ".join(reasons))
        lines = done.stderr.decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), f"exit status {done.returncode}")
        reasons.append(f"{name}: {one_line(RuntimeError(last))}")
    return Drawing(None, "; ".join(reasons))


def require_drawing() -> str:
    """Returns the offscreen platform that works on this machine.

    Raises:
        UserError: no platform works, with the error of each.
    """
    platform, why = try_drawing()
    if platform is None:
        raise UserError(f"MuJoCo's renderer cannot draw on this machine ({why}); {drawing_remedy(why)}")
    return platform


class Camera:
    """Draws scenes of one model; a context manager, which releases the graphics context."""

    def __init__(self, scene: Scene):
        name = require_drawing()
        os.environ["PYOPENGL_PLATFORM"] = name
        self.scene, self.model = scene, copy.copy(scene.model)
        self.model.vis.global_.offwidth, self.model.vis.global_.offheight = WIDTH, HEIGHT
        self.data = mujoco.MjData(self.model)
        self._context: Any = importlib.import_module(f"mujoco.{name}").GLContext(WIDTH, HEIGHT)
        self._context.make_current()
        self._canvas = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._canvas)
        self._shapes = mujoco.MjvScene(self.model, maxgeom=2000)
        for costly in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._shapes.flags[costly] = 0  # without a GPU these take most of the time
        self._options, self._view = mujoco.MjvOption(), mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._view.fixedcamid = self.model.camera(CAMERA).id
        self._options.geomgroup[:] = (1, 1, 1, 0, 0, 0)
        for number in range(scene.cubes):
            color = to_rgb(CUBES[number % len(CUBES)])
            self.model.geom(f"object_{number}").rgba = np.array([*color, 1.0])
            self.model.geom(f"target_object_{number}").rgba = np.array([*color, 0.25])

    def __enter__(self) -> "Camera":
        return self

    def __exit__(self, *_: object) -> None:
        self._canvas.free()
        self._context.free()

    def picture(self, qpos: np.ndarray, buttons: np.ndarray, target: Objects) -> np.ndarray:
        """Draws one scene, uint8[HEIGHT, WIDTH, 3]; faint cubes and small balls mark the desired states."""
        model, data = self.model, self.data
        data.qpos[:] = qpos
        for number, pos in enumerate(target.cubes):
            data.mocap_pos[model.body(f"object_target_{number}").mocapid[0]] = pos
        for number, state in enumerate(buttons):
            model.geom(f"btngeom_{number}").rgba = (*to_rgb(BUTTONS[int(state)]), 1.0)
        for number, name in enumerate(("drawer", "window")[: self.scene.slides]):
            model.material(f"{name}_handle").rgba = (*to_rgb(BUTTONS[int(buttons[number])]), 1.0)
        mujoco.mj_forward(model, data)
        self._update()
        self._mark(qpos, buttons, target)
        rectangle = mujoco.MjrRect(0, 0, WIDTH, HEIGHT)
        mujoco.mjr_render(rectangle, self._shapes, self._canvas)
        pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, rectangle, self._canvas)
        return pixels[::-1]

    def _update(self) -> None:
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(
            self.model, self.data, self._options, None, self._view, everything, self._shapes
        )

    def _mark(self, qpos: np.ndarray, buttons: np.ndarray, target: Objects) -> None:
        """Marks buttons in the wrong state, by the desired colour, and the desired positions of handles."""
        scene = self.scene
        for top, state, wanted in zip(scene.button_top, buttons, target.buttons, strict=True):
            if state != wanted:
                self._ball(top + np.array([0.0, 0.0, 0.03]), BUTTONS[int(wanted)])
        for base, axis, wanted in zip(scene.handle, scene.handle_axis, target.slides, strict=True):
            self._ball(base + wanted * axis, PLACE)

    def _ball(self, pos: np.ndarray, color: str) -> None:
        if self._shapes.ngeom == self._shapes.maxgeom:
            return
        shape = self._shapes.geoms[self._shapes.ngeom]
        size, turn = np.full(3, 0.008), np.eye(3).ravel()
        rgba = np.array([*to_rgb(color), 0.9], np.float32)
        mujoco.mjv_initGeom(shape, mujoco.mjtGeom.mjGEOM_SPHERE, size, pos, turn, rgba)
        self._shapes.ngeom += 1


def legend(scene: Scene) -> str:
    """Returns the legend of the marks, in one line."""
    parts = ["faint cube: desired position"] if scene.cubes else []
    parts += ["ball above a button: desired state"] if scene.buttons else []
    return "   ·   ".join([*parts, *(["yellow ball: desired position of a handle"] if scene.slides else [])])


def render(
    scene: Scene, film: EpisodeRecording, numbers: list[int], title: str, frames: list[int]
) -> Iterator[np.ndarray]:
    """Draws the control steps `frames`, uint8[height, width, 3] each, as `vector_drawing.draw`.

    Raises:
        UserError: no offscreen platform works.
    """
    rows, columns = -(-len(numbers) // COLUMNS), min(len(numbers), COLUMNS)
    size = (max(columns, 2) * WIDTH, TITLE + rows * (HEIGHT + LABEL) + FOOT)
    fonts = [ImageFont.load_default(points) for points in (15, 13, 11)]
    left = (size[0] - columns * WIDTH) // 2
    with Camera(scene) as camera:
        for k in frames:
            sheet = Image.new("RGB", size, "white")
            pen = ImageDraw.Draw(sheet)
            pen.text((size[0] / 2, TITLE / 2), title, fill="black", font=fonts[0], anchor="mm")
            low = size[1] - FOOT / 2
            pen.text((size[0] / 2, low), legend(scene), fill="#555555", font=fonts[2], anchor="mm")
            for s, number in enumerate(numbers):
                row, column = divmod(s, COLUMNS)
                x, y = left + column * WIDTH, TITLE + row * (HEIGHT + LABEL)
                target = Objects(*(part[s] for part in film.target))
                pen.text((x + 6, y + LABEL / 2), f"seed {number}", fill="black", font=fonts[1], anchor="lm")
                label = caption(scene, film, k, s)
                color = STATUS_COLORS[status(film, k, s)]
                pen.text((x + WIDTH - 6, y + LABEL / 2), label, fill=color, font=fonts[1], anchor="rm")
                picture = camera.picture(film.qpos[k, s], film.buttons[k, s], target)
                sheet.paste(Image.fromarray(picture), (x, y + LABEL))
            yield np.asarray(sheet)
