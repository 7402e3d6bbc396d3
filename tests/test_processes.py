"""torchrun: the number of processes changes nothing but the time that a run takes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import test_docs
import torch
from conftest import KILLER, LIMIT, ROOT, assert_same_outcome, finish, load, only, run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# 16 environments: with four processes four rows each; for fewer rows the CPU's libraries may add in another order.
SHAPE = "--num-envs 16 --num-steps 32 --total-timesteps 3072 --num-minibatches 4 --update-epochs 2 --no-compile"
FLAGS = {
    "ppo_continuous.py": "--env-id Hopper-v4",
    "ppo_klpen.py": "--env-id Hopper-v4",
    "ppo_multidiscrete_joint_loss.py": "--env-id Hopper-v4",
    "vmpo.py": "--env-id CartPole-v1",  # choices
    "vmpo_lstm.py": "--env-id Hopper-v4",
    "hppo_hybrid.py": "--env-id environments.hybrid:HybridMoving-v0",
}
# An environment that breaks at a step of the one process that BREAK names.
BREAKS = """
import os
import signal

import gymnasium as gym
import numpy as np


class Breaks(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t += 1
        obs = self.observation_space.sample()
        if self.t == 100 and os.environ["RANK"] == "1":
            if os.environ["BREAK"] == "raise":
                raise ValueError("the arm is off")
            if os.environ["BREAK"] == "exit":
                os._exit(3)
            if os.environ["BREAK"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            obs[0] = np.nan
        return obs, 1.0, False, False, {}


gym.register("Breaks-v0", Breaks)
"""


def start(processes: int, *flags, script="ppo_continuous.py", torchrun=("--standalone",), **env) -> subprocess.Popen:
    """The script in so many processes, in a process group of its own."""
    command = [*TORCHRUN, *torchrun, "--nproc-per-node", str(processes), ROOT / script, *map(str, flags)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, **options)


def said(err: str) -> list[str]:
    """The lines of ours, that is, without torchrun's."""
    return [line for line in re.split("[\r\n]+", err) if line.startswith(("error:", "notice:"))]


@pytest.mark.parametrize("script", FLAGS)
def test_a_run_of_one_is_equal_to_one_killed_with_two_and_continued_with_four_processes(script, tmp_path):
    flags = [*FLAGS[script].split(), *SHAPE.split(), "--checkpoint-every", 0, "--eval-episodes", 1, "--runs-dir"]
    module = FLAGS[script].split()[:2] if ":" in FLAGS[script] else []
    status, _, err = run(*flags, tmp_path / "one", script=script)
    assert status == 0, err
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    before = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "KILL_BEFORE": "replace checkpoint.pt 4"}
    status, out, _ = finish(start(2, *flags, tmp_path / "two", script=script, **before))
    run_dir = only(tmp_path / "two")
    assert status != 0 and "2 processes" in out and load(run_dir / "checkpoint.pt")["progress"]["iteration"] == 3
    shutil.copytree(run_dir, tmp_path / "again")
    for processes, folder in ((4, run_dir), (1, tmp_path / "again")):
        process = start(processes, "--resume", folder, *module, script=script, PYTHONPATH=str(ROOT))
        status, _, err = finish(process)
        assert status == 0 and "start again" not in err, err
        assert_same_outcome(folder, only(tmp_path / "one"))
    assert (run_dir / "episodes.csv").read_text().count("\n") > 10


@pytest.fixture
def breaks(tmp_path):
    (tmp_path / "breaks.py").write_text(BREAKS)
    flags = (
        "--env-id breaks:Breaks-v0 --num-steps 64 --num-envs 8 --num-minibatches 4 --no-compile --checkpoint-every 0"
    )
    return [*flags.split(), "--runs-dir", tmp_path / "runs"], {"PYTHONPATH": str(tmp_path)}


def ends_soon(process: subprocess.Popen) -> tuple[int, str, str]:
    """Status and output of torchrun; none of its processes is left."""
    status, out, err = finish(process)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return status, out, err
        time.sleep(0.1)
    raise AssertionError("a process is left")


@pytest.mark.parametrize(
    "how, expected",
    [
        ("raise", ["ValueError: the arm is off", "in environment 4", "breaks:Breaks-v0, after 792 steps in all"]),
        ("nan", ["error: next_obs is nan or inf at step 800"]),
        ("exit", ["rank .* 1 .*exitcode .* 3|exitcode: 3\\) local_rank: 1"]),
        ("kill", ["exitcode: -9\\) local_rank: 1"]),
    ],
)
def test_when_a_process_breaks_all_end_and_it_is_named(how, expected, breaks, tmp_path):
    flags, env = breaks
    status, _, err = ends_soon(start(2, *flags, BREAK=how, **env))
    assert status != 0
    for text in expected:
        assert re.search(text, err), err
    lines = [line for line in said(err) if "rank 1 of 2 was lost" in line]
    assert len(lines) <= 1 and len(said(err)) <= 2  # torchrun may end rank 0 before it can say so
    checkpoint = load(only(tmp_path / "runs") / "checkpoint.pt")
    assert checkpoint["progress"]["iteration"] == 1 and len(checkpoint["envs"]["obs"]) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes_and_the_run_goes_on(number, tmp_path):
    flags = "--env-id Hopper-v4 --num-envs 8 --num-steps 32 --num-minibatches 4 --no-compile --checkpoint-every 0"
    process = start(2, *flags.split(), "--eval-episodes", 0, "--runs-dir", tmp_path / "runs")
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)  # Ctrl-C goes to all
    status, out, err = ends_soon(process)
    run_dir = only(tmp_path / "runs")
    assert status != 0 and "Traceback" not in "".join(re.findall(r"\[rank\d\].*", err))
    assert number == signal.SIGTERM or "interrupted; continue with: python" in out
    done = load(run_dir / "checkpoint.pt")["progress"]["iteration"]
    status, _, err = finish(start(2, "--resume", run_dir, "--total-timesteps", 256 * (done + 1)))
    assert status == 0 and load(run_dir / "checkpoint.pt")["progress"]["iteration"] == done + 1, err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--env-id Hoper-v4", "error: --env-id Hoper-v4 .*Did you mean: `Hopper`"),
        ("--num-envs 2 --num-steps 1024", "error: --num-envs 2: is less than 3 processes"),
    ],
)
def test_a_mistake_is_said_once(flags, message, tmp_path):
    status, _, err = finish(start(3, *flags.split(), "--runs-dir", tmp_path / "runs"))
    assert status != 0 and len(said(err)) == 1 and re.match(message, said(err)[0])
    assert "exitcode  : 2" in err and not (tmp_path / "runs").exists()


