"""Tests that scenes and task tables are those of the installed ogbench."""

import importlib.util
import types

import gymnasium
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from envs_mjx.manipulation.observation import Objects, handle_pos
from envs_mjx.manipulation.scenes import FAMILIES, build_scene
from envs_mjx.manipulation.tasks import MAX_STEPS, default_task, task_table
from mac.errors import UserError
from tests.helpers.ogbench_runs import official
from tests.helpers.pytest_params import slow_except

# Addresses into the names and asset paths, which differ because dm_control invents names for unnamed
# elements and renames files; sizes that count those characters; and colours, which ogbench paints
# at every reset.
_NAMES = {
    "names_map",
    "nnames",
    "nnames_map",
    "npaths",
    "nbuffer",
    "mesh_pathadr",
    "tex_pathadr",
    "signature",
}
_COLOURS = {"geom_rgba"}
_MARKS = {"site_pos"}  # the marks of the goals of drawer and window, which a reset moves


@pytest.fixture(scope="module", params=slow_except(["scene", "puzzle-4x5"], FAMILIES))
def pair(request):
    env = official(f"{request.param}-v0")
    env.reset()
    if hasattr(env, "_target_drawer_pos"):
        env._cur_button_states[:] = 1
        env._apply_button_states()  # frees the slides, as they are in our model
    return build_scene(request.param), env


def test_compiled_models_are_equal_array_by_array(pair):
    scene, env = pair
    ours, theirs = scene.model, env._model
    compared = 0
    for where in ("", "opt", "stat"):
        a, b = (getattr(m, where) if where else m for m in (ours, theirs))
        for field in dir(b):
            value = getattr(b, field)
            if field.startswith("_") or not isinstance(value, np.ndarray | int | float):
                continue
            if field in _NAMES | _COLOURS or field.startswith("name_"):
                continue
            mine = np.asarray(getattr(a, field))
            if field in _MARKS:
                keep = [s for s in range(b.nsite) if "center_target" not in b.site(s).name]
                mine, value = mine[keep], value[keep]
            np.testing.assert_array_equal(mine, np.asarray(value), err_msg=field)
            compared += 1
    assert compared > 300


def test_named_elements_are_equal(pair):
    scene, env = pair
    for name in ("BODY", "JOINT", "GEOM", "SITE", "ACTUATOR", "TENDON"):
        kind, ids = getattr(mujoco.mjtObj, f"mjOBJ_{name}"), range(1000)
        ours = [mujoco.mj_id2name(scene.model, kind, i) for i in ids]
        theirs = [mujoco.mj_id2name(env._model, kind, i) for i in ids]
        assert ours == [None if name and "unnamed" in name else name for name in theirs]


def test_ids_point_at_what_ogbench_uses(pair):
    scene, env = pair
    np.testing.assert_array_equal(scene.arm_qpos, env._arm_joint_ids)
    np.testing.assert_array_equal(scene.arm_ctrl, env._arm_actuator_ids)
    assert [scene.gripper_ctrl] == list(env._gripper_actuator_ids)
    assert scene.driver_qpos == env._gripper_opening_joint_id
    assert list(scene.sites) == [env._pinch_site_id, env._attach_site_id]
    assert scene.pad_body == env._model.body("ur5e/robotiq/right_pad").id
    assert scene.substeps == env._n_steps
    for i, (qpos, dof) in enumerate(zip(scene.cube_qpos, scene.cube_dof, strict=True)):
        assert qpos == env._model.joint(f"object_joint_{i}").qposadr[0]
        assert dof == env._model.joint(f"object_joint_{i}").dofadr[0]

    for i in range(scene.buttons):
        joint = env._model.joint(f"buttonbox_joint_{i}")
        assert (scene.button_qpos[i], scene.button_dof[i]) == (joint.qposadr[0], joint.dofadr[0])
    for i, name in enumerate(("drawer_slide", "window_slide")[: scene.slides]):
        joint = env._model.joint(name)
        assert (scene.slide_qpos[i], scene.slide_dof[i]) == (joint.qposadr[0], joint.dofadr[0])
    bounds = env._arm_sampling_bounds, env._object_sampling_bounds
    for ours, theirs in zip((scene.arm_bounds, scene.object_bounds), bounds, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_buttons_and_handles_are_where_ogbench_reads_them(pair):
    scene, env = pair
    data = mujoco.MjData(env._model)
    slides = np.asarray([-0.05, 0.12])[: scene.slides]
    data.qpos[scene.slide_qpos] = slides
    mujoco.mj_forward(env._model, data)
    for i in range(scene.buttons):
        np.testing.assert_allclose(scene.button_top[i], data.site_xpos[env._button_site_ids[i]], atol=1e-12)
    ours = handle_pos(scene, jnp.asarray(slides, jnp.float32))
    for i, name in enumerate(("_drawer_site_id", "_window_site_id")[: scene.slides]):
        site = getattr(env, name)
        np.testing.assert_allclose(ours[i], data.site_xpos[site], atol=1e-7)
        mat = data.site_xmat[site].reshape(3, 3)
        np.testing.assert_allclose(scene.handle_yaw[i], np.arctan2(mat[1, 0], mat[0, 0]), atol=1e-12)


def test_tasks_and_limits_are_ogbenchs(pair):
    scene, env = pair
    for side, table in zip(("init", "goal"), task_table(scene.family), strict=True):
        for task, theirs in enumerate(env.task_infos):
            ours = Objects(*(x[task] for x in table))
            own = theirs[side] if scene.slides else {k.removeprefix(f"{side}_"): v for k, v in theirs.items()}
            cubes = own.get("block_xyzs", own.get("xyzs", np.zeros((0, 3))))
            np.testing.assert_allclose(ours.cubes, cubes, atol=1e-12)
            np.testing.assert_array_equal(ours.buttons, own.get("button_states", ()))
            slides = [own[k] for k in ("drawer_pos", "window_pos") if k in own]
            np.testing.assert_array_equal(ours.slides, slides)
    reward = gymnasium.make(f"{scene.family}-singletask-v0").unwrapped  # others set the task of shared ones
    reward.reset()
    assert reward._reward_task_id == default_task(scene.family)
    assert MAX_STEPS[scene.family] == gymnasium.spec(f"{scene.family}-v0").max_episode_steps


def test_a_scene_is_compiled_once():
    assert build_scene("cube-single") is build_scene("cube-single")


def test_an_unknown_family_is_a_mistake():
    with pytest.raises(UserError, match="cube-nonuple"):
        build_scene("cube-nonuple")


@pytest.mark.parametrize("places", [None, ["/nowhere/ogbench"]])
def test_missing_model_files_are_named(monkeypatch, places):
    found = places and types.SimpleNamespace(submodule_search_locations=places)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)
    with pytest.raises(UserError, match="ogbench"):
        build_scene.__wrapped__("cube-single")
