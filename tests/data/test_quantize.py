"""16-bit codes: what comes back exactly, how far the rest is off, and the one map that networks see."""

import jax.numpy as jnp
import numpy as np
import pytest

from mac.data import quantize as coding
from mac.data.normalize import fit_minmax
from mac.data.window import make_column


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last of them short, in a few rows."""
    monkeypatch.setattr(coding, "BLOCK", 64)


def columns(seed: int = 0, rows: int = 1000) -> np.ndarray:
    """Numbers of very unequal size, a constant, 0/1, small whole numbers, and a nearly constant column."""
    rng = np.random.default_rng(seed)
    out = rng.normal(size=(rows, 7)) * [1, 100, 1e-3, 0, 1, 1, 1e-3] + [0, -30, 0, 0.3, 0, 0, 5]
    out[:, 4], out[:, 5] = rng.integers(0, 2, rows), rng.integers(-7, 300, rows)
    return out.astype(np.float32)


def fitted(rows: np.ndarray) -> coding.Affine:
    return coding.fit_affine(coding.summarize(rows))


@pytest.mark.parametrize("seed", range(5))
def test_values_come_back_within_half_a_step(seed: int):
    rows = columns(seed)
    affine = fitted(rows)
    codes = affine.encode(rows)
    assert codes.dtype == np.uint16
    span = rows.max(axis=0).astype(np.float64) - rows.min(axis=0)
    exact = affine.low + affine.step * codes
    assert (np.abs(exact - rows) <= 0.5000001 * affine.step).all()
    np.testing.assert_allclose(affine.step[:3], span[:3] / 65535, rtol=1e-12)
    np.testing.assert_array_equal(affine.decode(codes), exact.astype(np.float32))


def test_constants_whole_numbers_and_ends_come_back_exactly():
    rows = columns()
    affine = fitted(rows)
    back = affine.decode(affine.encode(rows))
    np.testing.assert_array_equal(back[:, 3:6], rows[:, 3:6])
    for at in (rows.argmin(axis=0), rows.argmax(axis=0)):
        np.testing.assert_array_equal(back[at, range(7)], rows[at, range(7)])


def test_values_beyond_the_fitted_range_are_cut_to_it():
    affine = fitted(np.asarray([[-1.0], [0.5]], np.float32))
    back = affine.decode(affine.encode(np.asarray([[-2.0], [9.0]], np.float32)))
    np.testing.assert_array_equal(back, [[-1.0], [0.5]])


@pytest.mark.parametrize("seed", range(5))
def test_codes_normalised_in_one_step_equal_two_steps(seed: int):
    rows = columns(seed)
    affine, norm = fitted(rows), fit_minmax(rows[:200])
    codes = affine.encode(rows)
    # In float64, since float32 cannot tell apart the neighbours of 5 that a column of width 1e-3 needs.
    value = affine.low + affine.step * codes
    want = (value - np.asarray(norm.center, np.float64)) / np.asarray(norm.width, np.float64)
    got = make_column(codes, norm, affine)[:]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    usual = [0, 1, 3, 4, 5]  # columns where float32 suffices
    decoded = np.asarray(norm.apply(jnp.asarray(affine.decode(codes))))
    np.testing.assert_allclose(np.asarray(got)[:, usual], decoded[:, usual], rtol=1e-6, atol=1e-6)
    plain = np.asarray(make_column(codes, None, affine)[:])
    size = np.maximum(np.ptp(value, axis=0), np.abs(value).max(axis=0))
    assert (np.abs(plain - value) <= 3e-7 * size).all()


def test_parts_are_summarised_as_the_whole_is():
    rows = columns()
    whole = coding.merge_summaries([coding.summarize(part) for part in np.split(rows, [1, 300, 301])])
    wide = rows.astype(np.float64)
    assert whole.rows == 1000
    np.testing.assert_array_equal(whole.low, wide.min(axis=0))
    np.testing.assert_array_equal(whole.high, wide.max(axis=0))
    np.testing.assert_allclose(whole.mean, wide.mean(axis=0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(whole.std, wide.std(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(whole.whole, [False, False, False, False, True, True, False])
    again = coding.ColumnSummary.from_dict(whole.to_dict())
    assert all(np.array_equal(a, b) for a, b in zip(again, whole, strict=True))


def test_loss_is_the_distance_of_rows_and_decoded_codes():
    rows = columns()
    affine = fitted(rows)
    codes = affine.encode(rows)
    parts = [slice(0, 10), slice(10, 1000)]
    loss = coding.merge_losses([coding.coding_loss(rows[p], codes[p], affine) for p in parts])
    apart = np.abs(affine.low + affine.step * codes - rows)
    np.testing.assert_array_equal(loss.largest, apart.max(axis=0))
    np.testing.assert_allclose(loss.square, np.square(apart).sum(axis=0), rtol=1e-9)
    assert loss.rows == 1000