def test_only_rank_0_evaluates_and_shows_help_and_all_end_well(tmp_path):
    status, out, err = finish(start(2, "--help"))
    assert status == 0 and out.count("usage:") == 1
    flags = "--num-envs 4 --num-steps 32 --total-timesteps 128 --num-minibatches 2 --no-compile --eval-episodes 2"
    status, out, err = finish(start(2, *flags.split(), "--env-id", "Hopper-v4", "--runs-dir", tmp_path / "runs"))
    assert status == 0 and out.count("evaluation: 2 episodes") == out.count("wrote") == 1, err
    run_dir = only(tmp_path / "runs")
    assert json.loads((run_dir / "config.json").read_text())["processes"] == 2
    assert len(list(run_dir.glob("events.*"))) == 1
    for flag in ("--eval", "--resume"):  # the second finds that all is done
        status, out, err = finish(start(2, flag, run_dir))
        assert status == 0 and out.count("evaluation: 2 episodes") + out.count("is finished") == 1, err


@pytest.fixture
def two_hosts():
    """Names of two network namespaces, joined by a cable, the first with the address 10.99.0.1."""
    names, ip = (f"rl{os.getpid()}a", f"rl{os.getpid()}b"), shutil.which("ip")
    if ip is None or subprocess.run([ip, "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here")
    try:
        for words in [
            f"netns add {names[1]}",
            f"link add v0 netns {names[0]} type veth peer name v0 netns {names[1]}",
            *(f"-n {name} addr add 10.99.0.{i}/24 dev v0" for i, name in enumerate(names, 1)),
            *(f"-n {name} link set {device} up" for name in names for device in ("v0", "lo")),
        ]:
            subprocess.run([ip, *words.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name])


def test_two_machines_train_one_run_to_the_same_bits(two_hosts, tmp_path):
    flags = [*FLAGS["ppo_continuous.py"].split(), *SHAPE.split(), "--eval-episodes", "0", "--runs-dir"]
    status, _, err = run(*flags, tmp_path / "one")
    assert status == 0, err
    processes = []
    for rank, host in enumerate(two_hosts):
        where = f"--nnodes 2 --node-rank {rank} --master-addr 10.99.0.1 --master-port 29400 --nproc-per-node 2"
        command = ["ip", "netns", "exec", host, *TORCHRUN, *where.split(), ROOT / "ppo_continuous.py"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "v0"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([*command, *flags, tmp_path / f"host{rank}"], env=env, **pipes))
    (status, out, err), (other_status, other_out, _) = map(finish, processes)
    assert status == other_status == 0 and "4 processes" in out and other_out == "", err
    assert not (tmp_path / "host1").exists()
    run_dir, expected = only(tmp_path / "host0"), only(tmp_path / "one")
    model, wanted = load(run_dir / "model.pt"), load(expected / "model.pt")
    assert all(model[name].equal(wanted[name]) for name in wanted)
    assert (run_dir / "episodes.csv").read_bytes() == (expected / "episodes.csv").read_bytes()


def test_the_recipe_for_averaged_gradients_learns_what_one_process_learns(tmp_path):
    """Each minibatch is normalised as a whole, which its parts are not, so --no-norm-adv."""
    source = (ROOT / "ppo_continuous.py").read_text()
    for _, _, language, diff in test_docs.blocks(ROOT / "docs" / "scale.md"):
        source = test_docs.apply(diff, source) if language == "diff" else source
    script = tmp_path / "ppo_averaged.py"
    script.write_text(source)
    flags = "--env-id Hopper-v4 --num-envs 16 --num-steps 16 --num-minibatches 4 --update-epochs 2 --no-norm-adv"
    flags = [*flags.split(), "--no-compile", "--total-timesteps", 256, "--eval-episodes", 0, "--runs-dir"]
    assert run(*flags, tmp_path / "one")[0] == 0
    status, out, err = finish(start(2, *flags, tmp_path / "two", script=script))
    assert status == 0 and "2 processes" in out, err
    one, two = (load(only(tmp_path / name) / "model.pt") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-5)
