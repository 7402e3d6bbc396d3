"""Run command lines, one training each, several at a time, and pick up where a killed runner stopped.

    benchmarks/ppo_table1.sh                # prints such lines into this program
    echo 'python ppo_klpen.py --env-id Hopper-v4 --seed 1' | python benchmarks/runner.py --name try --jobs 2

Every command has a folder of its own, runs/NAME/{script and flags}__{hash}. The hash, a function of the command alone,
finds it again; the rest is for the eye, in TensorBoard (--logdir runs/NAME) before the name of the run's own folder,
which has environment, experiment and seed. It holds that folder and `log`, what the run printed. A run is finished when
it has a result.json with the evaluation in it and was started by this very command, or when the committed
results/NAME.csv has a row for it (--fresh runs it all the same). Finished runs are skipped, others resumed from their
last checkpoint. A lock in each folder, which the training process inherits, keeps a second runner from running the same
thing; it takes what is left, then waits for the first. Exit status: 0 when all are finished, 1 when one failed (the end
of its log is shown), 2 for wrong input, 130 when stopped.

With --cluster the same commands become tasks of a Ray cluster, one each. Their folders are copied here whenever there
is a new checkpoint, so a lost worker costs what it did since then. The nodes need this folder's requirements.txt.
"""

import contextlib
import csv
import ctypes
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
POLL = 0.2  # seconds between two looks at the running processes
STARTED = time.time()


@dataclass
class Args:
    name: str
    """the sweep: runs go to RUNS/NAME, committed results are results/NAME.csv"""
    runs: Path = HERE / "runs"
    """parent folder of all sweeps"""
    jobs: int = 2
    """trainings at a time on this machine, one torch thread each"""
    report: bool = False
    """afterwards make a report of what is finished: report.py NAME"""
    fresh: bool = False
    """run, too, what the committed results have"""
    dry_run: bool = False
    """list what would run and stop"""
    cluster: str | None = None
    """run on the Ray cluster that this machine is part of: HOST:PORT of its head, or auto: the one at hand"""
    cpus: float = 1
    """CPUs that a run reserves on the cluster"""
    gpus: float = 0
    """GPUs that a run reserves on the cluster"""
    retries: int = 3
    """times in a row, without a checkpoint between, that a run is continued after its worker was lost"""


