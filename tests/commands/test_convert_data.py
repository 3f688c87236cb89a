"""convert_data.py: shards into one store, continued after a kill, its losses told; and training on it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import convert_data
from experiments.launch import dataset
from experiments.launch.settings import DataConfig
from experiments.run import main as train
from mac.data import convert
from mac.data.npz import read_npz
from mac.data.store import Store
from mac.errors import UserError
from tests.helpers.command_line import SIZES, arrays, params
from tests.helpers.small_datasets import SPEC, write


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        write(folder / f"toy-{i:03d}.npz", (10 + i, 9), seed=i)
    write(folder / "toy-000-val.npz", (12,), seed=9)
    return folder


def files_of(store: Path) -> dict[str, bytes]:
    """All arrays of a store, byte by byte."""
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*.npy"))}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []
    monkeypatch.setattr(convert, "read_file", lambda path, spec: names.append(path.name) or read_npz(path))
    return names


def test_shards_share_one_codec_and_validation_stays_exact(tmp_path: Path, shards: Path):
    plain = convert.prepare(shards, tmp_path / "plain", SPEC)
    coded = convert.prepare(shards, tmp_path / "coded", SPEC, "uint16")
    assert (plain.dtype, coded.dtype) == ("float32", "uint16")
    assert len({id(split.codec) for split in coded.train}) == 1
    for a, b in zip(plain.train, coded.train, strict=True):
        assert b.codec is not None
        np.testing.assert_allclose(b.codec.obs.decode(b.obs[:]), a.obs, atol=5e-4, rtol=0)
        np.testing.assert_array_equal(b.codec.obs.decode(b.obs[:])[:, 0], a.obs[:, 0])  # whole numbers
        np.testing.assert_allclose(b.codec.action.decode(b.action[:]), a.action, atol=2e-5, rtol=0)
        np.testing.assert_array_equal(a.length, b.length)
    np.testing.assert_array_equal(plain.statistics_obs, coded.statistics_obs)


def test_losses_and_origin_are_kept(tmp_path: Path, shards: Path):
    (shards / "toy.json").write_text(json.dumps({"seed": 7, "versions": {"mujoco": "3"}}))
    store = convert.prepare(shards, tmp_path / "s", SPEC, "uint16")
    meta = json.loads((store.path / "meta.json").read_text())
    rows = np.concatenate([read_npz(f).obs for f in sorted(shards.glob("toy-00?.npz"))])
    got = np.concatenate([split.codec.obs.decode(split.obs[:]) for split in store.train if split.codec])
    quality, apart = meta["quality"]["obs"], np.abs(got.astype(np.float64) - rows)
    np.testing.assert_allclose(quality["std"], rows.astype(np.float64).std(axis=0), rtol=1e-9)
    np.testing.assert_allclose(
        quality["largest_error_in_std"], apart.max(axis=0) / rows.std(axis=0), rtol=0.02, atol=1e-7
    )
    np.testing.assert_allclose(
        quality["typical_error_in_range"],
        np.sqrt((apart**2).mean(axis=0)) / np.ptp(rows, axis=0),
        rtol=0.05,
        atol=1e-8,
    )
    assert quality["largest_error_in_std"][0] == 0 and 0 < max(quality["largest_error_in_std"]) < 1e-4
    assert meta["made_by"] == {"seed": 7, "versions": {"mujoco": "3"}}
    assert [name for name, *_ in meta["sources"]] == [
        *(f"toy-00{i}.npz" for i in range(3)),
        "toy-000-val.npz",
    ]
    assert all(len(checksum) == 64 for checksum in meta["checksums"].values()) and len(meta["checksums"]) == 4


@pytest.mark.parametrize(("dtype", "before"), [("float32", 0), ("uint16", 3)])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_killed_conversion_goes_on_with_the_missing_shards(
    tmp_path: Path,
    shards: Path,
    reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    before: int,
    at: int,
):
    whole = convert.prepare(shards, tmp_path / "whole", SPEC, dtype)
    reads.clear()
    save, done = convert.write_rows, []

    def killed(*args):
        if len(done) == at:
            (args[0] / "obs.npy").write_bytes(b"half")
            raise Killed
        done.append(1)
        return save(*args)

    monkeypatch.setattr(convert, "write_rows", killed)
    with pytest.raises(Killed):
        convert.prepare(shards, tmp_path / "store", SPEC, dtype)
    assert not (tmp_path / "store").exists()
    assert len(reads) == before + at + 1
    monkeypatch.setattr(convert, "write_rows", save)
    reads.clear()
    store = convert.prepare(shards, tmp_path / "store", SPEC, dtype)
    assert reads == [*(f"toy-00{i}.npz" for i in range(at, 3)), "toy-000-val.npz"]
    assert files_of(store.path) == files_of(whole.path)
    assert not list(tmp_path.glob(".*.part"))


def test_shard_that_changed_or_was_damaged_is_converted_again(
    tmp_path: Path, shards: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
):
    save, done = convert.write_rows, []

    def killed(*args):
        if len(done) == 2:
            raise Killed
        done.append(1)
        return save(*args)

    monkeypatch.setattr(convert, "write_rows", killed)
    with pytest.raises(Killed):
        convert.prepare(shards, tmp_path / "store", SPEC)
    monkeypatch.setattr(convert, "write_rows", save)
    write(shards / "toy-000.npz", (8, 8), seed=5)
    cut = tmp_path / ".store.part" / "train-001" / "obs.npy"
    cut.write_bytes(cut.read_bytes()[:-100])
    reads.clear()
    store = convert.prepare(shards, tmp_path / "store", SPEC)
    assert reads[:2] == ["toy-000.npz", "toy-001.npz"]
    np.testing.assert_array_equal(store.train[0].obs, read_npz(shards / "toy-000.npz").obs)
    np.testing.assert_array_equal(store.train[1].obs, read_npz(shards / "toy-001.npz").obs)


def test_the_asked_type_replaces_another_and_none_keeps_it(tmp_path: Path, shards: Path, reads: list[str]):
    folder = tmp_path / "s"
    assert convert.prepare(shards, folder, SPEC, "uint16").dtype == "uint16"
    reads.clear()
    assert convert.prepare(shards, folder, SPEC._replace(name="another-task")).dtype == "uint16"
    assert reads == []
    assert convert.prepare(shards, folder, SPEC, "float32").dtype == "float32"
    with pytest.raises(UserError, match="dtype=int8: rows are stored as float32 or uint16"):
        convert.prepare(shards, folder, SPEC, "int8")


def test_progress_counts_every_reading(tmp_path: Path, shards: Path):
    seen: list[tuple[int, int]] = []
    convert.prepare(shards, tmp_path / "s", SPEC, "uint16", lambda *done: seen.append(done))
    rows = 19 + 20 + 21
    assert [done for done, _ in seen] == [19, 39, 60, 79, 99, 120] and {total for _, total in seen} == {
        2 * rows
    }


def test_disk_needs_are_known_before_anything_is_read(
    tmp_path: Path, shards: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
):
    free = shutil.disk_usage(tmp_path)._replace(free=1430)  # 60 + 12 rows of 20 bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match=r"prepare it with --dtype uint16 \(half the size\)"):
        convert.prepare(shards, tmp_path / "s", SPEC)
    assert reads == [] and not list(tmp_path.glob(".*.part"))


def test_file_too_large_for_memory_is_one_line(
    tmp_path: Path, shards: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(convert, "free_host_memory", lambda: 2500)  # 32 + 72 + 32 bytes of each of 21 rows
    with pytest.raises(UserError, match=r"toy-002\.npz: .* of memory to read it, .* split it into shards"):
        convert.prepare(shards, tmp_path / "s", SPEC)
    assert reads == []


# The command line.


@pytest.fixture
def cubes(tmp_path: Path) -> Path:
    """Two shards of cube-single's shapes."""
    folder = tmp_path / "cube-single-play-100m-v0"
    folder.mkdir()
    for i in range(2):
        np.savez(folder / f"cube-single-play-v0-00{i}.npz", **arrays(4 + i))  # pyright: ignore
    np.savez(folder / "cube-single-play-v0-000-val.npz", **arrays(1))  # pyright: ignore
    return folder


