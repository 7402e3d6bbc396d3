"""What several test files share. Every `run` is a process of its own, as a user starts it; its time limit is against
hanging, so it says nothing about speed."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

torch.set_num_threads(1)  # as the scripts do; two lose time on networks this small

ROOT = Path(__file__).parents[1]
LIMIT = 600  # seconds

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


def start(*flags, script="ppo_continuous.py", **env) -> subprocess.Popen:
    command = [sys.executable, ROOT / script, *map(str, flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **env})


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """The exit status and what was printed."""
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


def run(*flags, **env) -> tuple[int, str, str]:
    return finish(start(*flags, **env))


def only(runs_dir: Path) -> Path:
    """The one run in a folder that has nothing else in it."""
    (run_dir,) = runs_dir.iterdir()
    return run_dir


def snapshot(folder: Path) -> dict:
    """{file: when it was written, what is in it}."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def load(path: Path):
    return torch.load(path, map_location="cpu", weights_only=True)


def scalars(run_dir: Path) -> Counter:
    """How often TensorBoard's own reader shows each (tag, step, value), over all event files; the speed's value is left
    out."""
    reader = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    reader.Reload()
    events = [(tag, event) for tag in reader.Tags()["scalars"] for event in reader.Scalars(tag)]
    return Counter((tag, event.step, None if tag == "charts/SPS" else event.value) for tag, event in events)


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


def spaces(obs_dim: int, action_dim: int):
    """What an agent looks at of its environments."""
    box = gym.spaces.Box
    return SimpleNamespace(observation_space=box(-9, 9, (obs_dim,)), action_space=box(-1, 1, (action_dim,)))


FLAT, IMAGE = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Toy(gym.Env):
    """Any spaces; an episode lasts as long as the id's max_episode_steps."""

    def __init__(self, observation_space, action_space, render_mode=None):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 1.0, False, False, {}
