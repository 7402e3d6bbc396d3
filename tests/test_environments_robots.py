"""environments/playground.py and environments/mjlab.py: robots as batches without autoreset. Each part is skipped where
its package is missing. Playground's tasks are compiled once a batch size, into a cache that these tests share."""

import json
import os
import random
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import KILLER, ROOT, assert_same_outcome, only, run
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of JAX, Warp and gymnasium's checker of infinite bounds

LIMIT = 12  # steps of an episode
BALANCE, SWINGUP = "Playground-CartpoleBalance", "Mjlab-Cartpole-Swingup"
SHORT = {BALANCE: {"episode_length": LIMIT}, SWINGUP: {"episode_length_s": 0.05 * LIMIT - 0.01}}


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    pytest.importorskip("mujoco_playground", reason="MuJoCo Playground is not installed")
    import jax

    import environments.playground as module

    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder = str(tmp_path_factory.mktemp("jax"))  # for the scripts
    jax.config.update("jax_compilation_cache_dir", folder)
    yield module
    del os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="module")
def mjlab():
    pytest.importorskip("mjlab", reason="mjlab is not installed")
    import environments.mjlab as module

    return module


@pytest.fixture(params=[BALANCE, SWINGUP])
def task(request):
    request.getfixturevalue("playground" if request.param == BALANCE else "mjlab")
    return request.param


def make_vec(task, num_envs=3, **kwargs):
    return gym.make_vec(task, num_envs, **{**SHORT[task], **kwargs})


def actions_of(env, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, size=(steps, *env.action_space.shape)).astype(np.float32)


def play(env, seeds, steps=LIMIT + 5):
    """Random actions; the finished are reset, without seeds. All that came of them, as arrays."""
    rows = [env.reset(seed=seeds)[0]]
    for actions in actions_of(env, steps):
        obs, rewards, terminated, truncated, _ = env.step(actions)
        rows += [obs, rewards, terminated, truncated]
        if (terminated | truncated).any():
            rows.append(env.reset(options={"reset_mask": terminated | truncated})[0])
    return rows


def same(first, second):
    return len(first) == len(second) and all(np.array_equal(*pair) for pair in zip(first, second))


def test_spaces_dtypes_and_shapes(task):
    env, single = make_vec(task), gym.make(task, **SHORT[task])
    assert env.metadata["autoreset_mode"] == AutoresetMode.DISABLED
    assert env.single_observation_space == single.observation_space == gym.spaces.Box(-np.inf, np.inf, (5,))
    assert env.single_action_space == single.action_space
    bound = 1 if task == BALANCE else np.inf  # mjlab's actions have none
    assert env.action_space == gym.spaces.Box(-bound, bound, (3, 1))
    obs, _ = env.reset(seed=0)
    next_obs, rewards, terminated, truncated, infos = env.step(actions_of(env, 1)[0])
    for array in (obs, next_obs):
        assert array.shape == (3, 5) and array.dtype == np.float32
    assert rewards.shape == (3,) and rewards.dtype == np.float64 and (rewards > 0).all()
    assert terminated.shape == truncated.shape == (3,) and terminated.dtype == truncated.dtype == bool
    assert infos and all(len(values) == 3 for values in infos.values())


def test_gymnasiums_checker(task):
    check_env(gym.make(task, **SHORT[task]).unwrapped, skip_render_check=True)


def test_exactly_the_masked_environments_are_reset(task):
    env, undisturbed = make_vec(task), make_vec(task)
    actions = actions_of(env, 6)
    for each in (env, undisturbed):
        each.reset(seed=[3, 4, 5])
        for row in actions[:3]:
            before = each.step(row)[0]
    kept = before.copy()
    obs, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    assert np.array_equal(before, kept)  # the caller's array is left alone
    assert np.array_equal(obs[[0, 2]], kept[[0, 2]]) and not np.array_equal(obs[1], kept[1])
    for row in actions[3:]:
        obs, rewards, *_ = env.step(row)
        wanted, wanted_rewards, *_ = undisturbed.step(row)
        assert np.array_equal(obs[[0, 2]], wanted[[0, 2]]) and not np.array_equal(obs[1], wanted[1])
        assert np.array_equal(rewards[[0, 2]], wanted_rewards[[0, 2]])


