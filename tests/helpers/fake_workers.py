"""A stand-in for the processes that play in real environments."""

from typing import Any

import numpy as np

from experiments.ogbench_eval.worker import Played, Start


class Lanes:
    """Stands for a fleet: episode `seed` takes task + seed % 3 steps and pays its number each step."""

    asked: list[list[tuple[int, Any]]]

    def __init__(self, name: str, count: int):
        self.left = [0] * count
        self.pay = [0] * count
        Lanes.asked = []

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, *_: object) -> None: ...

    def obey(self, orders: list[tuple[int, Any]]) -> list[Played]:
        Lanes.asked.append(orders)
        return [self.one(slot, order) for slot, order in orders]

    def one(self, slot: int, order: Any) -> Played:
        blank = np.zeros(28, np.float32)
        if isinstance(order, Start):
            self.left[slot], self.pay[slot] = order.task + order.seed % 3, order.seed % 100
            return Played(blank, [], False, False, [])
        steps = min(len(order), self.left[slot])
        self.left[slot] -= steps
        done = self.left[slot] == 0
        rewards = [float(self.pay[slot])] * steps
        return Played(blank, rewards, done and self.pay[slot] % 2 == 0, done, [])
