"""OGBench's tabletop scenes: compiled models, and the ids and constants that task logic needs."""

import dataclasses
import functools

import mujoco
import numpy as np

from envs_mjx.manipulation.assets import ARM, GRIPPER, Box, Contents, compose, descriptions
from mac.errors import UserError

PHYSICS_DT = 0.002
CONTROL_DT = 0.05
ARM_KP = (4500.0, 4500.0, 4500.0, 2000.0, 2000.0, 500.0)
"""Position gains of the arm's servos, N m / rad, from shoulder to wrist."""
LOCKED_DAMPING, FREE_DAMPING = 1e6, 2.0
"""Joint damping of a locked drawer or window, and of a free one, N s / m."""

_TABLE: Box = ((0.3, -0.3), (0.55, 0.3))
_ARM_BOX: Box = ((0.25, -0.35, 0.20), (0.6, 0.35, 0.35))
_PUZZLE_ARM_BOX: Box = ((0.25, -0.2, 0.20), (0.6, 0.2, 0.25))


def _cubes(count: int) -> Contents:
    return Contents(count, (0, 0), False, _TABLE, _ARM_BOX)


def _puzzle(rows: int, columns: int) -> Contents:
    return Contents(0, (rows, columns), False, _TABLE, _PUZZLE_ARM_BOX)


