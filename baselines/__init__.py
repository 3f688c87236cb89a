"""Every algorithm by the name that `--algo` takes, and `register_algorithm` for one's own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from baselines.cql import CQL, CQLConfig
from baselines.diffuser import Diffuser, DiffuserConfig
from baselines.flow_bc import FlowBC, FlowBCConfig
from baselines.fmpc import FMPC, FMPCConfig
from baselines.fql import FQL, FQLConfig
from baselines.gciql import GCIQL, GCIQLConfig
from baselines.hd_da import HDDA, HDDAConfig
from baselines.idql import IDQL, IDQLConfig
from baselines.ifql import IFQL, IFQLConfig
from baselines.iql import IQL, IQLConfig
from baselines.leq import LEQ, LEQConfig
from baselines.mobile import MOBILE, MOBILEConfig
from baselines.mopo import MOPO, MOPOConfig
from baselines.nsac_bc import NStepSACBC, NStepSACBCConfig
from baselines.rebrac import ReBRAC, ReBRACConfig
from baselines.sharsa import SHARSA, SHARSAConfig
from baselines.tap import TAP, TAPConfig
from baselines.tt import TT, TTConfig
from mac.ablations.gaussian import GaussianConfig, mac_gaussian
from mac.ablations.mac_fql import MACFQLConfig, mac_fql
from mac.ablations.no_distillation import NoDistillConfig, mac_nodistill
from mac.algorithm import AbstractAlgorithm
from mac.config import CommonConfig
from mac.config import Config as MACConfig
from mac.errors import unknown_name
from mac.mac import MAC
from mac.plugins import load_plugins

__all__ = ["REGISTRY", "AlgorithmEntry", "algorithms", "get_algorithm", "register_algorithm"]


class AlgorithmEntry(NamedTuple):
    """One algorithm: `algorithm(config(...), env_spec, steps)` builds it for a run of so many updates.

    Attributes:
        title: name with its source.
        learns: what it learns, in one line.
        year: of the publication.
        arxiv: its number there; empty if it has none.
        hparams: a file of rows as in `experiments/hparams.toml`, of an algorithm of one's own; None where it
            trains with its configuration's defaults.
    """

    config: type[Any]
    algorithm: Callable[..., AbstractAlgorithm]
    title: str
    learns: str
    year: int
    arxiv: str
    hparams: Path | None = None

    @property
    def source(self) -> str:
        """Title, number and year of the publication, as far as there are."""
        arxiv, year = f"arXiv {self.arxiv}" if self.arxiv else "", str(self.year or "")
        return ", ".join(filter(None, (self.title, arxiv, year)))


def _mac(config: type[MACConfig], algorithm: Callable[..., MAC], title: str, learns: str) -> AlgorithmEntry:
    """An entry of the paper that MAC and its ablations are from."""
    return AlgorithmEntry(config, algorithm, f"{title} (Park et al. 2025)", learns, 2025, "2512.08108")


REGISTRY: Mapping[str, AlgorithmEntry] = {
    "mac": _mac(
        MACConfig, MAC, "MAC",
        "model of action chunks, V from its rollouts; acts by the best of N chunks of a flow policy",
    ),
    "mac_gaussian": _mac(
        GaussianConfig, mac_gaussian, "MAC (Gau)", "MAC whose policy is a Gaussian, not a flow",
    ),
    "mac_fql": _mac(
        MACFQLConfig, mac_fql, "MAC (FQL)", "MAC whose policy is trained on Q; one sample, no choice",
    ),
    "mac_nodistill": _mac(
        NoDistillConfig, mac_nodistill, "MAC without distillation",
        "MAC whose one-step policy is trained on the data, not on a flow of many steps",
    ),
    "flow_bc": AlgorithmEntry(
        FlowBCConfig, FlowBC, "flow behaviour cloning (Lipman et al. 2023)",
        "flow policy that imitates the data", 2023, "2210.02747",
    ),
    "iql": AlgorithmEntry(
        IQLConfig, IQL, "IQL (Kostrikov et al. 2022)",
        "V as an expectile of Q over the data's actions; Gaussian policy by weighted imitation",
        2022, "2110.06169",
    ),
    "fql": AlgorithmEntry(
        FQLConfig, FQL, "FQL (Park et al. 2025)",
        "one-step policy that maximizes Q, distilled from a flow of the data", 2025, "2502.02538",
    ),
    "rebrac": AlgorithmEntry(
        ReBRACConfig, ReBRAC, "ReBRAC (Tarasov et al. 2023)",
        "TD3 that pays for leaving the data, in policy and critics", 2023, "2305.09836",
    ),
    "ifql": AlgorithmEntry(
        IFQLConfig, IFQL, "IFQL (Park et al. 2025)",
        "values of IQL; acts by the best of N actions of a flow policy", 2025, "2502.02538",
    ),
    "idql": AlgorithmEntry(
        IDQLConfig, IDQL, "IDQL (Hansen-Estruch et al. 2023)",
        "values of IQL; acts by the best of N actions of a diffusion policy", 2023, "2304.10573",
    ),
    "gciql": AlgorithmEntry(
        GCIQLConfig, GCIQL, "GCIQL (Park et al. 2025)",
        "goal-conditioned IQL values; Gaussian policy by DDPG+BC", 2025, "2410.20092",
    ),
    "nsac_bc": AlgorithmEntry(
        NStepSACBCConfig, NStepSACBC, "n-step SAC+BC (Park et al. 2025)",
        "n-step Q of the probability to reach a goal; Gaussian policy by SAC+BC",
        2025, "2506.04168",
    ),
    "sharsa": AlgorithmEntry(
        SHARSAConfig, SHARSA, "SHARSA (Park et al. 2025)",
        "values and flow policy of subgoals n steps ahead, and a flow policy that goes there",
        2025, "2506.04168",
    ),
    "fmpc": AlgorithmEntry(
        FMPCConfig, FMPC, "F-MPC (Park et al. 2025)",
        "flows of action chunks and of the states after them; acts by the best of N under Q", 2025,
        "2512.08108",
    ),
    "mopo": AlgorithmEntry(
        MOPOConfig, MOPO, "MOPO (Yu et al. 2020)",
        "soft actor-critic on imagined steps, less the spread of the models", 2020, "2005.13239",
    ),
    "mobile": AlgorithmEntry(
        MOBILEConfig, MOBILE, "MOBILE (Sun et al. 2023)",
        "soft actor-critic on imagined steps, less the disagreement of the models about values", 2023, "",
    ),
    "leq": AlgorithmEntry(
        LEQConfig, LEQ, "LEQ (Park and Lee 2024)",
        "lower expectile of imagined returns, which a deterministic policy maximizes through the model",
        2024, "2407.00699",
    ),
    "cql": AlgorithmEntry(
        CQLConfig, CQL, "CQL (Kumar et al. 2020)",
        "soft actor-critic whose Q is low where the data are not", 2020, "2006.04779",
    ),
    "diffuser": AlgorithmEntry(
        DiffuserConfig, Diffuser, "Diffuser (Janner et al. 2022)",
        "diffusion of trajectories; follows a plan sampled from the state to the goal", 2022, "2205.09991",
    ),
    "hd_da": AlgorithmEntry(
        HDDAConfig, HDDA, "HD-DA (Chen et al. 2024)",
        "diffusion of every 15th state, and of the steps between two; follows a plan to the goal", 2024,
        "2401.02644",
    ),
    "tap": AlgorithmEntry(
        TAPConfig, TAP, "TAP (Jiang et al. 2023)",
        "autoencoder of trajectories, and a prior of its codes, among which beam search plans", 2023,
        "2208.10291",
    ),
    "tt": AlgorithmEntry(
        TTConfig, TT, "Trajectory Transformer (Janner et al. 2021)",
        "language model of trajectories; acts by beam search for expected return", 2021, "2106.02039",
    ),
}  # fmt: skip
"""The algorithms of this project, by name."""

_registered: dict[str, AlgorithmEntry] = {}


def register_algorithm(
    name: str,
    config: type[Any],
    algorithm: Callable[..., AbstractAlgorithm],
    *,
    title: str = "",
    learns: str = "",
    year: int = 0,
    arxiv: str = "",
    hparams: Path | None = None,
) -> None:
    """Adds an algorithm of one's own, which every program then knows by its name.

    A program finds the call in a package that declares the entry point `mac_jax.plugins` (`mac.plugins`).
    Arguments are those of `AlgorithmEntry`.

    Args:
        config: subclass of `mac.config.CommonConfig`; each hyperparameter becomes a flag `--hp.NAME`, whose
            help is its docstring.
        algorithm: `algorithm(config(...), env_spec, steps)` builds it.
    Raises:
        ValueError: the name is taken or malformed, or `config` is of another class.
    """
    if name in REGISTRY or name in _registered:
        raise ValueError(f"an algorithm {name!r} exists already; choose another name")
    if not name.isidentifier():
        raise ValueError(f"name {name!r} may have letters, digits and '_' only")
    if not issubclass(config, CommonConfig):
        raise ValueError(f"config {config!r} must be a subclass of mac.config.CommonConfig")
    _registered[name] = AlgorithmEntry(config, algorithm, title or name, learns, year, arxiv, hparams)


def algorithms() -> dict[str, AlgorithmEntry]:
    """Returns this project's algorithms and those registered, by plug-ins too.

    Raises:
        UserError: a plug-in cannot be loaded.
    """
    load_plugins()
    return {**REGISTRY, **_registered}


def get_algorithm(name: str, asked_by: str = "algorithm") -> AlgorithmEntry:
    """Returns the algorithm called `name`.

    Args:
        asked_by: the flag or key that names it, for the message.
    Raises:
        UserError: there is none, with the closest name; or a plug-in cannot be loaded.
    """
    entry = REGISTRY.get(name) or algorithms().get(name)
    if entry is None:
        raise unknown_name(asked_by, name, algorithms())
    return entry
