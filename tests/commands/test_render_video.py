"""Films of a run: what is recorded, what the pictures show, and the command."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from envs_mjx.action_noise import with_action_noise
from envs_mjx.manipulation.observation import Objects
from envs_mjx.manipulation.scenes import Scene, build_scene
from envs_mjx.registry import make
from experiments import render_video
from experiments.launch.saved_run import SavedRun, open_run
from experiments.ogbench_eval.worker import Snapshot, Start, StepResult
from experiments.render_video import main, pick_frames
from experiments.video import encode, mujoco_render, outlines, record, vector_drawing
from experiments.video.record import EpisodeRecording, film_ours, reached, record_in_ogbench
from mac.errors import UserError
from mac.run.evaluate import evaluate, evaluation_keys
from tests.helpers.command_line import content

ENV = "cube-single-play-singletask-task2-v0"


def still(family: str, steps: int = 2, buttons: int = 0, seeds: int = 1) -> tuple[Scene, EpisodeRecording]:
    """A scene at its model's own pose, the arm out of sight; its first `buttons` buttons are on."""
    scene = build_scene(family)
    qpos = scene.model.qpos0.copy()
    qpos[scene.arm_qpos] = (0, -np.pi / 2, 0, 0, 0, 0)  # upright
    on = np.arange(scene.buttons) < buttons
    target = Objects(
        np.tile([[[0.5, 0.1, 0.02]]], (seeds, scene.cubes, 1)),
        np.zeros((seeds, scene.buttons), bool),
        np.zeros((seeds, scene.slides)),
    )
    t = np.tile(np.arange(steps)[:, None], (1, seeds))
    done = t == steps - 1
    shape = (steps, seeds, 1)
    return scene, EpisodeRecording(np.tile(qpos, shape), np.tile(on, shape), t, done, done, target)


def count(picture: np.ndarray, color: str) -> int:
    """Pixels of just this colour, up to rounding."""
    return int(np.sum(np.all(np.abs(picture - 255 * np.asarray(to_rgb(color))) <= 2, axis=-1)))


# What is recorded.


@pytest.fixture(scope="module")
def saved(finished: Path) -> SavedRun:
    return open_run(finished)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_film_shows_the_first_episode_of_the_evaluation(saved: SavedRun, noise: float):
    env: Any = make(ENV, "c")
    got = film_ours(saved, env, 2, draw=3, noise=noise)
    keys = evaluation_keys(jnp.asarray(saved.numbers), saved.step, 3)
    noisy = with_action_noise(env, noise)
    want = evaluate(saved.policies, noisy, 1, keys, batch=0, tasks=(2,))  # as the command line calls it
    np.testing.assert_array_equal(got.t[-1], want.length[:, 0, 0])
    np.testing.assert_array_equal(got.success[-1], want.success[:, 0, 0])
    steps = len(got.t)
    assert got.qpos.shape == (steps, 2, 21) and got.buttons.shape == (steps, 2, 0)
    assert got.done[-1].all() and not got.done[:-1].all(axis=1).any() and not got.t[0].any()
    np.testing.assert_allclose(got.target.cubes, [[[0.5, 0.0, 0.02]]] * 2, rtol=1e-6)


class Short:
    """Replaces `EnvPool`: seed 0's episode ends after 3 steps with success, seed 1's after 12 without."""

    def __init__(self, name: str, count: int, *, film: bool):
        assert film
        self.t = [0] * count

    def __enter__(self) -> "Short":
        return self

    def __exit__(self, *_: object) -> None: ...

    def execute(self, commands: list[tuple[int, Any]]) -> list[StepResult]:
        return [self.one(slot, command) for slot, command in commands]

    def one(self, slot: int, command: Any) -> StepResult:
        target = (np.full((1, 3), float(slot)), np.zeros(0, bool), np.zeros(0))
        first = isinstance(command, Start)
        end = min(self.t[slot] + (0 if first else len(command)), 3 if slot == 0 else 12)
        times = [0] if first else range(self.t[slot] + 1, end + 1)
        shots = [Snapshot(np.full(21, float(10 * slot + t)), np.zeros(0, bool), target) for t in times]
        self.t[slot] = end
        done = end == (3 if slot == 0 else 12)
        return StepResult(np.zeros(28, np.float32), [0.0] * len(shots), done and slot == 0, done, shots)


