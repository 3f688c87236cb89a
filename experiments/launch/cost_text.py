"""The arithmetic, traffic and memory of a run, in words."""

from typing import NamedTuple

from mac import free_memory
from mac.run.cost.flops import Operations, total


class Memory(NamedTuple):
    """Bytes that training takes.

    Attributes:
        data: the dataset, or as much of it as is held at a time; each device has it.
        state: networks, targets and optimiser, of all seeds.
        scratch: what one seed's update needs beside these.
        seeds: how many there are.
        devices: accelerators among which the seeds are shared out; a CPU is one.
        together: how many seeds are updated at a time, on all devices.
    """

    data: int
    state: int
    scratch: int
    seeds: int
    devices: int
    together: int

    @property
    def peak(self) -> int:
        """The most that one device holds."""
        return self.data + -(-(self.state + self.together * self.scratch) // self.devices)


def work_lines(parts: dict[str, Operations], traffic: int) -> list[str]:
    """Operations of one update of one seed, by part, and the bytes that it moves."""
    whole = total(parts)
    lines = [
        f"arithmetic   {whole.flops / 1e9:,.4g} GFLOP per update and seed: matmuls "
        f"{whole.matmuls / 1e9:,.4g}, elementwise {whole.elementwise / 1e9:,.3g}; "
        f"and {whole.transcendental / 1e9:,.3g} G of tanh, roots and the like"
    ]
    for name, part in sorted(parts.items(), key=lambda item: -item[1].flops):
        lines.append(f"  {name:<12} {part.flops / 1e9:10,.3f} GFLOP {part.flops / max(whole.flops, 1):6.1%}")
    lines.append(
        f"traffic      {mega(traffic)} read and written per update and seed, as compiled for this device: "
        f"{whole.flops / max(traffic, 1):,.0f} FLOP per byte"
    )
    return lines


def memory_lines(need: Memory, free: free_memory.Memory) -> list[str]:
    """What training takes here and on an accelerator, and whether there is enough."""
    where = "in all" if need.devices == 1 else f"on each of {need.devices} devices"
    lines = [
        f"memory       {mega(need.peak)} {where}{_verdict(need.peak, free.device)}",
        f"  data         {mega(need.data):>10}",
        f"  networks     {mega(need.state):>10}  of {need.seeds} seeds, with targets and optimiser",
        f"  scratch      {mega(need.together * need.scratch):>10}  of {need.together} at a time",
    ]
    if free.shared:
        alone = need._replace(devices=1, together=need.seeds)
        lines.append(f"  one accelerator, which updates all seeds at a time, takes about {mega(alone.peak)}")
    return lines


def mega(size: float) -> str:
    """Bytes as MB or, if there are many, as GB."""
    return f"{size / 1e6:,.0f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def _verdict(need: int, free: int | None) -> str:
    if free is None:
        return "; how much is free is not known here"
    if need <= free:
        return f", of {mega(free)} free: enough"
    return f", but only {mega(free)} are free: NOT ENOUGH; take fewer --seeds or a smaller --hp.batch"
