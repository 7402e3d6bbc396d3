"""Steps a second against the number of environments and of processes, into results/scale.csv.

    python benchmarks/scale.py

A measurement is a training, whose result.json has the seconds without imports and compilation. Where processes are
compared there is a second, shorter one: the difference of rank 0's CPU times is what an iteration costs it, the floor
that more cores cannot go below. Cases take turns, --repetitions times.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import tyro
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
MOVING = "environments.hybrid:HybridMoving-v0"


class Case(NamedTuple):
    command: str
    env_id: str
    N: int  # environments
    T: int  # steps of each in a batch
    minibatches: int
    processes: int
    iterations: int


PROCESSES = [
    Case("ppo_continuous.py", env_id, N, T, 32, processes, iterations)
    for env_id, N, T, iterations in [("HalfCheetah-v4", 8, 256, 32), ("Humanoid-v4", 16, 128, 10)]
    for processes in (1, 2, 4)
]
# From 128 environments on, the batch grows with them: at least 16 steps of each.
CHEETAHS = [
    Case("ppo_continuous.py", "HalfCheetah-v4", N, max(2048 // N, 16), 32, 1, max(24 // max(N // 128, 1), 2))
    for N in (1, 8, 64, 512, 1024, 4096)
]
# Minibatches of 16,384 steps, or the whole batch where it is smaller.
MOVINGS = [
    Case("hppo_hybrid.py --update-epochs 4", MOVING, N, 64, max(N * 64 // 16384, 1), 1, max(4096 // N, 4))
    for N in (1, 8, 64, 512, 1024, 4096)
]


@dataclass
class Args:
    repetitions: int = 3
    """of every case"""


def train(case: Case, iterations: int) -> tuple[float, float, float]:
    """Seconds, CPU seconds of rank 0, and its peak memory in MB, for so many iterations."""
    flags = f"--num-envs {case.N} --num-steps {case.T} --num-minibatches {case.minibatches} --env-id {case.env_id}"
    flags += f" --total-timesteps {case.N * case.T * iterations} --device cpu --eval-episodes 0 --runs-dir"
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w") as log:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, *shlex.split(f"{case.command} {flags}"), f"{folder}/runs"]
        options = {"cwd": HERE.parent, "stdout": log, "stderr": log}
        where = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        where["WORLD_SIZE"] = str(case.processes)  # as torchrun sets them
        ranks = [
            subprocess.Popen(command, env={**os.environ, **where, "RANK": str(rank)}, **options)
            for rank in range(case.processes)
        ]
        _, status, usage = os.wait4(ranks[0].pid, 0)
        statuses = [os.waitstatus_to_exitcode(status), *(process.wait() for process in ranks[1:])]
        if any(statuses):
            raise RuntimeError(f"{shlex.join(command)} ended with {statuses}\n{(Path(folder) / 'log').read_text()}")
        (result,) = Path(folder).glob("runs/*/result.json")
        seconds = json.loads(result.read_text())["seconds"]
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(args: Args):
    rows = []
    for case in (*PROCESSES, *CHEETAHS, *MOVINGS):  # compile
        train(case._replace(processes=1), 1)
    for repetition in range(1, args.repetitions + 1):
        for case in tqdm([*PROCESSES, *CHEETAHS, *MOVINGS], f"{repetition} of {args.repetitions}"):
            seconds, cpu, memory = train(case, case.iterations)
            row = {**case._asdict(), "repetition": repetition, "ms": 1000 * seconds / case.iterations}
            row["sps"] = case.N * case.T * case.iterations / seconds
            if case in PROCESSES:
                few = case.iterations // 4
                row["rank_0_cpu_ms"] = 1000 * (cpu - train(case, few)[1]) / (case.iterations - few)
            row |= {"peak_mb": memory, "load": os.getloadavg()[0], "cores": os.cpu_count(), "torch": torch.__version__}
            rows.append(row)
    pd.DataFrame(rows).round(2).to_csv(HERE / "results" / "scale.csv", index=False)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
