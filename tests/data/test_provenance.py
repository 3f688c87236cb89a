"""Stores and results say where their data come from."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from experiments.evaluate import main as evaluate_main
from experiments.launch import dataset, saved_run
from mac.data.checksums import sha256
from mac.data.convert import prepare
from mac.data.provenance import (
    LEDGER,
    UNKNOWN,
    DownloadRecord,
    generator_record,
    provenance_from_dict,
    provenance_of,
    record_download,
)
from mac.data.shards import read_part
from mac.data.store import META, Store, metadata_checksum
from mac.errors import UserError
from mac.run.io.logger import EVAL, read_rows
from mac.run.report.plot import plot_learning_curve
from mac.run.report.stats import learning_curve
from mac.run.report.table import results_table
from tests.helpers.small_datasets import SPEC, write, write_pair

MADE = {
    "source": "made by mac-jax with OGBench's scripted expert; not the files that OGBench hosts",
    "dataset": "toy-v0",
    "seed": 7,
    "engine": "c",
    "versions": {"jax": "0.10.2", "mujoco": "3.17.0"},
}
RAIL = "https://rail.eecs.berkeley.edu/datasets/ogbench/toy.npz"


def made(folder: Path, **more: Any) -> Path:
    """A pair of files beside which a generator left its note."""
    path = write_pair(folder)
    (folder / "toy.json").write_text(json.dumps(MADE | more))
    return path


def downloaded_file(folder: Path, url: str = RAIL) -> Path:
    """A file that was downloaded."""
    path = write_pair(folder)
    record_download(path, DownloadRecord(sha256(path), path.stat().st_size, url, "OGBench"))
    return path


def stored(path: Path) -> Store:
    return prepare(path, path.parent / "store", SPEC)


def test_generated_data_say_by_whom_and_how(tmp_path: Path):
    source = stored(made(tmp_path)).provenance
    assert source.label == "generated (mac-jax, seed 7, 49 rows)"  # 16 + 14 + 19
    facts = source.to_dict()
    assert facts["kind"] == "generated" and facts["rows"] == 49 and facts["seed"] == 7
    assert facts["engine"] == "c" and facts["versions"]["mujoco"] == "3.17.0"
    assert facts["metadata"] == MADE
    assert stored(tmp_path / "toy.npz").provenance == source  # opened again


def test_an_expert_of_our_own_is_marked_as_not_comparable(tmp_path: Path):
    label = stored(made(tmp_path, expert="ours")).provenance.label
    assert label.startswith("generated (mac-jax, own expert: not comparable with published numbers, seed 7")


def test_downloaded_data_carry_the_name_of_their_collection(tmp_path: Path):
    source = stored(downloaded_file(tmp_path)).provenance
    assert source.kind == "downloaded" and source.label == "OGBench"
    entry = source.facts["files"]["toy.npz"]
    assert entry["url"] == RAIL and entry["sha256"] == sha256(tmp_path / "toy.npz")


def test_a_mirror_is_named(tmp_path: Path):
    assert stored(downloaded_file(tmp_path, "http://mirror.example/toy.npz")).provenance.label == (
        "OGBench (mirror mirror.example)"
    )


def test_a_download_that_was_changed_since_is_refused(tmp_path: Path):
    path = downloaded_file(tmp_path)
    write(path, (16, 14, 19), seed=5)
    with pytest.raises(UserError, match="is not what was downloaded") as caught:
        stored(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_record_is_a_user_error(tmp_path: Path):
    path = downloaded_file(tmp_path)
    (tmp_path / LEDGER).write_text('{"toy.npz": 3}')
    with pytest.raises(UserError, match="holds no record"):
        stored(path)


def test_files_of_unknown_origin_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert stored(write_pair(tmp_path)).provenance.label == "local file toy.npz"
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".ogbench" / "data"
    folder.mkdir(parents=True)
    assert stored(write_pair(folder)).provenance.label == "OGBench (file in ~/.ogbench)"


def test_several_files_are_counted(tmp_path: Path):
    files = [write(tmp_path / f"toy-{i}.npz", (5, 5)) for i in range(3)]
    assert provenance_of(files, None, 30).label == f"local files {tmp_path.name} (3)"
    for file in files:
        record_download(file, DownloadRecord(sha256(file), file.stat().st_size, RAIL, "OGBench"))
    assert provenance_of(files, None, 30).label == "OGBench (3 files of its large set)"


def test_stores_of_before_say_what_they_know(tmp_path: Path):
    """Stores once had no `source`, but the generator's note."""
    store = stored(write_pair(tmp_path)).path
    meta = json.loads((store / META).read_text())
    del meta["source"]

    def write_meta(meta: dict[str, Any]) -> None:
        (store / META).write_text(json.dumps(meta | {"seal": metadata_checksum(meta)}))

    write_meta(meta)
    assert Store.open(store).provenance == UNKNOWN and UNKNOWN.label == "unknown source"
    write_meta(meta | {"made_by": MADE})
    assert Store.open(store).provenance.label == "generated (mac-jax, seed 7, 49 rows)"
    assert dataset.dataset_provenance(store) == Store.open(store).provenance


