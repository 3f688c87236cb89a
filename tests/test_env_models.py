"""Scenes and task tables are those of the installed ogbench."""

import importlib.util
import types

import gymnasium
import mujoco
import numpy as np
import pytest

from envs_mjx.scenes import FAMILIES, build_scene
from envs_mjx.tasks import MAX_STEPS, cube_tasks
from mac.errors import UserError
from tests.ogbench_runs import official

CUBES = tuple(f for f in FAMILIES if f.startswith("cube"))
# Addresses into the names and asset paths, which differ because dm_control invents names for unnamed
# elements and renames files; sizes that count those characters; and colours, which ogbench paints
# at every reset.
_NAMES = {"names_map", "nnames", "nnames_map", "npaths", "nbuffer", "mesh_pathadr", "signature"}
_COLOURS = {"geom_rgba"}


@pytest.fixture(scope="module", params=CUBES)
def pair(request):
    env = official(f"{request.param}-v0")
    env.reset()
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
            np.testing.assert_array_equal(np.asarray(getattr(a, field)), np.asarray(value), err_msg=field)
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


def test_tasks_and_limits_are_ogbenchs(pair):
    scene, env = pair
    starts, goals = cube_tasks(scene.family)
    np.testing.assert_allclose(starts, [task["init_xyzs"] for task in env.task_infos], atol=1e-12)
    np.testing.assert_allclose(goals, [task["goal_xyzs"] for task in env.task_infos], atol=1e-12)
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
