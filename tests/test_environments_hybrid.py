"""environments/hybrid.py: rules, many at once against one by one, episodes repeated, and that they can be solved."""

import cmath
import functools
import math
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import environments.hybrid  # noqa: F401  registers the ids

MOVING, SLIDING, CATCH, PLATFORM = "HybridMoving-v0", "HybridSliding-v0", "HybridCatchPoint-v0", "HybridPlatform-v0"
PLANE = [MOVING, SLIDING, CATCH, "HybridHardMove4-v0", "HybridHardMove10-v0"]
IDS = [*PLANE, PLATFORM]


def make_vec(env_id, N, **kwargs) -> gym.vector.VectorEnv:
    return gym.make_vec(env_id, N, autoreset_mode=AutoresetMode.DISABLED, **kwargs)


@functools.cache
def action_space(env_id) -> gym.spaces.Tuple:
    return gym.make(env_id).action_space


# --- Experts ------------------------------------------------------------------------------------------------------


def drive(obs):
    """Turn to the target, accelerate, roll, and brake where the way to a stop, about speed^2 / 40, gets as long as
    what is left. It turns only while standing, so it drives a straight line and Sliding is no different."""
    x, y, speed, cos, sin, target_x, target_y, distance, _, _ = obs.T
    error = np.arctan2(target_y - y, target_x - x) - np.arctan2(sin, cos)
    error = (error + np.pi) % (2 * np.pi) - np.pi
    fastest = np.sqrt(40 * distance)
    brake = (speed > 0.95 * fastest) | (distance < 0.05)
    turn = (speed == 0) & (abs(error) > 1e-3)
    accelerate = (speed < 0.7 * fastest) & (speed < 4)
    thrust = (0.9 * fastest - speed) / 0.5
    return np.select([brake, turn, accelerate], [2, 1, 0], 1), np.stack([thrust, turn * error / (np.pi / 2)], -1)


def fly_and_catch(obs):
    """Full force towards the target, and catch within its radius."""
    way = obs[:, 6:8]
    return (np.hypot(*way.T) < 0.2).astype(int), np.arctan2(way[:, 1:], way[:, :1]) / np.pi


def pull(obs, n):
    """All actuators, each by its share of the straight way to the target, no more than the strongest one can."""
    angles = 2 * np.pi * np.arange(n) / n
    p = obs[:, 4:6] @ np.stack([np.cos(angles), np.sin(angles)]) * (2 / n / 0.1)
    return np.full(len(obs), 2**n - 1), p / np.maximum(1, abs(p).max(1, keepdims=True))


def run_and_hop(obs):
    """Hop over the enemy, run to the edge, hop over the gap, and run on the last platform. It often fails."""
    left = np.rint(obs[:, 7] * 1035)
    way, speed = left + np.rint(obs[:, 4] * 275) - (obs[:, 0] * 1055 - 20), obs[:, 1] * 100
    hop = np.where(speed == 0, way > 150, way < 0.92 * speed) & (left < 900)
    run = np.where(way < 1.01 * speed, 0, 30)
    return hop.astype(int), np.stack([run, np.where(speed == 0, 250, 720), run], -1)


def expert(env_id, obs):
    """Actions (k, x) of the environment."""
    space = action_space(env_id)
    if env_id == CATCH:
        k, x = fly_and_catch(obs.astype(np.float64))
    elif env_id in (MOVING, SLIDING):
        k, x = drive(obs.astype(np.float64))
    elif env_id == PLATFORM:
        k, x = run_and_hop(obs.astype(np.float64))
    else:
        k, x = pull(obs.astype(np.float64), space[1].shape[0])
    return k, np.clip(np.float32(x), space[1].low, space[1].high)


def mixed(env_id, obs, rng):
    """The even environments follow the expert, with less force than it asks for; the odd ones act at random."""
    space, odd = action_space(env_id), np.arange(len(obs)) % 2 == 1
    k, x = expert(env_id, obs)
    uniform = rng.uniform(space[1].low, space[1].high, x.shape)
    x = np.where(odd[:, None], uniform, x * rng.uniform(0.9, 1, x.shape)).astype(np.float32)
    return np.where(odd, rng.integers(space[0].n, size=len(obs)), k), x


