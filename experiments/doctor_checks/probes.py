"""Probes of `doctor.py`: small programs in processes of their own, because a broken package may kill them.

Each prints its findings as one line of JSON. All run at the same time, so they take as long as the slowest.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.doctor_checks.findings import ROOT

JAX = """
import json, jax, jax.numpy as jnp
total = float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((8, 8), jnp.float32)))
assert total == 512, f"8x8 ones give {total} instead of 512"
devices = jax.devices()
memory = (devices[0].memory_stats() or {}).get("bytes_limit")
print(json.dumps({"backend": devices[0].platform, "device": devices[0].device_kind, "count": len(devices),
                  "memory": memory}))
"""

PHYSICS = """
import json, time, mujoco, numpy as np
from envs_mjx.manipulation.scenes import build_scene
model = build_scene("cube-single").model
data = mujoco.MjData(model)
began = time.perf_counter()
mujoco.mj_step(model, data, 100)
seconds = time.perf_counter() - began
assert np.isfinite(data.qpos).all() and data.time > 0, "the scene's state is not finite after 100 steps"
print(json.dumps({"rate": round(100 / seconds)}))
"""

MJX = """
import json, mujoco
from mujoco import mjx
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><body><freejoint/><geom size='.1'/></body></worldbody></mujoco>")
assert mjx.put_model(model).nq == 7, "a model has the wrong size"
try:  # MJX imports warp where it is installed, so that one process tells of both
    from envs_mjx.engines.warp_setup import require_warp
    require_warp()
    import warp
    print(json.dumps({"warp": True, "cuda": warp.is_cuda_available()}))
except Exception as error:
    print(json.dumps({"warp": False, "why": str(error)[:200]}))
"""

PICTURE = """
import json, mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom type='box' size='.2 .2 .2'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 48, 64) as renderer:
    renderer.update_scene(data)
    picture = renderer.render()
assert picture.std() > 0, "the picture is of one colour"
print(json.dumps({}))
"""


def drawing_remedy(why: str) -> str:
    """Returns a remedy for a renderer of MuJoCo that cannot draw.

    Args:
        why: errors of the platforms.
    """
    alternative = "or take render_video.py --renderer drawing, which needs neither EGL nor OSMesa"
    variables = [name for name in ("MUJOCO_EGL_DEVICE_ID", "MUJOCO_GL") if name in os.environ]
    named = [name for name in variables if name in why] or variables
    if named:
        values = " and ".join(f"{name} (it is {os.environ[name]!r})" for name in named)
        return f"unset or correct {values}, {alternative}"
    return f"install libegl1 (with a GPU) or libosmesa6, {alternative}"


class ProbeResult(NamedTuple):
    """Result of a probe: its findings, or the last line of its error."""

    found: dict[str, Any] | None
    error: str = ""


class Probe:
    """A running program; `result` waits for its end."""

    def __init__(self, code: str, environment: Mapping[str, str] | None = None):
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        settings = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        # -P: modules in the script's folder must not shadow packages of the same names.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", code],
            env=settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self, timeout: float = 120.0) -> ProbeResult:
        """Waits for the end and returns the result; never raises."""
        try:
            said, complaints = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return ProbeResult(None, f"gave no answer within {timeout:.0f} s")
        if self._process.returncode < 0:
            return ProbeResult(None, f"the process was ended by signal {-self._process.returncode}")
        lines = [line.strip() for line in complaints.splitlines() if line.strip()]
        if self._process.returncode:
            return ProbeResult(None, lines[-1][:200] if lines else f"exit status {self._process.returncode}")
        try:
            return ProbeResult(json.loads(said.splitlines()[-1]))
        except (IndexError, ValueError):
            return ProbeResult(None, "gave no answer")
