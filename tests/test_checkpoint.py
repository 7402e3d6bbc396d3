"""What a run leaves on disk, and what --resume makes of it. What is killed is a process, as a user starts it; the rest
runs in this one, for speed."""

import io
import json
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import KILLER, LIMIT, assert_same_outcome, finish, load, only, run, scalars, snapshot, start

import ppo_continuous
import ppo_klpen
import vmpo
from ppo_continuous import Args, Envs

# A background thread that fails prints a traceback; pytest would make that a warning
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

BATCH, ITERATIONS = 4 * 64, 36
SIZES = "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 2 --eval-episodes 1".split()
SMALL = [*SIZES, "--no-compile", "--checkpoint-every", "0"]
RUN = [*SMALL, "--total-timesteps", str(ITERATIONS * BATCH)]
PENDULUM = [*SMALL, "--env-id", "Pendulum-v1", "--total-timesteps", str(6 * BATCH)]

# As a module on the path. `where` says what an episode depends on besides its seed and actions; the goal shows in the
# reward after `late` steps.
GOALS = """
import random

import gymnasium as gym
import numpy as np


class Goal(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, where=None, length=50, late=0, bound=np.inf, render_mode=None):
        self.where, self.length, self.late, self.bound, self.episodes = where, length, late, bound, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.x = 0, self.np_random.uniform(-0.1, 0.1)
        self.goal = self.np_random.uniform(-1, 1)  # not observed
        self.episodes += 1
        if self.where == "random":
            self.goal = random.uniform(-1, 1)
        if self.where == "first observation":
            self.x += self.episodes
        if self.where == "reward":
            self.goal += self.episodes
        return np.array([self.x], dtype=np.float32), {}

    def step(self, action):
        self.x += action.item() / 10 + self.np_random.normal() / 100
        self.count += 1
        if self.where == "np.random":
            self.x += np.random.normal() / 100
        if abs(self.x) > self.bound:
            raise RuntimeError("out of bounds")
        distance = abs(self.x - self.goal) if self.count > self.late else 1.0
        near = self.where is None and distance < 0.01
        return np.array([self.x], dtype=np.float32), -distance, near, self.count >= self.length, {}


class Broken(Goal):
    # One quantity is `value` at the end of an episode, or at the start of that with `seed`; `strict`: checks actions

    def __init__(self, quantity, value, seed, strict):
        super().__init__(length=100)
        self.quantity, self.value, self.seed, self.strict = quantity, float(value), seed, strict

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs * (self.value if self.quantity == "obs" and seed == self.seed else 1), info

    def step(self, action):
        assert not self.strict or self.action_space.contains(action)
        obs, reward, _, truncated, info = super().step(action)
        factor = {self.quantity: self.value if truncated else 1}
        return obs * factor.get("next_obs", 1), reward * factor.get("rewards", 1), False, truncated, info


gym.register("Goal-v0", Goal)
gym.register("Broken-v0", Broken)
"""


@pytest.fixture(scope="module", autouse=True)
def goals(tmp_path_factory):
    """A folder with goals.py, on the path of this process and of those that it starts."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "goals.py").write_text(GOALS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))
        yield folder


def train(*flags):
    """In this process, as from the command line."""
    ppo_continuous.main(ppo_continuous.parse_args([str(flag) for flag in flags]))


def wait_for(process: subprocess.Popen, condition):
    """Until condition() is true; the process must live to see it."""
    started = time.monotonic()
    while not condition():
        if process.poll() is not None or time.monotonic() - started > LIMIT:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.002)


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def notices(text: str) -> list:
    return [line for line in text.splitlines() if line.startswith("notice: ")]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """A function of an id: the folder of a run that nothing has disturbed."""
    folders = {}

    def folder(env_id: str) -> Path:
        if env_id not in folders:
            runs_dir = tmp_path_factory.mktemp("never_killed")
            train(*RUN, "--env-id", env_id, "--runs-dir", runs_dir)
            folders[env_id] = only(runs_dir)
        return folders[env_id]

    return folder


@pytest.fixture
def finished(never_killed, tmp_path) -> Path:
    """A copy of Pendulum's."""
    return Path(shutil.copytree(never_killed("Pendulum-v1"), tmp_path / "copy"))


@pytest.fixture
def unfinished(finished) -> Path:
    """As if killed before the evaluation."""
    (finished / "result.json").unlink()
    return finished


