"""Tests of the probes that `doctor.py` runs in their own processes."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.doctor_checks import checks, probes
from experiments.doctor_checks.findings import BROKEN, OK, WARNING
from experiments.doctor_checks.probes import Probe, ProbeResult
from mac.card_memory import CardMemory
from tests.helpers.doctor import only, report, versions


def trials(**probed: Any) -> checks.Probes:
    """Probes with these outcomes."""
    made = object.__new__(checks.Probes)

    class Done:
        def __init__(self, outcome: ProbeResult):
            self.outcome = outcome

        def result(self) -> ProbeResult:
            return self.outcome

    for name, outcome in probed.items():
        pictures = isinstance(outcome, dict)
        done = {key: Done(each) for key, each in outcome.items()} if pictures else Done(outcome)
        setattr(made, f"_{name}", done)
    return made


def test_a_device_that_jax_cannot_start_on_is_broken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_PLATFORMS", "rocm")
    line = only(trials(jax=ProbeResult(None, "RuntimeError: Unknown backend rocm")).device)
    assert line.state == BROKEN and "Unknown backend" in line.found and "unset JAX_PLATFORMS" in line.remedy


def test_an_idle_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    found = {"backend": "cpu", "device": "cpu", "count": 1, "memory": None}
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert only(trials(jax=ProbeResult(found)).device).state == OK
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    line = only(trials(jax=ProbeResult(found)).device)
    assert line.state == WARNING and "cuda12" in line.remedy


def test_an_accelerator_tells_its_memory():
    found = {"backend": "gpu", "device": "NVIDIA H200", "count": 2, "memory": 140 * 2**30}
    assert only(trials(jax=ProbeResult(found)).device).found == "2 x NVIDIA H200 (gpu), 140 GiB"


def test_memory_of_a_gpu_that_others_hold_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    found = {"backend": "gpu", "device": "NVIDIA H100", "count": 1, "memory": 60 * 2**30}
    monkeypatch.setattr(checks, "card_memory", lambda: CardMemory(80 * 2**30, 30 * 2**30))
    first, second = trials(jax=ProbeResult(found)).device(Path())
    assert first.state == OK and second.state == WARNING
    assert second.found == "other programs hold 50 of 80 GiB"
    monkeypatch.setattr(checks, "card_memory", lambda: CardMemory(80 * 2**30, 79 * 2**30))
    only(trials(jax=ProbeResult(found)).device)


def test_physics_that_fail_are_broken():
    assert only(trials(physics=ProbeResult(None, "no scene")).physics).state == BROKEN
    assert only(trials(physics=ProbeResult({"rate": 50_000})).physics).state == OK


def test_mjx_is_needed_and_warp_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    versions(monkeypatch, warp_lang=None)
    mjx, warp = report(trials(mjx=ProbeResult(None, "ImportError: no mjx")).mjx)
    assert (mjx.state, warp.state) == (BROKEN, OK)
    versions(monkeypatch, warp_lang="1.0")
    mjx, warp = report(trials(mjx=ProbeResult({"warp": False, "why": "too old"})).mjx)
    assert (mjx.state, warp.state, warp.found) == (OK, WARNING, "too old")


def test_a_machine_without_pictures_is_told_what_works(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    none = {name: ProbeResult(None, f"no {name}") for name in checks.PLATFORMS}
    line = only(trials(pictures=none).renderer)
    assert line.state == WARNING and "no egl" in line.found and "--renderer drawing" in line.remedy
    assert only(trials(pictures=none | {"osmesa": ProbeResult({})}).renderer).state == OK
    assert only(trials(pictures=none | {"glfw": ProbeResult({})}).renderer).state == WARNING  # needs a screen


def test_a_variable_that_misleads_the_renderer_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    none = {name: ProbeResult(None, f"no {name}") for name in checks.PLATFORMS}
    none["egl"] = ProbeResult(None, "RuntimeError: MUJOCO_EGL_DEVICE_ID must be between 0 and 0")
    line = only(trials(pictures=none).renderer)
    assert "unset or correct MUJOCO_EGL_DEVICE_ID (it is '99')" in line.remedy
    assert "libegl1" not in line.remedy


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_package_at_all", "No module named 'no_such_package_at_all'"),
        ("import os; os.abort()", "ended by signal 6"),
        ("raise SystemExit(3)", "exit status 3"),
        ("pass", "gave no answer"),
    ],
)
def test_a_probe_that_fails_says_why(code: str, said: str):
    assert said in Probe(code).result().error


def test_a_probe_that_hangs_is_ended():
    began = time.monotonic()
    assert "no answer within" in Probe("import time; time.sleep(60)").result(timeout=0.3).error
    assert time.monotonic() - began < 30


def test_a_probe_that_works_tells_what_it_found():
    assert Probe("print('noise'); print('{\"a\": 1}')").result() == ProbeResult({"a": 1})


def test_probes_are_python():
    for code in (probes.JAX, probes.MJX, probes.PHYSICS, probes.PICTURE):
        compile(code, "probe", "exec")
