"""Short edition of the fuzzers in `tests/fuzz`: damage is refused in one line, noted, or changes nothing."""

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import work
from tests.fuzz.judge import FAILURES


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in memory if there is one, since converting forces files to the disk.

    Memory is limited meanwhile, and the working folder is the same again afterwards.
    """
    here = os.getcwd()
    made = Path(tempfile.mkdtemp(prefix="fuzz-", dir=work.memory()))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (work.most(), before[1]))
    yield made
    resource.setrlimit(resource.RLIMIT_AS, before)
    os.chdir(here)
    shutil.rmtree(made)


def failures(cases: Any, numbers: Iterator[int] | range) -> list[str]:
    """The verdicts that must not be, in words."""
    lines = [line for number in numbers for line in work.lines_of(cases, number)]
    return [
        f"{x.number} {x.kind}, {x.asked}: {x.word}, {x.detail[:200]}" for x in lines if x.word in FAILURES
    ]


def test_no_bit_of_an_npz_header_changes_a_number_in_silence(folder: Path):
    cases = work.subject("npz", folder, 0)
    assert len(cases.bits) > 5000
    assert not failures(cases, range(-1 - 7, -len(cases.bits), -61))


@pytest.mark.parametrize(("name", "count"), [("npz", 50), ("hdf5", 40)])
def test_damaged_data_files_are_refused_or_read_right(folder: Path, name: str, count: int):
    assert not failures(work.subject(name, folder, 1), range(count))


def test_damaged_stores_are_refused_or_made_again(folder: Path):
    assert not failures(work.subject("store", folder, 1), range(30))


@pytest.mark.slow
def test_damaged_run_folders_are_refused_or_read_right(folder: Path):
    assert not failures(work.subject("run", folder, 1), range(40))


@pytest.mark.slow
@pytest.mark.parametrize("name", work.SUBJECTS)
def test_many_more_cases_in_processes_that_may_hang(name: str):
    lines = work.run(name, range(1000, 1000 + (100 if name == "run" else 300)), seed=0)
    assert not [line for line in lines if line.word in FAILURES], work.summary(lines)