@pytest.fixture
def killed_before(tmp_path, goals):
    """A function that runs the script until just before a call (see KILLER)."""
    (tmp_path / "killer").mkdir()
    (tmp_path / "killer" / "sitecustomize.py").write_text(KILLER)

    def run_until(moment: str, *flags):
        status, out, err = run(*flags, KILL_BEFORE=moment, PYTHONPATH=f"{tmp_path / 'killer'}{os.pathsep}{goals}")
        assert status == -signal.SIGKILL, (moment, out, err)

    return run_until


@pytest.fixture
def interrupted_after(monkeypatch):
    """A function that trains in this process, and is interrupted as by Ctrl-C once so many checkpoints are saved."""

    def train_until(checkpoints: int, *flags):
        saved, save = [], ppo_continuous.save

        def save_and_interrupt(*args):
            save(*args)
            saved.append(args)
            if len(saved) == checkpoints:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
            patch.setattr(ppo_continuous, "save", save_and_interrupt)
            train(*flags)
        assert exit.value.code == 130

    return train_until


@pytest.fixture
def error_line(capfd):
    """A function that trains, and gives the only line on stderr besides the bar where that ends with this status, or
    None where it ends well."""

    def error_line_of(*flags, status=2) -> str | None:
        capfd.readouterr()
        try:
            return train(*flags)
        except SystemExit as exit:
            err = capfd.readouterr().err
            (line,) = [line for line in err.splitlines() if line.strip() and not re.match(r" *\d+%", line)]
            assert (exit.code, line[:7]) == (status, "error: "), err
            return line

    return error_line_of


@pytest.fixture
def refused(error_line):
    """A function that expects an error line with these texts."""

    def assert_refused(*flags, says: list, status=2):
        line = error_line(*flags, status=status)
        assert line and not [text for text in says if str(text) not in line], line

    return assert_refused


@pytest.fixture
def refused_with(refused):
    """A function that expects, for each content of a file of a run (None: no file), an error line that names the file,
    and the folder to stay as it is."""

    def assert_refused(flag: str, path: Path, contents: list):
        for content in contents:
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
            before = snapshot(path.parent)
            refused(flag, path.parent, says=[path])
            assert snapshot(path.parent) == before

    return assert_refused


def as_file(value) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Killed
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id, first, last",
    [  # the moments in two processes, then five at random, then one moment in a last process but one
        ("Hopper-v4", ["replace episodes.csv 1", "replace checkpoint.pt 1"], "replace result.json 1"),
        ("HalfCheetah-v5", ["replace model.pt 1", "replace checkpoint.pt 2"], "replace result.json 2"),
        ("Pendulum-v1", ["replace model.pt 2", "replace episodes.csv 1"], "replace model.pt {remaining}"),
        ("goals:Goal-v0", ["replace checkpoint.pt 4", "replace model.pt 3"], "replace checkpoint.pt {remaining}"),
    ],
)
def test_killed_at_any_moment_a_resumed_run_ends_as_one_never_killed(
    env_id, first, last, never_killed, killed_before, tmp_path, capfd
):
    runs_dir, moments, kills = tmp_path / "runs", random.Random(env_id), 0
    killed_before(first[0], *RUN, "--env-id", env_id, "--runs-dir", runs_dir)
    run_dir = only(runs_dir)
    checkpoint = run_dir / "checkpoint.pt"
    resume = ["--resume", run_dir, *["--env-id", env_id] * (":" in env_id)]
    killed_before(first[1], *resume)
    for _ in range(5):
        before, process = written(checkpoint), start(*resume)
        wait_for(process, lambda before=before: written(checkpoint) != before)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        kills += finish(process)[0] == -signal.SIGKILL
    assert kills == 5, "the run is too short for its kills"
    killed_before(last.format(remaining=ITERATIONS - load(checkpoint)["progress"]["iteration"]), *resume)
    train(*resume)
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == f"wrote {run_dir}" and not notices(err)
    assert_same_outcome(run_dir, never_killed(env_id))


