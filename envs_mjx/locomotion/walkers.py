"""Compiled models of the walkers: OGBench's point, ant and humanoid in a maze, and three gym walkers.

Only the XML files of the installed `ogbench` and `gymnasium` distributions are read; none of their Python
is imported. Compiled models agree array by array with those that the packages compile.
"""

import dataclasses
import functools
import importlib.util
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Float

from envs_mjx.locomotion.mazes import SIZES, UNIT, WALL_HEIGHT, Maze, build_maze
from mac.errors import UserError

TORSO = 1
"""Body of a walker's torso, in every model."""
_HEAD, _HANDS_AND_FEET = 2, (16, 10, 13, 7)  # of the humanoid: left hand, left foot, right hand, right foot


class _Body(NamedTuple):
    """A kind of walker: the package and file of its model, physics steps per control step, and the jump."""

    package: str
    file: str
    substeps: int
    jump: float = 0.0


_FOLDERS = {"ogbench": "locomaze/assets", "gymnasium": "envs/mujoco/assets"}
_PINS = {"ogbench": "'ogbench>=1.2,<1.3'", "gymnasium": "'gymnasium>=1.1'"}
_BODIES = {
    "point": _Body("ogbench", "point.xml", 5, jump=0.2),
    "ant": _Body("ogbench", "ant.xml", 5),
    "humanoid": _Body("ogbench", "humanoid.xml", 5),
    "hopper": _Body("gymnasium", "hopper.xml", 4),
    "walker2d": _Body("gymnasium", "walker2d.xml", 4),
    "walker2d-v5": _Body("gymnasium", "walker2d_v5.xml", 4),
    "halfcheetah": _Body("gymnasium", "half_cheetah.xml", 5),
}
GYM = ("hopper", "walker2d", "walker2d-v5", "halfcheetah")
"""Walkers on a plane. `walker2d-v5` differs from `walker2d` in the friction of its feet."""
MAZES = tuple(
    f"{body}maze-{size}"
    for body in ("point", "ant", "humanoid")
    for size in SIZES
    if (body, size) != ("humanoid", "teleport")
)
"""Walkers in mazes for which datasets exist."""
FAMILIES = (*MAZES, *GYM)


@dataclasses.dataclass(frozen=True, eq=False)
class Walker:
    """A compiled walker; compared and hashed by identity.

    Attributes:
        family: name such as `antmaze-medium` or `hopper`.
        body: `point`, `ant`, `humanoid`, or a name in `GYM`.
        model: the compiled model with all walls in it; treat it as read-only.
        maze: the maze, None on a plane.
        substeps: physics steps per control step.
        jump: displacement per action, m; 0 for walkers driven by forces. Before the physics of a control
            step, `jump * ctrl` is added to the first positions and all velocities are set to 0; no force is
            applied.
    """

    family: str
    body: str
    model: mujoco.MjModel
    maze: Maze | None
    substeps: int
    jump: float

    @property
    def control_dt(self) -> float:
        """Seconds per control step."""
        return self.substeps * float(self.model.opt.timestep)

    @property
    def seen_size(self) -> int:
        """Width of `WalkerPhysics.seen`."""
        if self.body == "humanoid":
            return 1 + 3 * len(_HANDS_AND_FEET) + 3 + 3
        return 1 if self.body in GYM else 0

    @property
    def fresh(self) -> bool:
        """Returns whether `seen` reads kinematics, which then must be those of the state *after* the step."""
        return self.body == "humanoid"

    def seen(
        self,
        moved: Float[Any, ""],
        pos: Float[Any, "bodies 3"],
        mat: Float[Any, "bodies 3 3"],
        velocity: Float[Any, " 3"],
    ) -> Float[Any, " R"]:
        """Returns `WalkerPhysics.seen` of a state; NumPy arrays give a NumPy array.

        Humanoid: height of the head (m), hands and feet in the torso's frame (left hand, left foot, right
            hand, right foot; m), vertical components of the torso's axes, velocity (m/s) of the centre of
            mass. Gym: mean velocity along x (m/s) over the control step. Others: nothing.

        Args:
            moved: increase of `qpos[0]` in the control step, m; 0 after a load.
            pos, mat: `xpos` and `xmat` of all bodies (read of the humanoid).
            velocity: `subtree_linvel` of the torso (read of the humanoid).
        """
        xp = np if isinstance(pos, np.ndarray) else jnp
        if self.body in GYM:
            return xp.reshape(moved, 1) / self.control_dt
        if self.body != "humanoid":
            return xp.zeros(0)
        limbs = (pos[np.asarray(_HANDS_AND_FEET)] - pos[TORSO][None]) @ mat[TORSO]
        return xp.concatenate([pos[_HEAD, 2:], limbs.reshape(-1), mat[TORSO, 2], velocity])


