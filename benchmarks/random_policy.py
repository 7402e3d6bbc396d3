"""The zero of normalised scores: mean undiscounted return of uniformly random actions, 300 episodes an environment.

python benchmarks/random_policy.py HalfCheetah-v4 Hopper-v4      # writes results/random_policy.csv
"""

import csv
import os
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np

EPISODES = 300
RESULTS = Path(__file__).resolve().parent / "results/random_policy.csv"


def returns(env_id: str) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date")  # the v4 ids are meant
        env = gym.make(env_id)
    env.action_space.seed(0)
    totals = np.zeros(EPISODES)
    for episode in range(EPISODES):
        env.reset(seed=episode)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            totals[episode] += reward
            done = terminated or truncated
    return totals


def main(env_ids: list[str]):
    rows = {}
    if RESULTS.exists():
        with open(RESULTS) as file:
            rows = {row["env_id"]: row for row in csv.DictReader(file)}
    for env_id in env_ids:
        if env_id not in rows:
            totals = returns(env_id)
            rows[env_id] = {
                "env_id": env_id,
                "episodes": EPISODES,
                "mean": f"{totals.mean():.3f}",
                "std": f"{totals.std():.3f}",
            }
    temporary = RESULTS.with_suffix(".tmp")
    with open(temporary, "w") as file:
        writer = csv.DictWriter(file, ["env_id", "episodes", "mean", "std"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[env_id] for env_id in sorted(rows))
    os.replace(temporary, RESULTS)  # the old rows or the new, whatever happens


if __name__ == "__main__":
    main(sys.argv[1:])
