"""Encoder of films: GIF by Pillow, MP4 by ffmpeg.

Pillow writes the GIF. Its mapping to a given palette is not exact, which tints white, and without a common
palette colours flicker. `Palette` keeps frequent colours and maps all others to the nearest one.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mac.atomic_files import replace_file
from mac.errors import UserError, one_line, refusal

KINDS = (".gif", ".mp4")
EXACT = 128  # colours of a GIF that are kept exactly
HOLD = 1.5  # duration of the last picture, s


def check_file(path: Path) -> None:
    """Checks that a film of this name can be written, before any episode is played.

    Raises:
        UserError: an extension other than .gif or .mp4, or ffmpeg is missing.
    """
    if path.suffix.lower() not in KINDS:
        raise UserError(f"--out={path}: the extension must be {' or '.join(KINDS)}")
    if path.suffix.lower() == ".mp4" and ffmpeg() is None:
        raise UserError(
            f"--out={path}: needs ffmpeg (pip install -e '.[video]', or the system's); or take .gif"
        )


def ffmpeg() -> str | None:
    """Returns the path of ffmpeg, from the package imageio-ffmpeg or the system; None if missing."""
    if importlib.util.find_spec("imageio_ffmpeg") is not None:
        import imageio_ffmpeg  # pyright: ignore[reportMissingImports]

        try:
            return imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError:
            pass
    return shutil.which("ffmpeg")


def write_film(path: Path, pictures: Iterator[np.ndarray], seconds: float) -> None:
    """Writes uint8[height, width, 3] pictures of duration `seconds` each; complete or not at all.

    Raises:
        UserError: the file cannot be written, or ffmpeg fails.
    """
    write_mp4(path, pictures, seconds) if path.suffix.lower() == ".mp4" else write_gif(
        path, pictures, seconds
    )


def write_gif(path: Path, pictures: Iterator[np.ndarray], seconds: float) -> None:
    """Writes a GIF with a common palette, of the first, middle and last picture; else colours flicker."""
    made = list(pictures)
    palette = Palette([made[i] for i in (0, len(made) // 2, -1)])
    frames = [palette.image(picture) for picture in made]
    times = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * max(HOLD, seconds))]
    how = dict(save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=False)
    replace_file(path, lambda file: frames[0].save(file, format="GIF", **how))


class Palette:
    """256 colours of `pictures`: the most frequent ones exactly, then a median cut of the others."""

    def __init__(self, pictures: list[np.ndarray]):
        codes, counts = np.unique(np.concatenate([_codes(p).ravel() for p in pictures]), return_counts=True)
        colors = _colors(codes[np.argsort(-counts, kind="stable")])
        others = colors[None, EXACT:]
        spread: list[int] = []
        if others.size:
            reduced = Image.fromarray(others).quantize(256 - EXACT, method=Image.Quantize.MEDIANCUT)
            spread = (reduced.getpalette() or [])[: 3 * (256 - EXACT)]
        self.colors = np.concatenate([colors[:EXACT], np.reshape(spread, (-1, 3))]).astype(np.uint8)
        self._place = np.full(1 << 24, -1, np.int16)  # index of each colour looked up so far

    def image(self, picture: np.ndarray) -> Image.Image:
        """Returns the picture in these colours."""
        codes = _codes(picture)
        new = np.unique(codes[self._place[codes] < 0])
        for part in np.array_split(new, len(new) // 10_000 + 1):
            away = _colors(part)[:, None].astype(int) - self.colors.astype(int)
            self._place[part] = np.argmin(np.sum(away**2, axis=-1), axis=1)
        made = Image.fromarray(self._place[codes].astype(np.uint8))
        made.putpalette(self.colors.tobytes())
        return made


def _codes(picture: np.ndarray) -> np.ndarray:
    """Returns each pixel's colour as one number."""
    return picture.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)


def _colors(codes: np.ndarray) -> np.ndarray:
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1).astype(np.uint8)


def write_mp4(path: Path, pictures: Iterator[np.ndarray], seconds: float) -> None:
    program = ffmpeg()
    assert program, "check_file comes first"
    first = next(pictures)
    height, width = (size - size % 2 for size in first.shape[:2])  # the codec wants even sizes
    part = path.with_name(f".{path.stem}.part.mp4")
    command = [program, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", f"{1 / seconds:g}", "-i", "-", "-pix_fmt", "yuv420p"]
    command += ["-movflags", "+faststart", str(part)]
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdin
        last = first
        for last in (first, *pictures):
            process.stdin.write(last[:height, :width].tobytes())
        process.stdin.write(last[:height, :width].tobytes() * round(HOLD / seconds))
        said = process.communicate()[1].decode(errors="replace")
        if process.returncode:
            raise UserError(f"ffmpeg could not write {path}: {one_line(RuntimeError(said))}; take .gif")
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({refusal(error)}); choose another --out") from error
    finally:
        part.unlink(missing_ok=True)