def test_a_time_limit_truncates_each_environment_after_its_own_steps(task):
    env = make_vec(task)
    env.reset(seed=0)
    for t, actions in enumerate(actions_of(env, LIMIT + 4), start=1):
        last, _, terminated, truncated, _ = env.step(actions)
        assert not terminated.any() and truncated.tolist() == [t == LIMIT, t == LIMIT + 4, t == LIMIT]
        if t == 4:
            env.reset(options={"reset_mask": np.array([False, True, False])})
        if t == LIMIT:
            with pytest.raises((ValueError, RuntimeError), match="reset"):
                env.step(actions)
            first, _ = env.reset(options={"reset_mask": truncated})
            assert np.array_equal(first[1], last[1]) and not np.isclose(first[[0, 2]], last[[0, 2]]).all()


def test_the_same_seeds_repeat_a_batch_in_used_and_new_environments(task):
    env = make_vec(task)
    rows = play(env, [5, 6, 2**32 - 1])
    assert same(rows, play(env, [5, 6, 2**32 - 1])) and same(rows, play(make_vec(task), [5, 6, 2**32 - 1]))
    assert not same(rows, play(env, [5, 6, 7])) and not same(play(make_vec(task), None), play(make_vec(task), None))


def test_the_process_s_own_generators_are_left_alone(task):
    def states():
        return repr(random.getstate()), repr(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    play(make_vec(task), [1, 2, 3])
    play(make_vec(task), None)
    assert states() == before


def test_what_is_refused(task):
    for make in (gym.make, make_vec):
        with pytest.raises((KeyError, TypeError), match="no_such_field"):
            make(task, no_such_field=1)
    with pytest.raises(ValueError, match="autoreset_mode: must be DISABLED"):
        make_vec(task, autoreset_mode=AutoresetMode.SAME_STEP)
    env = make_vec(task)
    for wrong in ({"seed": [1, 2]}, {"options": {"reset_mask": np.ones(3)}}, {"options": {"reset_mask": [True]}}):
        with pytest.raises(ValueError, match="3 environments need as many seeds, and a reset_mask of as many bools"):
            env.reset(**wrong)


def test_a_script_trains_evaluates_and_resumes_to_the_bit(task, tmp_path):
    """Where all episodes of mjlab's batch start together. Elsewhere the script says that it starts them again."""
    module = "environments.playground" if task == BALANCE else "environments.mjlab"
    flags = [
        "--env-id",
        f"{module}:{task}",
        "--env-kwargs",
        json.dumps(SHORT[task]),
        "--num-envs",
        3,
        "--eval-episodes",
        1,
    ]
    flags += [
        "--num-steps",
        20,
        "--num-minibatches",
        2,
        "--total-timesteps",
        240,
        "--no-compile",
        "--checkpoint-every",
        0,
    ]
    status, out, err = run(*flags, "--runs-dir", tmp_path / "whole")
    assert status == 0 and "evaluation: 1 episodes" in out, err
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    kill = {"KILL_BEFORE": "replace checkpoint.pt 3", "PYTHONPATH": str(tmp_path)}
    status, _, err = run(*flags, "--runs-dir", tmp_path / "killed", **kill)
    assert status == -signal.SIGKILL, err
    run_dir = only(tmp_path / "killed")
    status, _, err = run("--resume", run_dir, *flags[:2])
    assert status == 0 and "start again" not in err, err
    assert_same_outcome(run_dir, only(tmp_path / "whole"))
    assert (run_dir / "episodes.csv").read_text().count("\n") == 1 + 3 * (80 // LIMIT)


@pytest.mark.parametrize("name", ["playground", "mjlab"])
def test_without_its_package_one_line_says_what_to_install(name):
    missing = {"playground": "jax", "mjlab": "mjlab"}[name]
    code = f"import sys; sys.modules['{missing}'] = None; import gymnasium; gymnasium.make('environments.{name}:A')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].startswith("ImportError: ") and "During handling" not in result.stderr
    assert "is needed" in result.stderr and "pip install -r environments/requirements-robots.txt" in result.stderr


def test_playground_a_batch_is_equal_to_single_environments(playground):
    """To 1e-4 of an observation or reward: XLA adds in another order for another size."""
    many, one = make_vec(BALANCE), gym.make(BALANCE, **SHORT[BALANCE])
    actions = actions_of(many, LIMIT)
    first = many.reset(seed=[8, 9, 10])[0]
    steps = [many.step(row) for row in actions]
    for i in range(3):
        np.testing.assert_allclose(one.reset(seed=8 + i)[0], first[i], atol=1e-4)
        for row, (obs, rewards, terminated, truncated, infos) in zip(actions, steps):
            single = one.step(row[i])
            np.testing.assert_allclose(single[0], obs[i], atol=1e-4)
            np.testing.assert_allclose(single[1], rewards[i], atol=1e-4)
            assert single[2:4] == (terminated[i], truncated[i]) and single[4].keys() == infos.keys()
        assert single[3]


def test_playground_each_environment_goes_on_from_its_own_seed(playground):
    env, other = make_vec(BALANCE), make_vec(BALANCE)
    assert np.array_equal(env.reset(seed=[5, 6, 7])[0], other.reset(seed=[7, 6, 5])[0][::-1])
    assert np.array_equal(env.reset()[0], other.reset()[0][::-1])
    mask = np.array([True, False, False])
    first = env.reset(seed=[1, None, None], options={"reset_mask": mask})[0][0]
    assert np.array_equal(first, other.reset(seed=1)[0][0])


def test_playground_what_a_task_calls_done_terminates_and_is_not_truncated(playground):
    env = make_vec(BALANCE)
    for steps in (3, LIMIT):  # before the time limit, and with it
        env.reset(seed=0)
        for actions in actions_of(env, steps - 1):
            assert not any(part.any() for part in env.step(actions)[2:4])
        broken = env.state.data.replace(qvel=env.state.data.qvel.at[1].set(np.nan))  # what Cartpole calls done
        env.state = env.state.replace(data=broken)
        _, _, terminated, truncated, _ = env.step(actions_of(env, 1)[0])
        assert terminated.tolist() == [False, True, False]
        assert truncated.tolist() == [steps == LIMIT, False, steps == LIMIT]


def test_playground_infos_are_sums_over_the_episode(playground):
    env = make_vec(BALANCE)
    sums = []
    env.reset(seed=0)
    for actions in actions_of(env, 3):
        infos = env.step(actions)[4]
        sums.append(infos["reward/upright"])
    assert (np.diff(sums, axis=0, prepend=0) > 0.9).all()  # upright is 1 at its best
    env.reset(options={"reset_mask": np.array([True, False, False])})
    sums = env.step(actions)[4]["reward/upright"]
    assert sums[0] <= 1 and (sums[1:] > 3.5).all()


def test_playground_takes_the_policy_s_part_of_several_observations_and_no_images(playground):
    from mujoco_playground import dm_control_suite
    from mujoco_playground._src.dm_control_suite import cartpole

    class Several(cartpole.Balance):
        names = ("state", "privileged_state")

        def __init__(self, **kwargs):
            super().__init__(swing_up=False, sparse=False, **kwargs)

        def reset(self, rng):
            state = super().reset(rng)
            return state.replace(obs=dict(zip(self.names, (state.obs[:2], state.obs))))

    class Images(Several):
        names = ("pixels/view_0", "pixels/view_1")

    for kind in (Several, Images):
        dm_control_suite.register_environment(kind.__name__, kind, cartpole.default_config)
    assert playground.PlaygroundVectorEnv("Several", 2).single_observation_space.shape == (2,)
    with pytest.raises(ValueError, match="Images: observations are pixels/view_0, pixels/view_1"):
        playground.PlaygroundVectorEnv("Images", 2)


def test_mjlab_a_termination_terminates_and_a_finite_horizon_does_too(mjlab):
    from mjlab.envs.mdp import time_out
    from mjlab.managers.termination_manager import TerminationTermCfg

    def far(env):
        return torch.tensor([False, True, False]) & (env.common_step_counter == 4)

    terms = {"far": TerminationTermCfg(func=far), "time_out": TerminationTermCfg(func=time_out, time_out=True)}
    env = make_vec(SWINGUP, terminations=terms, is_finite_horizon=True)
    env.reset(seed=0)
    for actions in actions_of(env, 4):
        _, _, terminated, truncated, infos = env.step(actions)
    assert terminated.tolist() == infos["Episode_Termination/far"].tolist() == [False, True, False]
    assert not truncated.any() and not infos["Episode_Termination/time_out"].any()
    env.reset(options={"reset_mask": terminated})
    for actions in actions_of(env, LIMIT - 4):
        _, _, terminated, truncated, infos = env.step(actions)
    assert terminated.tolist() == infos["Episode_Termination/time_out"].tolist() == [True, False, True]
    assert not truncated.any()


def test_mjlab_a_robot_s_properties_follow_from_the_keyword_seed(mjlab):
    """Go1's friction is drawn when a batch is built."""
    go1 = "Mjlab-Velocity-Flat-Unitree-Go1"
    envs = [gym.make_vec(go1, 3, seed=seed) for seed in (1, 1, 2)]
    frictions = [env.simulator.sim.model.geom_friction.cpu().numpy() for env in envs]
    assert np.array_equal(frictions[0], frictions[1]) and not np.array_equal(frictions[0], frictions[2])
    assert envs[0].single_observation_space.shape == (48,) and envs[0].single_action_space.shape == (12,)
