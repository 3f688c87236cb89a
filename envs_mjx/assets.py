"""OGBench's tabletop scenes, compiled with `mujoco.MjSpec` from the installed package's asset files.

Only the XML and mesh files of the `ogbench` distribution are read; none of its Python is imported.
The composition (a UR5e with a Robotiq 2F-85 on its flange, standing in a walled arena with N cubes),
the element names and the changes after compilation are those of OGBench 1.2's `manipspace`
environments, so that compiled models agree array by array.
"""

import copy
import dataclasses
import functools
import importlib.util
import xml.etree.ElementTree as ET
from pathlib import Path

import mujoco
import numpy as np

from mac.errors import UserError

CUBE_COUNTS = {"cube-single": 1, "cube-double": 2, "cube-triple": 3, "cube-quadruple": 4, "cube-octuple": 8}
"""Families of scenes that can be built, and how many cubes each holds."""

PHYSICS_DT = 0.002
CONTROL_DT = 0.05
ARM_KP = (4500.0, 4500.0, 4500.0, 2000.0, 2000.0, 500.0)
"""Position gains of the arm's servos, N m / rad, from shoulder to wrist."""

OBJECT_BOUNDS = ((0.3, -0.3), (0.55, 0.3))
"""Lower and upper corner of the xy region (metres) where cubes and their targets are drawn."""
ARM_BOUNDS = ((0.25, -0.35, 0.20), (0.6, 0.35, 0.35))
"""Lower and upper corner of the box (metres) from which starting positions of the gripper are drawn."""

_CUBE_SPACING = 0.1  # metres between neighbours, before a reset places them
_ARM = "ur5e/"
_GRIPPER = "robotiq/"


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """A compiled model and the ids that task logic needs; compared and hashed by identity.

    Attributes:
        family: name such as `cube-double`.
        model: the compiled model; treat it as read-only.
        cubes: number of cubes.
        substeps: physics steps per control step.
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
    """

    family: str
    model: mujoco.MjModel
    cubes: int
    substeps: int
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


@functools.cache
def build_scene(family: str) -> Scene:
    """The scene of `family` ("cube-single" ... "cube-octuple"); compiled once per process (about 1 s).

    Raises:
        UserError: for an unknown family, or if the ogbench package's files cannot be found.
    """
    if family not in CUBE_COUNTS:
        raise UserError(f"unknown scene family {family!r}; known: {', '.join(CUBE_COUNTS)}")
    cubes = CUBE_COUNTS[family]
    model = _compose(_descriptions(), cubes).compile()
    model.opt.timestep = PHYSICS_DT
    _set_servo_gains(model)
    return _index(family, model, cubes)


def _descriptions() -> Path:
    """Folder of OGBench's model files, found without importing the package."""
    found = importlib.util.find_spec("ogbench")
    places = list(found.submodule_search_locations or ()) if found else []
    for place in places:
        folder = Path(place) / "manipspace" / "descriptions"
        if (folder / "floor_wall.xml").is_file():
            return folder
    where = f"its folder {places[0]} holds no manipspace/descriptions" if places else "it is not installed"
    raise UserError(
        f"the robot models come from the ogbench package, but {where}; pip install 'ogbench>=1.2,<1.3'"
    )


def _compose(folder: Path, cubes: int) -> mujoco.MjSpec:
    """Arena, arm, gripper and cubes as one specification, in OGBench's element order."""
    arena = mujoco.MjSpec.from_string(_arena_xml(folder, cubes))
    arm = mujoco.MjSpec.from_file(str(folder / "universal_robots_ur5e" / "ur5e.xml"))
    gripper = mujoco.MjSpec.from_file(str(folder / "robotiq_2f85" / "2f85.xml"))
    # Attaching keeps the parent's options, so the children's are handed up first: the arm file
    # chooses the integrator, the gripper file the friction cone.
    for spec in (arm, arena):
        spec.option.cone, spec.option.impratio = gripper.option.cone, gripper.option.impratio
    arena.option.integrator = arm.option.integrator
    for unwanted in (*arm.lights, *arm.keys):
        arm.delete(unwanted)

    flange = arm.site("attachment_site")
    mount = flange.parent.add_body(name=_GRIPPER, pos=flange.pos, quat=flange.quat)
    mount.add_frame().attach_body(gripper.body("base_mount"), _GRIPPER, "")
    arena.body(_ARM).add_frame().attach_body(arm.body("base"), _ARM, "")
    _decorate(arena)
    return arena


