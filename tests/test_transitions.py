"""Every stored row is a real transition, every episode counts once, statistics stand still within an iteration."""

import copy
import csv
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, only, scalars, spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import ppo_continuous as ppo

CPU = torch.device("cpu")


class Counting(gym.Env):
    """Observations that tell where they come from: [seed, step, the action as the environment saw it].

    The seed s is cut to what a float32 can hold. An episode lasts 3 + s % 5 steps, and ends by termination, truncation
    or both, by s % 3. The reward sqrt(2) step + s / 10 cannot be mistaken for another row's.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-0.5, 0.75, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.t = seed % 1_000_003, 0
        return np.array([self.seed, 0, 0]), {}

    def step(self, action):
        self.t += 1
        end, kind = self.t == 3 + self.seed % 5, self.seed % 3
        obs = np.array([self.seed, self.t, action[0]])
        return obs, reward_of(self.seed, self.t), end and kind != 1, end and kind != 0, {"seed": self.seed}


def reward_of(seed, t):
    return np.sqrt(2) * t + seed / 10


def seed_of(run_seed, index, episode):
    return int(np.random.SeedSequence([run_seed, index + 1, episode]).generate_state(1)[0])


gym.register("Counting-v0", Counting)


def collect(args, obs_dim, action_dim, rollouts):
    """Rows of several rollouts end to end, and the episodes they report."""
    torch.manual_seed(0)
    envs, agent = ppo.Envs(args, range(args.num_envs)), ppo.Agent(spaces(obs_dim, action_dim), args)
    parts = [ppo.rollout(envs, agent, args) for _ in range(rollouts)]
    return {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}, envs.finished


def test_rows_are_the_transitions_of_the_environment():
    args = ppo.Args(env_id="Counting-v0", num_envs=5, num_steps=16, seed=3, gamma=0.9)
    rows, episodes = collect(args, 3, 1, rollouts=6)
    expected_episodes, kinds = [], set()
    for n in range(5):
        episode, t, total, discounted = 1, 0, 0.0, 0.0
        for k in range(96):
            seed = seed_of(3, n, episode) % 1_000_003
            obs, next_obs = rows["obs"][k, n], rows["next_obs"][k, n]
            assert list(obs[:2]) == [seed, t]
            assert list(next_obs[:2]) == [seed, t + 1]  # the true successor, at an episode's end too
            action = rows["actions"][k, n, 0]
            assert next_obs[2] == np.clip(action, np.float32(-0.5), np.float32(0.75))
            if t:
                assert obs[2] == rows["next_obs"][k - 1, n][2]
            t, reward = t + 1, reward_of(seed, t + 1)
            total, discounted = total + reward, reward + 0.9 * discounted
            assert rows["rewards"][k, n] == reward and rows["discounted"][k, n] == discounted
            end, kind = t == 3 + seed % 5, seed % 3
            assert rows["done"][k, n] == end
            assert rows["terminated"][k, n] == (end and kind != 1)  # both flags: terminated
            if end:
                expected_episodes.append(((k + 1) * 5, total, t, {"seed": float(seed)}))
                kinds.add((t, kind))
                episode, t, total, discounted = episode + 1, 0, 0.0, 0.0
    assert len(expected_episodes) > 75 and len(kinds) == 15
    found, wanted = (sorted(list_, key=lambda row: row[:3]) for list_ in (episodes, expected_episodes))
    assert found == wanted  # exactly once each
    # stored as drawn, though the environment saw the clipped ones
    assert (rows["actions"] < -0.5).any() and (rows["actions"] > 0.75).any()


class Scheduled(gym.Wrapper):
    """Takes, where it is reset without one, the seed that a loop would give it."""

    def __init__(self, env, index):
        super().__init__(env)
        self.index, self.episode = index, 0

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        return self.env.reset(seed=seed_of(1, self.index, self.episode) if seed is None else seed)


class Blind(SyncVectorEnv):
    """Keeps an episode's last observation to itself."""

    def step(self, actions):
        *row, infos = super().step(actions)
        return *row, {name: value for name, value in infos.items() if name != "final_obs"}


def batched(mode, kind=SyncVectorEnv):
    """An environment's vector_entry_point: gymnasium's own, which has just one mode."""

    def make(num_envs, env_id, autoreset_mode=mode):
        if mode == AutoresetMode.SAME_STEP != autoreset_mode:
            raise ValueError("it always resets at once")
        envs = [lambda i=i: Scheduled(gym.make(env_id), i) for i in range(num_envs)]
        return kind(envs, copy=False, autoreset_mode=mode)

    return make


