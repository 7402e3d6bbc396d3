"""How fast ppo_continuous.py trains, next to its environments alone and to its rollouts alone: a markdown table.
With --scripts, how fast others of this repository train; with --versus, how long it takes next to another program.

    python benchmarks/speed.py --env-ids HalfCheetah-v4 Hopper-v4 --json speed.json
    python benchmarks/speed.py --scripts ppo_klpen.py vmpo.py
    python benchmarks/speed.py --versus 'python other.py --env-id HalfCheetah-v4 --total-timesteps 102400'
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_continuous as ppo

ROOT = Path(ppo.__file__).parent
BATCH_SIZE = ppo.Args.num_envs * ppo.Args.num_steps


@dataclass
class Args:
    env_ids: tuple[str, ...] = ("HalfCheetah-v4", "Hopper-v4", "Humanoid-v4")
    """environments of the table"""
    steps: int = 102_400
    """environment steps of each measurement, cut to whole batches"""
    repetitions: int = 3
    """times that all is measured; at least 3 with --versus"""
    json: str | None = None
    """file for the single measurements"""
    scripts: tuple[str, ...] = ()
    """instead of the table, the full training of ppo_continuous.py and of these in turn, each with its own settings,
    on the first of --env-ids"""
    versus: str | None = None
    """instead of the table, time this command and ppo_continuous.py in turn, on the command's --env-id or else the
    first of --env-ids; begin it with `env OMP_NUM_THREADS=1` for one torch thread, as ppo_continuous.py has"""
    versus_label: str = "versus"
    """its name in the output"""
    versus_steps: int | None = None
    """environment steps it takes, by default its --total-timesteps"""
    our_flags: str = ""
    """with --versus, more flags for ppo_continuous.py: --our-flags='--num-envs 1 --num-steps 2048'"""


def parse_args() -> Args:
    """Args from the command line; anything wrong with them is one line and status 2."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            args = tyro.cli(Args, description=__doc__)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        said = re.split("─{9,}", box.getvalue().partition("╮")[2])[0]
        ppo.fail(re.sub("[│╰╯]", " ", said) + " (--help lists the flags)")
    if not args.env_ids:
        ppo.fail("--env-ids: give at least one")
    for name, least in {"steps": BATCH_SIZE, "repetitions": 1, "versus_steps": 1}.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            ppo.fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    args.steps -= args.steps % BATCH_SIZE
    if args.scripts and args.versus:
        ppo.fail("--scripts and --versus: give one of them")
    for script in args.scripts:
        if not (ROOT / script).is_file():
            ppo.fail(f"--scripts {script}: there is no {ROOT / script}")
    for env_id in () if args.versus else args.env_ids:
        ppo.make_env(ppo.Args(env_id=env_id))
    return args


def run(command: list, cache: str) -> dict:
    """Run a command to its end, with this compile cache: its seconds, peak memory and output."""
    environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        try:
            process = subprocess.Popen(list(map(str, command)), env=environ, stdout=out, stderr=err)
        except OSError as error:
            ppo.fail(f"{command[0]}: cannot be run: {error.strerror}")
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except SystemExit:  # Ctrl-C or SIGTERM: leave nothing running
            process.kill()
            process.wait()
            raise
        seconds, process.returncode = time.perf_counter() - started, os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        complaints = [line for line in err.read().splitlines() if re.search(r"\w", line)]
        for line in complaints:
            if line.startswith("notice:"):  # without a C++ compiler the training runs uncompiled, and is slow for it
                print(line, file=sys.stderr)
        if process.returncode:
            last = complaints[-1] if complaints else "no output on stderr"
            ppo.fail(f"{shlex.join(map(str, command))}: {last}", status=max(1, process.returncode))
        return {"seconds": seconds, "peak_mb": usage.ru_maxrss / 1024, "output": out.read()}  # KiB on Linux


def training(env_id: str, steps: int, runs_dir: str, *flags, script: str = "ppo_continuous.py") -> list:
    command = [sys.executable, ROOT / script, "--env-id", env_id, "--total-timesteps", steps]
    return [*command, "--eval-episodes", 1, "--runs-dir", runs_dir, *flags]


