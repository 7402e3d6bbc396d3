"""benchmarks/runner.py with real trainings: stopped, killed and started again, twice at once, and on a Ray cluster."""

import csv
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import LIMIT, assert_same_outcome, load, snapshot

from benchmarks.runner import Run, read_files, resume_flags, write_files

ROOT = Path(__file__).parents[1]
RUNNER = ROOT / "benchmarks" / "runner.py"
SMALL = "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 2 --eval-episodes 1 --no-compile --device cpu"
HOPPER = f"--env-id Hopper-v4 {SMALL} --checkpoint-every 0 --total-timesteps {40 * 4 * 64}"
COMMANDS = [f"python ppo_continuous.py --seed {seed} {HOPPER}" for seed in (1, 2)]
SHORT = f"--env-id InvertedPendulum-v4 {SMALL} --total-timesteps {2 * 4 * 64}"
WRONG = "python ppo_continuous.py --gamma 2"


def start(commands: list[str], runs: Path, *flags, runner: Path = RUNNER, **env) -> subprocess.Popen:
    """The runner on these commands, as the sweep `sweep`."""
    command = [sys.executable, runner, "--runs", runs, "--name", "sweep", *flags]
    pipe, env = subprocess.PIPE, {**os.environ, **env}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    process.stdin.write("".join(f"{line}\n" for line in commands))
    process.stdin.close()
    process.stdin = None  # else communicate() would write to it
    return process


def finish(process: subprocess.Popen):
    """The exit status and what was printed."""
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


def run(*args, **kwargs):
    return finish(start(*args, **kwargs))


def home(command: str, runs: Path) -> Path:
    return Run(shlex.split(command), runs / "sweep").home


def run_dir(command: str, runs: Path) -> Path:
    """The one run that a command has made."""
    (folder,) = (path for path in home(command, runs).iterdir() if path.is_dir())
    return folder


def starts(command: str, runs: Path) -> list[str]:
    """The line with which each training begins, from the log."""
    return re.findall(r"^.* steps, \d+ x .*$", (home(command, runs) / "log").read_text(), re.MULTILINE)


def parents(text: str) -> dict[int, int]:
    """{process: its parent} of all processes that have this text in their command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if text in (path / "cmdline").read_text():
                found[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended
    return found


def wait_for(process: subprocess.Popen, condition):
    """Until condition() is true; the process must live to see it."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def iteration(command: str, runs: Path) -> int:
    """The last iteration that was saved; 0 without any."""
    paths = list(home(command, runs).glob("[!.]*/checkpoint.pt"))
    return load(paths[0])["progress"]["iteration"] if paths else 0


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("never_killed")
    status, out, err = run(COMMANDS, runs)
    assert (status, out) == (0, ""), err
    assert err.splitlines()[-1].startswith("100% |") and "2 of 2 runs, 0 failed" in err and "ETA" in err
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# Finished, resumed, new
# ----------------------------------------------------------------------------------------------------------------------


def test_finished_runs_are_not_run_again(never_killed):
    before = snapshot(never_killed)
    status, _, err = run(COMMANDS, never_killed)
    assert status == 0, err
    assert snapshot(never_killed) == before


def test_a_dry_run_lists_what_would_run_and_starts_nothing(never_killed, tmp_path):
    runs, new = shutil.copytree(never_killed, tmp_path / "runs"), f"python ppo_continuous.py {SHORT}"
    result = run_dir(COMMANDS[1], runs) / "result.json"
    result.write_text(result.read_text().replace("eval_returns", "of_the_training_alone"))
    before = snapshot(runs)
    status, out, err = run([*COMMANDS, "", "# a comment", new, new], runs, "--dry-run")
    lines = [f"finished {COMMANDS[0]}", f"resume   {COMMANDS[1]}", f"new      {new}", "2 of 3 runs to go"]
    assert (status, out.splitlines(), err) == (0, lines, "")
    assert snapshot(runs) == before and not home(new, runs).exists()


