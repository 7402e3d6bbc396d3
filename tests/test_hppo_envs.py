"""The environments inside hppo_hybrid.py: their rules, many at once against one by one, and that they can be solved."""

import cmath
import io
import math
import warnings
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import hppo_hybrid as hppo

torch.set_num_threads(1)  # as the script does; two lose time on networks this small

MOVING, SLIDING, CATCH = "HybridMoving-v0", "HybridSliding-v0", "HybridCatchPoint-v0"
IDS = [MOVING, SLIDING, CATCH, "HybridHardMove4-v0", "HybridHardMove10-v0"]


def make_vec(env_id, N, **kwargs) -> gym.vector.VectorEnv:
    return gym.make_vec(env_id, N, autoreset_mode=AutoresetMode.DISABLED, **kwargs)


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


def expert(env_id, obs):
    """Actions (k, x) of the environment."""
    space = gym.make(env_id).action_space
    if env_id == CATCH:
        k, x = fly_and_catch(obs.astype(np.float64))
    elif env_id in (MOVING, SLIDING):
        k, x = drive(obs.astype(np.float64))
    else:
        k, x = pull(obs.astype(np.float64), space[1].shape[0])
    return k, np.clip(np.float32(x), space[1].low, space[1].high)


def mixed(env_id, obs, rng):
    """The even environments follow the expert, with less force than it asks for; the odd ones act at random."""
    space, odd = gym.make(env_id).action_space, np.arange(len(obs)) % 2 == 1
    k, x = expert(env_id, obs)
    uniform = rng.uniform(space[1].low, space[1].high, x.shape)
    x = np.where(odd[:, None], uniform, x * rng.uniform(0.9, 1, x.shape)).astype(np.float32)
    return np.where(odd, rng.integers(space[0].n, size=len(obs)), k), x


@pytest.mark.parametrize("env_id", IDS)
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


@pytest.mark.parametrize("env_id", IDS)
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
    state = env.state()
    for name, value in arrays.items():
        state["arrays"][name][...] = torch.tensor(value, dtype=torch.float64)
    env.load_state(state)
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
    assert masks[MOVING] == masks[SLIDING] == [[1, 0], [0, 1], [0, 0]] and masks[CATCH] == [[1], [0]]
    env = gym.make("HybridHardMove-v0", n=6)
    assert env.action_space[0].n == 64 and env.action_space[1].shape == (6,)
    assert [sum(bit << i for i, bit in enumerate(row)) for row in masks["HybridHardMove10-v0"]] == list(range(1024))
    for env_id in IDS:  # a parameter that the mask leaves out does not act, one that it has does
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
    firsts = {env_id: make_vec(env_id, N).reset(seed=0)[0].astype(float) for env_id in IDS}
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
    """3,200 steps of 64; eight of them, from the places where vector instructions begin and end, are done singly."""
    env, rng = make_vec(env_id, 64), np.random.default_rng(1)
    singles = {i: gym.make(env_id) for i in (0, 1, 7, 8, 30, 47, 62, 63)}
    obs, _ = env.reset(seed=7)
    for i, single in singles.items():
        assert np.array_equal(single.reset(seed=7 + i)[0], obs[i])
    ends = []
    for _ in range(3200):
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
    assert len(ends) > 100 and 20 < sum(ends) < len(ends)


@pytest.mark.parametrize("env_id", IDS)
def test_autoreset_in_the_next_step_is_gymnasiums(env_id):
    env, wanted = gym.make_vec(env_id, 6), gym.make_vec(env_id, 6, vectorization_mode="sync")
    assert env.metadata["autoreset_mode"] == wanted.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert (env.action_space, env.observation_space) == (wanted.action_space, wanted.observation_space)
    obs, rng, resets = env.reset(seed=3)[0], np.random.default_rng(2), 0
    assert np.array_equal(obs, wanted.reset(seed=3)[0])
    terminated = np.zeros(6, dtype=bool)
    for _ in range(600):
        actions = mixed(env_id, obs, rng)
        resets += terminated.sum()
        obs, rewards, terminated, truncated, info = env.step(actions)
        obs_wanted, *rest, info_wanted = wanted.step(actions)
        assert np.array_equal(obs, obs_wanted)
        assert all(np.array_equal(*pair) for pair in zip((rewards, terminated, truncated), rest))
        assert np.array_equal(info["is_success"], info_wanted.get("is_success", np.zeros(6, dtype=bool)))
    assert resets > 20


@pytest.mark.parametrize("env_id", [MOVING, "HybridHardMove4-v0"])
def test_the_rows_of_a_rollout_are_the_same_one_by_one(env_id):
    args = hppo.Args(env_id=env_id, num_envs=6, num_steps=250, encoder_sizes=(8,))
    parts = []
    for envs in (hppo.make_envs(args, 3), hppo.GymnasiumEnvs(args)):
        torch.manual_seed(0)
        env = hppo.make_env(args)
        agent = hppo.Agent(env, args)
        running = hppo.start_episodes(envs, 6, 3)
        parts.append(hppo.rollout(envs, agent, running, env.action_space, args, 0))
        assert isinstance(envs, hppo.BatchedEnvs) == (len(parts) == 1)
    (rows, episodes), (wanted, wanted_episodes) = parts
    assert all(torch.equal(rows[name], wanted[name]) for name in rows)
    assert episodes == wanted_episodes and len(episodes) > 6


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
def test_state_continues_in_other_environments_to_the_bit(env_id):
    args = hppo.Args(env_id=env_id, num_envs=5)
    envs, others, rng = hppo.make_envs(args, 1), hppo.make_envs(args, 1), np.random.default_rng(4)
    space = hppo.make_env(args).action_space
    actions = rng.uniform(space.low, space.high + [0.999, *[0] * (len(space.low) - 1)], (500, 5, len(space.low)))

    def step_and_reset(envs, a):
        obs, rewards, terminated, truncated = envs.step(a.astype(np.float32))
        first = envs.reset(np.flatnonzero(terminated)) if terminated.any() else np.empty(0)
        return [obs, rewards, terminated, truncated, first]

    envs.reset(range(5), seed=1)
    others.reset(range(5), seed=2)
    for a in actions[:150]:
        step_and_reset(envs, a)
    state, file = envs.state(), io.BytesIO()
    later = [step_and_reset(envs, a) for a in actions[150:]]  # with which the state must not move
    torch.save(state, file)
    others.load_state(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for a, wanted in zip(actions[150:], later):
        assert all(np.array_equal(*pair) for pair in zip(step_and_reset(others, a), wanted))
    assert sum(len(first) for *_, first in later) > 5


# --- As gymnasium sees them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasiums_checker(env_id):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(gym.make(env_id, render_mode="rgb_array").unwrapped)
    messages = [str(warning.message) for warning in caught if "infinity" not in str(warning.message)]
    assert not messages  # of the spaces without bounds, which MuJoCo's observations are too, it does warn


@pytest.mark.parametrize("env_id", IDS)
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
