"""Datasets of several styles: which episode is of which, and that each is as if it were alone."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs_mjx.datagen import generate as module
from envs_mjx.datagen.dataset_spec import DatasetSpec
from envs_mjx.datagen.generate import generate
from envs_mjx.datagen.style_mix import StyleMix, possible_styles, read_mix
from mac.data.provenance import generated
from mac.errors import UserError

NAME = "pointmaze-medium-stitch-v0"
ROWS = 201


def read(folder: Path, part: str = "") -> dict[str, np.ndarray]:
    with np.load(folder / f"{NAME}{part}.npz") as file:
        return {name: file[name].reshape(-1, ROWS, *file[name].shape[1:]) for name in file.files}


# Which episode is of which style.


def test_counts_follow_the_shares_up_to_every_episode():
    mix = StyleMix(("play", "noisy", "random"), (0.5, 0.3, 0.2))
    places = [mix.place_of(i) for i in range(1000)]
    assert Counter(places) == {0: 500, 1: 300, 2: 200}
    for count in range(1, 1000):
        for place, share in enumerate(mix.shares):
            assert abs(places[:count].count(place) - share * count) < 1.5


def test_styles_are_those_with_episodes_of_equal_length():
    assert possible_styles("cube-single-play-v0") == ("play", "noisy", "random")
    assert possible_styles(NAME) == ("stitch", "random")
    assert possible_styles("antmaze-medium-explore-v0") == ("explore", "random")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("play=0.5,wild=0.5", "cannot have style 'wild'; choose play, noisy, random"),
        ("play=0.5,noisy=0.3", "sum to 1; these sum to 0.8"),
        ("play=1.5,noisy=-0.5", "must be positive"),
        ("play=0.5,play=0.5", "names play twice"),
        ("play=half,noisy=0.5", "write STYLE=SHARE"),
        ("play", "write STYLE=SHARE"),
        ("", "cannot have style ''"),
        ("play=nan,noisy=0.5", "must be positive"),
    ],
)
def test_bad_shares_are_one_line(text: str, said: str):
    with pytest.raises(UserError) as caught:
        read_mix(text, "cube-single-play-v0")
    assert str(caught.value).startswith(f"--mix={text}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


# The data.

SPEC = DatasetSpec(NAME, episodes=4, per_shard=4, seed=3, lanes=4, mix="stitch=0.5,random=0.5")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    generate(SPEC, folder)
    return folder


def test_each_episode_is_that_of_its_style_alone(mixed: Path, tmp_path: Path):
    generate(SPEC._replace(mix=""), tmp_path)
    both, pure = read(mixed), read(tmp_path)
    for index, style in enumerate(("stitch", "random", "stitch", "random")):
        same = np.array_equal(both["observations"][index], pure["observations"][index])
        assert same == (style == "stitch")
    actions = both["actions"][1::2, :-1]
    # Uniform on [-1, 1]: mean 0 and variance 1/3, of 800 numbers.
    assert abs(actions.mean()) < 0.08 and actions.var() == pytest.approx(1 / 3, rel=0.12)
    assert np.abs(actions).max() < 1


def test_interrupted_mix_ends_with_the_same_rows(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, calls = module.Simulator.run, []

    def stopped(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(module.Simulator, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        generate(SPEC, tmp_path, threads=1)
    assert not (tmp_path / f"{NAME}.npz").exists()
    monkeypatch.setattr(module.Simulator, "run", run)
    generate(SPEC, tmp_path, threads=1)
    for name, rows in read(tmp_path).items():
        np.testing.assert_array_equal(rows, read(mixed)[name])


def test_mix_is_recorded_and_other_shares_are_refused(mixed: Path):
    record = json.loads((mixed / f"{NAME}.json").read_text())
    assert record["mix"] == SPEC.mix
    made = generated(record, 4 * ROWS)
    assert made is not None and made.facts["mix"] == SPEC.mix and f"styles {SPEC.mix}" in made.label
    for other in ("", "stitch=0.25,random=0.75"):
        with pytest.raises(UserError, match=r"holds data with mix=stitch=0\.5,random=0\.5, asked is mix="):
            generate(SPEC._replace(mix=other), mixed)