@pytest.mark.parametrize("env_id", PLANE)
def test_an_expert_solves_it(env_id):
    env = make_vec(env_id, 1000)
    first, _ = env.reset(seed=0)
    obs, running, success, returns = first, np.ones(1000, bool), np.zeros(1000, bool), np.zeros(1000)
    while running.any():
        obs, rewards, terminated, _, info = env.step(expert(env_id, obs))
        returns += rewards * running
        success |= info["is_success"] & running
        running &= ~terminated
        obs, _ = env.reset(options={"reset_mask": terminated})
    print(f"{env_id}: {success.mean():.1%}, return {returns.mean():.3f}")
    assert success.mean() >= 0.99
    if env_id == CATCH:  # 29 moves at full force, then the catch, reach this far, and some targets are further
        reach = 0.2 + sum(0.1 * 0.8 * (1 - 0.75**t) for t in range(1, 30))
        assert not success.all() and (np.hypot(*first[~success, 6:8].T) > reach).all()
    else:
        assert success.all() and returns.mean() > 1.89


# --- Rules --------------------------------------------------------------------------------------------------------


def start_by_hand(env_id, obs):
    """The state behind a first observation, positions and velocities as complex numbers."""
    s = SimpleNamespace(pos=complex(*obs[:2]), velocity=0j, speed=0.0, t=0, attempts=10)
    at = {MOVING: 5, SLIDING: 5, CATCH: 4}.get(env_id, 2)
    s.target, s.heading = complex(*obs[at : at + 2]), complex(*obs[3:5])
    return s


def step_by_hand(env_id, s, k, p):
    """One step by the rules, of one environment: reward, whether the episode is over, success, observation."""
    before, s.t = abs(s.target - s.pos), s.t + 1
    if env_id == CATCH:
        success = k == 1 and before < 0.2
        s.attempts -= k
        s.velocity = 0.75 * s.velocity + (0.1 * 2 * cmath.exp(1j * math.pi * p[0]) if k == 0 else 0)
        s.pos += 0.1 * s.velocity
        way = s.target - s.pos
        over = success or s.attempts == 0 or s.t == 30
        obs = [s.pos, s.velocity, s.target, way, complex(s.attempts / 10, s.t / 30)]
        return 20 * success - abs(way) ** 2, over, success, [part for z in obs for part in (z.real, z.imag)]
    if env_id in (MOVING, SLIDING):
        if k == 1:
            s.heading *= cmath.exp(1j * p[1] * math.pi / 2)
        if k == 0:
            s.velocity += 0.5 * p[0] * s.heading
            s.speed = abs(s.velocity) if env_id == SLIDING else s.speed + 0.5 * p[0]
        if k == 2:
            s.speed = max(0.0, s.speed - 0.1)
        direction = cmath.exp(1j * cmath.phase(s.velocity)) if env_id == SLIDING else s.heading
        s.velocity = s.speed * direction
        s.pos += 0.005 * s.velocity
        after = abs(s.target - s.pos)
        success, late = after < 0.1 and s.speed == 0, s.t > 200
        obs = [s.pos.real, s.pos.imag, s.speed, s.heading.real, s.heading.imag, s.target.real, s.target.imag]
        obs += [after, after < 0.1, s.t / 200]
    else:
        n = len(p)
        s.pos += 0.1 * sum(p[i] * cmath.exp(2j * math.pi * i / n) for i in range(n) if f"{k:0{n}b}"[n - 1 - i] == "1")
        way = s.target - s.pos
        after = abs(way)
        success, late = after < 0.1, s.t == 25
        obs = [s.pos.real, s.pos.imag, s.target.real, s.target.imag, way.real, way.imag, after, s.t / 25]
    failure = not success and (late or max(abs(s.pos.real), abs(s.pos.imag)) > 1)
    return -1.0 if failure else before - after - 0.001 + success, success or failure, success, obs