def fail(message: str):
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def parse_args() -> Args:
    """Args from the command line; tyro's box for a wrong one is put into one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            args = tyro.cli(Args, description=__doc__)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        said = re.split("─{9,}", box.getvalue().partition("╮")[2])[0]
        fail(re.sub("[│╰╯]", " ", said) + " (--help lists the flags)")
    for name, least in {"jobs": 1, "cpus": 0, "gpus": 0, "retries": 0}.items():
        if not least <= getattr(args, name) < math.inf:
            fail(f"--{name} {getattr(args, name)}: must be at least {least}")
    return args


class Run:
    """A command, and the folder under `parent` that belongs to it."""

    def __init__(self, words: list[str], parent: Path):
        self.command, self.flags, self.script = shlex.join(words), words[2:], Path(words[1])
        end = f"__{hashlib.sha256(self.command.encode()).hexdigest()[:10]}"
        known = sorted(parent.glob(f"*{end}"))  # under whatever name it was begun
        self.home = known[0] if known else parent / f"{self.readable()}{end}"
        self.lock = None

    def readable(self, most: int = 60) -> str:
        """ppo_klpen,kl-target=0.003,no-anneal-lr: the flags that the run's own folder does not name, from the last on,
        since a sweep's commands differ at their ends; as many as fit."""
        text = self.script.stem
        for flag in reversed(re.split(r"(?:^|\s)--", " ".join(self.flags))[1:]):
            name, _, value = flag.replace("=", " ", 1).partition(" ")
            name, value = name.replace("_", "-"), re.sub(r"[^\w.-]+", "_", value).strip("_")
            if name in ("env-id", "exp-name", "seed", "device"):
                continue
            flag = f",{name}={value}" if value else f",{name}"
            if len(text + flag) > most:
                break
            text += flag
        return text

    def folder(self) -> Path | None:
        """The run's own folder, once there is one. Raises ValueError for one that another command made."""
        configs = list(self.home.glob("[!.]*/config.json"))
        for config in configs:
            try:
                script, *flags = json.loads(config.read_text())["command"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{config}: not that of a run ({error!r})") from error
            del flags[-2:]  # --runs-dir, see process_flags
            if (Path(script).name, flags) != (self.script.name, self.flags) or len(configs) > 1:
                raise ValueError(f"{config.parent} is not (only) of this command: {self.command}")
            return config.parent
        return None

    def finished(self) -> bool:
        folder = self.folder()
        result = folder / "result.json" if folder else None  # written at the training's end, and after the evaluation
        return result is not None and result.exists() and "eval_returns" in result.read_text()

    def fraction(self) -> float:
        """How much is done: 1 for a finished run, for others by the last episode in the logs."""
        folder = self.folder()
        if folder is None or self.finished():
            return float(folder is not None)
        try:
            total = json.loads((folder / "config.json").read_text())["args"]["total_timesteps"]
            last = (folder / "episodes.csv").read_bytes()[-200:].splitlines()[-1]
            return min(int(last.split(b",")[0]) / total, 0.999)
        except (OSError, ValueError, LookupError):  # no episode yet
            return 0.0

    def process_flags(self) -> list[str]:
        """The flags that start the run, or continue it."""
        folder = self.folder()
        return resume_flags(self.flags, folder) if folder else [*self.flags, "--runs-dir", str(self.home)]

    def acquire(self) -> bool:
        """Lock the run for this process and those that inherit the lock; False where another has it."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.home / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            self.lock.close()
            return False

    def failed_meanwhile(self) -> bool:
        """Whether another runner, since this one was started, ran it to no avail."""
        mark = self.home / "failed"
        return mark.exists() and mark.stat().st_mtime > STARTED

    def finish(self, status: int, failed: list):
        if status or not self.finished():
            (self.home / "failed").touch()
            failed.append(self)
        self.lock.close()

    def log_end(self, lines: int = 5) -> str:
        text = (self.home / "log").read_text(errors="replace") if (self.home / "log").exists() else ""
        return "\n".join(f"    {line}" for line in re.split("[\r\n]+", text.strip())[-lines:])


def resume_flags(flags: list[str], folder: Path) -> list[str]:
    """A script imports the module of an environment's MODULE:ID only where the command line names it."""
    modules = [flag.removeprefix("--env-id=") for flag in flags if re.fullmatch(r"(--env-id=)?[\w.]+:[\w./-]+", flag)]
    return ["--resume", str(folder), *(["--env-id", modules[0]] if modules else [])]


def read_commands(lines, parent: Path) -> list[Run]:
    """Runs from command lines `python script.py flags`, in their order; exits with 2 for any other."""
    runs = {}
    for line in map(str.strip, lines):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            fail(f"{line}: {error}")
        if not words:
            continue
        if len(words) < 2 or words[0] != "python" or not Path(words[1]).is_file():
            fail(f"{line}: must be `python SCRIPT FLAGS`, with a script that is there from {Path.cwd()}")
        taken = {"--runs-dir", "--resume", "--eval"} & {word.split("=")[0].replace("_", "-") for word in words}
        if taken:
            fail(f"{line}: {', '.join(sorted(taken))} is the runner's to choose")
        run = Run(words, parent)
        runs[run.command] = run
    if not runs:
        fail("no command lines on stdin")
    return list(runs.values())


def committed(name: str) -> set[str]:
    """The commands whose results are committed."""
    path = HERE / "results" / f"{name}.csv"
    if not path.exists():
        return set()
    with open(path) as file:
        return {row.get("command") for row in csv.DictReader(file)}


def take(waiting: list[Run], failed: list[Run]):
    """Yields, locked, the waiting runs that are to be run now; those of another runner stay in `waiting`."""
    for run in list(waiting):
        if run.acquire():
            waiting.remove(run)
            if run.finished():
                run.lock.close()
            elif run.failed_meanwhile():
                run.finish(1, failed)
            else:
                yield run


def start(script: Path, flags: list[str], log, **kwargs) -> subprocess.Popen:
    """A training process, which stops when this process dies, however it dies; its checkpoints stay."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def die_with_parent():
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # too late for the signal
            os._exit(1)

    command, environ = [sys.executable, str(script), *flags], {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    kwargs |= {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": os.environ | environ}
    return subprocess.Popen(command, preexec_fn=die_with_parent, **kwargs)


def run_here(runs: list[Run], args: Args, show) -> list[Run]:
    """Run them `jobs` at a time; returns those that failed. On SystemExit the trainings stop first."""
    waiting, running, failed = list(runs), {}, []
    try:
        while waiting or running:
            for run in islice(take(waiting, failed), args.jobs - len(running)):
                with open(run.home / "log", "a") as log:
                    running[run] = start(run.script, run.process_flags(), log, pass_fds=[run.lock.fileno()])
            time.sleep(POLL)
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    run.finish(process.returncode, failed)
            show(failed)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return failed


def read_files(folder: Path | None) -> dict[str, bytes]:
    """A run's folder as {path from its parent: content} that can be resumed from: the checkpoint is read first, and
    the logs, which only grow, are at least as long as it says."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"] if folder else []
    paths.sort(key=lambda path: path.name != "checkpoint.pt")
    return {str(path.relative_to(folder.parent)): path.read_bytes() for path in paths}


