"""The collision model of engine `mjx`: fewer geoms and pairs, the same physics in MuJoCo C."""

import mujoco
import numpy as np
import pytest
from mujoco import mjx
from mujoco.mjx._src.collision_driver import geom_pairs

from envs_mjx.collisions import collision_model, contact_cap, put_collision_model
from envs_mjx.scenes import build_scene
from mac.errors import UserError


@pytest.mark.parametrize(
    ("family", "lite", "finger"),
    # cubes n: n floor + 4n pad + 4n wall + n(n-1)/2 cube + 4 pad-pad + 4 pad-floor; finger: + 8n links
    [("cube-single", 17, 25), ("cube-double", 27, 43), ("cube-octuple", 108, 172)],
)
def test_only_the_listed_pairs_of_geoms_collide(family: str, lite: int, finger: int):
    model = build_scene(family).model
    assert len(list(geom_pairs(collision_model(model, "lite")))) == lite
    assert len(list(geom_pairs(collision_model(model, "finger")))) == finger


def test_the_compiled_scene_is_not_modified():
    model = build_scene("cube-single").model
    before = model.geom_contype.copy(), model.geom_type.copy(), model.body_contype.copy()
    collision_model(model, "finger")
    for old, new in zip(before, (model.geom_contype, model.geom_type, model.body_contype), strict=True):
        np.testing.assert_array_equal(old, new)


def test_bodies_carry_the_bits_of_their_geoms():
    model = collision_model(build_scene("cube-double").model)
    for body in range(model.nbody):
        geoms = model.geom_bodyid == body
        assert model.body_contype[body] == np.bitwise_or.reduce(model.geom_contype[geoms], initial=0)
        assert model.body_conaffinity[body] == np.bitwise_or.reduce(model.geom_conaffinity[geoms], initial=0)


def test_finger_boxes_contain_their_meshes():
    model = build_scene("cube-single").model
    boxed = collision_model(model, "finger")
    changed = np.flatnonzero(boxed.geom_type != model.geom_type)
    assert len(changed) == 8
    for g in changed:
        mesh = model.geom_dataid[g]
        start, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        rotation = np.empty(9)
        mujoco.mju_quat2Mat(rotation, model.geom_quat[g])
        rotation = rotation.reshape(3, 3)
        in_body = model.mesh_vert[start : start + count] @ rotation.T + model.geom_pos[g]
        in_box = (in_body - boxed.geom_pos[g]) @ rotation
        assert np.all(np.abs(in_box) <= boxed.geom_size[g] + 1e-6)
        assert np.abs(in_box).max(0) == pytest.approx(boxed.geom_size[g], abs=1e-5)


def test_contact_slots_are_limited_to_the_cap_whatever_other_numerics_the_model_has():
    spec = mujoco.MjSpec.from_string(
        "<mujoco><custom><numeric name='first' data='7 8 9'/></custom><worldbody>"
        "<geom name='floor' type='plane' size='1 1 1'/>"
        + "".join(
            f"<body name='object_{i}' pos='{i} 0 1'><freejoint/><geom type='box' size='.1 .1 .1'/></body>"
            for i in range(3)
        )
        + "</worldbody></mujoco>"
    )
    model = collision_model(spec.compile())
    assert mjx.make_data(put_collision_model(model, 5))._impl.ncon == 5
    assert mjx.make_data(put_collision_model(model, 100))._impl.ncon == 4 * (3 + 3)  # cubes, pairs


def test_visual_geoms_are_dropped_and_the_others_keep_their_bodies():
    scene = build_scene("cube-double")
    model = collision_model(scene.model)
    put = put_collision_model(model, 32)
    kept = np.flatnonzero(model.geom_contype | model.geom_conaffinity)
    assert put.ngeom == len(kept) == 11  # floor, 4 walls, 4 pads, 2 cubes
    np.testing.assert_array_equal(put.geom_bodyid, model.geom_bodyid[kept])
    np.testing.assert_allclose(put.geom_size, model.geom_size[kept], rtol=1e-6)
    for body in range(model.nbody):
        own = np.flatnonzero(put.geom_bodyid == body)
        assert put.body_geomnum[body] == len(own)
        assert not len(own) or put.body_geomadr[body] == own[0]


def test_contact_cap_covers_the_next_listed_number_of_cubes():
    assert [contact_cap(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [24, 32, 40, 44, 90, 90, 108]


def test_unknown_levels_and_models_without_cubes_are_refused():
    with pytest.raises(UserError, match="lite, finger"):
        collision_model(build_scene("cube-single").model, "full")
    with pytest.raises(UserError, match="object_"):
        collision_model(mujoco.MjModel.from_xml_string("<mujoco/>"))
    with pytest.raises(UserError, match="max_contacts"):
        put_collision_model(collision_model(build_scene("cube-single").model), 0)
