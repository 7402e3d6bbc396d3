"""Where an iteration's time goes: the median milliseconds of a training's rollouts, batches and updates.

    python benchmarks/phases.py ppo_continuous.py --env-id HalfCheetah-v4 --total-timesteps 40960 --device cuda

Runs the training, with these settings, in this process. `compiling` is compile_update, once a run; the first iteration
is left out, since libraries and CUDA graphs are set up there.
"""

import importlib
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PHASES = {"rollout": "rollout", "make_batch": "batch", "update": "update", "compile_update": "compiling"}


def timed(function, seconds: list):
    """function, which adds what each of its calls takes to `seconds`, what it leaves running on a GPU too."""

    def outer(*args, **kwargs):
        started = time.perf_counter()
        result = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        return result

    return outer


def main():
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    script = Path("".join(sys.argv[1:2]))
    path = script if script.is_file() else ROOT / script.name
    if path.suffix != ".py" or not path.is_file():
        print(f"error: {script}: needed is a script of this repository, or a copy, then its flags", file=sys.stderr)
        raise SystemExit(2)
    sys.path.insert(0, str(path.resolve().parent))
    module, seconds = importlib.import_module(script.stem), {name: [] for name in PHASES}
    for name in PHASES:
        setattr(module, name, timed(getattr(module, name), seconds[name]))
    args = module.parse_args(sys.argv[2:])
    sys.argv[0] = script.name  # for the command that an interrupted run prints
    module.main(args)
    size = args.num_envs * args.num_steps
    ms = {name: 1000 * statistics.median(times[1:] or times) for name, times in seconds.items()}
    sps = 1000 * size / (sum(ms.values()) - ms["compile_update"])
    print(f"| {' | '.join(PHASES.values())} | steps/s |\n{'|---' * 5}|")
    print(f"| {' | '.join(f'{value:,.1f} ms' for value in ms.values())} | {sps:,.0f} |")


if __name__ == "__main__":
    main()