def measure_training(env_id: str, steps: int, *flags, script: str = "ppo_continuous.py") -> dict:
    """The columns that a training fills. One batch compiles with the cache empty. The training itself then finds it
    filled, which keeps the C++ compiler out of its peak memory: wait4 counts a child's own children too."""
    row = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, length in (("cold", BATCH_SIZE), ("warm", steps)):
            command = training(env_id, length, f"{folder}/{name}", *flags, script=script)
            process = run(command, f"{folder}/cache")
            [path] = Path(folder, name).glob("*/result.json")
            result = json.loads(path.read_text())
            row |= {f"{name}_compile": result["compile_seconds"], f"{name}_process": process["seconds"]}
    return {**row, "full": result["sps"], "peak_mb": process["peak_mb"]}


def measure(column: str, env_id: str, steps: str):
    """Print the steps/s of the environments alone, or of the script's rollout(). Runs in a process of its own.

    Both see the same states: alone, the environments get N(0, 1) clipped to the bounds, which is what the untrained
    policy of the rollout draws but for a mean of 0.01 or so. Training starts from these states and moves on to others,
    where MuJoCo may have more or fewer contacts to solve; so full / environment only can in principle exceed 1.
    """
    args = ppo.Args(env_id=env_id)
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    envs = ppo.Envs(args, range(args.num_envs))
    agent, space = ppo.Agent(envs, args), envs.action_space
    batches = 1 + int(steps) // BATCH_SIZE
    noise = np.random.default_rng(args.seed).standard_normal(
        (batches, args.num_steps, args.num_envs, *space.shape), dtype=np.float32
    )
    actions = np.clip(noise, space.low, space.high)
    for batch in range(batches):
        if batch == 1:  # the first is not timed: threads start, memory is touched for the first time
            started = time.perf_counter()
        if column == "acting":
            ppo.rollout(envs, agent, args)
            continue
        for action in actions[batch]:
            for i, env in enumerate(envs.vector_env.envs):
                _, _, terminated, truncated, _ = env.step(action[i])
                if terminated or truncated:
                    env.reset()
    print((batches - 1) * BATCH_SIZE / (time.perf_counter() - started))


def measure_row(env_id: str, steps: int) -> dict:
    """All columns of one row of the table, once."""
    row = {"env_id": env_id}
    with tempfile.TemporaryDirectory() as folder:
        for column in ("environment", "acting"):
            child = [sys.executable, __file__, "measure", column, env_id, steps]
            row[column] = float(run(child, f"{folder}/cache")["output"])
    row |= measure_training(env_id, steps)
    return {**row, "ratio": row["full"] / row["environment"]}


