"""Every stored row is a real transition, every episode counts once, statistics stand still within an iteration."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_equations import spaces

import ppo_continuous as ppo

torch.set_num_threads(1)  # as the script does; two lose time on networks this small


class Counting(gym.Env):
    """Observations that tell where they come from: [seed, episode, step, the action as the environment saw it].

    Episode e of the environment with seed s lasts 3 + (s + 2 e) % 5 steps. It ends by termination, truncation or both
    in turn, and the reward sqrt(2) step + s / 10 cannot be mistaken for another row's.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,))
    action_space = gym.spaces.Box(-0.5, 0.75, (1,))
    seed = episode = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.seed, self.episode = seed, -1
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.seed, self.episode, 0, 0]), {}

    def step(self, action):
        self.t += 1
        end = self.t == 3 + (self.seed + 2 * self.episode) % 5
        obs = np.array([self.seed, self.episode, self.t, action[0]])
        kind = self.episode % 3
        return obs, reward_of(self.seed, self.t), end and kind != 1, end and kind != 0, {}


def reward_of(seed, t):
    return np.sqrt(2) * t + seed / 10


gym.register("Counting-v0", Counting)


def collect(envs, args, action_space, obs_dim, rollouts):
    """Rows of several rollouts end to end, and the episodes they report."""
    torch.manual_seed(0)
    agent = ppo.Agent(spaces(obs_dim, *action_space.shape), args)
    running = ppo.start_episodes(envs, args.num_envs, args.seed)
    parts, episodes = [], []
    for k in range(rollouts):
        start = k * args.num_steps * args.num_envs
        rows, finished = ppo.rollout(envs, agent, running, action_space, args, start)
        parts.append({name: tensor.numpy() for name, tensor in rows.items()})
        episodes += finished
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, episodes


def test_rows_are_the_transitions_of_the_environment():
    args = ppo.Args(env_id="Counting-v0", num_envs=5, num_steps=16, seed=3)
    envs = ppo.GymnasiumEnvs(args)
    rows, episodes = collect(envs, args, Counting.action_space, 4, rollouts=4)
    expected_episodes = []
    for n in range(5):
        seed, episode, t, total = 3 + n, 0, 0, 0.0
        for k in range(64):
            obs, next_obs = rows["obs"][k, n], rows["next_obs"][k, n]
            assert list(obs[:3]) == [seed, episode, t]
            assert list(next_obs[:3]) == [seed, episode, t + 1]  # the true successor, at an episode's end too
            action = rows["actions"][k, n, 0]
            assert next_obs[3] == np.clip(action, np.float32(-0.5), np.float32(0.75))
            assert rows["rewards"][k, n] == reward_of(seed, t + 1)
            t, total = t + 1, total + reward_of(seed, t + 1)
            end = t == 3 + (seed + 2 * episode) % 5
            assert rows["done"][k, n] == end
            assert rows["terminated"][k, n] == (end and episode % 3 != 1)  # both flags: terminated
            if end:
                expected_episodes.append(((k + 1) * 5, total, t))
                episode, t, total = episode + 1, 0, 0.0
    assert len(expected_episodes) > 50
    for found, wanted in zip(sorted(episodes), sorted(expected_episodes), strict=True):  # exactly once each
        assert found[0] == wanted[0] and found[2] == wanted[2]
        assert found[1] == pytest.approx(wanted[1], abs=1e-5)
    # stored as drawn, though the environment saw the clipped ones
    assert (rows["actions"] < -0.5).any() and (rows["actions"] > 0.75).any()


