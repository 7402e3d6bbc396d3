"""How fast the games of environments/microrts.py are: a markdown table of steps/s.

Random actions within the masks, each row in a process of its own, which is warmed up first, since Java compiles what it
runs for 20 s or so. Only the environment is timed, not the drawing of actions. Steps per second of processor time, that
of Java's threads included, say more than those of the clock on a machine with other work.

    python benchmarks/microrts_speed.py
    python benchmarks/microrts_speed.py --sizes 16x16 --opponents coacAI --repetitions 1
"""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from environments import microrts  # noqa: E402


@dataclass
class Args:
    sizes: tuple[str, ...] = ("8x8", "10x10", "16x16")
    """sizes of the basesWorkers map"""
    opponents: tuple[str, ...] = ("coacAI", "workerRushAI")
    """the bots, one a row"""
    action_mode: Literal["unit", "gridnet"] = "unit"
    """a single unit acts in a step, or all do"""
    num_envs: int = 24
    """games stepped side by side"""
    warm_up: float = 22
    """seconds before it counts"""
    seconds: float = 8
    """seconds that count"""
    repetitions: int = 3
    """times that all is measured"""


def draw(masks: np.ndarray, action_mode: str, rng) -> np.ndarray:
    """Random actions within the masks [N, h w, 79]."""
    n = np.arange(len(masks))
    if action_mode == "unit":
        cells = np.where(masks[:, :, 0], rng.random(masks.shape[:2]), -1).argmax(1)
        masks = masks[n, cells][:, None]
    u = np.where(masks[:, :, 1:], rng.random((*masks.shape[:2], masks.shape[2] - 1), dtype=np.float32), -1)
    parts = np.split(u, np.cumsum(microrts.COMPONENTS)[:-1], -1)
    orders = np.stack([part.argmax(-1) for part in parts], -1)
    return orders if action_mode == "gridnet" else np.column_stack([cells, orders[:, 0]])


def measure(size: str, opponent: str, action_mode: str, num_envs: str, warm_up: str, seconds: str):
    """Print steps/s by the clock and by processor time."""
    name = f"MicroRTS-{size}-basesWorkers"
    envs = microrts.MicroRTSVectorEnv(int(num_envs), name, opponent, action_mode=action_mode)
    rng = np.random.default_rng(0)
    _, info = envs.reset()
    for duration in (float(warm_up), float(seconds)):
        clock, processor, steps, started = 0.0, 0.0, 0, time.perf_counter()
        while time.perf_counter() - started < duration:
            actions = draw(info["action_mask"], action_mode, rng)
            before = time.perf_counter(), time.process_time()
            info = envs.step(actions)[-1]
            clock += time.perf_counter() - before[0]
            processor += time.process_time() - before[1]
            steps += envs.num_envs
    print(steps / clock, steps / processor)


def main(args: Args):
    load, rows = os.getloadavg()[0], {}
    for _ in range(args.repetitions):  # not row by row, so that a drift of the machine hits all rows alike
        for size in args.sizes:
            for opponent in args.opponents:
                child = [sys.executable, __file__, "measure", size, opponent, args.action_mode]
                child += [str(value) for value in (args.num_envs, args.warm_up, args.seconds)]
                done = subprocess.run(child, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    raise SystemExit(done.returncode)
                rows.setdefault((size, opponent), []).append([float(number) for number in done.stdout.split()])
    print(f"Steps/s, {args.num_envs} games, action mode {args.action_mode}, median of {args.repetitions}; ", end="")
    print(f"{os.cpu_count()} cores, load {load:.2f} at start, {os.getloadavg()[0]:.2f} at end\n")
    print("| map | opponent | by the clock | by processor time |\n|---|---|---|---|")
    for (size, opponent), measured in rows.items():
        clock, processor = (f"{statistics.median(numbers):,.0f}" for numbers in zip(*measured))
        print(f"| {size} | {opponent} | {clock} | {processor} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])
    else:
        main(tyro.cli(Args, description=__doc__))