@pytest.mark.parametrize("env_id", PLANE)
def test_each_step_is_by_the_rules(env_id):
    env, rng = make_vec(env_id, 16), np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    hands, ends = [start_by_hand(env_id, row) for row in obs], []
    for _ in range(600):
        k, x = mixed(env_id, obs, rng)
        obs, rewards, terminated, truncated, info = env.step((k, x))
        assert not truncated.any()
        for i, s in enumerate(hands):
            reward, over, success, wanted = step_by_hand(env_id, s, int(k[i]), x[i].astype(float))
            np.testing.assert_allclose(obs[i], wanted, atol=1e-5)
            assert rewards[i] == pytest.approx(reward, abs=1e-5)
            assert (terminated[i], info["is_success"][i]) == (over, success)
            if over:
                ends.append(success)
        obs, _ = env.reset(options={"reset_mask": terminated})
        for i in np.flatnonzero(terminated):
            hands[i] = start_by_hand(env_id, obs[i])
    assert 20 < sum(ends) < len(ends) - 20  # both kinds of end were met


def situation(env_id, N=1, **arrays) -> gym.vector.VectorEnv:
    """The environment in a state made by hand."""
    env = make_vec(env_id, N)
    env.reset(seed=0)
    for name, value in arrays.items():
        env.arrays[name][...] = value
    return env


def step(env, k, *p):
    """One step of one environment: reward, terminated, success; it is never truncated."""
    _, rewards, terminated, truncated, info = env.step((np.array([k]), np.array([p], dtype=np.float32)))
    assert not truncated[0] and rewards.dtype == np.float64
    return rewards[0], terminated[0], info["is_success"][0]


ACCELERATE, TURN, BRAKE = 0, 1, 2
EAST = {"heading": 0.0, "phi": 0.0}


@pytest.mark.parametrize("env_id", [MOVING, SLIDING])
def test_rewards_of_driving_by_hand(env_id):
    far = {"pos": [-0.5, 0.0], "target": [0.5, 0.0], **EAST}
    assert step(situation(env_id, **far), ACCELERATE, 1, 0) == (pytest.approx(0.0025 - 0.001, abs=1e-12), False, False)
    assert step(situation(env_id, **far), BRAKE, 1, 1) == (-0.001, False, False)  # it stands, and stays
    assert step(situation(env_id, **far, t=199.0), BRAKE, 0, 0) == (-0.001, False, False)
    assert step(situation(env_id, **far, t=200.0), BRAKE, 0, 0) == (-1.0, True, False)
    edge = {"pos": [0.999, 0.5], "target": [0.5, 0.5], "speed": 1.0, **EAST}
    assert step(situation(env_id, **edge), TURN, 0, 0) == (-1.0, True, False)
    near = {"pos": [0.45, 0.0], "target": [0.5, 0.0], **EAST}
    assert step(situation(env_id, **near, speed=0.1), BRAKE, 0, 0) == (0.999, True, True)
    assert step(situation(env_id, **near, speed=0.1, t=200.0), BRAKE, 0, 0) == (0.999, True, True)
    rolls = step(situation(env_id, **near, speed=0.125), BRAKE, 0, 0)  # slow is not standing
    assert rolls == (pytest.approx(0.005 * 0.025 - 0.001, abs=1e-12), False, False)
    outside = {"pos": [0.399, 0.0], "target": [0.5, 0.0], "speed": 0.1, **EAST}
    assert step(situation(env_id, **outside), BRAKE, 0, 0) == (-0.001, False, False)


def test_only_sliding_keeps_its_direction_in_a_turn():
    state = {"pos": [0.0, 0.0], "target": [0.0, 0.9], "speed": 1.0, **EAST}
    found = {}
    for env_id in (MOVING, SLIDING):
        env = situation(env_id, **state)
        step(env, TURN, 0, 1)  # to the north
        obs = env.step((np.array([ACCELERATE]), np.array([[1.0, 0.0]], dtype=np.float32)))[0][0]
        found[env_id] = obs[:3]
    np.testing.assert_allclose(found[MOVING], [0, 0.005 * (1 + 1.5), 1.5], atol=1e-6)
    np.testing.assert_allclose(found[SLIDING], [0.005 * 2, 0.005 * 0.5, math.hypot(1, 0.5)], atol=1e-6)