def test_committed_results_are_finished_runs(tmp_path):
    runner = tmp_path / "benchmarks" / "runner.py"
    (runner.parent / "results").mkdir(parents=True)
    shutil.copy(RUNNER, runner)
    with open(runner.parent / "results" / "sweep.csv", "w") as file:
        csv.writer(file).writerows([["score", "command"], ["1.5", COMMANDS[0]]])
    assert run(COMMANDS, tmp_path, "--dry-run", runner=runner)[1].startswith(f"finished {COMMANDS[0]}\nnew      ")
    status, _, err = run(COMMANDS[:1], tmp_path, runner=runner)
    assert (status, "1 of 1 runs" in err) == (0, True), err
    assert not home(COMMANDS[0], tmp_path).exists()
    assert run(COMMANDS, tmp_path, "--dry-run", "--fresh", runner=runner)[1].startswith(f"new      {COMMANDS[0]}\n")
    report, check = runner.parent / "report.py", "def check(name):\n    if name != 'sweep': raise SystemExit(3)\n\n"
    main = "if __name__ == '__main__':\n    import sys; print(*sys.argv[1:]); sys.exit(len(sys.argv) != 4)\n"
    report.write_text(check + main)
    status, out, _ = run(COMMANDS[:1], tmp_path, "--report", runner=runner)
    assert (status, out) == (0, f"sweep --runs {tmp_path}\n")
    assert run(COMMANDS, tmp_path, "--report", "--dry-run", runner=runner)[1].endswith("1 of 2 runs to go\n")
    report.write_text(check + main.replace("!=", "=="))
    assert run(COMMANDS[:1], tmp_path, "--report", runner=runner)[0] == 1


def test_a_folder_of_another_command_is_named(never_killed, tmp_path):
    folder = home(COMMANDS[1], tmp_path) / "run"
    shutil.copytree(run_dir(COMMANDS[0], never_killed), folder)
    status, out, err = run(COMMANDS, tmp_path)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"error: {folder} ") and COMMANDS[1] in err
    (folder / "config.json").write_text("{")
    status, _, err = run(COMMANDS, tmp_path)
    assert (status, len(err.splitlines())) == (2, 1) and err.startswith(f"error: {folder / 'config.json'}: ")