def test_command_line_makes_a_store_and_says_what_it_loses(
    tmp_path: Path, cubes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert convert_data.main([str(cubes)]) == 0
    shown = capsys.readouterr().out
    assert "environment  cube-single-play-v0" in shown and "2 files, 360 training rows" in shown
    assert "28 columns, 0 of them constant, 0 exact; largest error: column" in shown
    (made,) = Path("data/stores").glob("[!.]*cube-single-play-100m-v0-*")
    assert Store.open(made).dtype == "uint16" and f"--data.path {made}" in shown
    # run.py finds it, by the files' place and by its own.
    assert (
        dataset.dataset_facts(DataConfig(), cubes)
        == dataset.dataset_facts(DataConfig(), made)
        == (360, "uint16", False)
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "nowhere: no such dataset"),
        (["empty"], "empty: this folder holds no training .npz file"),
        (["odd.npz"], "odd.npz: cannot tell the environment from its name; give --env"),
        (["odd.npz", "--env", "cube-sinlge-play-v0"], "did you mean cube-single-play-v0"),
        (["odd.npz", "--env", "cube-double-play-v0"], "has 28 observation and 5 action columns, cube-double"),
        (["odd.npz", "--dtype", "int8"], "int8"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    said: str,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    np.savez("odd.npz", **arrays())  # pyright: ignore
    assert convert_data.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and lines[0].startswith("error: ")


@pytest.mark.usefixtures("quiet")
@pytest.mark.slow
def test_training_over_windows_resumes_to_the_same_bits(
    tmp_path: Path, cubes: Path, capsys: pytest.CaptureFixture[str]
):
    store = tmp_path / "store"
    assert convert_data.main([str(cubes), "--out", str(store)]) == 0
    shutil.rmtree(cubes)  # the store is enough
    flags = [*SIZES, "--data.path", str(store), "--data.resident", "no", "--data.window", "200"]
    flags += ["--data.window-updates", "5", "--run.checkpoint-every", "5"]
    assert train([*flags, "--steps", "20", "--out", str(tmp_path / "a")]) == 0
    assert "waited for data" in capsys.readouterr().out
    assert train([*flags, "--steps", "10", "--out", str(tmp_path / "b")]) == 0
    assert train([*flags, "--steps", "20", "--out", str(tmp_path / "b"), "--resume"]) == 0
    assert params(tmp_path / "a") == params(tmp_path / "b")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["data"]["resident"], config["data"]["dtype"]) == ("no", "uint16")
    # Other windows would be other batches.
    more = ["--steps", "30", "--resume", "--data.window", "100", "--out", str(tmp_path / "b")]
    assert train([*SIZES, *more]) == 2
    assert "data.window (200 there, 100 here)" in capsys.readouterr().err
