"""Films of reports: one for each environment, rendered without OpenGL."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from envs_mjx.registry import parse
from experiments.reproduction.cells import Plan
from experiments.reproduction.comparison import Finished
from experiments.reproduction.html_report import Picture
from experiments.reproduction.jobs import Job
from mac.atomic_files import visible

FOLDER = "films"
REFERENCE = "mac"
MOST_BYTES = 6_000_000
"""Of all films of a page: base64 adds a third, and the page stays below 10 MB."""


class Films(NamedTuple):
    """The films of a page, and those that it has no room for."""

    pictures: list[Picture]
    left_out: list[Path]


def filmed(runs: Iterable[Finished]) -> list[Finished]:
    """The run that is filmed in each environment: MAC's, else the first."""
    chosen: dict[str, Finished] = {}
    for run in runs:
        before = chosen.get(family := parse(run.cell.env).family)
        if before is None or (run.cell.algo == REFERENCE != before.cell.algo):
            chosen[family] = run
    return list(chosen.values())


def film_jobs(runs: Iterable[Finished], plan: Plan) -> list[Job]:
    """A job for each environment without a film."""
    jobs = []
    for run in filmed(runs):
        if _newest(run, plan) is None:
            done = _file(run, plan)
            words = ("render_video.py", str(run.folder), "--renderer", "drawing", "--out", str(done))
            jobs.append(Job(f"film_{run.cell.name}", f"film of {run.cell.title}", words, done))
    return jobs


def _file(run: Finished, plan: Plan) -> Path:
    return plan.out / FOLDER / f"{run.cell.name}.gif"


def _newest(run: Finished, plan: Plan) -> Path | None:
    """The film of a run: this program's, else one that `render_video.py` left in the run's folder."""
    own = _file(run, plan)
    found = [own] if own.exists() else visible(run.folder, "view-*.gif")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def films(runs: Sequence[Finished], plan: Plan) -> Films:
    """The films that are there, smallest first, as many as a page has room for."""
    found = [(path.stat().st_size, run, path) for run in filmed(runs) if (path := _newest(run, plan))]
    pictures, left_out, total = [], [], 0
    for size, run, path in sorted(found, key=lambda each: (each[0], each[1].cell.name)):
        total += size
        if total > MOST_BYTES:
            left_out.append(path)
            continue
        kinds = ", ".join(run.kinds)
        caption = f"{run.cell.title}, seeds side by side; {kinds} data, preset {run.cell.preset}"
        pictures.append(Picture(path.read_bytes(), "gif", caption))
    return Films(pictures, left_out)
