"""What a run leaves on disk, and what --resume makes of it. Every run is a process of its own, as a user starts it."""

import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

import ppo_continuous
from ppo_continuous import Args, GymnasiumEnvs

SCRIPT = Path(__file__).parents[1] / "ppo_continuous.py"
SIZES = "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 2 --eval-episodes 1".split()
SMALL = [*SIZES, "--checkpoint-every", "3", "--no-compile"]
HOPPER = [*SMALL, "--env-id", "Hopper-v4", "--total-timesteps", str(40 * 4 * 64)]  # 40 is no multiple of 3

# As sitecustomize.py on PYTHONPATH: kills the unchanged script just before a certain call, since a kill timed from
# outside would rarely fall between two writes. KILL_BEFORE is "function of os, name of the file, how many-th call".
KILLER = """
import os, signal

function, name, count = os.environ["KILL_BEFORE"].split()
original, calls = getattr(os, function), []

def hooked(*args, **kwargs):
    if any(isinstance(a, (str, os.PathLike)) and os.path.basename(a) == name for a in args):
        calls.append(args)
        if len(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(os, function, hooked)
"""


def start(*flags, **env) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, *map(str, flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **env})


def finish(process: subprocess.Popen):
    """The exit status and what was printed."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def run(*flags, **env):
    return finish(start(*flags, **env))


def wait_for(process: subprocess.Popen, condition):
    """Until condition() is true; the process must live to see it."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def only(runs_dir: Path) -> Path:
    """The one run in a folder that has nothing else in it."""
    (run_dir,) = runs_dir.iterdir()
    return run_dir


def written(path: Path) -> int:
    return path.stat().st_mtime_ns