@functools.cache
def build_walker(family: str) -> Walker:
    """Returns the walker of `family`, a name in `FAMILIES`; compiled once per process.

    Raises:
        UserError: for an unknown family, or if the package with its model cannot be found.
    """
    body, maze = _parts(family)
    facts = _BODIES[body]
    return Walker(family, body, compiled(walker_mjcf(family)), maze, facts.substeps, facts.jump)


def walker_mjcf(family: str) -> mujoco.MjSpec:
    """Returns the model of `family` before compilation; a new one at each call, so it may be changed.

    Raises:
        UserError: as `build_walker`.
    """
    body, maze = _parts(family)
    facts = _BODIES[body]
    spec = mujoco.MjSpec.from_file(str(_assets(facts.package) / facts.file))
    if maze is not None:
        _build_walls(spec, maze)
    return spec


def compiled(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """Compiles `spec`, without the warning that half_cheetah.xml uses a deprecated attribute
    (`settotalmass`)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*settotalmass.*")
        return spec.compile()


def _parts(family: str) -> tuple[str, Maze | None]:
    if family not in FAMILIES:
        raise UserError(f"unknown walker {family!r}; known: {', '.join(FAMILIES)}")
    if family in GYM:
        return family, None
    body, size = family.split("maze-")
    return body, build_maze(size)


def _assets(package: str) -> Path:
    """Folder of a package's model files, found without importing the package."""
    found = importlib.util.find_spec(package)
    places = list(found.submodule_search_locations or ()) if found else []
    for place in places:
        folder = Path(place) / _FOLDERS[package]
        if folder.is_dir():
            return folder
    where = f"{places[0]} holds no {_FOLDERS[package]}" if places else "it is not installed"
    raise UserError(
        f"models of walkers come from the {package} package, but {where}; pip install {_PINS[package]}"
    )


def _build_walls(spec: mujoco.MjSpec, maze: Maze) -> None:
    """Adds the walls, the markers of teleporters and of the goal, in OGBench's order, and fits the floor."""
    half, world = UNIT / 2, spec.worldbody
    for cell in np.argwhere(maze.walls):
        world.add_geom(
            name="block_{}_{}".format(*cell),
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=(*maze.xy(cell), WALL_HEIGHT / 2),
            size=(half, half, WALL_HEIGHT / 2),
            contype=1,
            conaffinity=1,
            material="wall",
        )
    rows, columns = maze.walls.shape
    floor = spec.geom("floor")
    floor.pos, floor.size = (2 * (columns - 3), 2 * (rows - 3), 0), (2 * columns, 2 * rows, 0.2)
    marks = [(f"teleport_in_{i}", xy, 1.0) for i, xy in enumerate(maze.entrances)]
    marks += [(f"teleport_out_{i}", xy, 1.0) for i, xy in enumerate(maze.exits)]
    for name, xy, radius in [*marks, ("target", np.zeros(2), 0.5)]:
        world.add_geom(
            name=name,
            type=mujoco.mjtGeom.mjGEOM_CYLINDER,
            pos=(*xy, 0.05),
            size=(radius, 0.05, 0),
            contype=0,
            conaffinity=0,
            material=name.rstrip("_0123456789"),
        )
