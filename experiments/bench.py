"""How fast training is, beside the usual loop and beside the machine's matrix products.

    python experiments/bench.py --seeds 1 2 4 8 --widths 128 256 512 --out experiments/results/bench_cpu.csv

Every configuration runs in a process of its own, so that its peak memory is its own and the CPU may
count as another number of devices. Within it the contenders (`contenders.py`) take turns: machines
are noisy, and what is compared must see the same noise. All train the paper's MAC, on random data
of cube-single's shapes.
"""

import csv
import dataclasses
import datetime
import io
import json
import resource
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

from experiments import contenders
from experiments.contenders import Timing
from mac.errors import UserError
from mac.mac import MAC, Config
from mac.run import segment as loop
from mac.run.record import cores, cpu_model, git_state, replace_file
from mac.types import EnvSpec

SPEC = EnvSpec("shapes of cube-single", 28, 5, None, (1,), 200, 0.05)
EXPECTED_SHARE = 0.6  # of the matrix-product rate; only sizes the turns
ONE = "--one"  # measure the first width and number of seeds in this very process, and print JSON


@dataclass(frozen=True)
class Args:
    """Measures training speed; prints a table and writes a CSV file."""

    seeds: tuple[int, ...] = (1, 2, 4, 8)
    """numbers of seeds trained together"""
    widths: tuple[int, ...] = (128, 256, 512)
    """widths of the four hidden layers of every network"""
    batch: int = 256
    """chunks per update"""
    rows: int = 200_000
    """rows of the random dataset"""
    seconds: float = 3.0
    """seconds that each contender is measured for, per configuration"""
    rounds: int = 5
    """turns that these seconds are cut into; figures are medians over them"""
    out: Path | None = None
    """CSV file to write"""
    quick: bool = False
    """tiny batches and rollouts, to see that everything runs: the figures mean nothing"""

    def check(self) -> None:
        """Raises UserError for values that make no sense; not `__post_init__`, whose errors tyro rewords."""
        for name in ("seeds", "widths"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: give at least one number, each at least 1")
        for name, least in (("batch", 1), ("rounds", 1), ("rows", 2 * contenders.EPISODE_ROWS)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least {least}")
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"--seconds={self.seconds}: must be positive and finite")

    def config(self, width: int) -> Config:
        """The paper's MAC at this width and batch."""
        if self.quick:
            return Config(batch=8, hidden=(width,) * 4, candidates=2, rollout=2, flow_steps=2)
        return Config(batch=self.batch, hidden=(width,) * 4)


@dataclass(frozen=True)
class Row:
    """Figures of one configuration, medians over turns; the names are the columns of the CSV file.

    Attributes:
        updates: updates of each seed in one turn.
        rate: seed-updates per second of the segment; `plain_rate` is the plain loop's.
        ratio: of the two, turn by turn.
        gflop: operations of the matrix products in one update of one seed, in 10^9.
        product_gflops: the machine's rate of such products, in 10^9 per second.
        share: of that rate that the segment reaches, turn by turn.
        compile_s: seconds to compile the segment; `plain_compile_s` the plain loop's update.
        peak_mb: peak memory, 10^6 bytes: of the whole process on CPU, of the device elsewhere, before
            the plain loop exists.
        cores: processor time over wall time while the segment ran: lower than usual on a busy machine.
    """

    width: int
    seeds: int
    batch: int
    devices: int
    updates: int
    rate: float
    plain_rate: float
    ratio: float
    gflop: float
    product_gflops: float
    share: float
    compile_s: float
    plain_compile_s: float
    peak_mb: float
    cores: float
    plain_cores: float
    product_cores: float


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    try:
        one, flags = ONE in argv, [flag for flag in argv if flag != ONE]
        args = tyro.cli(Args, args=flags, prog="python experiments/bench.py")
        args.check()
        if one:
            print(json.dumps(dataclasses.asdict(measure(args, args.widths[0], args.seeds[0]))))
            return 0
        rows = [in_process(args, width, seeds) for width in args.widths for seeds in args.seeds]
        Console().print(table(rows))
        if args.out is not None:
            write_csv(args.out, rows, argv)
            print(args.out)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def in_process(args: Args, width: int, seeds: int) -> Row:
    """`measure` in a process of its own, whose messages go to stderr.

    Raises:
        UserError: it failed.
    """
    print(f"measuring width {width}, seeds {seeds}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, ONE, *(["--quick"] if args.quick else [])]
    for name in ("batch", "rows", "seconds", "rounds"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--widths", str(width), "--seeds", str(seeds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"width {width}, seeds {seeds}: status {done.returncode}; see the lines above")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def measure(args: Args, width: int, seeds: int) -> Row:
    """Measures one configuration; it starts JAX, so a process can call it once."""
    loop.use_cpu_devices(seeds)
    jax.config.update("jax_enable_compilation_cache", False)  # compile time is one of the figures
    cfg, mesh = args.config(width), loop.seed_mesh(seeds)
    algo = MAC(cfg, SPEC)
    window = contenders.random_window(SPEC, args.rows, cfg.chunk)
    flop = contenders.update_flops(algo, window)
    # The products of the candidates dominate an update. On a CPU, each device computes those of one
    # seed at a time, or all cores share them: the better is the machine's rate.
    cpu = jax.default_backend() == "cpu"
    together = 1 if cpu else seeds
    meshes = {m.size: m for m in (mesh, loop.seed_mesh(1))}
    chains = [contenders.products(width, cfg.batch * cfg.candidates * together, m) for m in meshes.values()]
    turn_s, speed = args.seconds / args.rounds, max(contenders.time_turn(c).speed for c in chains)

    updates = max(1, round(turn_s * EXPECTED_SHARE * speed / (flop * seeds)))
    segment = contenders.segment(algo, mesh, window, seeds, updates)
    contenders.time_turn(segment)
    peak = peak_bytes()
    plain = contenders.plain_loop(algo, window, seeds, updates)
    chains = {f"product{i}": c.times(max(1, round(turn_s * speed / c.work))) for i, c in enumerate(chains)}
    taken = contenders.take_turns({"segment": segment, "plain": plain, **chains}, args.rounds)

    ours, usual = taken["segment"], taken["plain"]
    product = [max(turns) for turns in zip(*(taken[name] for name in chains), strict=True)]
    return Row(
        width=width,
        seeds=seeds,
        batch=cfg.batch,
        devices=mesh.size,
        updates=updates,
        rate=_median(ours) / flop,
        plain_rate=_median(usual) / flop,
        ratio=median_ratio(ours, usual),
        gflop=flop / 1e9,
        product_gflops=_median(product) / 1e9,
        share=median_ratio(ours, product),
        compile_s=segment.compile_s,
        plain_compile_s=plain.compile_s,
        peak_mb=peak / 1e6,
        cores=statistics.median(t.cores for t in ours),
        plain_cores=statistics.median(t.cores for t in usual),
        product_cores=statistics.median(t.cores for t in product),
    )


def _median(turns: list[Timing]) -> float:
    return statistics.median(t.speed for t in turns)


def median_ratio(turns: list[Timing], others: list[Timing]) -> float:
    """Median over rounds of the ratio of speeds within a round, which saw the same noise."""
    return statistics.median(a.speed / b.speed for a, b in zip(turns, others, strict=True))


def peak_bytes() -> int:
    """Peak memory so far: of the process on CPU, of the fullest device elsewhere."""
    if jax.default_backend() == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices())


def table(rows: Sequence[Row]) -> Table:
    """What a reader wants of the figures."""
    title = "seed-updates per second: of the segment, of a plain loop, and as a share of matrix products"
    shown = Table(title=title, title_justify="left")
    for head in ("width", "seeds", "devices", "segment", "plain", "ratio", "share", "compile s", "peak MB"):
        shown.add_column(head, justify="right")
    for r in rows:
        figures = (f"{r.rate:.3g}", f"{r.plain_rate:.3g}", f"{r.ratio:.2f}", f"{r.share:.0%}")
        sizes = (f"{r.compile_s:.1f}", f"{r.peak_mb:,.0f}")
        shown.add_row(str(r.width), str(r.seeds), str(r.devices), *figures, *sizes)
    return shown


def write_csv(path: Path, rows: Sequence[Row], argv: Sequence[str]) -> None:
    """Writes the rows below comment lines that say when, where and how they were measured.

    Raises:
        UserError: the file cannot be written.
    """
    git = git_state(Path(__file__).parent) or {"commit": "unknown", "changed": False}
    text = io.StringIO()
    for name, value in {
        "command": shlex.join(["python", "experiments/bench.py", *argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git["commit"] + (" with changes" if git["changed"] else ""),
        "hardware": f"{cpu_model()}, {cores()} cores; {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }.items():
        text.write(f"# {name}: {value}\n")
    writer = csv.DictWriter(text, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in vars(row).items()})
    replace_file(path, lambda file: file.write(text.getvalue().encode()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