def snapshot(folder: Path) -> dict:
    return {path: (written(path), path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


def scalars(run_dir: Path) -> Counter:
    """How often each (tag, step, value) was logged, over all event files; the speed's value is left out."""
    events = [event for path in run_dir.glob("events.*") for event in LegacyEventFileLoader(str(path)).Load()]
    rows = [(value.tag, event.step, value.simple_value) for event in events for value in event.summary.value]
    return Counter((tag, step, None if tag == "charts/SPS" else value) for tag, step, value in rows)


def load(path: Path):
    return torch.load(path, weights_only=True)


def assert_same_outcome(run_dir: Path, expected_dir: Path):
    """To the bit, and nothing left over from the kills."""
    model, expected = load(run_dir / "model.pt"), load(expected_dir / "model.pt")
    assert list(model) == list(expected)
    assert all(torch.equal(model[name], expected[name]) for name in model)
    assert (run_dir / "episodes.csv").read_bytes() == (expected_dir / "episodes.csv").read_bytes()
    assert scalars(run_dir) == scalars(expected_dir)
    results = [json.loads((folder / "result.json").read_text()) for folder in (run_dir, expected_dir)]
    for name in ("iteration", "global_step", "eval_returns"):
        assert results[0][name] == results[1][name]
    assert not list(run_dir.glob("*.tmp"))


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory) -> Path:
    runs_dir = tmp_path_factory.mktemp("never_killed")
    status, _, err = run(*HOPPER, "--runs-dir", runs_dir)
    assert status == 0, err
    return only(runs_dir)


@pytest.fixture
def unfinished(never_killed, tmp_path) -> Path:
    """A copy that looks as if it had been killed before its evaluation."""
    folder = tmp_path / "unfinished"
    shutil.copytree(never_killed, folder)
    (folder / "result.json").unlink()
    return folder


@pytest.fixture
def killed_before(tmp_path):
    """A function that runs the script until just before a call (see KILLER)."""
    (tmp_path / "killer").mkdir()
    (tmp_path / "killer" / "sitecustomize.py").write_text(KILLER)

    def run_until(moment: str, *flags):
        status, out, err = run(*flags, KILL_BEFORE=moment, PYTHONPATH=str(tmp_path / "killer"))
        assert status == -signal.SIGKILL, (moment, out, err)

    return run_until


# ----------------------------------------------------------------------------------------------------------------------
# Killed
# ----------------------------------------------------------------------------------------------------------------------


def test_a_kill_before_the_folder_appears_leaves_no_run(killed_before, tmp_path):
    runs_dir = tmp_path / "runs"
    killed_before("replace checkpoint.pt 1", *HOPPER, "--runs-dir", runs_dir)
    assert not list(runs_dir.glob("[!.]*"))


def test_killed_at_any_moment_a_resumed_run_ends_as_one_never_killed(never_killed, killed_before, tmp_path):
    runs_dir = tmp_path / "runs"
    killed_before("unlink episodes.csv 1", *HOPPER, "--runs-dir", runs_dir)  # the first call once the folder is there
    run_dir = only(runs_dir)
    resume = ["--resume", run_dir]
    killed_before("replace checkpoint.pt 1", *resume)  # model.pt is newer than checkpoint.pt, and all logs too long
    killed_before("replace checkpoint.pt 2", *resume)
    killed_before("truncate episodes.csv 1", *resume)
    killed_before("replace model.pt 2", *resume)
    moments, kills = random.Random(1), 0
    for _ in range(3):
        process, before = start(*resume), written(run_dir / "checkpoint.pt")
        wait_for(process, lambda before=before: written(run_dir / "checkpoint.pt") != before)
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        kills += finish(process)[0] == -signal.SIGKILL
    assert kills >= 2, "the run is too short for its kills"
    killed_before("replace result.json 1", *resume)
    status, out, err = run(*resume)
    assert status == 0, err
    assert out.splitlines()[-1] == f"wrote {run_dir}"
    assert_same_outcome(run_dir, never_killed)


def test_a_compiled_run_resumes_to_the_bit_too(killed_before, tmp_path):
    flags = [*SIZES, "--checkpoint-every", 2, "--env-id", "Walker2d-v4", "--total-timesteps", 12 * 4 * 64]
    assert run(*flags, "--runs-dir", tmp_path / "whole")[0] == 0
    killed_before("replace checkpoint.pt 3", *flags, "--runs-dir", tmp_path / "killed")
    run_dir = only(tmp_path / "killed")
    assert run("--resume", run_dir)[0] == 0
    assert_same_outcome(run_dir, only(tmp_path / "whole"))
    assert not [name for name in load(run_dir / "model.pt") if "_orig_mod" in name]


# ----------------------------------------------------------------------------------------------------------------------
# State of the environments
# ----------------------------------------------------------------------------------------------------------------------

TASKS = (
    "HalfCheetah Hopper Walker2d Ant Humanoid HumanoidStandup Swimmer Reacher InvertedPendulum InvertedDoublePendulum"
)


def step_and_reset(envs: GymnasiumEnvs, actions: np.ndarray) -> list[np.ndarray]:
    obs, rewards, terminated, truncated = envs.step(actions)
    done = terminated | truncated
    first = envs.reset(np.flatnonzero(done)) if done.any() else np.empty(0)
    return [obs, rewards, terminated, truncated, first]


@pytest.mark.parametrize("env_id", [f"{task}-{v}" for task in TASKS.split() for v in ("v4", "v5")] + ["Pusher-v5"])
@pytest.mark.parametrize("steps_before", [0, 50])
def test_mujoco_state_continues_in_new_environments_to_the_bit(env_id, steps_before):
    args = Args(env_id=env_id, num_envs=2)
    envs, others, rng = GymnasiumEnvs(args), GymnasiumEnvs(args), np.random.default_rng(1)
    space = envs.envs[0].action_space
    actions = rng.uniform(space.low, space.high, (steps_before + 200, 2, *space.shape))
    envs.reset(range(2), seed=1)
    others.reset(range(2), seed=2)
    for a in actions[:steps_before]:
        step_and_reset(envs, a)
    file = io.BytesIO()
    torch.save(envs.state(), file)
    others.load_state(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for t, a in enumerate(actions[steps_before:]):
        for array, other in zip(step_and_reset(envs, a), step_and_reset(others, a)):
            assert np.array_equal(array, other), f"step {t} after the capture"


@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
def test_where_the_state_cannot_be_captured_episodes_start_again_and_a_line_says_so(backend, killed_before, tmp_path):
    if backend == "envpool":
        pytest.importorskip("envpool", reason="EnvPool is not installed")
    flags = [*SIZES, "--no-compile", "--env-id", "Pendulum-v1", "--backend", backend, "--total-timesteps", 12 * 4 * 64]
    # Call 1 is the checkpoint at the start, 2 that at step 512, 3 that at step 1024. An episode lasts 200 steps.
    killed_before("replace checkpoint.pt 3", *flags, "--checkpoint-every", 2, "--runs-dir", tmp_path / "runs")
    run_dir = only(tmp_path / "runs")
    status, out, err = run("--resume", run_dir)
    assert status == 0, err
    (notice,) = [line for line in (out + err).splitlines() if "notice" in line]
    assert notice.startswith("notice: ") and "start again" in notice
    ends = [int(row.split(",")[0]) for row in (run_dir / "episodes.csv").read_text().splitlines()[1:]]
    assert ends == [step for k in (1, 2, 3) for step in [512 + 4 * 200 * k] * 4]


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted
# ----------------------------------------------------------------------------------------------------------------------


def printed_command(out: str) -> str:
    before, command = out.splitlines()[-1].split("continue with: ")
    return command


def run_as_typed(command: str):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, shell=True, env={**os.environ, "PATH": path}, capture_output=True, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_iteration_and_the_printed_command_continues_it(number, never_killed, tmp_path):
    runs_dir = tmp_path / "my runs"  # a path that has to be quoted
    process = start(*HOPPER, "--checkpoint-every", 1000, "--runs-dir", runs_dir)
    wait_for(process, lambda: list(runs_dir.glob("[!.]*/events.*")))
    process.send_signal(number)
    status, out, err = finish(process)
    assert (status, "Traceback" in err) == (130, False), err
    run_dir = only(runs_dir)
    assert 1 <= load(run_dir / "checkpoint.pt")["progress"]["iteration"] < 40
    assert str(run_dir) in shlex.split(printed_command(out))
    again = run_as_typed(printed_command(out))
    assert again.returncode == 0, again.stderr
    assert_same_outcome(run_dir, never_killed)


def test_a_signal_during_the_evaluation_is_no_result(tmp_path):
    flags = [*SMALL, "--env-id", "Hopper-v4", "--total-timesteps", 256, "--eval-episodes", 10_000]
    process = start(*flags, "--runs-dir", tmp_path / "runs")
    wait_for(process, lambda: list((tmp_path / "runs").glob("[!.]*/events.*")))
    run_dir = only(tmp_path / "runs")
    wait_for(process, lambda: load(run_dir / "checkpoint.pt")["progress"]["iteration"] == 1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    status, out, err = finish(process)
    assert status == 130, err
    assert "evaluation:" not in out and "greedy" not in out  # of the episodes that were not run to their end
    assert not (run_dir / "result.json").exists()
    status, out, err = run("--resume", run_dir, "--eval-episodes", 1)
    assert status == 0, err
    result = json.loads((run_dir / "result.json").read_text())
    assert len(result["eval_returns"]) == 1
    assert result["sps"] > 0  # that of the training, though this start only evaluated


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be resumed
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capfd):
    """A function that expects one error line with these texts, and exit status 2; in this process, for speed."""

    def assert_refused(*flags, says: list):
        with pytest.raises(SystemExit) as exit:
            ppo_continuous.main(ppo_continuous.parse_args([str(flag) for flag in flags]))
        (line,) = capfd.readouterr().err.splitlines()
        assert (exit.value.code, line[:7]) == (2, "error: ")
        assert not [text for text in says if str(text) not in line], line

    return assert_refused


def test_a_finished_run_says_so_and_stays_as_it_is(never_killed):
    before = snapshot(never_killed)
    status, out, err = run("--resume", never_killed)
    assert (status, err) == (0, "")
    assert "finished" in out and str(never_killed) in out
    assert snapshot(never_killed) == before


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--gamma", "0.5"], ["--gamma", "0.5", "0.99"]),
        (["--num-envs", "8"], ["--num-envs", "8", "4"]),  # 8 is the default, the run has 4
        (["--compile"], ["--compile"]),  # the default, but the run has --no-compile
    ],
)
def test_a_flag_that_the_run_contradicts_is_refused(flags, says, unfinished, refused):
    before = snapshot(unfinished)
    refused("--resume", unfinished, *flags, says=says)
    assert snapshot(unfinished) == before