def test_a_compiled_run_resumes_to_the_bit_too(killed_before, tmp_path, capfd):
    flags = [*SIZES, "--num-minibatches", 1, "--checkpoint-every", 0, "--env-id", "Walker2d-v4"]
    flags += ["--total-timesteps", 6 * BATCH, "--runs-dir"]
    killed_before("replace checkpoint.pt 3", *flags, tmp_path / "killed")
    train("--resume", only(tmp_path / "killed"))
    train(*flags, tmp_path / "whole")
    assert not notices(capfd.readouterr().err)
    assert_same_outcome(only(tmp_path / "killed"), only(tmp_path / "whole"))


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(never_killed, tmp_path):
    process = start(*RUN, "--env-id", "Hopper-v4", "--checkpoint-every", 1000, "--runs-dir", tmp_path / "runs")
    wait_for(process, lambda: sum(path.stat().st_size for path in tmp_path.glob("runs/*/events.*")) > 5000)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    run_dir = only(tmp_path / "runs")
    assert max(step for _, step, _ in scalars(run_dir)) > BATCH and not list(run_dir.glob("*.pt"))
    train("--resume", run_dir)
    assert_same_outcome(run_dir, never_killed("Hopper-v4"))


# ----------------------------------------------------------------------------------------------------------------------
# State of the environments
# ----------------------------------------------------------------------------------------------------------------------

MUJOCO = "HalfCheetah Hopper Walker2d Ant Humanoid HumanoidStandup Swimmer Reacher InvertedDoublePendulum".split()
EXACT = [*[f"{task}-{v}" for task in MUJOCO for v in ("v4", "v5")], "Pusher-v5", "Pendulum-v1"]
EXACT += ["MountainCarContinuous-v0", "LunarLander-v3", "goals:Goal-v0"]


def stepped_and_continued(env_id: str, steps: int, **kwargs):
    """Envs after so many steps of random actions; others that continue them, and which of those start again; a function
    that gives the next actions."""
    kwargs = {"continuous": True} if env_id == "LunarLander-v3" else kwargs
    args, rng = Args(env_id=env_id, env_kwargs=json.dumps(kwargs), num_envs=2), np.random.default_rng(1)
    envs, others = Envs(args, range(2)), Envs(args, range(2))

    def actions():
        return rng.normal(size=(2, *envs.action_space.shape)).astype(np.float32)

    for _ in range(steps):
        envs.step(actions())
    again = others.load_state_dict(torch.load(io.BytesIO(as_file(envs.state_dict())), weights_only=True))
    envs.finished.clear()
    return envs, others, again, actions


def assert_equal_steps(envs: Envs, others: Envs, actions):
    for t in range(200):
        a = actions()
        row, other = envs.step(a), others.step(a)
        assert all(np.array_equal(row[name], other[name]) for name in row), f"step {t} after the start"
        assert np.array_equal(envs.obs, others.obs)
        assert [episode[:3] for episode in envs.finished] == [episode[:3] for episode in others.finished]


@pytest.mark.parametrize("env_id", EXACT)
@pytest.mark.parametrize("steps", [0, 50])
def test_new_environments_continue_the_running_episodes_to_the_bit(env_id, steps):
    envs, others, again, actions = stepped_and_continued(env_id, steps)
    assert not again.any()
    assert_equal_steps(envs, others, actions)


def test_bipedal_walker_starts_again_wherever_it_would_continue_differently():
    for steps in (0, 50, 400):  # Box2D's world outlives an episode, and its history shows only when the walker falls
        envs, others, again, actions = stepped_and_continued("BipedalWalker-v3", steps)
        if not again.any():
            assert_equal_steps(envs, others, actions)


@pytest.mark.parametrize(
    "steps, kwargs",
    [(120, {"where": where}) for where in ("random", "np.random", "first observation", "reward")]
    + [(120, {"where": "random", "length": 400, "late": 300}), (250, {"where": "reward", "length": 400, "late": 220})],
    ids=str,
)
def test_an_episode_with_state_elsewhere_starts_again(steps, kwargs):
    envs, others, again, _ = stepped_and_continued("goals:Goal-v0", steps, **kwargs)
    assert again.all()
    assert list(others.episode) == list(envs.episode + 1) and others.global_step == envs.global_step
    assert not others.lengths.any() and not others.returns.any() and not others.discounted.any()