def test_the_report_s_document_is_looked_for_before_anything_is_trained(tmp_path):
    shutil.copytree(RUNNER.parent, tmp_path / "benchmarks", ignore=shutil.ignore_patterns("runs", "results"))
    (tmp_path / "README.md").write_text("no block\n")
    command, runs = [sys.executable, tmp_path / "benchmarks/runner.py", "--name", "vmpo"], tmp_path / "runs"
    done = subprocess.run(
        [*command, "--report", "--runs", runs], input=COMMANDS[0], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and not runs.exists()
    assert done.stderr.startswith("error: vmpo: ") and "<!-- begin vmpo -->" in done.stderr


def test_a_sweep_without_a_report_of_its_own_gets_curves_and_scores(never_killed, tmp_path):
    runs = shutil.copytree(never_killed, tmp_path / "runs")
    status, out, err = run(COMMANDS, runs, "--report")
    assert status == 0 and "ppo_continuous      2     2  10240" in out, out + err
    assert {path.name for path in (runs / "sweep").glob("report.*")} == {"report.png", "report.csv", "report.html"}


def test_a_folder_s_name_is_a_function_of_its_whole_command(tmp_path):
    names = {home(f"python ppo_continuous.py {HOPPER} --{flag}", tmp_path).name for flag in ("compile", "no-norm-adv")}
    assert len(names) == 2 and all(re.fullmatch(r"ppo_continuous,[\w.,=-]+__\w{10}", name) for name in names)
    assert home(COMMANDS[0], tmp_path) == home(COMMANDS[0].replace(" --", "   --"), tmp_path)


def test_a_folder_s_name_shows_the_last_flags_that_the_run_s_own_does_not(tmp_path):
    flags = "--env-id=Ant-v4 --log-std-init -1 --env-kwargs '{\"a\": [1]}' --exp-name x --no_norm_adv --seed 3"
    name = home(f"python vmpo.py {flags} --encoder-sizes 64 64 --device cpu", tmp_path).name
    assert name.startswith("vmpo,encoder-sizes=64_64,no-norm-adv,env-kwargs=a_1__")  # as many as fit
    name = home(f"python vmpo.py --gamma 0.9 --wandb-project {'p' * 300} --num-envs 4", tmp_path).name
    assert name.startswith("vmpo,num-envs=4__") and len(name) < 80  # a folder's name has at most 255 letters


def test_a_folder_is_found_and_resumed_under_any_name_with_its_command_s_hash(never_killed, tmp_path):
    runs = shutil.copytree(never_killed, tmp_path / "runs")
    new = home(COMMANDS[0], runs)
    old = new.with_name(f"ppo_continuous.py_seed_1_env-id_Hopper-v4_num-envs_4_{new.name[-12:]}")
    new.rename(old)
    folder = run_dir(COMMANDS[0], runs)
    assert folder.parent == old
    (folder / "result.json").unlink()
    status, out, err = run(COMMANDS, runs, "--dry-run")
    assert out.startswith(f"resume   {COMMANDS[0]}\nfinished {COMMANDS[1]}\n")
    status, _, err = run(COMMANDS, runs)
    assert status == 0 and not new.exists() and (folder / "result.json").exists(), err


@pytest.mark.parametrize(
    "flags, more",
    [
        ("--env-id Hopper-v4", []),
        ("--env-id gym_platform:Platform-v0 --seed 1", ["--env-id", "gym_platform:Platform-v0"]),
        (
            "--seed 1 --env-id=benchmarks.half_cheetah_unclipped:Own-v4",
            ["--env-id", "benchmarks.half_cheetah_unclipped:Own-v4"],
        ),
        ('--env-id Hopper-v4 --env-kwargs {"a":1}', []),
    ],
)
def test_a_module_is_named_again_when_its_run_is_resumed(flags, more):
    assert resume_flags(flags.split(), Path("run")) == ["--resume", "run", *more]


# ----------------------------------------------------------------------------------------------------------------------
# Stopped and killed
# ----------------------------------------------------------------------------------------------------------------------


def test_stopped_and_killed_a_sweep_ends_as_one_never_killed(never_killed, tmp_path):
    def saved() -> int:
        return sum(iteration(command, tmp_path) for command in COMMANDS)

    def trainings() -> set[int]:
        """The parents of those that run."""
        return set(parents(str(tmp_path / "sweep")).values())

    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        before, runner = saved(), start(COMMANDS, tmp_path)
        if number == signal.SIGTERM:  # already while they import torch
            wait_for(runner, trainings)
        else:
            wait_for(runner, lambda n=before: saved() > n)
        assert trainings() == {runner.pid}
        runner.send_signal(number)
        status, _, err = finish(runner)
        assert (status, "Traceback" in err) == (-number if number == signal.SIGKILL else 130, False), err
        while number == signal.SIGKILL and trainings():  # they stop without it
            time.sleep(0.01)
        assert not trainings()
    status, _, err = run(COMMANDS, tmp_path)
    assert status == 0, err
    assert sum(len(starts(command, tmp_path)) for command in COMMANDS) > 4
    for command in COMMANDS:
        assert_same_outcome(run_dir(command, tmp_path), run_dir(command, never_killed))


def test_two_runners_at_once_run_everything_once(tmp_path):
    commands = [WRONG] + [f"python ppo_continuous.py --seed {seed} {SHORT}" for seed in (1, 2, 3)]
    runners = [start(commands, tmp_path, "--jobs", "1") for _ in range(2)]
    for status, _, err in map(finish, runners):
        assert status == 1 and "3 of 4 runs, 1 failed" in err, err
    assert (home(WRONG, tmp_path) / "log").read_text().count("error: --gamma") == 1
    for command in commands[1:]:
        assert (run_dir(command, tmp_path) / "result.json").exists() and len(starts(command, tmp_path)) == 1


def test_a_failed_run_is_reported_at_the_end_and_the_others_finish(tmp_path):
    good = f"python ppo_continuous.py {SHORT}"
    status, _, err = run([WRONG, good], tmp_path, "--jobs", "1")
    *_, failed, where, line = err.splitlines()
    assert (status, failed) == (1, f"failed: {WRONG}")
    assert str(home(WRONG, tmp_path) / "log") in where and line.startswith("    error: --gamma 2.0: ")
    assert (run_dir(good, tmp_path) / "result.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Wrong input
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines, flags, says",
    [
        ([], "", "stdin"),
        (["", "# nothing"], "", "stdin"),
        ([COMMANDS[0], "ppo_continuous.py --seed 1"], "", "error: ppo_continuous.py --seed 1: "),
        (["python no_such_script.py"], "", "no_such_script.py"),
        (["python ppo_continuous.py --env-id 'Hopper-v4"], "", "--env-id 'Hopper-v4: "),
        (["python ppo_continuous.py --runs_dir=runs"], "", "--runs-dir"),
        (["python ppo_continuous.py --resume runs/x"], "", "--resume"),
        (COMMANDS, "--jobs 0", "--jobs 0"),
        (COMMANDS, "--jobs many", "--jobs"),
        (COMMANDS, "--gpus -1", "--gpus -1"),
        (COMMANDS, "--job 2", "--job"),
        (COMMANDS, "--runs /dev/null", "/dev/null"),
        (COMMANDS, "--cluster 127.0.0.1:1", "--cluster 127.0.0.1:1: "),
        (COMMANDS, "--cluster ray://127.0.0.1:10001", "HOST:PORT"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(lines, flags, says, tmp_path):
    if "--cluster" in flags:
        pytest.importorskip("ray", reason="Ray is not installed")
    status, out, err = run(lines, tmp_path, *flags.split())
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("error: ") and says in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cluster_without_ray_installed(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError")
    status, _, err = run(COMMANDS, tmp_path / "runs", "--cluster", "auto", PYTHONPATH=str(tmp_path))
    assert (status, len(err.splitlines())) == (2, 1), err
    assert err.startswith("error: --cluster: ") and "pip install" in err


# ----------------------------------------------------------------------------------------------------------------------
# On a cluster
# ----------------------------------------------------------------------------------------------------------------------


def test_a_copy_broken_off_at_any_moment_is_no_run_or_one_to_resume(never_killed, tmp_path, monkeypatch):
    original = run_dir(COMMANDS[0], never_killed)
    copied = Run(shlex.split(COMMANDS[0]), tmp_path)
    source = shutil.copytree(original, tmp_path / original.name)
    (source / "model.pt.tmp").write_bytes(b"half a mod")
    (source / "videos" / "1").mkdir(parents=True)
    (source / "videos" / "1" / "film.mp4").write_bytes(b"film")
    files = read_files(source)
    assert len(files) == len(snapshot(original)) + 1
    replace, left = Path.replace, 0

    def replace_some(*args):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return replace(*args)

    monkeypatch.setattr(Path, "replace", replace_some)
    for count in range(len(files)):
        left = count
        with pytest.raises(KeyboardInterrupt):
            write_files(copied.home, files)
        folder = copied.folder()
        assert not copied.finished() and (folder is None or count == len(files) - 1)
        if folder:
            assert load(folder / "checkpoint.pt")["progress"]["iteration"] == 40
        shutil.rmtree(copied.home)
    left = len(files)
    (copied.home / original.name).mkdir(parents=True)
    (copied.home / original.name / "events.out.tfevents.1").write_bytes(b"of a start that was undone")
    write_files(copied.home, files)
    assert copied.finished() and read_files(copied.folder()) == files
    assert len(snapshot(copied.home)) == len(files)


@pytest.fixture
def two_nodes():
    """The address of a Ray cluster of two nodes with one CPU each on this machine, and its folder for temporary files,
    whose name must be short for the sockets in it."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        try:
            cluster.add_node(**node)
            yield cluster.address, folder
        finally:
            cluster.shutdown()
            deadline = time.monotonic() + 30
            while parents(folder) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not parents(folder)


def test_a_worker_killed_on_a_cluster_costs_only_what_it_did_since_its_last_checkpoint(
    two_nodes, never_killed, tmp_path
):
    address, folder = two_nodes
    runner = start(COMMANDS + [WRONG], tmp_path, "--cluster", address)
    wait_for(runner, lambda: iteration(COMMANDS[0], tmp_path) > 0)
    name = run_dir(COMMANDS[0], tmp_path).name
    trainings = parents("--seed\x001\x00")
    (worker,) = {parent for pid, parent in parents(folder).items() if pid in trainings}
    os.kill(worker, signal.SIGKILL)
    status, _, err = finish(runner)
    assert status == 1 and "2 of 3 runs, 1 failed" in err, err
    assert err.splitlines()[-1].startswith("    error: --gamma 2.0: ")
    log = (home(COMMANDS[0], tmp_path) / "log").read_text()
    first, second = starts(COMMANDS[0], tmp_path)
    assert re.search(r"/run/(.*): ", second)[1] == name  # the same run, in another worker's folder
    assert first != second and log.index(first) < log.index("\nthe worker was lost: ") < log.index(second)
    assert len(starts(COMMANDS[1], tmp_path)) == 1
    for command in COMMANDS:
        assert_same_outcome(run_dir(command, tmp_path), run_dir(command, never_killed))


def test_a_run_that_lost_its_last_worker_has_failed_and_the_next_runner_continues_it(two_nodes, never_killed, tmp_path):
    address, folder = two_nodes
    flags = {"RAY_ADDRESS": address}  # for auto
    runner = start(COMMANDS[:1], tmp_path, "--cluster", "auto", "--retries", "0", **flags)
    wait_for(runner, lambda: iteration(COMMANDS[0], tmp_path) > 0)
    trainings = parents("--seed\x001\x00")
    (worker,) = {parent for pid, parent in parents(folder).items() if pid in trainings}
    os.kill(worker, signal.SIGKILL)
    status, _, err = finish(runner)
    assert status == 1 and "0 of 1 runs, 1 failed" in err and "the worker was lost: " in err, err
    status, _, err = run(COMMANDS[:1], tmp_path, "--cluster", "auto", **flags)
    assert status == 0 and "1 of 1 runs, 0 failed" in err, err
    assert_same_outcome(run_dir(COMMANDS[0], tmp_path), run_dir(COMMANDS[0], never_killed))


def test_the_folder_of_environments_travels_with_the_script(two_nodes, tmp_path):
    command = "python hppo_hybrid.py --env-id environments.hybrid:HybridMoving-v0 --total-timesteps 512 --num-envs 8"
    command += " --num-steps 64 --num-minibatches 4 --no-compile --eval-episodes 1"
    status, _, err = run([command], tmp_path, "--cluster", two_nodes[0])
    assert status == 0 and "1 of 1 runs, 0 failed" in err, err


def test_resources_that_no_node_has_are_pointed_out(two_nodes, tmp_path):
    runner = start(COMMANDS[:1], tmp_path, "--cluster", two_nodes[0], "--cpus", "2")
    assert runner.stderr.readline() == "warning: no node has the 2 CPUs and 0 GPUs of a run yet\n"
    wait_for(runner, lambda: "starting" in runner.stderr.readline())  # the bar: from here on signals are its own
    runner.send_signal(signal.SIGINT)
    assert finish(runner)[0] == 130


SWEEPS = sorted(path.name for path in RUNNER.parent.glob("*.sh") if "runner.py" in path.read_text())


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_scripts_take_the_flags_of_every_sweep(sweep):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", RUNNER.parent / sweep, "--dry-run", "--fresh"], capture_output=True, text=True, env=env, timeout=LIMIT
    )
    commands = [shlex.split(line.partition("python ")[2]) for line in done.stdout.splitlines() if "python " in line]
    assert done.returncode == 0 and commands, done.stderr
    kinds = {(script, *(flag for flag in flags if flag.startswith("--"))): flags for script, *flags in commands}
    for (script, *_), flags in kinds.items():
        module = importlib.import_module(Path(script).stem)
        module.check(module.parse_args(flags))