@pytest.mark.parametrize(
    "pattern, damage",
    [
        ("checkpoint.pt", lambda content: content[: len(content) // 2]),
        ("checkpoint.pt", lambda content: bytes(reversed(content))),
        ("checkpoint.pt", lambda content: b""),
        ("checkpoint.pt", None),
        ("config.json", lambda content: content[:100]),
        ("episodes.csv", lambda content: content[:-1]),
        ("episodes.csv", None),
        ("events.*", lambda content: content[:-1]),
        ("events.*", None),
    ],
    ids="truncated garbage empty missing config-truncated csv-short csv-missing events-short events-missing".split(),
)
def test_a_damaged_file_is_named_and_nothing_is_touched(pattern, damage, unfinished, refused):
    (path,) = unfinished.glob(pattern)
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    before = snapshot(unfinished)
    refused("--resume", unfinished, says=["--resume", unfinished, path.name])
    assert snapshot(unfinished) == before


def test_a_checkpoint_of_something_else_is_named(never_killed, unfinished, refused):
    shutil.copy(never_killed / "model.pt", unfinished / "checkpoint.pt")
    refused("--resume", unfinished, says=["--resume", unfinished, "checkpoint.pt"])


def test_a_folder_that_is_no_run_is_refused(tmp_path, refused):
    refused("--resume", tmp_path, says=["--resume", tmp_path])
    refused("--resume", tmp_path / "none", says=["--resume", tmp_path / "none"])
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# What is in the files
# ----------------------------------------------------------------------------------------------------------------------


def test_both_files_load_without_running_code_and_hold_the_same_weights(never_killed):
    checkpoint, model = load(never_killed / "checkpoint.pt"), load(never_killed / "model.pt")
    assert checkpoint["progress"]["global_step"] == 40 * 4 * 64
    assert list(model) == list(checkpoint["agent"])
    assert all(torch.equal(model[name], checkpoint["agent"][name]) for name in model)


BROKEN = """
import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv

class Reward(HalfCheetahEnv):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.nan if self.data.time > 99.5 * self.dt else reward, *rest

class Observation(HalfCheetahEnv):
    def step(self, action):
        obs, *rest = super().step(action)
        return np.where(self.data.time > 99.5 * self.dt, np.inf, obs), *rest

gym.register("Reward-v0", Reward, max_episode_steps=1000)
gym.register("Observation-v0", Observation, max_episode_steps=1000)
"""


@pytest.mark.parametrize("quantity", ["reward", "observation"])
def test_a_number_that_is_not_finite_ends_the_run_with_what_and_where(quantity, tmp_path):
    (tmp_path / "broken_envs.py").write_text(BROKEN)  # broken from the 100th step of an episode
    flags = [*SMALL, "--checkpoint-every", 1, "--total-timesteps", 10 * 256, "--runs-dir", tmp_path / "runs"]
    env = {"PYTHONPATH": str(tmp_path)}
    status, _, err = run(*flags, "--env-id", f"broken_envs:{quantity.capitalize()}-v0", **env)
    run_dir = only(tmp_path / "runs")

    def error_line(err: str) -> str:
        (line,) = [line for line in err.splitlines() if "error" in line.lower()]
        assert line.startswith(f"error: {quantity} ")
        assert "step 400" in line and "Traceback" not in err
        return line

    line = error_line(err)
    assert status == 1
    assert load(run_dir / "checkpoint.pt")["progress"]["global_step"] == 256
    before = (run_dir / "checkpoint.pt").read_bytes()
    status, _, err = run("--resume", run_dir, **env)
    assert (status, error_line(err)) == (1, line)
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    assert only(tmp_path / "runs") == run_dir and not list(run_dir.glob("*.tmp"))