class Endless(gym.Env):
    """Actions are a matrix, and no episode ends."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (2, 2))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=2)
        return self.x.astype(np.float32), {}

    def step(self, action):
        self.x = 0.9 * self.x + action.sum(0)
        return self.x.astype(np.float32), -abs(self.x).sum(), False, False, {}


def test_a_run_without_an_episode_s_end_resumes_and_saves_to_the_bit(interrupted_after, tmp_path):
    gym.register("Endless-v0", Endless)
    flags = [*SMALL, "--env-id", "Endless-v0", "--eval-max-steps", 50, "--total-timesteps", 4 * BATCH]
    train(*flags, "--runs-dir", tmp_path / "whole")
    interrupted_after(2, *flags, "--runs-dir", tmp_path / "resumed")
    train("--resume", only(tmp_path / "resumed"), "--checkpoint-every", 0)
    assert_same_outcome(only(tmp_path / "resumed"), only(tmp_path / "whole"))


@pytest.mark.parametrize("where", ["random", "np.random", "first observation", "reward", "nowhere"])
def test_an_episode_with_state_elsewhere_never_goes_on_another_way_without_a_word(
    where, interrupted_after, tmp_path, capfd
):
    """Each checkpoint falls between two episodes, so that there is nothing to repeat. "nowhere" is exact, and raises on
    paths that the run does not take."""
    kwargs = json.dumps({"where": where, "length": 64, "bound": 0.5 if where == "nowhere" else 1e9})
    flags = ["--env-id", "goals:Goal-v0", "--env-kwargs", kwargs, "--log-std-init", -4]
    flags = [*SMALL, *flags, "--total-timesteps", 6 * BATCH]
    train(*flags, "--runs-dir", tmp_path / "whole")
    interrupted_after(3, *flags, "--runs-dir", tmp_path / "resumed")
    run_dir = only(tmp_path / "resumed")
    assert not notices(capfd.readouterr().err)
    train("--resume", run_dir, "--env-id", "goals:Goal-v0")
    if not notices(capfd.readouterr().err):
        assert_same_outcome(run_dir, only(tmp_path / "whole"))


# ----------------------------------------------------------------------------------------------------------------------
# Longer, and from another run's weights
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("already_finished", [False, True])
def test_resumed_with_total_timesteps_a_run_goes_on_to_there(already_finished, interrupted_after, tmp_path, capfd):
    if already_finished:
        train(*PENDULUM, "--runs-dir", tmp_path)
    else:
        interrupted_after(6, *PENDULUM, "--runs-dir", tmp_path)
    run_dir = only(tmp_path)
    capfd.readouterr()
    interrupted_after(2, "--resume", run_dir, "--total-timesteps", 12 * BATCH)
    (notice,) = notices(capfd.readouterr().err)
    assert f"{12 * BATCH:,}" in notice and "learning rate" in notice
    assert json.loads((run_dir / "config.json").read_text())["args"]["total_timesteps"] == 12 * BATCH
    train("--resume", run_dir)
    assert not notices(capfd.readouterr().err)
    assert json.loads((run_dir / "result.json").read_text())["global_step"] == 12 * BATCH
    rates = {step // BATCH: value for tag, step, value in scalars(run_dir) if tag == "charts/learning_rate"}
    ends = {k: 6 if k <= 6 else 12 for k in range(1, 13)}  # the schedule's last iteration
    assert rates == pytest.approx({k: 3e-4 * (1 - (k - 1) / end) for k, end in ends.items()})


def test_a_longer_run_in_two_parts_is_the_same_where_the_learning_rate_stays(tmp_path):
    flags = [*PENDULUM, "--no-anneal-lr"]
    train(*flags, "--runs-dir", tmp_path / "parts")
    train("--resume", only(tmp_path / "parts"), "--total-timesteps", 12 * BATCH)
    train(*flags, "--total-timesteps", 12 * BATCH, "--runs-dir", tmp_path / "whole")
    folders = only(tmp_path / "parts"), only(tmp_path / "whole")
    parts, whole = ({point: n for point, n in scalars(f).items() if "eval/" not in point[0]} for f in folders)
    assert parts == whole
    for path in tmp_path.glob("*/*/events.*"):  # the parts have an evaluation more
        path.unlink()
    assert_same_outcome(*folders)


def test_a_finished_run_says_so_and_stays_as_it_is(finished, capfd):
    before = snapshot(finished)
    train("--resume", finished)
    out, err = capfd.readouterr()
    assert "finished" in out and str(finished) in out and err == ""
    assert snapshot(finished) == before


@pytest.mark.parametrize("source", ["", "model.pt"])
def test_a_run_starts_from_the_weights_and_statistics_of_another(source, finished, tmp_path):
    flags = [*SMALL, "--env-id", "Pendulum-v1", "--total-timesteps", BATCH, "--runs-dir", tmp_path / "runs"]
    train(*flags, "--init-from", finished / source, "--learning-rate", 0)
    model, begun = load(finished / "model.pt"), load(only(tmp_path / "runs") / "model.pt")
    assert all(torch.equal(model[name], begun[name]) for name in model if "_rms" not in name)
    for rms in ("obs_rms", "return_rms"):
        assert begun[f"{rms}.count"] == model[f"{rms}.count"] + BATCH
        assert not torch.equal(begun[f"{rms}.mean"], model[f"{rms}.mean"])


def test_a_run_made_from_another_needs_that_only_to_begin(finished, interrupted_after, tmp_path):
    flags = [*PENDULUM, "--init-from", finished, "--runs-dir", tmp_path / "runs"]
    interrupted_after(2, *flags)
    shutil.rmtree(finished)
    train("--resume", only(tmp_path / "runs"))


def test_a_run_cannot_start_from_weights_that_do_not_fit(never_killed, tmp_path, refused):
    flags = [*PENDULUM, "--runs-dir", tmp_path / "runs", "--init-from"]
    for source in (tmp_path / "none", tmp_path / "none.pt", never_killed("HalfCheetah-v5")):
        refused(*flags, source, says=[source])
    assert not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Damage
# ----------------------------------------------------------------------------------------------------------------------


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[name], b[name]) for name in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list) else a == b


TWO = pytest.mark.parametrize("flag, name", [("--resume", "checkpoint.pt"), ("--eval", "model.pt")])


@TWO
def test_no_flipped_bit_is_taken_for_what_was_saved(flag, name, finished, error_line):
    path, draw, lines = finished / name, random.Random(1), []
    content, saved = path.read_bytes(), load(path)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        before = snapshot(finished)
        lines.append(error_line(flag, finished))
        assert str(path) in lines[-1] if lines[-1] else equal(load(path), saved)  # a bit of a date, say
        assert snapshot(finished) == before
    assert lines.count(None) < 50


@TWO
def test_a_file_that_is_cut_short_or_something_else_is_named(flag, name, finished, refused_with):
    content, draw = (finished / name).read_bytes(), random.Random(2)
    lengths = [0, 1, len(content) - 1, *(draw.randrange(len(content)) for _ in range(20))]
    garbage = [bytes(reversed(content)), draw.randbytes(len(content)), bytes(len(content)), None]
    refused_with(flag, finished / name, [content[:length] for length in lengths] + garbage)


class Code:
    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@TWO
@pytest.mark.parametrize(
    "write, read", [(as_file, lambda file: torch.load(file, weights_only=False)), (pickle.dumps, pickle.load)]
)
def test_code_in_a_file_is_not_run(write, read, flag, name, finished, tmp_path, refused, refused_with):
    path, marker = finished / name, tmp_path / "marker"
    refused_with(flag, path, [write({**load(path), "agent": Code(marker)})])
    refused(*PENDULUM, "--init-from", path, "--runs-dir", tmp_path / "runs", says=[path])
    assert not marker.exists()
    read(io.BytesIO(path.read_bytes()))
    assert marker.exists()  # it would have been


def test_a_checkpoint_with_a_part_missing_or_of_another_size_is_named(unfinished, refused_with):
    saved = load(unfinished / "checkpoint.pt")

    def resized(value):
        return value.repeat(2) if isinstance(value, torch.Tensor) and value.dim() == 0 else value[:-1]

    damaged = [{name: part for name, part in saved.items() if name != missing} for missing in saved]
    damaged += [{**saved, "rng": resized(saved["rng"])}, {}, [], saved["agent"]]
    for part in ("agent", "optimizer", "envs", "progress"):
        for name, value in saved[part].items():
            damaged.append({**saved, part: {k: v for k, v in saved[part].items() if k != name}})
            if isinstance(value, (torch.Tensor, list)):
                damaged.append({**saved, part: {**saved[part], name: resized(value)}})
    assert len(damaged) > 60
    refused_with("--resume", unfinished / "checkpoint.pt", map(as_file, damaged))


@pytest.mark.parametrize("script", [vmpo, ppo_klpen], ids=lambda script: script.__name__)
def test_a_checkpoint_of_another_script_is_named(script, unfinished, tmp_path, refused, refused_with):
    flags = "--env-id Pendulum-v1 --num-envs 4 --num-steps 64 --total-timesteps 256 --no-compile --eval-episodes 1"
    script.main(script.parse_args([*flags.split(), "--runs-dir", str(tmp_path / "other")]))
    other = only(tmp_path / "other")
    refused("--resume", other, says=[other / "config.json"])
    refused_with("--resume", unfinished / "checkpoint.pt", [(other / "checkpoint.pt").read_bytes()])


@pytest.mark.parametrize("num_envs", [2, 8])
def test_a_checkpoint_of_another_number_of_environments_is_named(num_envs, unfinished, tmp_path, refused_with):
    train(*PENDULUM, "--num-envs", num_envs, "--runs-dir", tmp_path / "other")
    other = only(tmp_path / "other") / "checkpoint.pt"
    refused_with("--resume", unfinished / "checkpoint.pt", [other.read_bytes()])


@pytest.mark.parametrize("checkpoints", [4, 6])
def test_a_list_of_episodes_that_lacks_some_is_completed(checkpoints, interrupted_after, tmp_path):
    train(*PENDULUM, "--runs-dir", tmp_path / "whole")
    interrupted_after(checkpoints, *PENDULUM, "--runs-dir", tmp_path / "stopped")
    content = (only(tmp_path / "stopped") / "episodes.csv").read_bytes()
    for damaged in (content[: len(content) // 2], None):
        run_dir = Path(shutil.copytree(only(tmp_path / "stopped"), tmp_path / f"damaged_{len(damaged or [])}"))
        (run_dir / "episodes.csv").unlink()
        if damaged is not None:
            (run_dir / "episodes.csv").write_bytes(damaged)
        train("--resume", run_dir)
        assert_same_outcome(run_dir, only(tmp_path / "whole"))


# ----------------------------------------------------------------------------------------------------------------------
# Folders of somebody else
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--resume", "--eval"])
def test_settings_of_a_wrong_type_missing_or_unknown_are_one_line(flag, finished, refused_with):
    content = (finished / "config.json").read_bytes()
    args = json.loads(content)["args"]
    damaged = [{**args, "unknown": 1}, []]
    for name in ("env_id", "num_envs", "gamma", "anneal_lr", "std_type", "total_timesteps"):
        damaged.append({k: v for k, v in args.items() if k != name})
        values = [[], {"a": {"b": 1}}, None, True, "text"]
        good = {"env_id": "text", "anneal_lr": True}
        damaged += [{**args, name: value} for value in values if value is not good.get(name, "")]
    contents = [json.dumps({"args": value}).encode() for value in damaged]
    garbage = [b"", b"\xff\xfe", content[:300], b"[]", b"1", b'"args"', b"null", b"{}"]
    refused_with(flag, finished / "config.json", contents + garbage)


def test_a_folder_that_is_no_run_is_refused(tmp_path, killed_before, refused):
    killed_before("replace config.json 1", *RUN, "--env-id", "Pendulum-v1", "--runs-dir", tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    for folder in (only(tmp_path / "runs"), tmp_path / "empty", tmp_path / "none"):
        before = sorted(tmp_path.rglob("*"))
        refused("--resume", folder, says=[folder / "config.json"])
        refused("--eval", folder, says=[folder / "config.json"])
        assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_imports_no_module_unless_the_user_names_it_again(goals, tmp_path, refused, capfd):
    marker, env_id = tmp_path / "imported", "stranger:Goal-v0"
    (goals / "stranger.py").write_text(f"open({str(marker)!r}, 'w')\nimport goals")
    train(*SMALL, "--total-timesteps", BATCH, "--env-id", env_id, "--runs-dir", tmp_path / "runs")
    run_dir = only(tmp_path / "runs")
    for flags in (["--resume", run_dir], ["--eval", run_dir], ["--eval", run_dir / "model.pt"]):
        marker.unlink()
        del sys.modules["stranger"]
        refused(*flags, says=[run_dir, f"--env-id {env_id}"])
        refused(*flags, "--env-id", "Pendulum-v1", says=[run_dir, f"--env-id {env_id}"])
        assert not marker.exists()
        train(*flags, "--env-id", env_id)
        assert marker.exists()


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("name", "checkpoint.pt checkpoint.pt.tmp model.pt episodes.csv lock result.json".split())
def test_nothing_is_written_through_a_symbolic_link(name, exists, unfinished, tmp_path, refused):
    path, target = unfinished / name, tmp_path / "target"
    if exists:
        target.write_bytes(path.read_bytes() if path.exists() else b"")
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    before = snapshot(tmp_path)
    refused("--resume", unfinished, says=[unfinished])
    assert snapshot(tmp_path) == before and target.exists() == exists and path.is_symlink()


def test_a_second_process_cannot_train_the_run_until_the_first_is_dead(never_killed, tmp_path, refused):
    process = start(*RUN, "--env-id", "Pendulum-v1", "--runs-dir", tmp_path / "runs")
    wait_for(process, lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # until it stands still: it may be about to write the next file
    run_dir = only(tmp_path / "runs")
    before = snapshot(run_dir)
    try:
        refused("--resume", run_dir, says=[run_dir, "another process"])
    finally:
        process.kill()
    assert finish(process)[0] == -signal.SIGKILL and snapshot(run_dir) == before
    train("--resume", run_dir)
    assert_same_outcome(run_dir, never_killed("Pendulum-v1"))


def test_equal_runs_of_the_same_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    for _ in range(3):
        train(*SMALL, "--env-id", "Pendulum-v1", "--total-timesteps", BATCH, "--runs-dir", tmp_path)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 3
    for folder in folders[1:]:
        assert_same_outcome(folder, folders[0])


def test_both_files_load_without_running_code_and_hold_the_same_weights(never_killed):
    folder = never_killed("Hopper-v4")
    checkpoint, model = load(folder / "checkpoint.pt"), load(folder / "model.pt")
    assert checkpoint["progress"]["iteration"] == ITERATIONS
    assert equal(checkpoint["agent"], model) and not [name for name in model if "_orig_mod" in name]


# ----------------------------------------------------------------------------------------------------------------------
# Disks
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def full_after(size: int):
    """No file can be written beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["events", "checkpoint"])