for name in ("Counting-v0", "Hopper-v4", "Pendulum-v1"):
    for mode in AutoresetMode:
        kwargs = {"entry_point": lambda env_id: gym.make(env_id), "vector_entry_point": batched(mode)}
        gym.register(f"Batched/{mode.name}-{name}", kwargs={"env_id": name}, **kwargs)
kwargs |= {"vector_entry_point": batched(AutoresetMode.SAME_STEP, Blind)}
gym.register("Batched/Blind-v0", kwargs={"env_id": "Counting-v0"}, **kwargs)


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("env_id", ["Counting-v0", "Hopper-v4", "Pendulum-v1"])
def test_an_environments_own_batch_and_a_loop_give_the_same_rows_to_the_bit(env_id, mode):
    both, args = [], ppo.Args(num_envs=3, num_steps=250)
    for name in (env_id, f"Batched/{mode.name}-{env_id}"):
        args.env_id = name
        envs = ppo.Envs(args, range(3))
        torch.manual_seed(0)
        agent = ppo.Agent(envs, args)
        parts = [ppo.rollout(envs, agent, args) for _ in range(2)]
        both.append([np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]])
        both[-1].append(envs.finished)
    assert isinstance(envs.vector_env, ppo.Loop) == (mode == AutoresetMode.NEXT_STEP)  # it would lose observations
    *rows, episodes = zip(*both)
    assert all(np.array_equal(*arrays) for arrays in rows) and episodes[0] == episodes[1] and len(episodes[0]) >= 3


def test_a_batch_without_the_last_observation_is_refused_with_one_line(capsys):
    envs = ppo.Envs(ppo.Args(env_id="Batched/Blind-v0", num_envs=3), range(3))
    with pytest.raises(SystemExit) as stop:
        for _ in range(8):
            envs.step(np.zeros((3, 1), dtype=np.float32))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and "no final_obs" in err and err.count("\n") == 1


def test_a_batch_that_cannot_be_used_is_said_and_runs_one_by_one(tmp_path, capsys):
    run(tmp_path, "--env-id", "Batched/NEXT_STEP-Hopper-v4", "--total-timesteps", 256, "--no-compile")
    assert "run one by one: Batched/NEXT_STEP-Hopper-v4's own batch hides" in capsys.readouterr().err


def test_the_episodes_of_a_batch_that_resets_itself_start_again_and_a_notice_says_so(tmp_path, capsys):
    folder = run(tmp_path, "--env-id", "Batched/SAME_STEP-Hopper-v4", "--total-timesteps", 512, "--no-compile")
    capsys.readouterr()
    ppo.main(ppo.parse_args(["--resume", str(folder), "--total-timesteps", "768"]))
    assert "the episodes of environments [0, 1, 2, 3] start again" in capsys.readouterr().err
    lengths = np.loadtxt(folder / "episodes.csv", delimiter=",", skiprows=1)
    assert (np.diff(lengths[:, 0]) >= 0).all() and load(folder / "checkpoint.pt")["envs"]["lengths"].max() <= 64


@pytest.mark.parametrize("steps", [0, 5, 260])
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Pendulum-v1"])
def test_a_batch_continues_its_running_episodes_to_the_bit(env_id, steps, capfd):
    args = ppo.Args(env_id=f"Batched/DISABLED-{env_id}", num_envs=3)
    envs, others, rng = ppo.Envs(args, range(3)), ppo.Envs(args, range(3)), np.random.default_rng(1)
    actions = rng.normal(size=(steps + 200, 3, *envs.action_space.shape)).astype(np.float32)
    for action in actions[:steps]:
        envs.step(action)
    others.load_state_dict({name: copy.deepcopy(value) for name, value in envs.state_dict().items()})
    for action in actions[steps:]:
        rows = envs.step(action), others.step(action)
        assert all(np.array_equal(rows[0][name], rows[1][name]) for name in rows[0])
        assert np.array_equal(envs.obs, others.obs)
    assert not capfd.readouterr().err


def test_no_two_episodes_of_any_two_runs_or_of_the_evaluation_share_a_seed():
    seeds = []
    for run_seed in (0, 1, 2):
        args = ppo.Args(env_id="Counting-v0", num_envs=8, seed=run_seed)
        for indices in (range(8), range(-1, 0)):
            envs = ppo.Envs(args, indices)
            for _ in range(40):
                seeds += [env.unwrapped.np_random_seed for env in envs.vector_env.envs]
                envs.reset(np.ones(len(indices), dtype=bool))
    assert len(set(seeds)) == len(seeds) == 3 * 9 * 40