@pytest.mark.parametrize("threads", [1, 3])
def test_envpool_rows_are_transitions_of_the_physics(threads):
    """InvertedPendulum's observation is its whole state, so gymnasium's copy can replay each row of EnvPool's."""
    pytest.importorskip("envpool", reason="--backend envpool is optional")
    args = ppo.Args(env_id="InvertedPendulum-v4", num_envs=6, num_steps=64)
    env = ppo.make_env(args)
    envs = ppo.EnvPoolEnvs(args.env_id, args.num_envs, args.seed, threads)
    rows, episodes = collect(envs, args, env.action_space, 4, rollouts=3)
    env.reset()
    returns, lengths, expected_episodes = np.zeros(6), np.zeros(6, int), []
    for k in range(len(rows["obs"])):
        for n in range(6):
            if k and not rows["done"][k - 1, n]:
                assert np.array_equal(rows["obs"][k, n], rows["next_obs"][k - 1, n])
            if k and rows["done"][k - 1, n]:
                assert np.abs(rows["obs"][k, n]).max() <= 0.01  # a first observation
            state = rows["obs"][k, n].astype(np.float64)
            env.unwrapped.set_state(state[:2], state[2:])
            action = np.clip(rows["actions"][k, n], env.action_space.low, env.action_space.high)
            next_obs, reward, terminated, _, _ = env.unwrapped.step(action)
            np.testing.assert_allclose(rows["next_obs"][k, n], next_obs, atol=1e-4)
            assert rows["terminated"][k, n] == terminated == rows["done"][k, n]
            assert rows["rewards"][k, n] == 1.0
            returns[n], lengths[n] = returns[n] + 1, lengths[n] + 1
            if terminated:
                expected_episodes.append(((k + 1) * 6, returns[n], lengths[n]))
                returns[n], lengths[n] = 0, 0
    assert len(expected_episodes) > 30
    assert sorted(episodes) == sorted(expected_episodes)


def test_envpool_time_limit_is_a_truncation_with_its_true_last_observation():
    pytest.importorskip("envpool", reason="--backend envpool is optional")
    args = ppo.Args(env_id="HalfCheetah-v4", num_envs=3, num_steps=1003)
    envs = ppo.EnvPoolEnvs(args.env_id, args.num_envs, args.seed, 1)
    rows, episodes = collect(envs, args, ppo.make_env(args).action_space, 17, rollouts=1)
    assert [tuple(np.flatnonzero(column)) for column in rows["done"].T] == [(999,)] * 3
    assert not rows["terminated"].any()
    assert np.abs(rows["obs"][1000]).max() < 1.5 < np.abs(rows["next_obs"][999]).max()  # at rest, in motion
    assert [(step, length) for step, _, length in episodes] == [(3000, 1000)] * 3
    np.testing.assert_allclose([r for _, r, _ in episodes], rows["rewards"][:1000].sum(0), atol=1e-5)


def test_gymnasium_time_limit_is_a_truncation():
    args = ppo.Args(env_id="HalfCheetah-v4", num_envs=2, num_steps=1001)
    envs = ppo.GymnasiumEnvs(args)
    rows, episodes = collect(envs, args, ppo.make_env(args).action_space, 17, rollouts=1)
    assert [tuple(np.flatnonzero(column)) for column in rows["done"].T] == [(999,)] * 2
    assert not rows["terminated"].any() and [length for _, _, length in episodes] == [1000] * 2


def test_log_probabilities_belong_to_the_unclipped_actions():
    args = ppo.Args(env_id="Counting-v0", num_envs=4, num_steps=32, norm_reward=False)
    torch.manual_seed(0)
    agent = ppo.Agent(spaces(4, 1), args)
    envs = ppo.GymnasiumEnvs(args)
    running = ppo.start_episodes(envs, 4, 1)
    rows, _ = ppo.rollout(envs, agent, running, Counting.action_space, args, 0)
    batch, _ = ppo.make_batch(rows, agent, running, ppo.RunningMeanStd(), args)
    mean, log_std, values = agent(agent.normalize(rows["obs"].flatten(0, 1)))
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(rows["actions"].flatten(0, 1)).sum(-1)
    torch.testing.assert_close(batch["logprobs"], expected)
    torch.testing.assert_close(batch["values"], values)
    torch.testing.assert_close(batch["returns"], batch["advantages"] + batch["values"])
    assert batch["actions"].abs().max() > 1


def run(tmp_path, *argv):
    """A short run in this process; its folder."""
    tmp_path.mkdir(exist_ok=True)
    small = "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 2 --eval-episodes 1 --device cpu"
    ppo.main(ppo.parse_args([*small.split(), "--runs-dir", str(tmp_path), *argv]))
    return max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)


