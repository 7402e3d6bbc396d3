"""Run command lines, one training each, several at a time, and pick up where a killed runner stopped.

    benchmarks/ppo_table1.sh                # prints such lines into this program
    echo 'python ppo_klpen.py --env-id Hopper-v4 --seed 1' | python benchmarks/runner.py --name try --jobs 2

Every command has a folder of its own, runs/NAME/{words of the command}__{hash}, a function of the command alone. It
holds `log`, what the run printed, and the run's own folder. A run is finished when that has a result.json and was
started by this very command, or when the committed results/NAME.csv has a row for it (delete the row to run it again).
Finished runs are skipped, others resumed from their last checkpoint. A lock in each folder, which the training process
inherits, keeps a second runner from running the same thing; it takes what is left, then waits for the first. Exit
status: 0 when all are finished, 1 when one failed (the end of its log is shown), 2 for wrong input, 130 when stopped.

With --cluster the same commands become tasks of a Ray cluster, one each. Their folders are copied here whenever there
is a new checkpoint, so a lost worker costs what it did since then. The nodes need requirements.txt installed.
"""

import contextlib
import csv
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
POLL = 0.2  # seconds between two looks at the running processes


@dataclass
class Args:
    name: str
    """the sweep: runs go to RUNS/NAME, committed results are results/NAME.csv"""
    runs: Path = HERE / "runs"
    """parent folder of all sweeps"""
    jobs: int = 2
    """trainings at a time on this machine, one torch thread each"""
    dry_run: bool = False
    """list what would run and stop"""
    cluster: str | None = None
    """address of a Ray cluster to run on instead; auto: the one at hand"""
    cpus: float = 1
    """CPUs that a run reserves on the cluster"""
    gpus: float = 0
    """GPUs that a run reserves on the cluster"""
    retries: int = 3
    """times that a run starts again after its worker was lost"""
    sync_seconds: float = 20
    """least time between two copies of a run's folder from the cluster"""


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Run:
    """A command, and the folder under `parent` that belongs to it."""

    def __init__(self, words: list[str], parent: Path):
        self.command, self.flags, self.script = shlex.join(words), words[2:], Path(words[1])
        readable = re.sub(r"[^\w.-]+", "_", " ".join(words[1:]).replace("--", ""))[:100]
        self.home = parent / f"{readable}__{hashlib.sha256(self.command.encode()).hexdigest()[:10]}"
        self.lock = None

    def folder(self) -> Path | None:
        """The run's own folder, once there is one. Raises ValueError for one that another command made."""
        configs = sorted(self.home.glob("[!.]*/config.json"))
        for config in configs:
            started_by = json.loads(config.read_text())["command"][1:]
            if "--runs-dir" in started_by:
                at = started_by.index("--runs-dir")
                del started_by[at : at + 2]
            if started_by != self.flags or len(configs) > 1:
                raise ValueError(f"{config.parent} is not (only) of this command: {self.command}")
            return config.parent
        return None

    def finished(self) -> bool:
        folder = self.folder()
        return folder is not None and (folder / "result.json").exists()

    def fraction(self) -> float:
        """How much is done, by the last episode in the logs."""
        try:
            folder = self.folder()
            total = json.loads((folder / "config.json").read_text())["args"]["total_timesteps"]
            last = (folder / "episodes.csv").read_bytes()[-200:].splitlines()[-1]
            return min(int(last.split(b",")[0]) / total, 1.0)
        except (OSError, ValueError, IndexError, TypeError):
            return 0.0

    def process_flags(self) -> list[str]:
        """The flags that start the run, or continue it."""
        folder = self.folder()
        return ["--resume", str(folder)] if folder else [*self.flags, "--runs-dir", str(self.home)]

    def acquire(self) -> bool:
        """Lock the run for this process and those that inherit the lock; False where another has it."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.home / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            self.release()
            return False

    def release(self):
        self.lock.close()
        self.lock = None

    def log_end(self, lines: int = 5) -> str:
        text = (self.home / "log").read_text(errors="replace") if (self.home / "log").exists() else ""
        return "\n".join(f"    {line}" for line in re.split("[\r\n]+", text.strip())[-lines:])


def read_commands(lines, parent: Path) -> list[Run]:
    """Runs from command lines `python script.py flags`, in their order; exits with 2 for any other."""
    runs = {}
    for line in lines:
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if len(words) < 2 or words[0] != "python" or not Path(words[1]).is_file():
            fail(f"{line.strip()}: must be `python SCRIPT FLAGS`, with a script that is there from {Path.cwd()}")
        taken = {"--runs-dir", "--resume", "--eval"} & {word.split("=")[0] for word in words}
        if taken:
            fail(f"{line.strip()}: {', '.join(sorted(taken))} is the runner's to choose")
        run = Run(words, parent)
        runs[run.command] = run
    return list(runs.values())


def committed(name: str) -> set[str]:
    """The commands whose results are committed."""
    path = HERE / "results" / f"{name}.csv"
    if not path.exists():
        return set()
    with open(path) as file:
        return {row["command"] for row in csv.DictReader(file)}


def die_with_parent():
    """In a child: a SIGTERM when the runner dies, however it dies, so that the training saves and stops."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def start(script: Path, flags: list[str], log, **kwargs) -> subprocess.Popen:
    environ = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *flags]
    return subprocess.Popen(command, stdout=log, stderr=log, env=environ, preexec_fn=die_with_parent, **kwargs)