def test_a_time_limit_is_a_truncation():
    args = ppo.Args(env_id="HalfCheetah-v4", num_envs=2, num_steps=1001)
    rows, episodes = collect(args, 17, 6, rollouts=1)
    assert [tuple(np.flatnonzero(column)) for column in rows["done"].T] == [(999,)] * 2
    assert not rows["terminated"].any() and [length for _, _, length, _ in episodes] == [1000] * 2
    assert np.abs(rows["obs"][1000]).max() < 1.5 < np.abs(rows["next_obs"][999]).max()  # at rest, in motion


@pytest.mark.parametrize("std_type", ["independent", "state"])
def test_a_batch_s_log_probabilities_belong_to_the_unclipped_actions(std_type):
    args = ppo.Args(env_id="Counting-v0", num_envs=4, num_steps=32, norm_reward=False, std_type=std_type)
    torch.manual_seed(0)
    envs = ppo.Envs(args, range(4))
    agent = ppo.Agent(envs, args)
    rows = ppo.rollout(envs, agent, args)
    batch = ppo.make_batch(rows, agent, CPU, args)
    pi, values = agent.policy(rows["obs"].flatten(0, 1)), agent.value(rows["obs"].flatten(0, 1))
    expected = torch.distributions.Normal(pi.mean, pi.log_std.exp()).log_prob(rows["actions"].flatten(0, 1)).sum(-1)
    torch.testing.assert_close(batch["logprobs"], expected)
    torch.testing.assert_close(batch["values"], values)
    torch.testing.assert_close(batch["returns"], batch["advantages"] + batch["values"])
    arrays = [rows[name].numpy() for name in ("rewards", "terminated", "done")]
    next_values = agent.value(rows["next_obs"]).detach().numpy()
    wanted = ppo.gae(arrays[0], values.detach().view(32, 4).numpy(), next_values, *arrays[1:], 0.99, 0.95)
    np.testing.assert_allclose(batch["advantages"].view(32, 4), wanted, rtol=1e-4)
    assert torch.equal(batch["actions"], rows["actions"].flatten(0, 1)) and batch["actions"].abs().max() > 1
    assert torch.equal(batch["obs"], rows["obs"].flatten(0, 1))


def run(tmp_path, *argv):
    """A short run in this process; its folder."""
    small = "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 2 --eval-episodes 1 --device cpu"
    ppo.main(ppo.parse_args([*small.split(), "--runs-dir", str(tmp_path), *map(str, argv)]))
    return only(tmp_path)


def test_statistics_stand_still_within_an_iteration_and_are_saved(tmp_path, monkeypatch):
    """The first update is the exception: before it there are no statistics, so it takes its own rollout's."""
    seen, discounted, frozen = [], [], []
    rollout, update = ppo.rollout, ppo.update

    def watched_rollout(envs, agent, args):
        frozen.append(agent.obs_rms.mean.clone())
        rows = rollout(envs, agent, args)
        assert torch.equal(agent.obs_rms.mean, frozen[-1])
        seen.append(rows["obs"].reshape(-1, 11))
        discounted.append(rows["discounted"].flatten())
        return rows

    def watched_update(step, agent, *rest):
        if len(seen) == 1:
            assert (frozen[0] == 0).all()
            frozen[-1] = seen[0].double().mean(0)
        torch.testing.assert_close(agent.obs_rms.mean, frozen[-1], rtol=0, atol=1e-12 if len(seen) == 1 else 0)
        before = agent.obs_rms.mean.clone()
        metrics = update(step, agent, *rest)
        assert torch.equal(agent.obs_rms.mean, before)
        return metrics

    monkeypatch.setattr(ppo, "rollout", watched_rollout)
    monkeypatch.setattr(ppo, "update", watched_update)
    saved = load(run(tmp_path, "--env-id", "Hopper-v4", "--total-timesteps", 1024, "--no-compile") / "model.pt")
    for name, samples in (("obs_rms", torch.cat(seen)), ("return_rms", torch.cat(discounted))):
        samples = samples.double().numpy()
        assert len(samples) == saved[f"{name}.count"] == 1024
        np.testing.assert_allclose(saved[f"{name}.mean"], samples.mean(0), atol=1e-12)
        np.testing.assert_allclose(saved[f"{name}.var"], samples.var(0), rtol=1e-9)


