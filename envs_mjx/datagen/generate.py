"""Generates datasets of any size in OGBench's schema, with experts that act in our environments.

The files are those that `ogbench.make_env_and_datasets(name, dataset_path=...)` reads: episodes of equal
length, each row the state before its action. Experts are OGBench's scripts; ants and humanoids use policies
that were trained here. Episodes are simulated in batches of equal size; those that fail OGBench's health
check are rejected and redone. Episode i of a seed is the same bit for bit, whatever the number of threads,
shards and interruptions.
"""

import concurrent.futures
import contextlib
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs_mjx.datagen.data_policy import AbstractDataPolicy, TabletopDataPolicy
from envs_mjx.datagen.dataset_parts import WHOLE, DatasetSummary, Part, PartRecords, work_folder
from envs_mjx.datagen.dataset_spec import DatasetSpec, episode_rows, family_and_style, generation_versions
from envs_mjx.datagen.npz_shards import TRAIN, VAL, file_arrays, make_shards
from envs_mjx.datagen.resumable_writer import DatasetWriter, EpisodeRecord, check_settings
from envs_mjx.datagen.simulate_episodes import EpisodeBatch, EpisodeJob, Simulator
from envs_mjx.datagen.style_mix import RANDOM, RandomDataPolicy, StyleMix, read_mix
from envs_mjx.engines.tabletop_c import CEngine
from envs_mjx.engines.walker_c import CWalkerEngine
from envs_mjx.experts.maze_experts import DirectionActor, MazeDataPolicy
from envs_mjx.locomotion.maze_env import MazeEnv
from envs_mjx.locomotion.walkers import MAZES
from envs_mjx.manipulation.scenes import build_scene
from envs_mjx.registry import engine_for, make
from mac.atomic_files import write_json
from mac.cgroup_limits import cores
from mac.errors import UserError

_CORES_PER_BATCH = 4  # so many threads can share the physics of a batch before its JAX part limits them
_POLL = 0.2  # s between two checks of the running batches

Progress = Callable[[int, int], None]
"""Called with rows simulated so far and rows in total, all files together."""