def _arena_xml(folder: Path, cubes: int) -> str:
    """The arena file with an empty body for the arm and `cubes` renamed copies of the cube file."""
    arena = ET.parse(folder / "floor_wall.xml").getroot()
    defaults = ET.parse(folder / "cube_outer.xml").getroot().find("default")
    template = ET.parse(folder / "cube_inner.xml").getroot().find("worldbody")
    world = arena.find("worldbody")
    if defaults is None or template is None or world is None:
        raise UserError(f"the model files in {folder} are not those of ogbench 1.2; reinstall ogbench")
    arena.append(defaults)
    ET.SubElement(world, "body", name=_ARM)
    for i in range(cubes):
        y = -_CUBE_SPACING / 2 * (cubes - 1) + _CUBE_SPACING * i
        for body in template:
            clone = copy.deepcopy(body)
            x, _, z = clone.get("pos", "0 0 0").split()
            clone.set("pos", f"{x} {y!r} {z}")
            for element in clone.iter():
                stem, _, index = element.get("name", "").rpartition("_")
                if index == "0":
                    element.set("name", f"{stem}_{i}")
            world.append(clone)
    return ET.tostring(arena, encoding="unicode")


def _decorate(arena: mujoco.MjSpec) -> None:
    """Cameras, view and the two boxes that show sampling regions: nothing here moves anything."""
    arena.stat.center, arena.stat.extent, arena.stat.meansize = (0.3, 0.0, 0.15), 0.7, 0.04
    view = arena.visual
    view.global_.elevation, view.global_.azimuth = -20, 180
    view.map.znear, view.map.zfar = 0.1, 10.0
    flat = [(*corner, 0.02) for corner in OBJECT_BOUNDS]
    for name, (low, high), rgba in (
        ("object_bounds", flat, (0.6, 0.3, 0.3, 0.2)),
        ("arm_bounds", ARM_BOUNDS, (0.3, 0.6, 0.3, 0.2)),
    ):
        low, high = np.asarray(low), np.asarray(high)
        arena.worldbody.add_site(
            name=name,
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=(low + high) / 2,
            size=(high - low) / 2 + 1e-7,  # a flat box needs some thickness
            rgba=rgba,
            group=4,
        )
    for name, pos, tilt in (
        ("front", (1.287, 0.0, 0.509), (-0.342, 0.0, 0.940)),
        ("front_pixels", (1.053, -0.014, 0.639), (-0.628, 0.001, 0.778)),
    ):
        camera = arena.worldbody.add_camera(name=name, pos=pos)
        camera.alt.type = mujoco.mjtOrientation.mjORIENTATION_XYAXES
        camera.alt.xyaxes = (0.0, 1.0, 0.0, *tilt)


def _set_servo_gains(model: mujoco.MjModel) -> None:
    """OGBench's gains. The damping it writes sits in `gainprm[2]`, which a fixed gain ignores: the
    damping in force stays that of the arm file (`biasprm[2]`). Kept, because it is what its data has.
    """
    arm = _arm_actuators(model)
    kp = np.asarray(ARM_KP)
    model.actuator_gainprm[arm, 0] = kp
    model.actuator_gainprm[arm, 2] = -kp / 10
    model.actuator_biasprm[arm, 1] = -kp


def _arm_actuators(model: mujoco.MjModel) -> np.ndarray:
    names = ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3")
    return np.asarray([model.actuator(_ARM + name).id for name in names])


def _index(family: str, model: mujoco.MjModel, cubes: int) -> Scene:
    arm = _arm_actuators(model)
    joints = model.actuator_trnid[arm, 0]
    free = np.asarray([model.joint(f"object_joint_{i}").id for i in range(cubes)])
    return Scene(
        family=family,
        model=model,
        cubes=cubes,
        substeps=round(CONTROL_DT / PHYSICS_DT),
        arm_qpos=model.jnt_qposadr[joints].copy(),
        arm_dof=model.jnt_dofadr[joints].copy(),
        arm_ctrl=arm,
        gripper_ctrl=model.actuator(_ARM + _GRIPPER + "fingers_actuator").id,
        driver_qpos=int(model.joint(_ARM + _GRIPPER + "right_driver_joint").qposadr[0]),
        sites=np.asarray([model.site(_ARM + _GRIPPER + "pinch").id, model.site(_ARM + "attachment_site").id]),
        pad_body=model.body(_ARM + _GRIPPER + "right_pad").id,
        cube_qpos=model.jnt_qposadr[free].copy(),
        cube_dof=model.jnt_dofadr[free].copy(),
        cube_geom=np.asarray([model.geom(f"object_{i}").id for i in range(cubes)]),
    )
