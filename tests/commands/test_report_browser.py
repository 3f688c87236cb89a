"""The report in a real browser, at the width of a desk and of a phone; needs Chromium."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.reproduction.comparison import row_of
from experiments.reproduction.figures import draw_bars, draw_settings
from experiments.reproduction.html_report import Picture, page
from experiments.reproduction.suites import Setting, load_suite
from tests.commands.test_reproduce_report import SUITE3, entry, part, section

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")
# Nothing of these reaches for a network; as root there is no sandbox.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
)  # fmt: skip
FIRST = "<script>window.faults=[]; addEventListener('error', e => faults.push(e.message));</script>"
PROBE = """<script>
const table = document.querySelector("table");
const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === "ours");
const column = () => [...table.tBodies[0].rows].map((row) => row.cells[at].textContent);
const orders = [column()];
for (let i = 0; i < 2; i++) { table.querySelectorAll("th button")[at].click(); orders.push(column()); }
const body = document.documentElement;
addEventListener("load", () => {
  parent.document.documentElement.dataset.found = JSON.stringify({
    faults, orders, wide: innerWidth, page: body.scrollWidth, sort: table.tHead.rows[0].cells[at].ariaSort,
    images: [...document.images].map((image) => image.naturalWidth),
    curves: document.querySelectorAll("figure polyline").length,
  });
});
</script>"""


def report(folder: Path) -> str:
    """A page with a table, its bars, a figure by a setting, learning curves and a film."""
    suite = load_suite("figure3")
    places = [Setting(value, "", ()) for value in (1, 5, 10, 25)]
    entries = [entry(float("nan"), None, setting=place, env="an-env") for place in places]
    suite = suite._replace(entries=tuple(entries))
    pairs = [
        (each, row_of(suite, each, [part(np.full((3, 2, 1), value))]))
        for each, value in zip(entries, (0.1, 0.4, 0.9, 0.7), strict=True)
    ]
    draw_settings(suite, pairs, folder / "by_setting.png")
    first = section(0.5, 0.9, 0.2)
    rows = [dataclasses.replace(pair[1], env="cube-single-play-v0", paper=50.0) for pair in pairs[:1]]
    draw_bars(load_suite(SUITE3), rows, folder / "bars.png")
    pictures = [Picture((folder / name).read_bytes(), "png", name) for name in ("bars.png", "by_setting.png")]
    Image.new("RGB", (300, 200), "teal").save(folder / "film.gif")
    film = Picture((folder / "film.gif").read_bytes(), "gif", "a film")
    return page([first._replace(pictures=pictures)], "A report", [film])


def show(folder: Path, text: str, width: int) -> None:
    """Writes a page that holds another one, `width` pixels wide: no window is narrower than 500."""
    frame = (
        f'<iframe style="border: 0; width: {width}px; height: 1000px" srcdoc="{html.escape(text)}"></iframe>'
    )
    (folder / "page.html").write_text(f'<!doctype html><body style="margin: 0">{frame}')


def browse(folder: Path, width: int, *flags: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    words = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1000"]
    address = (folder / "page.html").as_uri()
    done = subprocess.run([*words, *flags, address], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("width", [1400, 390])
def test_report_works_in_a_browser(tmp_path: Path, width: int):
    text = report(tmp_path)
    assert len(text) < 10_000_000
    show(tmp_path, text.replace("<head>", f"<head>{FIRST}", 1) + PROBE, width)
    said = browse(tmp_path, width, "--virtual-time-budget=3000", "--dump-dom").stdout
    match = re.search(r'<html[^>]* data-found="([^"]*)"', said)
    assert match, said[:500]
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    assert found["faults"] == [] and found["curves"] == 3
    assert len(found["images"]) == 3 and min(found["images"]) > 0
    assert found["page"] <= found["wide"] == width  # nothing sticks out of the page
    numbers = [[float(cell.partition(" ")[0]) for cell in order] for order in found["orders"]]
    assert numbers == [[50, 90, 20], [20, 50, 90], [90, 50, 20]] and found["sort"] == "descending"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
def test_picture_of_the_report_is_not_empty(tmp_path: Path, width: int):
    show(tmp_path, report(tmp_path), width)
    browse(tmp_path, width, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