def test_rewards_of_catching_by_hand():
    near = {"pos": [0.0, 0.0], "target": [0.125, 0.0]}
    assert step(situation(CATCH, **near), 1, 0) == (20 - 0.125**2, True, True)
    assert step(situation(CATCH, **near), 0, 1) == (pytest.approx(-((0.125 + 0.02) ** 2), abs=1e-9), False, False)
    far = situation(CATCH, pos=[0.0, 0.0], target=[0.25, 0.0])
    assert [step(far, 1, 0) for _ in range(10)] == [(-0.0625, False, False)] * 9 + [(-0.0625, True, False)]
    assert step(situation(CATCH, **near, attempts=1.0, t=29.0), 1, 0) == (20 - 0.125**2, True, True)
    assert [step(situation(CATCH, **near, t=t), 0, 0)[1:] for t in (28.0, 29.0)] == [(False, False), (True, False)]
    coasting = situation(CATCH, pos=[0.0, 0.0], target=[1.0, 0.0], velocity=[0.5, 0.0])
    assert step(coasting, 1, 0)[0] == -((1 - 0.1 * 0.75 * 0.5) ** 2)  # no force, but friction


def test_rewards_of_pulling_by_hand():
    env_id, far = "HybridHardMove4-v0", {"pos": [0.0, 0.0], "target": [0.5, 0.0]}
    assert step(situation(env_id, **far), 0b0101, 1, 1, -1, 1) == (pytest.approx(0.2 - 0.001), False, False)
    assert step(situation(env_id, **far), 0b0000, 1, 1, 1, 1) == (-0.001, False, False)
    assert step(situation(env_id, **far, t=23.0), 0, 1, 1, 1, 1) == (-0.001, False, False)
    assert step(situation(env_id, **far, t=24.0), 0, 1, 1, 1, 1) == (-1.0, True, False)
    assert step(situation(env_id, pos=[0.95, 0.0], target=[0.0, 0.0]), 1, 1, 0, 0, 0) == (-1.0, True, False)
    near = {"pos": [0.0, 0.0], "target": [0.125, 0.0], "t": 24.0}
    assert step(situation(env_id, **near), 1, 1, 0, 0, 0) == (pytest.approx(0.1 - 0.001 + 1, abs=1e-12), True, True)


def test_masks_say_which_parameters_count():
    masks = {env_id: gym.make(env_id).unwrapped.parameter_mask.astype(int).tolist() for env_id in IDS}
    assert masks[PLATFORM] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert masks[MOVING] == masks[SLIDING] == [[1, 0], [0, 1], [0, 0]] and masks[CATCH] == [[1], [0]]
    env = gym.make("HybridHardMove-v0", n=6)
    assert env.action_space[0].n == 64 and env.action_space[1].shape == (6,)
    assert [sum(bit << i for i, bit in enumerate(row)) for row in masks["HybridHardMove10-v0"]] == list(range(1024))
    for env_id in PLANE:  # a parameter that the mask leaves out does not act, one that it has does
        for k, used in enumerate(masks[env_id][:16]):
            for j, uses in enumerate(used):
                arrays = {"speed": 1.0, **EAST} if env_id in (MOVING, SLIDING) else {}
                p = np.full((1, len(used)), 0.5, dtype=np.float32)
                one, other = (situation(env_id, pos=[0.0, 0.0], **arrays) for _ in range(2))
                first = one.step((np.array([k]), p.copy()))[0]
                p[0, j] = 0.75
                assert (first != other.step((np.array([k]), p))[0]).any() == uses


def test_starts_fill_the_field():
    N = 4000
    firsts = {env_id: make_vec(env_id, N).reset(seed=0)[0].astype(float) for env_id in PLANE}
    for env_id, obs in firsts.items():
        at = {MOVING: 5, SLIDING: 5, CATCH: 4}.get(env_id, 2)
        size = 1 if env_id == CATCH else 0.9
        for column, half in [(0, 1), (1, 1), (at, size), (at + 1, size)]:
            assert 0.995 * half < abs(obs[:, column]).max() <= half
            assert abs(obs[:, column].mean()) < 5 * half / math.sqrt(3 * N)
            assert obs[:, column].std() == pytest.approx(half / math.sqrt(3), rel=0.05)  # that of a uniform one
    for env_id in (MOVING, SLIDING):
        heading = np.arctan2(firsts[env_id][:, 4], firsts[env_id][:, 3])
        assert (
            heading.std() == pytest.approx(math.pi / math.sqrt(3), rel=0.05) and (firsts[env_id][:, [2, 9]] == 0).all()
        )
    assert (firsts[CATCH][:, [2, 3, 9]] == 0).all() and (firsts[CATCH][:, 8] == 1).all()


