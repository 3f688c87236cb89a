"""Lines that describe a program compiled for a GPU that is not there."""

from collections import Counter
from typing import NamedTuple

from experiments.deviceless.cards import Card
from experiments.deviceless.compiler import DevicelessProgram
from experiments.deviceless.time_model import HOST_WAIT, LAUNCH, Cost, cost_of
from mac.formatting import counted
from mac.run.cost.gpu_program import Kernel, callbacks, host_waits, own_kernels
from mac.run.report.timing import duration

JAX_SHARE = 0.75
"""Share of the memory that JAX takes unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise."""
MOST_LINES = 8
"""Source lines that are listed."""


class Unit(NamedTuple):
    """A part of a program that figures are given for.

    Attributes:
        name: such as "update of all 4 seeds".
        times: how many of them one call of the program is.
        in_run: how many of them the whole run is; 0 if that is not known.
    """

    name: str
    times: int = 1
    in_run: int = 0


def program_lines(
    program: DevicelessProgram, kernels: list[Kernel], card: Card, unit: Unit, more_memory: int = 0
) -> list[str]:
    """Returns the description of a program; figures are of one `unit`.

    Args:
        more_memory: bytes that the run holds besides, such as the next window of data.
    """
    cost = cost_of(kernels, card, unit.times)
    lines = [
        memory_line(program, card, more_memory),
        *work_lines(kernels, cost, card, unit),
        *time_lines(cost, card, unit),
        *host_lines(kernels),
        tf32_line(kernels),
        *source_lines(kernels, card, unit),
    ]
    return [f"  {line}" for line in lines]


def memory_line(program: DevicelessProgram, card: Card, more: int = 0) -> str:
    """Says how much of the card's memory a program takes, and if that is there."""
    need = program.memory + more
    if need > card.memory:
        verdict = "NOT ENOUGH; take fewer --seeds, a smaller --hp.batch or --data.resident no"
    elif need > JAX_SHARE * card.memory:
        verdict = f"enough, but JAX takes {JAX_SHARE:.0%} unless XLA_PYTHON_CLIENT_MEM_FRACTION is set"
    else:
        verdict = "enough"
    besides = f", the next window {_giga(more)}" if more else ""
    parts = f"arguments {_giga(program.arguments)}, scratch {_giga(program.scratch)}"
    results = (
        f"results {_giga(program.results)}, of which {_giga(program.in_place)} take their arguments' place"
    )
    return f"memory       {_giga(need)} of {_giga(card.memory)}: {verdict} ({parts}, {results}{besides})"


def work_lines(kernels: list[Kernel], cost: Cost, card: Card, unit: Unit) -> list[str]:
    """Counts launches, operations of products by precision, and bytes."""
    of_products = cost_of([each for each in kernels if each.product], card, unit.times)
    flops = Counter[str]()
    for each in kernels:
        if each.product:
            flops[_precision(each)] += each.times * each.product.flops
    kinds = ", ".join(f"{kind} {value / unit.times / 1e9:,.4g}" for kind, value in flops.most_common())
    rest = cost.bytes - of_products.bytes
    lines = [
        f"launches     {cost.launches:,.0f} per {unit.name} ({of_products.launches:,.0f} of products); "
        f"{counted(len(kernels), 'different kernel')}",
        f"arithmetic   {cost.flops / 1e9:,.4g} GFLOP of products ({kinds or 'none'})",
        f"traffic      {_size(cost.bytes)} read and written (products {_size(of_products.bytes)}, the rest "
        f"{_size(rest)}), {cost.flops / max(cost.bytes, 1):,.0f} FLOP per byte",
    ]
    if own := own_kernels(kernels):
        times = sum(each.times for each in own) / unit.times
        lines.append(f"own kernels  {times:,.0f} launches of Pallas kernels, whose products are not counted")
    return lines


def time_lines(cost: Cost, card: Card, unit: Unit) -> list[str]:
    """Gives the roofline and the modelled time, with the assumptions in them."""
    lines = [
        f"roofline     {_time(cost.roofline)}: products {_time(cost.roofline_flops)}, traffic "
        f"{_time(cost.roofline_bytes)} (assumed: TF32 {card.rates.tf32 / 1e12:,.0f} and bf16 "
        f"{card.rates.bf16 / 1e12:,.0f} TFLOP/s, {card.rates.memory / 1e12:,.1f} TB/s)",
        f"estimate     {_time(cost.seconds)} per {unit.name}: kernels {_time(cost.busy)}, launches "
        f"{_time(cost.seconds - cost.busy)} (modelled, not measured: {LAUNCH * 1e6:.1f} us per launch)",
    ]
    if unit.in_run:
        lines.append(
            f"whole run    {unit.in_run:,} updates: about {duration(unit.in_run * cost.seconds)} of training "
            f"(at the roofline {duration(unit.in_run * cost.roofline)}); evaluation and compiling are extra"
        )
    return lines


def host_lines(kernels: list[Kernel]) -> list[str]:
    """Says where the host is waited for: callbacks, and loops of unknown length."""
    found, loops = callbacks(kernels), host_waits(kernels)
    where = ", ".join(sorted({each.source or each.name for each in found}))
    lines = [
        f"callbacks    {counted(len(found), 'call')} of Python ({where})" if found else "callbacks    none"
    ]
    if loops:
        lines.append(
            f"host waits   {counted(loops, 'loop')} of unknown length, counted once above: each iteration "
            f"waits for the host (assumed: {HOST_WAIT * 1e6:.0f} us)"
        )
    else:
        lines.append("host waits   none: every loop has a known length")
    return lines


def tf32_line(kernels: list[Kernel]) -> str:
    """Lists the lines whose float32 products the card rounds to TF32."""
    lines = Counter(each.source or "elsewhere" for each in kernels if each.product and each.product.tf32)
    if not lines:
        return "tf32         no product"
    shown = ", ".join(f"{name} ({count})" for name, count in lines.most_common(MOST_LINES))
    more = f", and {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
    return f"tf32         float32 products with 10 bits of mantissa, by line: {shown}{more}"


def source_lines(kernels: list[Kernel], card: Card, unit: Unit) -> list[str]:
    """Lists the source lines that launch most."""
    by_line: dict[str, list[Kernel]] = {}
    for each in kernels:
        by_line.setdefault(each.source or "elsewhere", []).append(each)
    costs = {name: cost_of(some, card, unit.times) for name, some in by_line.items()}
    ranked = sorted(costs.items(), key=lambda item: -item[1].launches)[:MOST_LINES]
    return ["lines        that launch most"] + [
        f"  {cost.launches:9,.1f} launches {cost.bytes / 1e6:10,.1f} MB {cost.busy * 1e3:8.3f} ms  {name}"
        for name, cost in ranked
    ]


def _precision(kernel: Kernel) -> str:
    product = kernel.product
    assert product is not None
    if product.dtype == "f32":
        return "TF32" if product.tf32 else "float32"
    return product.dtype


def _giga(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds < 1 else f"{seconds:,.1f} s"
