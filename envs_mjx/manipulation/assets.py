"""OGBench's tabletop models, composed with `mujoco.MjSpec` from the installed package's asset files.

Only the XML and mesh files of the `ogbench` distribution are read; none of its Python is imported.
The composition is a UR5e with a Robotiq 2F-85 on its flange, in a walled arena with objects. It, the element
names and their order are those of OGBench 1.2's `manipspace` environments, so that compiled models agree
array by array.
"""

import copy
import importlib.util
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

from mac.errors import UserError

ARM = "ur5e/"
GRIPPER = "robotiq/"

_CUBE_SPACING = 0.1  # metres between neighbours, before a reset places them
_BUTTON_SPACING = 0.1  # metres between the centres of a puzzle's buttons
_CENTER_X = 0.425
_MERGED = ("compiler", "default", "asset", "worldbody")
_CAMERAS = {
    False: {
        "front": ((1.287, 0.0, 0.509), (-0.342, 0.0, 0.940)),
        "front_pixels": ((1.053, -0.014, 0.639), (-0.628, 0.001, 0.778)),
    },
    True: {
        "front": ((1.139, 0.0, 0.821), (-0.627, 0.0, 0.779)),
        "front_pixels": ((0.905, 0.0, 0.762), (-0.771, 0.0, 0.637)),
    },
}
"""Position and second image axis of each camera, without and with buttons in the scene."""

Box = tuple[tuple[float, ...], tuple[float, ...]]


class Contents(NamedTuple):
    """The objects in an arena.

    Attributes:
        cubes: number of cubes.
        grid: rows and columns of a puzzle's buttons; (0, 0) without a puzzle.
        furniture: whether it contains two buttons, a drawer and a window.
        object_bounds: corners of the xy region marked for objects, metres.
        arm_bounds: corners of the box marked for the gripper, metres.
    """

    cubes: int
    grid: tuple[int, int]
    furniture: bool
    object_bounds: Box
    arm_bounds: Box


def descriptions() -> Path:
    """Returns the folder of OGBench's model files, found without importing the package.

    Raises:
        UserError: if it cannot be found.
    """
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


def compose(folder: Path, contents: Contents) -> mujoco.MjSpec:
    """Composes arena, arm, gripper and objects as one specification, in OGBench's element order.

    Raises:
        UserError: if the files in `folder` are not those of ogbench 1.2.
    """
    arena = mujoco.MjSpec.from_string(_arena_xml(folder, contents))
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
    mount = flange.parent.add_body(name=GRIPPER, pos=flange.pos, quat=flange.quat)
    mount.add_frame().attach_body(gripper.body("base_mount"), GRIPPER, "")
    arena.body(ARM).add_frame().attach_body(arm.body("base"), ARM, "")
    _decorate(arena, contents)
    return arena


def _arena_xml(folder: Path, contents: Contents) -> str:
    """The arena file with an empty body for the arm, and all objects."""
    arena = _read(folder, "floor_wall.xml")
    ET.SubElement(_part(arena, "worldbody"), "body", name=ARM)
    if contents.furniture:
        for name in ("cube", "buttons", "drawer", "window"):
            _merge(arena, _read(folder, f"{name}.xml"))
    elif contents.cubes:
        _merge(arena, _read(folder, "cube_outer.xml"))
        _merge_copies(arena, _read(folder, "cube_inner.xml"), _cube_row(contents.cubes))
    if any(contents.grid):
        _merge(arena, _read(folder, "button_outer.xml"))
        _merge_copies(arena, _read(folder, "button_inner.xml"), _button_grid(*contents.grid))
    for file in arena.findall("./asset/*[@file]"):
        file.set("file", str(folder / file.get("file", "")))
    return ET.tostring(arena, encoding="unicode")


def _read(folder: Path, name: str) -> ET.Element:
    try:
        return ET.parse(folder / name).getroot()
    except (OSError, ET.ParseError) as error:
        raise UserError(
            f"the model files in {folder} are not those of ogbench 1.2 ({name}: {error}); reinstall ogbench"
        ) from error


def _part(root: ET.Element, tag: str) -> ET.Element:
    """Returns the section `tag` of a model, created if it is missing."""
    part = root.find(tag)
    return ET.SubElement(root, tag) if part is None else part


def _merge(arena: ET.Element, other: ET.Element) -> None:
    """Appends the sections of `other` to those of the arena."""
    for tag in _MERGED:
        for section in other.findall(tag):
            part = _part(arena, tag)
            part.attrib.update(section.attrib)
            part.extend(section)


def _merge_copies(
    arena: ET.Element, template: ET.Element, places: Iterable[tuple[float | None, float]]
) -> None:
    """Appends one copy of the template's bodies for each place, with `_0` in names counted up.

    Places are xy in metres; the template's x is kept where x is None.
    """
    world = _part(arena, "worldbody")
    for i, (x, y) in enumerate(places):
        for body in _part(template, "worldbody"):
            clone = copy.deepcopy(body)
            old_x, _, z = clone.get("pos", "0 0 0").split()
            clone.set("pos", f"{old_x if x is None else repr(x)} {y!r} {z}")
            for element in clone.iter():
                stem, _, index = element.get("name", "").rpartition("_")
                if index == "0":
                    element.set("name", f"{stem}_{i}")
            world.append(clone)


def _cube_row(cubes: int) -> list[tuple[float | None, float]]:
    return [(None, -_CUBE_SPACING / 2 * (cubes - 1) + _CUBE_SPACING * i) for i in range(cubes)]


def _button_grid(rows: int, columns: int) -> list[tuple[float | None, float]]:
    half = _BUTTON_SPACING / 2
    xs = [_CENTER_X - half * (rows - 1) + 2 * half * i for i in range(rows)]
    ys = [0.0 - half * (columns - 1) + 2 * half * j for j in range(columns)]
    return [(x, y) for x in xs for y in ys]


def _decorate(arena: mujoco.MjSpec, contents: Contents) -> None:
    """Adds cameras, view and the two boxes that show sampling regions; none of them affects the physics."""
    arena.stat.center, arena.stat.extent, arena.stat.meansize = (0.3, 0.0, 0.15), 0.7, 0.04
    view = arena.visual
    view.global_.elevation, view.global_.azimuth = -20, 180
    view.map.znear, view.map.zfar = 0.1, 10.0
    flat = [(*corner, 0.02) for corner in contents.object_bounds]
    for name, (low, high), rgba in (
        ("object_bounds", flat, (0.6, 0.3, 0.3, 0.2)),
        ("arm_bounds", contents.arm_bounds, (0.3, 0.6, 0.3, 0.2)),
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
    for name, (pos, tilt) in _CAMERAS[contents.furniture or any(contents.grid)].items():
        camera = arena.worldbody.add_camera(name=name, pos=pos)
        camera.alt.type = mujoco.mjtOrientation.mjORIENTATION_XYAXES
        camera.alt.xyaxes = (0.0, 1.0, 0.0, *tilt)