# --- Many at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", IDS)
def test_64_at_once_are_64_single_ones_to_the_bit(env_id):
    """64 at once; eight of them, from the places where vector instructions begin and end, are done singly too."""
    env, rng = make_vec(env_id, 64), np.random.default_rng(1)
    singles = {i: gym.make(env_id) for i in (0, 1, 7, 8, 30, 47, 62, 63)}
    obs, _ = env.reset(seed=7)
    for i, single in singles.items():
        assert np.array_equal(single.reset(seed=7 + i)[0], obs[i])
    ends, steps, enough = [], *((60, 50) if env_id == PLATFORM else (3000, 100))
    for _ in range(steps):
        k, x = mixed(env_id, obs, rng)
        obs, rewards, terminated, truncated, info = env.step((k, x))
        for i, single in singles.items():
            found = single.step((k[i], x[i]))
            assert np.array_equal(found[0], obs[i])
            assert found[1:4] == (rewards[i], terminated[i], truncated[i])
            assert found[4]["is_success"] == info["is_success"][i]
        if terminated.any():
            obs, _ = env.reset(options={"reset_mask": terminated})
            for i in np.flatnonzero(terminated[list(singles)]):
                i = list(singles)[i]
                ends.append(info["is_success"][i])
                assert np.array_equal(singles[i].reset()[0], obs[i])
    assert len(ends) > enough and (env_id == PLATFORM or 20 < sum(ends) < len(ends))


@pytest.mark.parametrize("env_id", IDS)
def test_autoreset_in_the_next_step_is_gymnasiums(env_id):
    env, wanted = gym.make_vec(env_id, 6), gym.make_vec(env_id, 6, vectorization_mode="sync")
    assert env.metadata["autoreset_mode"] == wanted.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert (env.action_space, env.observation_space) == (wanted.action_space, wanted.observation_space)
    obs, rng, resets = env.reset(seed=3)[0], np.random.default_rng(2), 0
    assert np.array_equal(obs, wanted.reset(seed=3)[0])
    terminated = np.zeros(6, dtype=bool)
    for _ in range(80 if env_id == PLATFORM else 600):
        actions = mixed(env_id, obs, rng)
        resets += terminated.sum()
        obs, rewards, terminated, truncated, info = env.step(actions)
        obs_wanted, *rest, info_wanted = wanted.step(actions)
        assert np.array_equal(obs, obs_wanted)
        assert all(np.array_equal(*pair) for pair in zip((rewards, terminated, truncated), rest))
        assert np.array_equal(info["is_success"], info_wanted.get("is_success", np.zeros(6, dtype=bool)))
    assert resets > 20