def test_notes_that_are_nested_without_end_are_no_notes(tmp_path: Path):
    file = write(tmp_path / "toy.npz", (5, 5))
    file.with_suffix(".json").write_text("[" * 100_000)
    assert generator_record(file) is None
    (tmp_path / "shard.json").write_text("[" * 100_000)
    assert read_part(tmp_path / "shard.json") is None


@pytest.mark.parametrize("values", [None, "text", {}, {"kind": "local"}])
def test_what_is_no_record_is_unknown(values: Any):
    assert provenance_from_dict(values) == UNKNOWN


def test_the_origin_is_known_before_the_files_are_read(tmp_path: Path):
    path = made(tmp_path)
    assert dataset.dataset_provenance(path) == stored(path).provenance


# Results.


def rows(**more: Any) -> list[dict[str, Any]]:
    base = {"task": 1, "success": 0.5, "episodes": 4, "engine": "c"} | more
    return [{"step": step, "seed": seed} | base for step in (0, 10) for seed in (0, 1)]


def printed(table: Any) -> str:
    file = io.StringIO()
    Console(width=200, file=file).print(table)
    return file.getvalue()


def test_tables_say_where_the_data_come_from_if_the_rows_do():
    label = "generated (mac-jax, seed 7, 49 rows)"
    assert f"data: {label}" in printed(results_table(learning_curve(rows(data=label)), title="t"))
    assert "data:" not in printed(results_table(learning_curve(rows()), title="t"))


def test_a_table_of_two_sources_names_both():
    mixed = [*rows(data="OGBench"), *(row | {"seed": 2} for row in rows(data="local file x.npz"))]
    assert learning_curve(mixed).data == "OGBench; local file x.npz"


def test_the_picture_shows_the_label(tmp_path: Path):
    """With the label there is less height for the axes, so pixels differ."""
    pictures = []
    for i, more in enumerate(({}, {"data": "generated (mac-jax, seed 7, 49 rows)"})):
        plot_learning_curve(rows(**more), tmp_path / f"{i}.png", title="t")
        pictures.append((tmp_path / f"{i}.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.slow
def test_a_run_and_its_evaluations_carry_the_label(copied: Path, capsys: pytest.CaptureFixture[str]):
    label = "local file small.npz"
    assert {row["data"] for row in read_rows(copied / EVAL)} == {label}
    launch = json.loads((copied / "run.json").read_text())["launches"][-1]
    assert launch["data"]["label"] == label and launch["data"]["rows"] == 120
    assert saved_run.data_label(copied) == label
    assert evaluate_main([str(copied), "--episodes", "1", "--engine", "c"]) == 0
    assert f"data: {label}" in capsys.readouterr().out
    line = json.loads((copied / "evaluations.jsonl").read_text().splitlines()[-1])
    assert {row["data"] for row in line["rows"]} == {label}


def test_a_run_of_before_is_of_unknown_source(copied: Path):
    values = json.loads((copied / "run.json").read_text())
    del values["launches"][-1]["data"]
    (copied / "run.json").write_text(json.dumps(values))
    assert saved_run.data_label(copied) == "unknown source"
    shutil.rmtree(copied / "checkpoints")
    (copied / "run.json").unlink()
    assert saved_run.data_label(copied) == "unknown source"


def test_rows_of_a_store_do_not_depend_on_its_origin(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = stored(write_pair(tmp_path / "a")), stored(made(tmp_path / "b"))
    np.testing.assert_array_equal(one.train[0].obs, two.train[0].obs)