@pytest.mark.parametrize("checkpoints", [0, 5])
def test_on_a_full_disk_what_was_saved_stays_and_the_run_goes_on_once_there_is_room(
    name, checkpoints, never_killed, interrupted_after, tmp_path, refused
):
    flags = [*RUN, "--env-id", "Pendulum-v1", "--runs-dir", tmp_path]
    if checkpoints:
        interrupted_after(checkpoints, *flags)
        flags = ["--resume", only(tmp_path)]
    models = [content for path, (_, content) in snapshot(tmp_path).items() if path.suffix == ".pt"]
    size = 100_000 if name == "checkpoint" else (never_killed("Pendulum-v1") / "config.json").stat().st_size + 1000
    with full_after(size):
        refused(*flags, "--checkpoint-every", 0 if name == "checkpoint" else 1000, says=["File too large"])
    assert [content for path, (_, content) in snapshot(tmp_path).items() if path.suffix == ".pt"] == models
    assert not list(tmp_path.glob("*/*.tmp"))
    train("--resume", only(tmp_path))
    assert_same_outcome(only(tmp_path), never_killed("Pendulum-v1"))


def test_where_no_run_can_begin_no_folder_is_left(tmp_path, refused):
    flags = [*RUN, "--env-id", "Pendulum-v1", "--runs-dir"]
    with full_after(1000):
        refused(*flags, tmp_path / "runs", says=["File too large"])
    assert not list((tmp_path / "runs").iterdir())
    (tmp_path / "file").touch()
    refused(*flags, tmp_path / "file" / "runs", says=[tmp_path / "file"])


