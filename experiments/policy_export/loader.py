"""Acts with an exported policy. Needs Python, jax, numpy and flatbuffers, and nothing of this project."""

import json
import zipfile

import jax
import jax.export
import numpy as np


class ExportedPolicy:
    """`policy = ExportedPolicy("policy.jaxpolicy"); action = policy(obs, goal)`; `reset` begins episodes.

    Observations and goals are in the environment's units, [D] or [B, D]; actions in [-1, 1]. Chunks of
    `header["chunk"]` actions are executed open loop.
    """

    def __init__(self, path):
        with zipfile.ZipFile(path) as file:
            self.header = json.loads(file.read("header.json"))
            self._decide = jax.jit(jax.export.deserialize(bytearray(file.read("policy.stablehlo"))).call)
        self.reset()

    def reset(self, task=None, episode=0):
        """Begins episodes of a task, numbered from `episode` on; the numbers decide the policy's noise."""
        self._task = self.header["tasks"][0] if task is None else task
        self._episode, self._step = episode, 0

    def __call__(self, obs, goal=None):
        """Returns the next action, [A], or one for each row of `obs`, [B, A]."""
        rows = np.atleast_2d(np.asarray(obs, np.float32))
        at = self._step % self.header["chunk"]
        if at == 0:
            whole = lambda number: np.full(len(rows), number, np.int32)  # noqa: E731
            place = whole(self._task), whole(self._episode) + np.arange(len(rows), dtype=np.int32)
            goals = (
                [] if goal is None else [np.broadcast_to(np.float32(goal), (len(rows), np.shape(goal)[-1]))]
            )
            count = whole(self._step // self.header["chunk"])
            self._chunk = np.asarray(self._decide(rows, *goals, *place, count))
        self._step += 1
        return self._chunk[0, at] if np.ndim(obs) == 1 else self._chunk[:, at]