FAMILIES = {
    "cube-single": _cubes(1),
    "cube-double": _cubes(2),
    "cube-triple": _cubes(3),
    "cube-quadruple": _cubes(4),
    "cube-octuple": _cubes(8),
    "scene": Contents(1, (0, 0), True, ((0.3, -0.07), (0.45, 0.18)), ((0.25, -0.2, 0.20), (0.6, 0.2, 0.35))),
    "puzzle-3x3": _puzzle(3, 3),
    "puzzle-4x4": _puzzle(4, 4),
    "puzzle-4x5": _puzzle(4, 5),
    "puzzle-4x6": _puzzle(4, 6),
}
"""Scenes that can be built, with the regions from which objects, targets and the gripper are drawn."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """A compiled model and the ids that task logic needs; compared and hashed by identity.

    Slides are the drawer and the window, in this order: joints that a button each unlocks.

    Attributes:
        family: name such as `cube-double`.
        model: the compiled model; treat it as read-only. Slides are free in it.
        cubes, buttons, slides: numbers of objects.
        grid: rows and columns of a puzzle's buttons, whose presses flip the neighbours too; else (0, 0).
        object_bounds: lower and upper corner of the xy region (metres) where cubes and targets are drawn.
        arm_bounds: lower and upper corner of the box (metres) where the gripper starts.
        substeps: physics steps per control step.
        fresh: whether site poses are recomputed from the positions at the end of a control step, as in
            OGBench's scenes with buttons; else they are those of the last substep's start.
        arm_qpos, arm_dof: addresses of the six arm joints in `qpos` and `qvel`.
        arm_ctrl: ids of the six arm actuators, in the same order.
        gripper_ctrl: id of the gripper's actuator (0 open, 255 closed).
        driver_qpos: address of the right driver joint in `qpos` (0 rad open, 0.8 rad closed).
        sites: ids of the tracked sites: the pinch point between the finger tips, then the flange
            (`attachment_site`).
        pad_body: id of the right finger pad, whose contact force is observed.
        cube_qpos: address of each cube's free joint in `qpos` (xyz, then wxyz quaternion).
        cube_dof: address of each cube's free joint in `qvel`.
        cube_geom: id of each cube's collision geom.
        button_qpos, button_dof: addresses of each button's joint (0 m out, -0.024 m pressed).
        button_top: position of the top of each button, m, world frame, float64[buttons, 3].
        slide_qpos, slide_dof: addresses of each slide's joint (drawer 0 to -0.16 m open, window 0 to 0.2).
        handle: position of each slide's handle at joint position 0, m, world frame, float64[slides, 3].
        handle_axis: its displacement per metre of joint position, float64[slides, 3].
        handle_yaw: yaw of each handle, rad.
    """

    family: str
    model: mujoco.MjModel
    cubes: int
    buttons: int
    slides: int
    grid: tuple[int, int]
    object_bounds: Box
    arm_bounds: Box
    substeps: int
    fresh: bool
    arm_qpos: np.ndarray
    arm_dof: np.ndarray
    arm_ctrl: np.ndarray
    gripper_ctrl: int
    driver_qpos: int
    sites: np.ndarray
    pad_body: int
    cube_qpos: np.ndarray
    cube_dof: np.ndarray
    cube_geom: np.ndarray
    button_qpos: np.ndarray
    button_dof: np.ndarray
    button_top: np.ndarray
    slide_qpos: np.ndarray
    slide_dof: np.ndarray
    handle: np.ndarray
    handle_axis: np.ndarray
    handle_yaw: np.ndarray


@functools.cache
def build_scene(family: str) -> Scene:
    """Returns the scene of `family`, a name in `FAMILIES`; compiled once per process (about 1 s).

    Raises:
        UserError: for an unknown family, or if the ogbench package's files cannot be found.
    """
    if family not in FAMILIES:
        raise UserError(f"unknown scene family {family!r}; known: {', '.join(FAMILIES)}")
    model = compose(descriptions(), FAMILIES[family]).compile()
    model.opt.timestep = PHYSICS_DT
    _set_servo_gains(model)
    return _index(family, model, FAMILIES[family])


def _set_servo_gains(model: mujoco.MjModel) -> None:
    """Sets OGBench's gains. It writes the damping to `gainprm[2]`, which a fixed gain ignores, so the damping
    stays that of the arm file (`biasprm[2]`). Kept, because OGBench's data were made so.
    """
    arm = _arm_actuators(model)
    kp = np.asarray(ARM_KP)
    model.actuator_gainprm[arm, 0] = kp
    model.actuator_gainprm[arm, 2] = -kp / 10
    model.actuator_biasprm[arm, 1] = -kp


def _arm_actuators(model: mujoco.MjModel) -> np.ndarray:
    names = ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3")
    return np.asarray([model.actuator(ARM + name).id for name in names], np.int32)


def _index(family: str, model: mujoco.MjModel, contents: Contents) -> Scene:
    arm = _arm_actuators(model)
    joints = model.actuator_trnid[arm, 0]
    buttons = 2 if contents.furniture else contents.grid[0] * contents.grid[1]
    free, pushed = (
        _joints(model, [f"{stem}_joint_{i}" for i in range(count)])
        for stem, count in (("object", contents.cubes), ("buttonbox", buttons))
    )
    slides = _joints(model, ["drawer_slide", "window_slide"] if contents.furniture else [])
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    handles = [model.site(f"{name}_handle_center").id for name in ("drawer", "window")[: len(slides)]]
    tops = [model.site(f"btntop_{i}").id for i in range(buttons)]
    turned = data.site_xmat[handles].reshape(-1, 3, 3)
    return Scene(
        family=family,
        model=model,
        cubes=contents.cubes,
        buttons=buttons,
        slides=len(slides),
        grid=contents.grid,
        object_bounds=contents.object_bounds,
        arm_bounds=contents.arm_bounds,
        substeps=round(CONTROL_DT / PHYSICS_DT),
        fresh=buttons > 0,
        arm_qpos=model.jnt_qposadr[joints].copy(),
        arm_dof=model.jnt_dofadr[joints].copy(),
        arm_ctrl=arm,
        gripper_ctrl=model.actuator(ARM + GRIPPER + "fingers_actuator").id,
        driver_qpos=int(model.joint(ARM + GRIPPER + "right_driver_joint").qposadr[0]),
        sites=np.asarray(
            [model.site(ARM + name).id for name in (GRIPPER + "pinch", "attachment_site")], np.int32
        ),
        pad_body=model.body(ARM + GRIPPER + "right_pad").id,
        cube_qpos=model.jnt_qposadr[free].copy(),
        cube_dof=model.jnt_dofadr[free].copy(),
        cube_geom=np.asarray([model.geom(f"object_{i}").id for i in range(contents.cubes)], np.int32),
        button_qpos=model.jnt_qposadr[pushed].copy(),
        button_dof=model.jnt_dofadr[pushed].copy(),
        button_top=data.site_xpos[tops].copy(),
        slide_qpos=model.jnt_qposadr[slides].copy(),
        slide_dof=model.jnt_dofadr[slides].copy(),
        handle=data.site_xpos[handles].copy(),
        handle_axis=data.xaxis[slides].copy(),
        handle_yaw=np.arctan2(turned[:, 1, 0], turned[:, 0, 0]),
    )


def _joints(model: mujoco.MjModel, names: list[str]) -> np.ndarray:
    return np.asarray([model.joint(name).id for name in names], np.int32)