def write_files(home: Path, files: dict[str, bytes]):
    """The counterpart of read_files. What speaks of other files goes after them, so that at any moment there is either
    no run, or one that can be resumed."""
    last = ("checkpoint.pt", "config.json", "result.json")
    for name in sorted(files, key=lambda name: last.index(Path(name).name) if Path(name).name in last else -1):
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(files[name])
        temporary.replace(path)
    for path in home.glob("[!.]*/events.*"):  # --resume deletes those that are younger than the checkpoint
        if str(path.relative_to(home)) not in files:
            path.unlink()


def run_on_worker(sources: dict[str, bytes], flags: list[str], files: dict[str, bytes]):
    """A task of the cluster: one run, of the first of the sources, in a temporary folder. Yields (exit status or None,
    files, more of the log), at each new checkpoint and at the end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        home = Path(temporary)
        write_files(home, sources)
        write_files(home / "run", files)

        def folder() -> Path | None:
            return next((config.parent for config in home.glob("run/[!.]*/config.json")), None)

        def saved_at() -> int | None:
            checkpoint = folder() / "checkpoint.pt" if folder() else None  # which follows config.json
            return checkpoint.stat().st_mtime_ns if checkpoint and checkpoint.exists() else None

        flags = resume_flags(flags, folder()) if folder() else [*flags, "--runs-dir", str(home / "run")]
        seen = saved_at()
        with open(home / "log", "wb") as output, open(home / "log", "rb") as log:
            process = start(home / next(iter(sources)), flags, output)
            try:
                while process.poll() is None:
                    time.sleep(POLL)
                    if saved_at() != seen:
                        seen = saved_at()
                        yield None, read_files(folder()), log.read()
            finally:
                process.kill()
                process.wait()
            end = process.returncode, read_files(folder()), log.read()
    yield end


def connect(args: Args):
    """run_on_worker as a task of the cluster."""
    address = args.cluster if args.cluster != "auto" else os.environ.get("RAY_ADDRESS", "auto")
    host, _, port = address.rpartition(":")
    try:
        import ray

        if "://" in address:
            raise ValueError("must be HOST:PORT of the head node, since Ray Client streams no results")
        if host:  # Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        needed = {"CPU": args.cpus, "GPU": args.gpus}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0) >= amount for name, amount in needed.items()) for node in nodes):
            print(f"warning: no node has the {args.cpus:g} CPUs and {args.gpus:g} GPUs of a run yet", file=sys.stderr)
        # A task waits until its last results are taken here, so that they pile up nowhere.
        options = {"max_retries": 0, "num_returns": "streaming", "_generator_backpressure_num_objects": 1}
        return ray.remote(num_cpus=args.cpus, num_gpus=args.gpus, **options)(run_on_worker)
    except ImportError:
        fail("--cluster: Ray is not installed; pip install -r benchmarks/requirements.txt")
    except Exception as error:  # whatever Ray makes of an address, or of a number of GPUs
        fail(f"--cluster {args.cluster}: {error}")


def run_on_cluster(task, runs: list[Run], args: Args, show) -> list[Run]:
    """As run_here, on a Ray cluster: this process keeps every run's folder and starts lost runs again from it."""
    import ray

    def submit(run: Run):
        here = run.script.parent
        paths = [run.script, *here.glob("environments/*.py")]
        sources = {str(path.relative_to(here)): path.read_bytes() for path in paths}
        running[task.remote(sources, run.flags, read_files(run.folder()))] = run

    waiting, running, failed, losses = list(runs), {}, [], Counter()
    try:
        while waiting or running:
            for run in take(waiting, failed):
                submit(run)
            ready = ray.wait(list(running), timeout=1)[0] if running else time.sleep(1) or []
            for results in ready:
                run = running[results]
                try:
                    status, files, output = ray.get(next(results))
                    write_files(run.home, files)
                    losses[run] = 0
                except ray.exceptions.RayError as error:
                    losses[run] += 1
                    status, output = "lost", f"\nthe worker was lost: {error}\n".encode()
                with open(run.home / "log", "ab") as log:
                    log.write(output)
                if status is not None:
                    del running[results]
                    if status == "lost" and losses[run] <= args.retries:
                        submit(run)
                    else:
                        run.finish(status, failed)
            show(failed)
    finally:
        ray.shutdown()
    return failed


