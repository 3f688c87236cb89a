"""Checkpoints that do not fit or are damaged are refused in one line that says what differs."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import Array

from mac.errors import UserError
from mac.run.io.checkpoint import CheckpointStore
from tests.helpers.small_states import State, assert_same_bits, make_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    config = {"hp": {"width": 5, "sizes": (3, 4)}, "steps": 100}
    with CheckpointStore(folder) as store:
        store.save(8, make_state(), {"config": config})
        store.save(9, make_state(), {"config": config})
    return folder


def expect(folder: Path, match: str, template: State | None = None, **kwargs: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        CheckpointStore(folder).restore(template or make_state(), **kwargs)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_other_widths_are_named(saved: Path):
    expect(
        saved,
        r"000000009: .* layers.0.weight is float32\[2, 3, 5\] there, float32\[2, 3, 6\] here",
        make_state(width=6),
    )


def test_other_seed_counts_are_named(saved: Path):
    expect(saved, r"float32\[2, 3, 5\] there, float32\[4, 3, 5\] here and \d+ more", make_state(seeds=4))


def test_missing_and_additional_arrays_are_named(saved: Path):
    state = make_state()
    expect(saved, r"extra.more is absent there, float32\[\] here", with_extra(state, more=jnp.array(0.0)))
    del state.extra["flag"]
    expect(saved, r"extra.flag is bool\[2\] there, absent here", state)


def with_extra(state: State, **more: Array) -> State:
    return State(state.layers, state.extra | more, state.count)


def test_configurations_are_compared_up_to_json(saved: Path):
    store = CheckpointStore(saved)
    same = {"hp": {"width": 5, "sizes": [3, 4]}, "steps": 100}
    assert store.restore(make_state(), config=same).step == 9
    longer = same | {"steps": 500}
    assert store.restore(make_state(), config=longer, may_differ=("steps",)).step == 9
    expect(saved, r"another configuration: steps \(100 there, 500 here\)", config=longer)
    other = {"hp": {"width": 5, "sizes": [3, 5], "new": None}, "steps": 100}
    expect(
        saved, r"hp.new \(absent there, None here\), hp.sizes \(\[3, 4\] there, \[3, 5\] here\)", config=other
    )


def test_absent_keys_stand_for_their_defaults(saved: Path):
    defaults = {"hp": {"width": 7, "rounds": 1, "elites": (0.5,)}}
    new = {"hp": {"width": 5, "sizes": (3, 4), "rounds": 1, "elites": (0.5,)}, "steps": 100}
    assert CheckpointStore(saved).restore(make_state(), config=new, defaults=defaults).step == 9
    expect(saved, r"configuration: hp.elites \(absent there, .*\), hp.rounds \(absent there, 1", config=new)
    other = new | {"hp": new["hp"] | {"rounds": 2}}
    expect(saved, r"configuration: hp.rounds \(absent there, 2 here\);", config=other, defaults=defaults)
    fewer = {"hp": {"width": 5}, "steps": 100}
    expect(saved, r"hp.sizes \(\[3, 4\] there, absent here\)", config=fewer, defaults=defaults)
    undone = new | {"hp": new["hp"] | {"width": 7}}  # the saved value counts, not the default
    expect(saved, r"hp.width \(5 there, 7 here\)", config=undone, defaults=defaults)


def test_absent_checkpoints_are_named(tmp_path: Path, saved: Path):
    expect(tmp_path / "none", "no checkpoint here")
    expect(saved, "no checkpoint of step 3 here", step=3)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def test_damaged_arrays_are_named_with_the_way_out(copy: Path):
    largest = max((p for p in (copy / "000000009" / "state").rglob("*") if p.is_file()), key=os.path.getsize)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.write_bytes(bytes(data))
    expect(copy, r"000000009: damaged checkpoint .* delete this folder to continue from step 8")
    assert_same_bits(CheckpointStore(copy).restore(make_state(), step=8).state, make_state())


def test_wrong_values_are_found_by_their_checksum(copy: Path):
    """Damage that Orbax reads without complaint, here a state folder of other values."""
    header = copy / "000000009" / "meta.json"
    content = json.loads(header.read_text())
    content["arrays"]["count"][2] ^= 1
    header.write_text(json.dumps(content))
    expect(copy, r"damaged checkpoint \(checksum of count\)")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"format": 1}', "[" * 100_000])
def test_damaged_description_is_named(copy: Path, content: str):
    (copy / "000000009" / "meta.json").write_text(content)
    expect(copy, r"000000009: damaged checkpoint \(.*\); delete this folder to continue from step 8$")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("format", "1", "format is a text"),
        ("step", 9.0, "step is a number"),
        ("meta", [], "meta is a list"),
        ("meta", {}, "config: null"),
        ("meta", {"config": [1]}, "config: a list"),
        ("arrays", None, "arrays is null"),
        ("arrays", {"count": 3.5}, "count is not described"),
        ("arrays", {"count": ["int32", 2.0, 1]}, "count is not described"),
        ("arrays", {"count": ["int32", [2.0], 1]}, "count is not described"),
        ("arrays", {"count": ["int32", [-2], 1]}, "count is not described"),
    ],
)
def test_damaged_fields_of_the_description_are_named(copy: Path, key: str, value: object, said: str):
    header = copy / "000000009" / "meta.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {key: value}))
    expect(copy, rf"000000009: damaged checkpoint \(.*{said}.*continue from step 8$", config={})


def test_a_checkpoint_under_another_name_is_named_as_it_is(copy: Path):
    (copy / "000000009").rename(copy / "000000210")
    expect(copy, r"000000210: damaged checkpoint \(it is the one of step 9\); delete this folder .* step 8$")


def test_a_checkpoint_deleted_while_read_is_not_called_damaged(copy: Path, monkeypatch: pytest.MonkeyPatch):
    store, steps = CheckpointStore(copy), CheckpointStore.steps
    later = iter([[8, 9], [9]])
    monkeypatch.setattr(CheckpointStore, "steps", lambda self: next(later, steps(self)))
    shutil.rmtree(copy / "000000008")
    with pytest.raises(UserError, match="000000008 was deleted while it was read; try again"):
        store.meta(8)


def test_missing_arrays_are_named(copy: Path):
    shutil.rmtree(copy / "000000009" / "state")
    expect(copy, "000000009: damaged checkpoint")


def test_other_format_versions_are_refused(copy: Path):
    header = copy / "000000009" / "meta.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"format": 99}))
    expect(copy, "checkpoint of format 99, this version reads 1")