def generate_file(
    dataset: str,
    rows: int,
    path: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    threads: int | None = None,
) -> DatasetSummary:
    """Generates `path` (training rows) and `<stem>-val.npz` in the same folder, on engine `c`, in one go.

    Both files appear complete or not at all; an interrupted attempt leaves nothing behind.

    Args:
        dataset: name such as `cube-single-play-v0`.
        rows: training rows wanted, rounded up to whole episodes.
        path: file to write, ending in `.npz`; its folder is created.
        seed, progress, threads: see `generate`.
    Raises:
        UserError: for a bad name, size or path, a file that exists, a folder that cannot be written,
            or a disk without room.
    """
    if rows < 1:
        raise UserError(f"rows={rows}: a dataset needs at least one row; ask for 1001 or more")
    if path.suffix != ".npz":
        raise UserError(f"{path}: a dataset file must end in .npz")
    if path.exists():
        raise UserError(f"{path} exists; delete it to make the data anew, or choose another file")
    episodes = -(-rows // episode_rows(dataset))
    with _temporary(path) as work:
        spec = DatasetSpec(dataset, episodes, episodes, seed)
        return generate(spec, path.parent, stem=path.stem, work=work, threads=threads, progress=progress)


def val_path(path: Path) -> Path:
    """Returns the path at which OGBench looks for the validation file of the training file `path`."""
    return path.with_name(path.name.removesuffix(".npz") + "-val.npz")


def metadata_path(folder: Path, stem: str) -> Path:
    """Returns the path of the JSON file that says how `<stem>*.npz` were made; written after all of them."""
    return folder / f"{stem}.json"


def generate(
    spec: DatasetSpec,
    folder: Path,
    *,
    stem: str | None = None,
    work: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    actor: DirectionActor | None = None,
    part: Part = WHOLE,
) -> DatasetSummary:
    """Generates a dataset, or what is missing of it: an earlier attempt, however it ended, is continued.

    Returns the summary of the dataset, or that of a part alone while others are missing.

    Only one process may work on a folder, or on a part, at a time; the caller sees to that (`held_folder`).
    Memory: the rows of the running batches (64 episodes each on engine `c`, 20 to 70 MB), however large the
    dataset.

    Args:
        folder: where the files go; created as needed.
        stem: what file names begin with; the dataset's name if None.
        work: working folder; `work_folder` if None. It is removed at the end.
        threads: host threads for the physics, every available core if None; it does not change the data.
        progress: called with rows simulated so far and rows in total, both splits together.
        actor: the trained expert whose checksum is `spec.expert_checksum`.
        part: what this process makes, of several that work in the folder at once.
    Raises:
        UserError: for a bad request, a folder that holds other data or cannot be written, or a disk
            without room.
    """
    mix = read_mix(spec.mix, spec.dataset, "mix") if spec.mix else None
    policies = _data_policies(spec, mix, threads, actor)
    policy = policies[0]
    stem = stem or spec.dataset
    settings = spec.settings | {"versions": generation_versions()}
    done = metadata_path(folder, stem)
    records = PartRecords(folder, stem, part, make_shards(stem, spec.episodes, spec.per_shard))
    shards, work = part.of(records.shards), records.work(work or work_folder(folder, stem))
    writer = DatasetWriter(folder, work, shards, file_arrays(policy.widths), policy.rows)
    earlier = None
    if done.exists():  # finished once: the summary is known, though some files may have been removed
        check_settings(done, spec.settings, f"delete the dataset {stem} in it")
        earlier = DatasetSummary(**json.loads(done.read_bytes())["collected"])
        if all(writer.finished(shard) for shard in shards):
            records.close(work)
            return earlier
        check_settings(done, settings, f"delete the dataset {stem} in it")
    else:
        records.begin(settings)
        earlier = records.mine()
        if earlier is None:
            writer.check_names()
    writer.open(settings)
    writer.check_disk_space()
    simulators = [Simulator(p, seed=spec.seed, lanes=spec.lanes, noise=spec.action_noise) for p in policies]
    at_once = max(1, (threads or cores()) // _CORES_PER_BATCH) if spec.engine == "c" else 1
    place_of = mix.place_of if mix else lambda index: 0
    _simulate_missing(simulators, place_of, writer, at_once, progress or (lambda rows, total: None))
    made = earlier or _summarize(writer, policy.rows)
    if part != WHOLE and not done.exists():
        records.finish(made)
        if records.missing():
            writer.close()
            return made
        made = records.total()
    write_json(done, _metadata(spec, settings, made), part=writer.draft(done.name))
    writer.close()
    records.close(work)
    return made


def held_folder(folder: Path, stem: str, part: Part) -> Path:
    """Returns the folder that a process must have for itself: the dataset's, or the working one of a part."""
    return PartRecords(folder, stem, part, ()).work(folder)


def episode_records(batch: EpisodeBatch) -> list[EpisodeRecord]:
    """Returns the journal entries of a batch's episodes."""
    targets, hits = (np.asarray(x).sum(axis=1).tolist() for x in batch.events)
    entries = zip(batch.jobs, batch.healthy.tolist(), targets, hits, batch.dropped.tolist(), strict=True)
    return [EpisodeRecord(*job, *rest) for job, *rest in entries]


def _take_batch(
    todo: deque[EpisodeJob], place_of: Callable[[int], int], simulators: Sequence[Simulator]
) -> tuple[Simulator, list[EpisodeJob]]:
    """Takes the first of the episodes to do, and the next ones that the same simulator plays."""
    simulator = simulators[place_of(todo[0].index)]
    near = [todo.popleft() for _ in range(min(len(todo), simulator.lanes * len(simulators)))]
    mine = [job for job in near if simulators[place_of(job.index)] is simulator][: simulator.lanes]
    taken = set(mine)
    todo.extendleft(reversed([job for job in near if job not in taken]))
    return simulator, mine


def _simulate_missing(
    simulators: Sequence[Simulator],
    place_of: Callable[[int], int],
    writer: DatasetWriter,
    at_once: int,
    progress: Progress,
) -> None:
    """Simulates the missing episodes, `at_once` batches at a time, and writes them to disk.

    `place_of` gives the simulator of an episode, by its number within the split.
    """
    todo, stop = deque(writer.missing()), threading.Event()
    running: dict[concurrent.futures.Future[EpisodeBatch], list[int]] = {}  # rows of each so far
    with concurrent.futures.ThreadPoolExecutor(at_once, "wave") as pool:
        try:
            while todo or running:
                while todo and len(running) < at_once:
                    simulator, jobs = _take_batch(todo, place_of, simulators)
                    rows: list[int] = []
                    running[pool.submit(simulator.run, jobs, rows.append, stop)] = rows
                # Polling, because an unbounded wait would not notice Ctrl-C everywhere.
                concurrent.futures.wait(running, _POLL, concurrent.futures.FIRST_COMPLETED)
                for future in [future for future in running if future.done()]:
                    batch, _ = future.result(), running.pop(future)
                    records = episode_records(batch)
                    writer.add(batch.rows, records)
                    todo.extendleft(
                        EpisodeJob(n.split, n.index, n.attempt + 1) for n in records if not n.kept
                    )
                progress(writer.rows_kept + sum(map(sum, running.values())), writer.rows)
        finally:
            stop.set()  # batches that still run end within a segment


def _data_policies(
    spec: DatasetSpec, mix: StyleMix | None, threads: int | None, actor: DirectionActor | None
) -> list[AbstractDataPolicy]:
    """Returns the environments and experts to simulate, one for each style of a mix."""
    family, own = family_and_style(spec)

    def policy(style: str) -> AbstractDataPolicy:
        if style == RANDOM:
            return RandomDataPolicy(_data_policy(spec, family, own, threads, actor))
        return _data_policy(spec, family, style, threads, actor)

    return [policy(style) for style in (mix.styles if mix else (own,))]


def _data_policy(
    spec: DatasetSpec, family: str, style: str, threads: int | None, actor: DirectionActor | None
) -> AbstractDataPolicy:
    """Returns the environment and expert of one style."""
    own_threads = threads is not None and spec.engine == "c"
    rows = episode_rows(spec.dataset)
    if family in MAZES:
        env = make(spec.dataset, spec.engine)
        assert isinstance(env, MazeEnv)
        env = MazeEnv(spec.dataset, env.walker, CWalkerEngine(env.walker, threads)) if own_threads else env
        return MazeDataPolicy(style, env, rows, actor)
    scene = build_scene(family)
    engine = CEngine(scene, threads) if own_threads else engine_for(family, spec.engine)
    return TabletopDataPolicy(style, scene, engine, rows)


def _summarize(writer: DatasetWriter, episode_rows: int) -> DatasetSummary:
    rows = [sum(shard[split].episodes for shard in writer.shards) * episode_rows for split in (TRAIN, VAL)]
    records = writer.records.values()
    return DatasetSummary(
        *rows,
        targets=sum(record.targets for record in records),
        hits=sum(record.hits for record in records),
        thrown=len(writer.thrown),
        dropped=sum(record.dropped for record in records),
    )


def _metadata(spec: DatasetSpec, settings: dict[str, Any], made: DatasetSummary) -> dict[str, Any]:
    """Returns the provenance of a dataset."""
    scripted = "made by mac-jax with OGBench's scripted expert; not the files that OGBench hosts"
    trained = (
        "made by mac-jax with an expert that it trained itself; results on it are not comparable with those "
        "on the files that OGBench hosts"
    )
    own = {} if spec.expert_checksum is None else {"expert": "ours"}
    rate = {"hit_rate": round(made.hits / max(made.targets, 1), 4)}
    if family_and_style(spec)[0] in MAZES:
        steps = (made.train_rows + made.val_rows) * (1 - 1 / episode_rows(spec.dataset))
        rate = {"steps_per_goal": round(steps / made.hits, 1) if made.hits else None}
    source = {"source": trained if own else scripted}
    return {**source, **settings, **own, **rate, "collected": made._asdict()}


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yields a working folder of this process alone, which is removed even after an interrupt."""
    work = work_folder(path.parent, f"{path.stem}.{os.getpid()}")
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):
            if not path.exists():
                val_path(path).unlink(missing_ok=True)
