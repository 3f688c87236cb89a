"""A small dataset in D4RL's schema, made with the real gymnasium environment."""

from pathlib import Path

import gymnasium
import h5py
import numpy as np

IDS = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}


def write_random(path: Path, kind: str, episodes: int, limit: int = 100, seed: int = 0) -> Path:
    """Episodes of random actions, cut after `limit` steps, as the arrays of a D4RL file."""
    rng = np.random.default_rng(seed)
    env = gymnasium.make(IDS[kind], max_episode_steps=limit)
    names = ("observations", "actions", "next_observations", "rewards", "terminals", "timeouts")
    rows: dict[str, list] = {name: [] for name in names}
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed * 1000 + episode)
        over = False
        while not over:
            action = rng.uniform(-1, 1, env.action_space.shape or ()).astype(np.float32)
            after, reward, terminated, cut, _ = env.step(action)
            over = terminated or cut
            for name, value in zip(
                rows, (obs, action, after, reward, terminated, cut and not terminated), strict=True
            ):
                rows[name].append(value)
            obs = after
    env.close()
    with h5py.File(path, "w") as file:
        for name, values in rows.items():
            flag = name in ("terminals", "timeouts")
            file[name] = np.asarray(values, bool if flag else np.float32)
    return path
