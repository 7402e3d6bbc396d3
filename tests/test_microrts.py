"""Whole runs of ppo_multidiscrete_joint_loss.py on MicroRTS, and the tournament between what they train and the bots.
Needs gym-microrts, jpype1 and a Java; the games themselves are tested in test_environments_microrts.py."""

import importlib
import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_outcome, only

import ppo_multidiscrete_joint_loss as ppo

ENV_ID = "environments.microrts:MicroRTS-8x8-basesWorkers"
SIZES = "--num-envs 3 --num-steps 64 --num-minibatches 2 --update-epochs 2 --no-anneal-lr --no-compile --device cpu"


@pytest.fixture(scope="module", autouse=True)
def java():
    """Not before these tests run: a process with Java in it cannot be forked."""
    try:
        pytest.importorskip("environments.microrts", exc_type=ImportError).start_java()
    except ImportError as error:
        pytest.skip(str(error))


def flags(runs_dir, more="", **kwargs) -> list[str]:
    """Of a run with games of at most 40 steps."""
    kwargs = json.dumps({"opponents": ["workerRushAI", "passiveAI"], "max_steps": 40, **kwargs})
    line = f"{SIZES} --env-id {ENV_ID} --env-kwargs {shlex.quote(kwargs)} --runs-dir {runs_dir} {more}"
    return shlex.split(line)


def train(*argv):
    ppo.main(ppo.parse_args(list(argv)))


@pytest.mark.parametrize(
    "loss, kwargs",
    [
        ("separate", {}),
        ("mix-loss", {"action_mode": "gridnet", "partial_obs": True}),
        ("mix-ratio", {"selfplay": 1, "map": ["MicroRTS-8x8-basesWorkers", "MicroRTS-8x8-FourBasesWorkers"]}),
    ],
)
def test_a_run_that_stops_within_games_goes_on_as_if_it_had_not(loss, kwargs, tmp_path, capfd):
    """Its bots draw nothing, so games are repeated from their actions: models and episodes are equal to the bit."""
    whole, stopped = (flags(tmp_path / name, f"--loss {loss} --eval-episodes 0", **kwargs) for name in "ab")
    train(*whole, "--total-timesteps", "768")
    train(*stopped, "--total-timesteps", "384")
    train("--resume", str(only(tmp_path / "b")), "--env-id", ENV_ID, "--total-timesteps", "768")
    assert "start again" not in capfd.readouterr().err
    assert_same_outcome(only(tmp_path / "b"), only(tmp_path / "a"))
    lengths = np.loadtxt(only(tmp_path / "a") / "episodes.csv", delimiter=",", skiprows=1)[:, 2]
    assert len(lengths) == 3 * (256 // 40) and (lengths == 40).all()  # nobody wins within 40 steps


def test_games_against_a_bot_that_draws_start_again_with_a_notice(tmp_path, capfd):
    train(*flags(tmp_path, "--eval-episodes 0", opponents=["randomBiasedAI"]), "--total-timesteps", "192")
    train("--resume", str(only(tmp_path)), "--env-id", ENV_ID, "--total-timesteps", "384")
    assert "notice: the episodes of environments [0, 1, 2] start again" in capfd.readouterr().err


def test_the_win_rate_is_that_of_the_games_against_bots():
    kwargs = {"opponents": ["passiveAI"], "selfplay": 1, "max_steps": 2}
    envs = ppo.Envs(ppo.Args(env_id=ENV_ID, env_kwargs=json.dumps(kwargs)), range(4))
    for _ in range(2):
        envs.step(np.zeros((4, 8), dtype=np.int64))
    assert ["is_success" in info for *_, info in envs.finished] == [False, False, True, True]
    envs.finished[-1][-1]["is_success"] = np.True_
    assert ppo.episode_means(envs.finished)["is_success"] == 0.5


def test_observations_stay_small_and_masks_follow_the_games():
    args = ppo.Args(env_id=ENV_ID, env_kwargs='{"opponents": ["passiveAI"]}')
    single, batch = ppo.Envs(args, range(-1, 0), evaluation=True), ppo.Envs(args, range(3))
    for envs in (single, batch):
        agent = ppo.make_agent(envs, args)
        for _ in range(20):
            assert envs.obs.dtype == np.uint8 and envs.masks.dtype == bool and envs.masks.shape[1] == 64 * 79
            owner, busy = envs.obs[:, 2].reshape(-1, 64), envs.obs[:, 4].reshape(-1, 64)
            idle = envs.masks.reshape(-1, 64, 79)[:, :, 0]
            assert (idle == ((owner == 1) & (busy == 0) & (envs.obs[:, 3].reshape(-1, 64) != 1))).all()
            envs.step(ppo.act(envs, agent, agent.noise(len(envs.obs))))


def test_drawn_games_of_an_evaluation_differ(tmp_path):
    """workerRushAI follows from the actions: greedy ones play one game again and again."""
    args = ppo.Args(env_id=ENV_ID, env_kwargs='{"opponents": ["workerRushAI"], "max_steps": 60}', eval_episodes=3)
    torch.manual_seed(0)
    agent = ppo.make_agent(ppo.Envs(args, range(-1, 0), evaluation=True), args)
    returns = [[episode[1] for episode in ppo.evaluate(agent, args, tmp_path)]]
    args.eval_sample = True
    returns.append([episode[1] for episode in ppo.evaluate(agent, args, tmp_path)])
    assert [len(set(each)) > 1 for each in returns] == [False, True]


@pytest.mark.parametrize("missing", ["gym_microrts", "jpype"])
def test_a_missing_package_is_one_line(missing, monkeypatch, capsys, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    monkeypatch.delitem(sys.modules, "environments.microrts")
    with pytest.raises(SystemExit) as stopped:
        train(*flags(tmp_path / "runs"))
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"error: --env-id {ENV_ID} ")
    assert missing in line and "pip install --no-deps gym-microrts==0.4.3" in line and not (tmp_path / "runs").exists()


def test_the_tournament_plays_what_it_has_not_played(tmp_path):
    """A match is a real evaluation of a real run, its row is there when it ends, and a second call plays the rest."""
    more = "--total-timesteps 192 --exp-name joint-0.2 --eval-episodes 1"
    train(*flags(tmp_path / "runs/a-run", more, opponents=["passiveAI"], max_steps=30))
    results = tmp_path / "results.csv"

    def play(*bots):
        command = [sys.executable, str(ROOT / "benchmarks/microrts_tournament.py"), "--runs", str(tmp_path / "runs")]
        command += ["--results", str(results), "--games", "2", "--opponents", *bots]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, results.read_text().splitlines() if results.exists() else [], done.stderr

    row = f"joint-0.2,{ENV_ID.split(':')[-1]},1,{{}},2,0.000"  # in 30 steps nobody wins
    header = "setting,env_id,seed,opponent,games,win_rate"
    assert play("passiveAI")[:2] == (0, [header, row.format("passiveAI")])
    results.write_text(results.read_text().replace("0.000", "0.500"))  # it would be 0 again if it were played again
    status, lines, errors = play("passiveAI", "workerRushAI", "nobody")
    assert status == 1 and "nobody" in errors  # what fails is told, the rest is played
    assert lines == [header, row.format("passiveAI").replace("0.000", "0.500"), row.format("workerRushAI")]
