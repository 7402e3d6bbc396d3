"""Steps a second of hppo_hybrid.py's embedded environments alone, random actions, one core.

python benchmarks/hybrid_speed.py          # a markdown table: median (min-max) of 5
"""

import os
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hppo_hybrid  # noqa: F401, E402  registers the environments

NAMES = "HybridMoving-v0 HybridSliding-v0 HybridCatchPoint-v0 HybridHardMove4-v0 HybridHardMove10-v0".split()


def steps_per_second(name: str, num_envs: int, steps: int = 300) -> float:
    env = gym.make_vec(name, num_envs, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(20)]
    started = time.perf_counter()
    for t in range(steps):
        _, _, terminated, truncated, _ = env.step(actions[t % len(actions)])
        if terminated.any():
            env.reset(options={"reset_mask": terminated | truncated})
    return steps * num_envs / (time.perf_counter() - started)


def main():
    sizes = (8, 64, 1024)
    speeds = {(name, n): [] for name in NAMES for n in sizes}
    for _ in range(5):
        for name, n in speeds:
            speeds[name, n].append(steps_per_second(name, n))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, numpy {np.__version__}\n")
    print(f"| environment | {' | '.join(f'{n} at once' for n in sizes)} |\n{'|---' * (1 + len(sizes))}|")
    for name in NAMES:
        cells = [f"{np.median(s):,.0f} ({min(s):,.0f}-{max(s):,.0f})" for s in (speeds[name, n] for n in sizes)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
