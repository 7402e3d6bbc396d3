"""Steps a second of environments/hybrid.py alone, random actions, one core; and of hybrid-platform, if it is installed.

python benchmarks/hybrid_speed.py          # a markdown table: median (min-max) of 5
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import environments.hybrid  # noqa: F401, E402  registers the ids

NAMES = [f"Hybrid{name}-v0" for name in "Moving Sliding CatchPoint HardMove4 HardMove10 Platform".split()]
ORIGINAL = "gym_platform:Platform-v0"  # takes its parameters as a tuple, and has no batched one


def steps_per_second(name: str, num_envs: int, steps: int = 300) -> float:
    env = gym.make_vec(name, num_envs, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(20)]
    started = time.perf_counter()
    for t in range(steps):
        _, _, terminated, truncated, _ = env.step(actions[t % len(actions)])
        if (terminated | truncated).any():
            env.reset(options={"reset_mask": terminated | truncated})
    return steps * num_envs / (time.perf_counter() - started)


def single_steps_per_second(name: str, steps: int = 300) -> float:
    env = gym.make(name)
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(20)]
    started = time.perf_counter()
    for t in range(steps):
        _, _, terminated, truncated, _ = env.step(actions[t % len(actions)])
        if terminated or truncated:
            env.reset()
    return steps / (time.perf_counter() - started)


def main():
    names = NAMES + [ORIGINAL] * (importlib.util.find_spec("gym_platform") is not None)
    sizes = (1, 8, 64, 1024)
    speeds = {(name, n): [] for name in names for n in sizes if name != ORIGINAL or n == 1}
    for _ in range(5):
        for name, n in speeds:
            speeds[name, n].append(single_steps_per_second(name) if n == 1 else steps_per_second(name, n))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, numpy {np.__version__}\n")
    print(f"| environment | one | {' | '.join(f'{n} at once' for n in sizes[1:])} |\n{'|---' * (1 + len(sizes))}|")
    for name in names:
        found = [speeds[name, n] for n in sizes if (name, n) in speeds]
        cells = [f"{np.median(s):,.0f} ({min(s):,.0f}-{max(s):,.0f})" for s in found]
        cells += ["-"] * (len(sizes) - len(found))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