def test_seeds_and_what_is_refused():
    env = make_vec(MOVING, 3)
    first = env.reset(seed=5)[0]
    assert np.array_equal(env.reset(seed=[7, 6, 5])[0], first[::-1])
    assert not np.array_equal(env.reset()[0], first) and np.array_equal(env.reset(seed=5)[0], first)
    stand = (np.full(3, TURN), np.zeros((3, 2), dtype=np.float32))
    ends = [env.step(stand)[2].any() for _ in range(201)]
    assert ends == [False] * 200 + [True]
    with pytest.raises(ValueError, match="reset them first"):
        env.step(stand)
    with pytest.raises(ValueError, match="autoreset_mode"):
        gym.make_vec(MOVING, 3, autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(TypeError):  # rather than a limit that is not kept
        gym.make_vec(MOVING, 3, max_episode_steps=10)


@pytest.mark.parametrize("env_id", IDS)
def test_an_episode_is_repeated_by_its_seed_and_actions_wherever_it_runs(env_id):
    """Episodes of 5 at once, each with a seed of its own; then each again, singly and as the third of 4."""
    env, rng, steps = make_vec(env_id, 5), np.random.default_rng(4), 60 if env_id == PLATFORM else 250
    seeds = [int(s) for s in rng.integers(2**32, size=5)]
    obs, _ = env.reset(seed=seeds)
    episodes = [[(seed, obs[i])] for i, seed in enumerate(seeds)]
    ended = []
    for _ in range(steps):
        k, x = mixed(env_id, obs, rng)
        obs, rewards, terminated, truncated, info = env.step((k, x))
        for i, episode in enumerate(episodes):
            episode.append((k[i], x[i], obs[i], rewards[i], terminated[i], truncated[i], info["is_success"][i]))
        if terminated.any():
            seeds = [int(rng.integers(2**32)) if over else None for over in terminated]
            obs, _ = env.reset(seed=seeds, options={"reset_mask": terminated})
            for i in np.flatnonzero(terminated):
                ended.append(episodes[i])
                episodes[i] = [(seeds[i], obs[i])]
    assert len(ended) > 5
    single, others = gym.make(env_id), make_vec(env_id, 4)
    others.reset(seed=0)
    for (seed, first), *rows in ended[:20] + episodes:
        found, _ = others.reset(
            seed=[None, None, seed, None], options={"reset_mask": others.over | (np.arange(4) == 2)}
        )
        assert np.array_equal(found[2], first) and np.array_equal(single.reset(seed=seed)[0], first)
        for row in rows:
            k, x = mixed(env_id, found, rng)
            k[2], x[2] = row[:2]
            found, *outcome, info = others.step((k, x))
            one, *outcome_of_one, info_of_one = single.step(row[:2])
            assert np.array_equal(found[2], row[2]) and np.array_equal(one, row[2])
            assert tuple(a[2] for a in (*outcome, info["is_success"])) == row[3:]
            assert (*outcome_of_one, info_of_one["is_success"]) == row[3:]
            others_over = others.over & (np.arange(4) != 2)
            if others_over.any():
                found, _ = others.reset(options={"reset_mask": others_over})


@pytest.mark.parametrize("env_id", IDS)
def test_what_a_step_returned_stays_as_it_was(env_id):
    env, rng, kept = make_vec(env_id, 6), np.random.default_rng(5), []
    obs, _ = env.reset(seed=1)
    for _ in range(60):
        returned = [obs, *env.step(mixed(env_id, obs, rng))]
        arrays = [*returned[:-1], returned[-1]["is_success"]]
        kept += [(array, array.copy()) for array in arrays]
        obs, _ = env.reset(options={"reset_mask": env.over}) if env.over.any() else (returned[1], None)
    assert all(np.array_equal(*pair) for pair in kept)


@pytest.mark.parametrize("env_id", IDS)
def test_wrong_actions_raise_and_change_nothing(env_id):
    env, single, (K, P) = make_vec(env_id, 3), gym.make(env_id), gym.make(env_id).unwrapped.parameter_mask.shape
    first, _ = env.reset(seed=0)
    single.reset(seed=0)
    k, x = np.zeros(3, dtype=int), np.zeros((3, P), dtype=np.float32)
    bad_choices = [np.full(3, K), np.array([0, -1, 0]), np.zeros(3), np.zeros((3, 1), int), np.zeros(2, int)]
    bad_parameters = [np.full((3, P), np.nan), np.full((3, P), np.inf), np.zeros((3, P + 1)), np.zeros(3), np.zeros(P)]
    for choices in bad_choices:
        with pytest.raises(ValueError, match=f"choices must be 3 integers in .0, {K}"):
            env.step((choices, x))
    for parameters in bad_parameters:
        with pytest.raises(ValueError, match="parameters must be finite"):
            env.step((k, parameters))
    for action in [(K, x[0]), (0.5, x[0]), (0, x[0, :0]), (0, np.full(P, np.nan))]:
        with pytest.raises(ValueError, match="must be"):
            single.step(action)
    assert np.array_equal(env.reset(options={"reset_mask": np.zeros(3, bool)})[0], first)


@pytest.mark.parametrize("env_id", IDS)
def test_only_platform_clips_parameters(env_id):
    space = action_space(env_id)
    found = []
    for scale in (1, 2):
        env = make_vec(env_id, 1)
        env.reset(seed=0)
        found.append(env.step((np.array([1]), scale * np.maximum(space[1].high, 0.4)[None]))[0])
    if env_id == CATCH:  # whose choice 1 has no parameter
        assert np.array_equal(*found)
    else:
        assert np.array_equal(*found) == (env_id == PLATFORM)


def test_masks_and_seeds_of_another_length_are_refused():
    env = make_vec(MOVING, 3)
    for mask in ([True], np.ones(3), np.ones((3, 1), bool)):
        with pytest.raises(ValueError, match=r"reset_mask must be bool \[3\]"):
            env.reset(options={"reset_mask": mask})
    with pytest.raises(ValueError, match="3 environments need as many seeds, not 2"):
        env.reset(seed=[1, 2])


# --- Platform -----------------------------------------------------------------------------------------------------

RUN, HOP, LEAP = 0, 1, 2


def test_platform_equals_pypis_hybrid_platform_to_the_bit():
    """Episodes of random actions, some out of bounds, and of good ones; the original repeats each with its seed."""
    pytest.importorskip("gym_platform", reason="hybrid-platform is not installed")
    N, rng = 160, np.random.default_rng(0)
    env, original = make_vec(PLATFORM, N), gym.make("gym_platform:Platform-v0", disable_env_checker=True)
    seeds = [int(s) for s in rng.integers(2**31, size=N)]
    first, _ = env.reset(seed=seeds)
    obs, running, rows, high = first, np.ones(N, bool), [[] for _ in range(N)], action_space(PLATFORM)[1].high
    while running.any():
        k, x = mixed(PLATFORM, obs, rng)
        k = np.where(rng.random(N) < 0.1, LEAP, k)
        x += np.float32(rng.choice([-0.1, 0, 0.1], (N, 1)) * high)
        obs, rewards, terminated, truncated, info = env.step((k, x))
        for i in np.flatnonzero(running):
            rows[i].append((k[i], x[i], obs[i], rewards[i], terminated[i], truncated[i], info["is_success"][i]))
        running &= ~(terminated | truncated)
        obs, _ = env.reset(options={"reset_mask": terminated | truncated})
    successes = 0
    for i, seed in enumerate(seeds):
        (features, _), _ = original.reset(seed=seed)
        assert np.array_equal(features, first[i, :9]) and first[i, 9] == 0
        for k, x, wanted, *outcome, _ in rows[i]:
            (features, small_steps), *outcome_of_original, _ = original.step((k, [[p] for p in x]))
            assert np.array_equal([*features, np.float32(small_steps / 200)], wanted)
            assert outcome_of_original == outcome
        success = rows[i][-1][-1]
        assert success == (sum(row[3] for row in rows[i]) > 1 - 1e-9)
        successes += success
    assert 0 < successes < N


def platform(x, y=40.0, speed=0.0, enemies=(230.0, 730.0)):
    return situation(PLATFORM, pos=[x, y, *enemies], vel=[speed, 0, -30, -30])


def test_ends_of_an_episode_on_the_platforms():
    assert step(platform(1030.0), RUN, 30, 0, 0) == (pytest.approx(5 / 1035), True, True)
    reward, *ends = step(platform(240.0, enemies=(0.0, 730.0)), RUN, 30, 0, 0)  # off the edge, at 250
    assert reward > 10 / 1035 and ends == [True, False]
    reward, *ends = step(platform(200.0), RUN, 30, 0, 0)  # into the enemy
    assert 0 < reward < 30 / 1035 and ends == [True, False]
    assert step(platform(200.0, enemies=(0.0, 730.0)), RUN, 0, 0, 0) == (0, False, False)
    assert step(platform(300.0, y=39.0), HOP, 0, 720, 0) == (0, True, False)  # who does not stand cannot jump
    reward, *ends = step(platform(240.0, speed=70.0, enemies=(0.0, 730.0)), HOP, 0, 720, 0)  # over the gap
    assert reward > 205 / 1035 and ends == [False, False]
    env = platform(100.0)
    reward, *ends = step(env, HOP, 0, 720, 0)  # over the enemy
    x, _, enemy, _ = env.arrays["pos"][0]
    assert reward > 80 / 1035 and ends == [False, False] and enemy < 100 < x


def test_200_actions_truncate_an_episode():
    for t, cut in [(198.0, False), (199.0, True)]:
        env = situation(PLATFORM, t=t)
        _, _, terminated, truncated, _ = env.step((np.array([RUN]), np.zeros((1, 3), dtype=np.float32)))
        assert (terminated[0], truncated[0]) == (False, cut)
    with pytest.raises(ValueError, match="reset them first"):
        env.step((np.array([RUN]), np.zeros((1, 3), dtype=np.float32)))


def test_a_picture_shows_platforms_player_enemies_and_the_path():
    env = gym.make(PLATFORM, render_mode="rgb_array")
    env.reset(seed=0)
    start = env.render()
    colours = {"player": (0, 114, 178), "enemy": (213, 94, 0), "platform": (130, 130, 130), "path": (120, 190, 230)}
    columns = {name: np.nonzero((start == colour).all(-1))[1] for name, colour in colours.items()}
    assert (columns["player"].min(), columns["player"].max()) == (10, 19)
    assert sorted(set(columns["enemy"])) == [*range(125, 135), *range(375, 385)]
    assert sorted(set(columns["platform"])) == [*range(10, 135), *range(248, 385), *range(502, 528)]
    assert not len(columns["path"])
    obs, *_ = env.step((HOP, np.array([0, 720, 0], dtype=np.float32)))
    picture = env.render()
    rows, columns = np.nonzero((picture == colours["path"]).all(-1))
    assert rows.min() < 90 and columns.max() - columns.min() > 35  # an arc, from the start to where the player is
    x = obs[0] * 1055 - 20
    assert np.nonzero((picture == colours["player"]).all(-1))[1].min() == pytest.approx((x + 20) / 2, abs=1)


# --- As gymnasium sees them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasiums_checker(env_id):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(gym.make(env_id, render_mode="rgb_array").unwrapped)
    messages = [str(warning.message) for warning in caught]
    if env_id == PLATFORM:  # whose parameters have the original's units
        messages = [message for message in messages if "symmetric and normalized space" not in message]
    assert not messages


@pytest.mark.parametrize("env_id", IDS)
def test_observations_stay_within_their_space(env_id):
    env, rng = make_vec(env_id, 200), np.random.default_rng(6)
    obs, _ = env.reset(seed=0)
    low, high = env.observation_space.low, env.observation_space.high
    space = action_space(env_id)
    forced = np.arange(200) < 100
    for _ in range(30 if env_id == PLATFORM else 210):
        k = np.where(forced, np.arange(200) % 2 * (space[0].n - 1), rng.integers(space[0].n, size=200))
        x = np.where(forced[:, None], space[1].high, rng.uniform(space[1].low, space[1].high, (200, space[1].shape[0])))
        obs, _, terminated, truncated, _ = env.step((k, x))
        assert ((low <= obs) & (obs <= high)).all()
        obs, _ = env.reset(options={"reset_mask": terminated | truncated})


def test_ids_with_the_module_work_from_the_folder_of_the_environments_and_need_no_torch():
    code = """
import sys, gymnasium as gym
one, many = gym.make("environments.hybrid:HybridPlatform-v0"), gym.make_vec("environments.hybrid:HybridMoving-v0", 2)
print(one.reset(seed=0)[0].shape, many.reset(seed=0)[0].shape, "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert (result.returncode, result.stdout) == (0, "(10,) (2, 10) False\n"), result.stderr


@pytest.mark.parametrize("env_id", PLANE)
def test_a_picture_shows_target_and_agent_where_they_are(env_id):
    spots = {"target": (0.6, -0.7), "pos": (-0.5, 0.3)}
    env = situation(env_id, 2, **{name: [list(spot), [0.0, 0.0]] for name, spot in spots.items()})
    picture, other = env.render()
    assert picture.shape == (240, 240, 3) and picture.dtype == np.uint8 and (picture != other).any()
    for colour, (x, y) in [((0, 158, 115), spots["target"]), ((0, 114, 178), spots["pos"])]:
        rows, columns = np.nonzero((picture == colour).all(-1))
        assert len(rows) > 20
        assert columns.mean() / 239 * 2.4 - 1.2 == pytest.approx(x, abs=0.03)
        assert 1.2 - rows.mean() / 239 * 2.4 == pytest.approx(y, abs=0.03)
    single = gym.make(env_id, render_mode="rgb_array")
    single.reset(seed=3)
    many = make_vec(env_id, 2)
    many.reset(seed=2)
    assert np.array_equal(single.render(), many.render()[1])