def main(args: Args):
    try:
        runs = read_commands(sys.stdin, args.runs.resolve() / args.name)
        done = set() if args.fresh else committed(args.name)
        left = [run for run in runs if run.command not in done and not run.finished()]
        if args.dry_run:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pager that is left, head: no error
            for run in runs:
                state = "finished" if run not in left else "resume" if run.folder() else "new"
                print(f"{state:9}{run.command}")
            print(f"{len(left)} of {len(runs)} runs to go")
            return
        if args.report:
            import report

            report.check(args.name)
        (args.runs / args.name).mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        fail(f"--report: {error}; pip install -r benchmarks/requirements.txt")
    except (OSError, ValueError) as error:
        fail(str(error))
    task = connect(args) if args.cluster else None
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own
        signal.signal(number, lambda *_: signals.append(_))

    def progress() -> tuple[float, int]:
        """The runs that are done, with the parts of others, and without."""
        fractions = [1.0] * (len(runs) - len(left)) + [run.fraction() for run in left]
        return sum(fractions), fractions.count(1.0)

    before, _ = progress()
    bar_format = "{percentage:3.0f}% |{bar:20}| {desc}, {elapsed} so far, ETA {remaining}"
    every = 1 if sys.stderr.isatty() else 60  # seconds
    tqdm.monitor_interval = 0  # no thread: `start` forks
    bar = tqdm(None, "starting", len(runs), initial=before, bar_format=bar_format, mininterval=every)
    shown_at = 0.0

    def show(failed: list[Run]):
        """Bring the bar up to date; leave here after a signal."""
        nonlocal shown_at
        if signals:
            raise SystemExit(130)
        if time.monotonic() - shown_at >= every:
            n, finished = progress()
            bar.n = max(n, before)  # a resumed run may go back a little
            bar.set_description_str(f"{finished} of {len(runs)} runs, {len(failed)} failed")
            shown_at = time.monotonic()

    with contextlib.closing(bar):
        failed = run_on_cluster(task, left, args, show) if task else run_here(left, args, show)
        shown_at = 0.0
        show(failed)
    for run in failed:
        print(f"failed: {run.command}\n  the end of {run.home / 'log'}:\n{run.log_end()}", file=sys.stderr)
    command = [sys.executable, HERE / "report.py", args.name, "--runs", args.runs]
    if args.report and subprocess.run(command).returncode or failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(parse_args())
