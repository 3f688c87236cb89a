"""Decides between data resident on the device and rotating windows, and checks the memory."""

import dataclasses

import numpy as np

from experiments.cli.settings import DataConfig
from experiments.data.run_store import Facts
from mac.data.normalize import Normalizer
from mac.data.store import Store
from mac.data.window import Relabel, all_pieces, check_chunk, recorded_falls
from mac.data.window_feed import Source, Whole, plan_rotation
from mac.errors import UserError
from mac.formatting import counted
from mac.free_memory import Memory, free_memory
from mac.types import EnvSpec, SampleSpec

SHARE = 0.75  # of the free memory that data may take; the rest is for networks and what updates need
WINDOWS_HELD = 3  # the one that trains, the next, and for a moment the one before
_LABEL_BYTES = 8  # reward and mask of a row
_INDEX_BYTES = 16  # of an episode, in the table


def row_bytes(spec: EnvSpec, dtype: str) -> float:
    """Bytes of a row of a window; episodes are taken to be of 100 rows at least."""
    labels = _LABEL_BYTES if spec.goal_dim is None else 0
    return (spec.obs_dim + spec.action_dim) * (2 if dtype == "uint16" else 4) + labels + _INDEX_BYTES / 100


def resolve(data: DataConfig, known: Facts, spec: EnvSpec, free: Memory | None = None) -> DataConfig:
    """`data` with `auto` decided: how rows are stored, and whether all of them stay on the device.

    Args:
        free: what may be taken; None is what is free now.
    Raises:
        UserError: there is not enough memory for what is asked, on the host or on the device.
    """
    free = free or free_memory()
    size = row_bytes(spec, known.dtype)
    resident = data.resident
    if resident == "auto":
        fits = _excess(known.rows * size, 1, free) is None
        resident = "yes" if fits or data.window >= known.rows else "no"
    data = dataclasses.replace(data, resident=resident, dtype=known.dtype)
    rows, held = windows(data, known)
    if excess := _excess(rows * size, held, free):
        smaller = "" if known.dtype == "uint16" else ", --data.dtype uint16 (half the size)"
        if resident == "yes":
            what, remedy = f"{rows:,} rows at once (--data.resident yes)", f"--data.resident no{smaller}"
        else:
            what = f"{held} windows of {rows:,} rows (--data.window)"
            remedy = f"a smaller --data.window{smaller}"
        raise UserError(f"{what} need {excess}; take {remedy}")
    return data


def _excess(size: float, held: int, free: Memory) -> str | None:
    """Why `held` windows of `size` bytes do not fit, None if they do."""
    # An accelerator's windows are put together on the host first: one of them, and the next.
    needs = [("device", free.device, size * held)]
    if not free.shared:
        needs.append(("host", free.host, size * min(held, 2)))
    for where, available, need in needs:
        if available is not None and need > SHARE * available:
            place = "memory" if free.shared else f"{where} memory"
            return (
                f"{need / 1e9:,.1f} GB of {place}, and of {available / 1e9:,.1f} GB free "
                f"{SHARE * available / 1e9:,.1f} GB may be taken"
            )
    return None


def make_source(
    data: DataConfig, store: Store, normalizer: Normalizer, sample: SampleSpec, relabel: Relabel | None
) -> Source:
    """What training draws from, as `resolve` decided.

    Args:
        sample: how chunks will be drawn.
    Raises:
        UserError: no episode, or none of some window, is long enough for the chunk.
    """
    everything = all_pieces(store)
    length = np.concatenate([split.length for split in store.train])
    check_chunk(str(store.path), length, sample.chunk, recorded_falls(store, everything), sample.every_row)
    if data.resident == "yes":
        return Whole(store, normalizer, sample.chunk, relabel, sample.every_row)
    return plan_rotation(
        store,
        normalizer,
        sample.chunk,
        relabel,
        rows=data.window,
        updates=data.window_updates,
        seed=data.seed,
        every_row=sample.every_row,
    )


def windows(data: DataConfig, known: Facts) -> tuple[int, int]:
    """Rows of a window, and how many windows are held at a time; `data` as `resolve` decided."""
    return (min(data.window, known.rows), WINDOWS_HELD) if data.resident == "no" else (known.rows, 1)


def describe(data: DataConfig, known: Facts) -> str:
    """How rows are held, in a few words; `data` as `resolve` decided."""
    if known.guessed:
        return "its rows cannot be counted, so sizes and times below are guesses"
    stored = f"{counted(known.rows, 'row')} as {known.dtype}"
    if data.resident != "no":
        return f"{stored}, all on the device"
    updates = counted(data.window_updates, "update")
    return f"{stored}, in windows of {counted(data.window, 'row')} for {updates} each"