def run_here(runs: list[Run], args: Args, show) -> list[Run]:
    """Run them `jobs` at a time; returns those that failed. On SystemExit the trainings save and stop first."""
    waiting, running, failed = list(runs), {}, []
    try:
        while waiting or running:
            for run in list(waiting):
                if len(running) == args.jobs:
                    break
                if not run.acquire():  # another runner's; look again later
                    continue
                waiting.remove(run)
                if run.finished():
                    run.release()
                    continue
                with open(run.home / "log", "a") as log:
                    running[run] = start(run.script, run.process_flags(), log, pass_fds=[run.lock.fileno()])
            time.sleep(POLL)
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    run.release()
                    if process.returncode or not run.finished():
                        failed.append(run)
            show(failed)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return failed


def read_files(folder: Path) -> dict[str, bytes]:
    """A run's folder as {relative path: content} that can be resumed from: the checkpoint comes first, and the logs,
    which only grow, are at least as long as it says."""
    paths = sorted(folder.glob("*/[!.]*"), key=lambda path: (path.name != "checkpoint.pt", path.name))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.suffix != ".tmp"}


def write_files(folder: Path, files: dict[str, bytes]):
    """The counterpart of read_files; checkpoint and result go last, so that what they speak of is there."""
    last = ("config.json", "checkpoint.pt", "result.json")
    for name in sorted(files, key=lambda name: last.index(Path(name).name) if Path(name).name in last else -1):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(files[name])
        temporary.replace(path)


def run_on_worker(script_name: str, script: bytes, flags: list[str], files: dict[str, bytes], sync_seconds: float):
    """A task of the cluster: one run in a temporary folder. Yields (None, files) at new checkpoints, and at the end
    (exit status, files), where files also has the log."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / script_name).write_bytes(script)
        write_files(home / "run", files)
        old = next((home / "run").glob("*/config.json"), None)
        flags = ["--resume", str(old.parent)] if old else [*flags, "--runs-dir", str(home / "run")]
        with open(home / "log", "wb") as log:
            process = start(home / script_name, flags, log)
        sent, sent_at = None, time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(POLL)
                checkpoint = next((home / "run").glob("[!.]*/checkpoint.pt"), None)
                if checkpoint and checkpoint.stat().st_mtime != sent and time.monotonic() - sent_at >= sync_seconds:
                    sent, sent_at = checkpoint.stat().st_mtime, time.monotonic()
                    yield None, read_files(home / "run")
            yield process.returncode, {**read_files(home / "run"), "log": (home / "log").read_bytes()}
        finally:
            process.kill()


def run_on_cluster(runs: list[Run], args: Args, show) -> list[Run]:
    """As run_here, on a Ray cluster: this process keeps every run's folder and starts lost runs again from it."""
    import ray

    ray.init(args.cluster, log_to_driver=False, logging_level="ERROR")
    task = ray.remote(max_retries=0, num_cpus=args.cpus, num_gpus=args.gpus, num_returns="streaming")(run_on_worker)

    def submit(run: Run):
        script = run.script.read_bytes()
        return task.remote(run.script.name, script, run.flags, read_files(run.home), args.sync_seconds)

    waiting, running, failed, losses = list(runs), {}, [], dict.fromkeys(runs, 0)
    try:
        while waiting or running:
            for run in list(waiting):
                if run.acquire():
                    waiting.remove(run)
                    if run.finished():
                        run.release()
                    else:
                        running[submit(run)] = run
            ready, _ = ray.wait(list(running), timeout=1) if running else (time.sleep(1), None)
            for results in ready or []:
                run, status = running[results], None
                try:
                    status, files = ray.get(next(results))
                    with open(run.home / "log", "ab") as log:
                        log.write(files.pop("log", b""))
                    write_files(run.home, files)
                except ray.exceptions.RayError as error:
                    losses[run] += 1
                    with open(run.home / "log", "a") as log:
                        print(f"the worker was lost: {str(error).strip().splitlines()[0]}", file=log)
                    del running[results]
                    if losses[run] <= args.retries:
                        running[submit(run)] = run
                        continue
                    status = 1
                if status is not None:
                    running.pop(results, None)
                    run.release()
                    if status or not run.finished():
                        failed.append(run)
            show(failed)
    finally:
        ray.shutdown()
    return failed


def stop(*_):
    raise SystemExit(130)


def main(args: Args):
    if args.jobs < 1:
        fail(f"--jobs {args.jobs}: must be at least 1")
    runs = read_commands(sys.stdin, args.runs.resolve() / args.name)
    done = committed(args.name)
    try:
        left = [run for run in runs if run.command not in done and not run.finished()]
        if args.dry_run:
            for run in runs:
                state = "finished" if run not in left else "resume" if run.folder() else "new"
                print(f"{state:9}{run.command}")
            print(f"{len(left)} of {len(runs)} runs to go")
            return
    except ValueError as error:
        fail(str(error))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    before = len(runs) - len(left) + sum(run.fraction() for run in left)
    bar_format = "{percentage:3.0f}% |{bar:20}| {desc}, {elapsed} so far, ETA {remaining}"
    every = 1 if sys.stderr.isatty() else 60  # seconds
    bar = tqdm(None, "starting", len(runs), initial=before, bar_format=bar_format, mininterval=every)
    shown_at = 0.0

    def show(failed: list[Run]):
        nonlocal shown_at
        if time.monotonic() - shown_at >= every:
            finished = sum(run.finished() for run in left)
            bar.set_description_str(
                f"{len(runs) - len(left) + finished} of {len(runs)} runs, {len(failed)} failed", refresh=False
            )
            bar.n = len(runs) - len(left) + sum(1.0 if run.finished() else run.fraction() for run in left)
            bar.refresh()
            shown_at = time.monotonic()

    with contextlib.closing(bar):
        failed = run_on_cluster(left, args, show) if args.cluster else run_here(left, args, show)
        shown_at = 0.0
        show(failed)
    for run in failed:
        print(f"failed: {run.command}\n  the end of {run.home / 'log'}:\n{run.log_end()}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