def test_film_of_the_original_freezes_ended_scenes(saved: SavedRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record, "EnvPool", Short)
    got = record_in_ogbench(saved, ENV, 2, 0)
    np.testing.assert_array_equal(got.t[:, 0], [0, 1, 2] + [3] * 10)
    np.testing.assert_array_equal(got.t[:, 1], np.arange(13))
    np.testing.assert_array_equal(got.qpos[:, :, 0], np.add(got.t, [0, 10]))
    np.testing.assert_array_equal(got.success[:, 0], [False] * 3 + [True] * 10)
    assert not got.success[:, 1].any() and got.done[-1].all() and not got.done[11, 1]
    np.testing.assert_array_equal(got.target.cubes[:, 0, 0], [0.0, 1.0])


def test_subgoals_are_counted_as_the_task_counts_them():
    scene = build_scene("scene")
    qpos = scene.model.qpos0.copy()
    qpos[scene.cube_qpos[0] : scene.cube_qpos[0] + 3] = (0.4, 0.1, 0.02)
    qpos[scene.slide_qpos] = (-0.1, 0.15)
    buttons = np.array([True, False])
    target = Objects(np.array([[0.4, 0.1, 0.055]]), np.array([True, True]), np.array([-0.16, 0.18]))
    np.testing.assert_array_equal(reached(scene, qpos, buttons, target), [True, True, False, False, True])


# What the pictures show.


def test_outline_is_the_convex_hull():
    inside = np.random.default_rng(0).uniform(0.1, 0.9, (20, 2))
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    got = outlines.convex_hull(np.concatenate([inside, corners, [[0.5, 0.0]]]))
    np.testing.assert_array_equal(got, corners)


def test_drawn_cube_is_where_the_scene_has_it():
    """Its centre, moved by 0.1 m along x and y, moves by the same share of the picture."""
    scene, made = still("cube-single", steps=2)
    at = scene.cube_qpos[0]
    made.qpos[0, 0, at : at + 3], made.qpos[1, 0, at : at + 3] = (0.3, 0.1, 0.02), (0.4, 0.0, 0.12)
    pictures = list(vector_drawing.draw(scene, made, [7], "title", [0, 1]))
    centres = []
    top, side = outlines.views(scene)
    for picture in pictures:
        near = np.all(np.abs(picture - 255 * np.asarray(to_rgb(vector_drawing.CUBES[0]))) <= 14, axis=-1)
        upper = np.argwhere(near[:330])  # rows, columns
        centres.append(upper.mean(axis=0))
    moved = (centres[1] - centres[0]) * (top.right[1] - top.right[0]) / 270  # 2.7 inches of 100 pixels
    np.testing.assert_allclose(moved, [0.1, 0.1], atol=0.005)
    assert side.axes == (0, 2) and pictures[0].dtype == np.uint8


def test_drawn_buttons_have_the_colours_of_their_states():
    areas = []
    for on in (0, 4, 9):
        scene, made = still("puzzle-3x3", steps=1, buttons=on)
        (picture,) = vector_drawing.draw(scene, made, [0], "title", [0])
        areas.append(count(picture, vector_drawing.BUTTONS[1]))
    assert areas[0] == 0 and areas[1] > 100
    assert areas[1] / areas[2] == pytest.approx(4 / 9, rel=0.35)


@pytest.mark.parametrize(("seeds", "rows"), [(1, 1), (4, 1), (5, 2)])
def test_every_seed_has_its_place(seeds: int, rows: int):
    scene, made = still("cube-single", steps=1, seeds=seeds)
    (one,) = vector_drawing.draw(scene, made, list(range(seeds)), "title", [0])
    assert one.shape[0] > 450 * rows and one.shape[1] > 270 * min(seeds, 4)
    cube = count(one, "#333333")  # outlines: as many as seeds
    assert cube > 0


def test_caption_tells_time_goals_and_outcome():
    scene, made = still("scene", steps=41)
    assert vector_drawing.caption(scene, made, 20, 0).split() == ["1.00", "s", "4/5", "goals"]
    assert vector_drawing.caption(scene, made, 40, 0).split()[-1] == "success"
    failed = made._replace(success=np.zeros_like(made.success))
    assert vector_drawing.caption(scene, failed, 40, 0).split()[-1] == "failed"


