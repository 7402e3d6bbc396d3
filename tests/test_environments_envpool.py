"""environments/envpool.py: EnvPool's ids without autoreset, with a seed for each environment."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

envpool = pytest.importorskip("envpool", reason="EnvPool is not installed")
import environments.envpool  # noqa: E402, F401  registers the ids

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of EnvPool's spaces and of the old versions of MuJoCo's ids

CARTPOLE, CHEETAH = "EnvPool-CartPole-v1", "EnvPool-HalfCheetah-v4"


def play(env, steps, seeds):
    """Random actions; the finished are reset. What came of them: per environment a list of episodes' observations."""
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=seeds)
    episodes = [[[row]] for row in obs]
    for _ in range(steps):
        obs, rewards, terminated, truncated, infos = env.step(rng.integers(2, size=env.num_envs))
        assert rewards.dtype == np.float64 and all(len(info) == env.num_envs for info in infos.values())
        assert infos["elapsed_step"].tolist() == [len(own[-1]) for own in episodes]
        for own, row in zip(episodes, obs):
            own[-1].append(row)
        done = terminated | truncated
        if done.any():
            first, _ = env.reset(options={"reset_mask": done})
            assert np.array_equal(first[~done], obs[~done])
            for i in np.flatnonzero(done):
                episodes[i].append([first[i]])
    return episodes


def test_finished_environments_wait_with_their_true_last_observation():
    episodes = [episode for own in play(gym.make_vec(CARTPOLE, 5), 150, 0) for episode in own]
    finished = [episode for episode in episodes if abs(episode[-1][0]) > 2.4 or abs(episode[-1][2]) > 12 * np.pi / 180]
    assert len(finished) == len(episodes) - 5 > 10  # the five last ones still go on
    for episode in finished:
        assert (abs(episode[0]) <= 0.05).all()  # CartPole's start
        assert all(abs(row[0]) <= 2.4 and abs(row[2]) <= 12 * np.pi / 180 for row in episode[:-1])


def test_an_unfinished_environment_can_be_reset_alone():
    env, actions = gym.make_vec(CHEETAH, 3), np.full((3, 6), 0.5, dtype=np.float32)
    env.reset(seed=0)
    before = env.step(actions)[0]
    kept = before.copy()
    obs, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    assert np.array_equal(before, kept)  # the caller's array is left alone
    assert np.array_equal(obs[[0, 2]], before[[0, 2]]) and not np.array_equal(obs[1], before[1])
    assert env.step(actions)[4]["elapsed_step"].tolist() == [2, 1, 2]


def test_each_environment_goes_on_from_its_own_seed():
    first, second = (play(gym.make_vec(CARTPOLE, 3), 60, seeds) for seeds in ([2**32 - 1, 6, 7], [2**32 - 1, 6, 7]))
    assert all(np.array_equal(*pair) for own in zip(first, second) for pair in zip(*own))
    env, other = gym.make_vec(CHEETAH, 3), gym.make_vec(CHEETAH, 3)
    assert np.array_equal(env.reset(seed=[5, 6, 7])[0], other.reset(seed=[7, 6, 5])[0][::-1])
    assert np.array_equal(gym.make_vec(CHEETAH, 3).reset(seed=5)[0], gym.make_vec(CHEETAH, 3).reset(seed=[5, 6, 7])[0])
    assert np.array_equal(env.reset(seed=[1, 2, 3])[0], other.reset()[0][::-1])  # later seeds change nothing
    assert not np.array_equal(*(gym.make_vec(CHEETAH, 3).reset()[0] for _ in range(2)))


def test_the_single_one_is_the_first_of_many_and_repeats_a_seed():
    env, many = gym.make(CHEETAH), gym.make_vec(CHEETAH, 2)
    firsts = many.reset(seed=[3, 4])[0]
    assert np.array_equal(env.reset(seed=3)[0], firsts[0])
    for _ in range(20):
        action = env.action_space.sample()
        obs, reward, terminated, truncated, info = env.step(action)
        wanted, rewards, *_ = many.step(np.array([action, action]))
        assert np.array_equal(obs, wanted[0]) and reward == rewards[0] and not (terminated or truncated)
    assert info["elapsed_step"] == 20
    assert np.array_equal(env.reset(seed=3)[0], firsts[0]) and not np.array_equal(env.reset()[0], firsts[0])


@pytest.mark.parametrize("task", ["HalfCheetah-v4", "CartPole-v1", "CVRP-v1", "phys2d-Pendulum-v0"])
def test_gymnasiums_checker(task):
    check_env(gym.make(f"EnvPool-{task}").unwrapped)


def test_observations_of_dictionaries_are_reset_one_by_one():
    env = gym.make_vec("EnvPool-CheetahRun-v1", 3)
    env.reset(seed=0)
    before = env.step(np.zeros((3, 6)))[0]
    after, _ = env.reset(options={"reset_mask": np.array([True, False, False])})
    for name in ("position", "velocity"):
        assert np.array_equal(after[name][1:], before[name][1:]) and not np.array_equal(after[name][0], before[name][0])


def test_what_is_refused():
    for make in (gym.make, gym.make_vec):
        with pytest.raises(ValueError, match="render_mode: must be None, not rgb_array"):
            make(CHEETAH, render_mode="rgb_array")
        with pytest.raises(ValueError, match="2 players"):
            make("EnvPool-IntersectionMultiAgent-v0")
    with pytest.raises(ValueError, match="autoreset_mode: must be DISABLED"):
        gym.make_vec(CHEETAH, 2, autoreset_mode=AutoresetMode.NEXT_STEP)
    env = gym.make_vec(CARTPOLE, 3, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(ValueError, match="reset them first"):
        env.step(np.zeros(3, int))
    with pytest.raises(ValueError, match="the first reset must be of all"):
        env.reset(options={"reset_mask": np.array([True, False, False])})
    for seeds in ([1, 2], [1, 2, None]):
        with pytest.raises(ValueError, match="3 environments need as many seeds"):
            env.reset(seed=seeds)
    env.reset(seed=0)
    for mask in (np.ones(3), [True]):
        with pytest.raises(ValueError, match="reset_mask must be bool"):
            env.reset(options={"reset_mask": mask})
    for actions, message in [(np.array([0, 1, 2]), "must be in"), (np.zeros(2, int), "must be .3., not .2.")]:
        with pytest.raises(ValueError, match=message):
            env.step(actions)
    while not env.over.any():
        env.step(np.ones(3, int))
    with pytest.raises(ValueError, match="reset them first"):
        env.step(np.ones(3, int))


def test_without_envpool_one_line_says_what_to_install():
    code = (
        "import sys; sys.modules['envpool'] = None; import gymnasium; gymnasium.make('environments.envpool:EnvPool-A')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].startswith("ImportError: EnvPool is needed")
    assert "pip install envpool==" in result.stderr and "During handling" not in result.stderr


def test_a_script_s_seed_reaches_the_environments():
    import vmpo

    first = []
    for seed in (1, 1, 2):
        args = vmpo.Args(env_id="environments.envpool:EnvPool-CartPole-v1", num_envs=4, seed=seed)
        first.append(vmpo.Envs(args, range(4)).obs)
    assert np.array_equal(first[0], first[1]) and not np.isin(first[2], first[0]).any()