def spread(values: list[float], digits: int = 0) -> str:
    low, middle, high = (f"{f(values):,.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})" if len(values) > 1 else middle


def table(args: Args, measurements: list) -> list[str]:
    """Repetition by repetition rather than row by row, so that a drift of the machine hits all rows alike."""
    columns = {"environment": 0, "acting": 0, "full": 0, "ratio": 2, "cold_compile": 1, "warm_compile": 1, "peak_mb": 0}
    for repetition in range(args.repetitions):
        for env_id in args.env_ids:
            measurements.append(measure_row(env_id, args.steps))
            numbers = ", ".join(f"{name} {measurements[-1][name]:,.{digits}f}" for name, digits in columns.items())
            print(f"{repetition + 1}/{args.repetitions} {env_id}: {numbers}", file=sys.stderr)
    lines = [
        f"Steps/s, N = {ppo.Args.num_envs}, {args.steps:,} steps each; median (min-max) of {args.repetitions}\n",
        "| environment | environment only | environment + acting | full training | full / environment only "
        "| compile cold, s | compile warm, s | peak memory, MB |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for env_id in args.env_ids:
        same = [m for m in measurements if m["env_id"] == env_id]
        cells = [spread([m[name] for m in same], digits) for name, digits in columns.items()]
        lines.append(f"| {' | '.join([env_id, *cells])} |")
    return lines


def scripts(args: Args, measurements: list) -> list[str]:
    names, env_id = ["ppo_continuous.py", *args.scripts], args.env_ids[0]
    for repetition in range(args.repetitions):
        for name in names:
            row = measure_training(env_id, args.steps, script=name)
            measurements.append({"script": name, "env_id": env_id, **row})
            print(f"{repetition + 1}/{args.repetitions} {name}: {row['full']:,} steps/s", file=sys.stderr)
    lines = [
        f"{env_id}, {args.steps:,} steps, full training, median (min-max) of {args.repetitions} in turn\n",
        "| script | steps/s | over ppo_continuous.py | compile cold, s |",
        "|---|---|---|---|",
    ]
    for name in names:
        speeds, base, seconds = (
            [m[column] for m in measurements if m["script"] == script]
            for column, script in (("full", name), ("full", names[0]), ("cold_compile", name))
        )
        ratios = [a / b for a, b in zip(speeds, base)]
        lines.append(f"| {name} | {spread(speeds)} | {spread(ratios, 2)} | {spread(seconds, 1)} |")
    return lines


def versus(args: Args, measurements: list) -> list[str]:
    """Whole processes, A B A B ..., each with an empty compile cache, so that every pair is the same trial."""

    def last_value(flag: str, command: list) -> str | None:
        return (re.findall(rf" --{flag}[= ](\S+)", " ".join(map(str, command))) or [None])[-1]

    try:
        theirs = shlex.split(args.versus)
        env_id = last_value("env[-_]id", theirs) or args.env_ids[0]
        ours = training(env_id, args.steps, "RUNS_DIR", *shlex.split(args.our_flags))
        counts = [last_value("total[-_]timesteps", ours), args.versus_steps or last_value("total[-_]timesteps", theirs)]
        counts = [int(float(count)) for count in counts]
    except TypeError:
        ppo.fail(f"--versus {args.versus}: has no --total-timesteps; give --versus-steps")
    except ValueError as error:
        ppo.fail(f"--versus {args.versus}: {error}")
    names, seconds, speeds = [Path(ppo.__file__).name, args.versus_label], ([], []), ([], [])
    for _ in range(max(3, args.repetitions)):
        for i, command in ((1, theirs), (0, ours)):  # in this order a mistake in the command shows soon
            with tempfile.TemporaryDirectory() as folder:
                command = [f"{folder}/runs" if word == "RUNS_DIR" else word for word in command]
                seconds[i].append(run(command, f"{folder}/cache")["seconds"])
            speeds[i].append(counts[i] / seconds[i][-1])
            measurements.append({"program": names[i], "steps": counts[i], "seconds": seconds[i][-1]})
            print(f"{names[i]}: {seconds[i][-1]:.1f} s", file=sys.stderr)
    lines = [
        f"{env_id}, whole processes with imports and cold compile, median (min-max) of {len(seconds[0])} in turn\n",
        "| program | steps | seconds | steps/s |",
        "|---|---|---|---|",
    ]
    for name, count, times, speed in zip(names, counts, seconds, speeds):
        lines.append(f"| {name} | {count:,} | {spread(times, 1)} | {spread(speed)} |")
    ratios = [a / b for a, b in zip(*speeds)]
    return [*lines, f"\nsteps/s of {names[0]} over {names[1]}, pair by pair: {spread(ratios, 2)}"]


def main(args: Args):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    machine = {"cores": os.cpu_count(), "cpu": "unknown CPU", "load_at_start": os.getloadavg()[0]}
    with contextlib.suppress(OSError, TypeError):
        machine["cpu"] = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    if torch.cuda.is_available():
        machine["cpu"] += f" and {torch.cuda.get_device_name()}"
    packages = ("torch", "mujoco", "gymnasium")
    versions = {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}
    try:
        file = open(args.json, "w") if args.json else None  # now, since a wrong path should show before an hour's work
    except OSError as error:
        ppo.fail(f"--json {args.json}: cannot be written: {error}")
    if machine["load_at_start"] > 0.5:
        print(f"warning: load average {machine['load_at_start']:.2f}, this machine is not idle", file=sys.stderr)
    measurements = []
    try:
        what = versus if args.versus else scripts if args.scripts else table
        lines = what(args, measurements)
    finally:  # what was measured stays when something goes wrong
        machine["load_at_end"] = os.getloadavg()[0]
        if file:
            report = {"machine": machine, "versions": versions, "args": dataclasses.asdict(args)}
            file.write(json.dumps({**report, "measurements": measurements}, indent=1) + "\n")
    print("{cores} cores, {cpu}, load {load_at_start:.2f} at start, {load_at_end:.2f} at end  ".format(**machine))
    print(*(f"{name} {version}," for name, version in versions.items()), f"torch threads {ppo.Args.torch_threads}  ")
    print("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])
    else:
        main(parse_args())