def test_statistics_stand_still_within_an_iteration_and_are_saved(tmp_path, monkeypatch):
    """The first update is the exception: before it there are no statistics, so it takes its own rollout's."""
    seen, frozen = [], []
    rollout, update = ppo.rollout, ppo.update

    def watched_rollout(envs, agent, *rest):
        frozen.append(agent.obs_rms.mean.clone())
        rows, episodes = rollout(envs, agent, *rest)
        assert torch.equal(agent.obs_rms.mean, frozen[-1])
        seen.append(rows["obs"].reshape(-1, 11))
        monkeypatch.setattr(ppo, "update", lambda *a: watched_update(agent, *a))
        return rows, episodes

    def watched_update(agent, *rest):
        if len(seen) == 1:
            frozen[-1] = seen[0].double().mean(0)
        torch.testing.assert_close(agent.obs_rms.mean, frozen[-1], rtol=0, atol=1e-12 if len(seen) == 1 else 0)
        return update(*rest)

    monkeypatch.setattr(ppo, "rollout", watched_rollout)
    folder = run(tmp_path, "--env-id", "Hopper-v4", "--total-timesteps", "1024", "--no-compile")
    saved = torch.load(folder / "model.pt", weights_only=True)
    everything = torch.cat(seen).double().numpy()
    assert len(everything) == 1024
    np.testing.assert_allclose(saved["obs_rms.mean"], everything.mean(0), atol=1e-12)
    np.testing.assert_allclose(saved["obs_rms.var"], everything.var(0), rtol=1e-9)


def model(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def test_compiled_and_plain_updates_agree_and_runs_repeat_to_the_bit(tmp_path):
    one = ["--env-id", "Hopper-v4", "--total-timesteps", "256"]  # a single iteration, 8 gradient steps
    several = ["--env-id", "Hopper-v4", "--total-timesteps", "2048"]
    plain, compiled = run(tmp_path / "a", *one, "--no-compile"), run(tmp_path / "b", *one)
    for name, tensor in model(plain).items():
        torch.testing.assert_close(model(compiled)[name], tensor, rtol=0, atol=1e-5)
    for flag in ("--no-compile", "--compile"):
        first, second = run(tmp_path / f"c{flag}", *several, flag), run(tmp_path / f"d{flag}", *several, flag)
        assert all(torch.equal(model(first)[name], tensor) for name, tensor in model(second).items())
        assert (first / "episodes.csv").read_bytes() == (second / "episodes.csv").read_bytes()
    other_seed = run(tmp_path / "e", *several, "--no-compile", "--seed", "2")
    assert not torch.equal(model(other_seed)["critic.0.weight"], tensor_of(first, "critic.0.weight"))


def tensor_of(folder, name):
    return model(folder)[name]


class Odd(gym.Env):
    """A constant observation; the reward is what the id's keyword says, the same in each step."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, reward):
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.full(3, 0.1), {}

    def step(self, action):
        self.t += 1
        return np.full(3, 0.1), self.reward, False, self.t == 10, {}


@pytest.mark.parametrize("reward", [0.0, 1.0, 1e10, -1e10])
@pytest.mark.parametrize("flags", [[], ["--no-norm-reward"], ["--no-norm-adv"], ["--std-type", "state"]])
def test_constant_observations_and_rewards_leave_finite_parameters(tmp_path, reward, flags):
    gym.register("Odd-v0", Odd, kwargs={"reward": reward})
    try:
        folder = run(tmp_path, "--env-id", "Odd-v0", "--total-timesteps", "1024", "--no-compile", *flags)
        assert all(tensor.isfinite().all() for tensor in model(folder).values())
    finally:
        gym.registry.pop("Odd-v0")


@pytest.mark.parametrize("std_type", ["independent", "fixed", "state"])
def test_the_three_kinds_of_sigma(tmp_path, std_type):
    settings = ["--std-type", std_type, "--log-std-init", "-0.5", "--no-compile"]
    folder = run(tmp_path, "--env-id", "Hopper-v4", "--total-timesteps", "1024", *settings)
    agent = ppo.Agent(spaces(11, 3), ppo.Args(std_type=std_type))
    agent.load_state_dict(model(folder))
    _, log_std = agent.policy(torch.randn(5, 11))
    assert torch.equal(log_std, torch.full((5, 3), -0.5)) == (std_type == "fixed")  # the others have learnt
    assert (log_std.std(0).max() > 0) == (std_type == "state")
