"""Pictures in files that play: every picture is there, at its time, in its colours."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.video import encode
from mac.errors import UserError


def stripes(pictures: int) -> list[np.ndarray]:
    """Pictures of 41 x 30 pixels; each has one more white row than the one before."""
    made = [np.zeros((30, 41, 3), np.uint8) for _ in range(pictures)]
    for i, picture in enumerate(made):
        picture[:i], picture[-3:, :, 1] = 255, 200
    return made


def test_gif_holds_every_picture_at_its_speed(tmp_path: Path):
    encode.write_film(tmp_path / "a.gif", iter(stripes(5)), 0.05)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.size, getattr(gif, "n_frames", 1)) == ((41, 30), 5)
        times = []
        for i in range(5):
            gif.seek(i)
            times.append(gif.info["duration"])
            assert np.array_equal(np.asarray(gif.convert("RGB")), stripes(5)[i])
    assert times == [50] * 4 + [1500]


def test_palette_keeps_surfaces_exactly_and_rare_colours_nearly():
    """A white sheet with 2000 pixels of different colours, and 30 of a green that is found nowhere else."""
    picture = np.full((200, 200, 3), (255, 254, 253), np.uint8)
    picture[:10] = np.random.default_rng(0).integers(0, 256, (10, 200, 3))
    picture[20, :30] = (26, 127, 55)
    got = np.asarray(encode.Palette([picture]).image(picture).convert("RGB")).astype(int)
    np.testing.assert_array_equal(got[30:], picture[30:])
    np.testing.assert_array_equal(got[20, :30], picture[20, :30])
    assert np.abs(got - picture).max() < 100 and np.abs(got[:10] - picture[:10]).mean() < 20


def test_mp4_gets_every_picture_and_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A program that copies what it is given stands for ffmpeg; the odd column is cut off."""
    tool = tmp_path / "ffmpeg"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nopen(sys.argv[-1], 'wb').write(sys.stdin.buffer.read())\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(encode, "ffmpeg", lambda: str(tool))
    encode.write_film(tmp_path / "a.mp4", iter(stripes(3)), 0.5)
    raw = np.frombuffer((tmp_path / "a.mp4").read_bytes(), np.uint8).reshape(-1, 30, 40, 3)
    np.testing.assert_array_equal(raw[:3], [p[:, :40] for p in stripes(3)])
    assert len(raw) == 3 + 3, "and the last one stays for 1.5 s"
    tool.write_text(f"#!{sys.executable}\nimport sys\nsys.stdin.buffer.read()\nsys.exit('no codec')\n")
    with pytest.raises(UserError, match="no codec"):
        encode.write_film(tmp_path / "b.mp4", iter(stripes(3)), 0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "ffmpeg"]