def test_an_iteration_logs_its_own_episodes_schedule_and_explained_variance(tmp_path, monkeypatch):
    make_batch, explained = ppo.make_batch, []

    def watched_make_batch(*args):
        batch = make_batch(*args)
        returns, values = batch["returns"].double().numpy(), batch["values"].double().numpy()
        explained.append(1 - np.var(returns - values) / np.var(returns))
        return batch

    monkeypatch.setattr(ppo, "make_batch", watched_make_batch)
    folder = run(tmp_path, "--env-id", "Hopper-v4", "--total-timesteps", 4 * 256, "--no-compile")
    logged = {}
    for (tag, step, value), times in scalars(folder).items():
        assert times == 1
        logged.setdefault(tag, {})[step] = value
    steps = [256, 512, 768, 1024]
    assert logged["losses/explained_variance"] == pytest.approx(dict(zip(steps, explained)), rel=1e-4, abs=1e-5)
    assert logged["charts/learning_rate"] == pytest.approx({k: 3e-4 * (1 - (k - 256) / 1024) for k in steps})
    columns = {"episodic_return": {}, "episodic_length": {}}
    with open(folder / "episodes.csv") as file:
        for row in csv.DictReader(file):
            end_of_iteration = math.ceil(int(row["global_step"]) / 256) * 256
            for name, column in (("episodic_return", "return"), ("episodic_length", "length")):
                columns[name].setdefault(end_of_iteration, []).append(float(row[column]))
    for name, values in columns.items():
        wanted = {step: np.mean(episodes) for step, episodes in values.items()}
        assert logged[f"charts/{name}"] == pytest.approx(wanted, rel=1e-5) and len(wanted) == 4


def test_compiled_and_plain_runs_agree_and_each_repeats_to_the_bit(tmp_path):
    def model(name, steps, *flags):
        folder = run(tmp_path / name, "--env-id", "Hopper-v4", "--total-timesteps", steps, *flags)
        return load(folder / "model.pt"), (folder / "episodes.csv").read_bytes()

    plain, compiled = model("plain", 256, "--no-compile")[0], model("compiled", 256)[0]  # one iteration, 8 steps
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=0, atol=1e-5)
    other_seed, _ = model("other", 2048, "--no-compile", "--seed", 2)
    for flag in ("--no-compile", "--compile"):
        (one, episodes), (again, again_episodes) = (model(f"{flag}{k}", 2048, flag) for k in range(2))
        assert all(torch.equal(one[name], tensor) for name, tensor in again.items())
        assert episodes == again_episodes and episodes.count(b"\n") > 10
        assert not torch.equal(one["critic.0.weight"], other_seed["critic.0.weight"])


class Odd(gym.Env):
    """A constant observation and a constant reward."""

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


gym.register("Odd-v0", Odd)


@pytest.mark.parametrize("reward", [0.0, 1.0, 1e10, -1e10])
@pytest.mark.parametrize("flags", [[], ["--no-norm-reward"], ["--no-norm-adv"], ["--std-type", "state"]], ids=str)
def test_constant_observations_and_rewards_leave_finite_parameters(tmp_path, reward, flags):
    env = ["--env-id", "Odd-v0", "--env-kwargs", json.dumps({"reward": reward})]
    folder = run(tmp_path, *env, "--total-timesteps", 1024, "--no-compile", *flags)
    assert all(tensor.isfinite().all() for tensor in load(folder / "model.pt").values())
    assert json.loads((folder / "result.json").read_text())["eval_returns"] == [10 * reward]


@pytest.mark.parametrize("std_type", ["independent", "fixed", "state"])
def test_the_three_kinds_of_sigma(tmp_path, std_type):
    settings = ["--std-type", std_type, "--log-std-init", "-0.5", "--no-compile"]
    folder = run(tmp_path, "--env-id", "Hopper-v4", "--total-timesteps", 1024, *settings)
    agent = ppo.Agent(spaces(11, 3), ppo.Args(std_type=std_type))
    agent.load_state_dict(load(folder / "model.pt"))
    log_std = agent.policy(torch.randn(5, 11)).log_std.expand(5, 3)
    assert torch.equal(log_std, torch.full((5, 3), -0.5)) == (std_type == "fixed")  # the others have learnt
    assert (log_std != log_std[0]).any() == (std_type == "state")