def test_a_small_disk_fills_up_becomes_larger_and_read_only(never_killed, tmp_path, refused):
    def mount(options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path]
        return subprocess.run(command, capture_output=True).returncode

    if mount("size=350k"):  # room for one checkpoint.pt and a half
        pytest.skip("may not mount a file system here")
    try:
        refused(*RUN, "--env-id", "Pendulum-v1", "--runs-dir", tmp_path, says=["No space left on device"])
        run_dir = only(tmp_path)
        assert load(run_dir / "checkpoint.pt")["progress"]["iteration"] == 1 and not list(run_dir.glob("*.tmp"))
        assert mount("remount,ro,size=20m") == 0
        refused("--resume", run_dir, says=["Read-only file system"])
        refused(*PENDULUM, "--runs-dir", tmp_path, says=["Read-only file system"])
        assert mount("remount,rw,size=20m") == 0
        train("--resume", run_dir)
        assert_same_outcome(run_dir, never_killed("Pendulum-v1"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_that_is_deleted_during_the_run_is_one_line(tmp_path, monkeypatch, refused):
    rollout, calls = ppo_continuous.rollout, []

    def delete_and_rollout(*args):
        calls.append(args)
        if len(calls) == 3:
            shutil.rmtree(only(tmp_path))
        return rollout(*args)

    monkeypatch.setattr(ppo_continuous, "rollout", delete_and_rollout)
    refused(*RUN, "--env-id", "Pendulum-v1", "--runs-dir", tmp_path, says=["No such file or directory", tmp_path])
    assert len(calls) < 6 and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted, and gone wrong
# ----------------------------------------------------------------------------------------------------------------------


def interrupt(process: subprocess.Popen) -> tuple[str, str]:
    """Ctrl-C; the command that the run prints, and all of it."""
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert (status, "Traceback" in err) == (130, False), err
    assert out.splitlines()[-1].startswith("interrupted; continue with: ")
    return out.splitlines()[-1].removeprefix("interrupted; continue with: "), out


@pytest.fixture
def ctrl_c_works():
    """A shell's background job ignores Ctrl-C, and so do the processes that it starts, unless somebody handles it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_ctrl_c_ends_the_run_and_the_printed_command_continues_it(ctrl_c_works, never_killed, tmp_path):
    runs_dir = tmp_path / "my runs"  # a path that has to be quoted
    process = start(*RUN, "--env-id", "goals:Goal-v0", "--runs-dir", runs_dir)
    wait_for(process, lambda: list(runs_dir.glob("*/checkpoint.pt")))
    command, _ = interrupt(process)
    run_dir = only(runs_dir)
    assert 1 <= load(run_dir / "checkpoint.pt")["progress"]["iteration"] < ITERATIONS
    assert str(run_dir) in shlex.split(command)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    again = subprocess.run(command, shell=True, env={**os.environ, "PATH": path}, capture_output=True, timeout=LIMIT)
    assert again.returncode == 0, again.stderr
    assert_same_outcome(run_dir, never_killed("goals:Goal-v0"))


def test_ctrl_c_during_the_evaluation_leaves_the_outcome_of_the_training(ctrl_c_works, never_killed, tmp_path):
    process = start(*RUN, "--env-id", "Hopper-v4", "--eval-episodes", 10**6, "--runs-dir", tmp_path)
    wait_for(process, lambda: list(tmp_path.glob("*/result.json")))
    _, out = interrupt(process)
    assert "evaluation:" not in out  # of the episodes that were not run to their end
    run_dir = only(tmp_path)
    before = json.loads((run_dir / "result.json").read_text())
    assert before["global_step"] == ITERATIONS * BATCH and before["sps"] > 0 and "eval_returns" not in before
    train("--resume", run_dir, "--eval-episodes", 1)
    result = json.loads((run_dir / "result.json").read_text())
    assert len(result["eval_returns"]) == 1 and result["seconds"] == before["seconds"]
    assert_same_outcome(run_dir, never_killed("Hopper-v4"))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "quantity, value", [("rewards", "nan"), ("rewards", "-inf"), ("next_obs", "inf"), ("obs", "nan")]
)
def test_a_number_that_is_not_finite_ends_the_run_with_what_and_where(quantity, value, strict, tmp_path, refused):
    seed = int(np.random.SeedSequence([1, 3, 2]).generate_state(1)[0])  # of environment 2's second episode
    kwargs = json.dumps({"quantity": quantity, "value": value, "seed": seed, "strict": strict})
    says = f"error: {quantity} is nan or inf at step {404 if quantity == 'obs' else 400};"
    flags = ["--env-id", "goals:Broken-v0", "--env-kwargs", kwargs]
    refused(*PENDULUM, *flags, "--runs-dir", tmp_path, says=[says, tmp_path], status=1)
    run_dir = only(tmp_path)
    assert load(run_dir / "checkpoint.pt")["progress"]["iteration"] == 1
    models = [(run_dir / name).read_bytes() for name in ("checkpoint.pt", "model.pt")]
    refused("--resume", run_dir, *flags, says=[says, run_dir], status=1)
    assert [(run_dir / name).read_bytes() for name in ("checkpoint.pt", "model.pt")] == models
    assert not list(run_dir.glob("*.tmp"))