def test_renderer_shows_the_cube_or_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    scene, made = still("cube-single", steps=1)
    for name in ("MUJOCO_EGL_DEVICE_ID", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    mujoco_render.try_drawing.cache_clear()
    if mujoco_render.try_drawing().platform:
        (picture,) = mujoco_render.render(scene, made, [0], "title", [0])
        red = (picture[..., 0] > 120) & (picture[..., 1] < 60)
        assert picture.shape == (34 + 326 + 22, 640, 3) and 50 < red.sum() < 5000
    monkeypatch.setattr(mujoco_render, "try_drawing", lambda: mujoco_render.Drawing(None, "egl: no display"))
    with pytest.raises(UserError, match=r"egl: no display.*libosmesa6.*--renderer drawing"):
        next(mujoco_render.render(scene, made, [0], "title", [0]))


def test_pictures_are_spread_over_the_film_and_end_with_its_end():
    assert pick_frames(5, None) == [0, 1, 2, 3, 4]
    assert pick_frames(201, None) == [*range(0, 200, 2), 200]
    assert len(pick_frames(1501, None)) <= 201
    assert pick_frames(10, 4) == [0, 4, 8, 9]
    assert pick_frames(1, 3) == [0]


# The command.


@pytest.mark.slow
def test_command_writes_a_film_and_nothing_else(copied: Path, capsys: pytest.CaptureFixture[str]):
    before = content(copied)
    flags = ["--engine", "c", "--renderer", "drawing", "--every", "80"]
    assert main([str(copied), "--task", "3", *flags]) == 0
    said = capsys.readouterr().out
    out = copied / "view-task3-c.gif"
    for part in (
        "task 3 on engine c: 2 seeds, after 10 updates",
        "trained on task 2",
        "of 2 seeds",
        str(out),
    ):
        assert part in said
    with Image.open(out) as gif:
        assert getattr(gif, "n_frames", 1) == len(pick_frames(201, 80))
    after = content(copied)
    assert after.pop(out.name) and after == before


@pytest.mark.parametrize(
    ("flags", "noise", "name"),
    [
        ((), 0.1, "view-task2-c.gif"),
        (("--noise", "0"), 0.0, "view-task2-c-noise0.gif"),
        (("--noise", "0.2"), 0.2, "view-task2-c-noise0.2.gif"),
    ],
)
def test_film_has_the_noise_of_the_runs_evaluations(
    copied: Path,
    flags: tuple[str, ...],
    noise: float,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    config = json.loads((copied / "config.json").read_text())
    config["eval"]["noise"] = 0.1
    (copied / "config.json").write_text(json.dumps(config))
    played = []

    def film(*args: Any) -> EpisodeRecording:
        played.append(args[-1])
        return still("cube-single", seeds=2)[1]

    monkeypatch.setattr(render_video, "film_ours", film)
    assert main([str(copied), "--engine", "c", "--renderer", "drawing", *flags]) == 0
    said = capsys.readouterr().out
    assert played == [noise] and (copied / name).exists()
    assert (f"10 updates, noise {noise:g} on executed actions\n" in said) == (noise > 0)
    assert main([str(copied), "--engine", "ogbench"]) == 2
    assert "--noise=0.1: ogbench plays without noise" in capsys.readouterr().err


def test_a_renderer_that_cannot_draw_is_found_out_before_playing(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The system's own reason is in the line, and the variable that is wrong."""
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    mujoco_render.try_drawing.cache_clear()
    capsys.readouterr()
    try:
        assert main([str(finished), "--renderer", "mujoco"]) == 2
    finally:
        mujoco_render.try_drawing.cache_clear()
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("error: MuJoCo's renderer cannot draw on this machine (egl: ")
    assert "playing" not in said.out
    assert "MUJOCO_EGL_DEVICE_ID (it is '99')" in line and "--renderer drawing" in line


BAD = {
    ("--task", "9"): ("--task 9", "tasks 1 to 5"),
    ("--out", "film.avi"): ("film.avi", ".gif or .mp4"),
    ("--out", "film.mp4"): ("film.mp4", "video"),
    ("--every", "0"): ("--every=0", "at least 1"),
    ("--noise", "-1"): ("--noise=-1", "at least 0"),
    ("--engine", "bullet"): ("'bullet'", "'ogbench'"),
    ("--step", "7"): ("--step=7", "updates 10"),
    ("--renderer", "paint"): ("'paint'", "'drawing'"),
    ("--frames", "3"): ("--frames", "--help"),
}


@pytest.mark.parametrize("flags", BAD, ids=" ".join)
def test_bad_flag_is_one_line_with_the_remedy(
    finished: Path,
    flags: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(encode, "ffmpeg", lambda: None)
    capsys.readouterr()
    assert main([str(finished), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(part in line for part in BAD[flags])


def test_scene_of_the_package_has_what_is_drawn():
    """Bodies that the drawing names exist in every family that has them."""
    for family in ("cube-octuple", "scene", "puzzle-4x6"):
        model = build_scene(family).model
        for name in vector_drawing.LINKS:
            assert model.body("ur5e/" + name).id > 0
    model = build_scene("scene").model
    assert all(outlines.pieces(model, body) for body in ("drawer_base", "drawer_link", "window", "windowb_b"))
    assert mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, mujoco_render.CAMERA) >= 0
