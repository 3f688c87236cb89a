"""The ablations in the training loop: 200 updates, one trace, and the same bits after an abort."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mac.algorithm import AbstractLossAlgorithm
from mac.run.io.logger import EVAL, METRICS, read_rows
from mac.run.train import RunConfig
from tests.helpers import toy_env
from tests.helpers.numpy_ablations import KINDS, MODES, make
from tests.helpers.toy_algorithm import make_job, result, run

pytestmark = pytest.mark.slow  # `test_contract` looks at the same without files

RUN = RunConfig(segment=40, eval_every=1000, checkpoint_every=80, keep=2)
STEPS = 200


def job(kind: str, mode: str) -> Any:
    env = toy_env.PointEnv() if mode == "reward" else toy_env.GoalPointEnv()
    return make_job(STEPS, algo=make(kind, mode), env=env, run=RUN)


@pytest.fixture(scope="module", params=[(kind, mode) for kind in KINDS for mode in MODES], ids="-".join)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The kind, the mode, the folder of a whole run, and how often its update was traced."""
    traces, real = [], AbstractLossAlgorithm.update

    def counted(self: Any, *args: Any) -> Any:
        traces.append(1)
        return real(self, *args)

    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AbstractLossAlgorithm, "update", counted)
        run(job(*request.param), folder)
    return *request.param, folder, len(traces)


def test_200_updates_are_finite_and_fit_the_model(trained: tuple[Any, ...]):
    *_, folder, _ = trained
    every = list(read_rows(folder / METRICS))
    rows = [row for row in every if "model/dynamics_loss" in row]  # the others are the evaluation's diagnoses
    assert [row["step"] for row in rows] == [s for s in range(40, STEPS + 1, 40) for _ in range(2)]
    assert all(np.isfinite(value) for row in every for value in row.values() if value is not None)
    assert rows[-1]["model/dynamics_loss"] < 0.7 * rows[0]["model/dynamics_loss"]
    assert {row["step"] for row in read_rows(folder / EVAL)} == {STEPS}


def test_update_is_traced_once(trained: tuple[Any, ...]):
    assert trained[-1] == 1


def test_aborted_and_continued_run_ends_with_the_same_bits(trained: tuple[Any, ...], tmp_path: Path):
    """It ends at update 120, when 80 are in a checkpoint, as a kill would end it: nothing is saved."""
    kind, mode, whole, _ = trained

    class Killed(BaseException):
        pass

    def kill(what: str, step: int) -> None:
        if what == "update" and step >= 120:
            raise Killed

    with pytest.raises(Killed):
        run(job(kind, mode), tmp_path, hook=kill)
    run(job(kind, mode), tmp_path, resume=True)
    assert result(tmp_path) == result(whole)
