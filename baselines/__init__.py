"""Every algorithm by the name that `--algo` takes: its hyperparameters' class and its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

from baselines.flow_bc import FlowBC, FlowBCConfig
from baselines.iql import IQL, IQLConfig
from mac.algorithm import AbstractAlgorithm
from mac.config import Config as MACConfig
from mac.fql import MACFQL, FQLConfig
from mac.gaussian import GaussianConfig, MACGaussian
from mac.mac import MAC
from mac.nodistill import MACNoDistill, NoDistillConfig


class Entry(NamedTuple):
    """One algorithm: `algorithm(config(...), env_spec, steps)` builds it for a run of so many updates.

    Attributes:
        title: name with its source.
        learns: what it learns, in one line.
        year: of the publication.
        arxiv: its number there.
    """

    config: type[Any]
    algorithm: Callable[..., AbstractAlgorithm]
    title: str
    learns: str
    year: int
    arxiv: str


def _mac(config: type[MACConfig], algorithm: type[MAC], title: str, learns: str) -> Entry:
    """An entry of the paper that MAC and its ablations are from."""
    return Entry(config, algorithm, f"{title} (Park et al. 2025)", learns, 2025, "2512.08108")


REGISTRY: dict[str, Entry] = {
    "mac": _mac(
        MACConfig, MAC, "MAC",
        "model of action chunks, V from its rollouts; acts by the best of N chunks of a flow policy",
    ),
    "mac_gaussian": _mac(
        GaussianConfig, MACGaussian, "MAC (Gau)", "MAC whose policy is a Gaussian, not a flow",
    ),
    "mac_fql": _mac(
        FQLConfig, MACFQL, "MAC (FQL)", "MAC whose policy is trained on Q; one sample, no choice",
    ),
    "mac_nodistill": _mac(
        NoDistillConfig, MACNoDistill, "MAC without distillation",
        "MAC whose one-step policy is trained on the data, not on a flow of many steps",
    ),
    "flow_bc": Entry(
        FlowBCConfig, FlowBC, "flow behaviour cloning (Lipman et al. 2023)",
        "flow policy that imitates the data", 2023, "2210.02747",
    ),
    "iql": Entry(
        IQLConfig, IQL, "IQL (Kostrikov et al. 2022)",
        "V as an expectile of Q over the data's actions; Gaussian policy by weighted imitation",
        2022, "2110.06169",
    ),
}  # fmt: skip
