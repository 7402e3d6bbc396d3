"""vmpo_lstm.py: what its core remembers, over which steps, and what that is good for. The loss is vmpo.py's."""

import csv
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_same_outcome, only
from gymnasium.spaces import Box, Discrete

import vmpo
import vmpo_lstm

CPU = torch.device("cpu")
SMALL = "--num-envs 4 --num-steps 32 --num-minibatches 2 --update-epochs 2 --eval-episodes 1 --device cpu".split()


class Chance(gym.Env):
    """Random observations and rewards; an episode ends, by termination or time, one step in ten."""

    observation_space, action_space = Box(-9, 9, (5,)), Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=5), {}

    def step(self, action):
        ends = self.np_random.random(2) < 0.1
        return self.np_random.normal(size=5), self.np_random.normal() * (1 + action), *map(bool, ends), {}


class Recall(gym.Env):
    """The first observation shows -1 or 1, the four after it nothing; the last action should tell which it was."""

    observation_space, action_space = Box(-1, 1, (1,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.cue = 0, self.np_random.integers(2)
        return np.array([2.0 * self.cue - 1]), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1), float(action == self.cue) if self.t == 5 else 0.0, self.t == 5, False, {}


gym.register("LstmChance-v0", Chance)
gym.register("Recall-v0", Recall)


def collect(**settings):
    """Two rollouts, the second of which begins amid episodes, and its batch; the agent is the target that acted."""
    settings = {"num_envs": 3, "num_steps": 32, "num_minibatches": 1, "norm_reward": False} | settings
    args = vmpo_lstm.Args(env_id="LstmChance-v0", **settings)
    torch.manual_seed(0)
    envs = vmpo_lstm.Envs(args, range(3))
    agent = vmpo_lstm.make_agent(envs, args)
    agent.actor_mean.weight.data *= 30  # else the policy hardly depends on anything
    rows = vmpo_lstm.rollout(envs, agent, [torch.zeros(3, 128), torch.zeros(3, 5)], args)
    agent.obs_rms.update(rows["obs"])
    memory = [rows["next_states"][-1], rows["next_obs"][-1, :, 5:]]
    rows = vmpo_lstm.rollout(envs, agent, memory, args)
    rows = {name: tensor.clone() for name, tensor in rows.items()}
    return agent, rows, vmpo_lstm.make_batch(rows, agent, agent, CPU, args), args


# --- The state ----------------------------------------------------------------------------------------------------


def test_a_row_has_the_last_action_and_reward_and_the_state_that_acted_all_0_where_an_episode_begins():
    _, rows, batch, _ = collect()
    done = rows["done"]
    assert rows["obs"].shape == (32, 3, 5 + 4 + 1) and 5 < done.sum() < 40
    for t in range(31):
        begins, goes_on = done[t], ~done[t]
        last = torch.cat([torch.eye(4)[rows["actions"][t, :, 0]], rows["rewards"][t, :, None]], -1).float()
        assert torch.equal(rows["obs"][t + 1, goes_on, 5:], last[goes_on])
        assert torch.equal(rows["states"][t + 1, goes_on], rows["next_states"][t, goes_on])
        assert rows["obs"][t + 1, begins, 5:].abs().sum() == 0 and rows["states"][t + 1, begins].abs().sum() == 0
        assert torch.equal(rows["next_obs"][t, :, 5:], last)  # also where the episode ends
    assert rows["states"][0].abs().sum(-1).max() > 0.1 and rows["next_states"].abs().sum(-1).min() > 0.1
    assert torch.equal(batch["obs"], rows["obs"].transpose(0, 1))


def step_by_step(agent, rows, n: int) -> list:
    """The core's (h, c) after each of environment n's rows, and that after the true successor, one LSTMCell call each;
    memory begins at the first row's and again after each episode's end."""
    outputs, successors = [], []
    h, c = rows["states"][0, n : n + 1].chunk(2, -1)

    def remember(obs, h, c):
        return agent.core(agent.torso(agent.normalize(obs[None])), (h, c))

    for t in range(len(rows["obs"])):
        h, c = remember(rows["obs"][t, n], h, c)
        outputs.append(h)
        successors.append(remember(rows["next_obs"][t, n], h, c)[0])
        if rows["done"][t, n]:
            h, c = torch.zeros(1, 64), torch.zeros(1, 64)
    return torch.cat(outputs), torch.cat(successors)


@torch.no_grad()
def test_the_unrolled_core_is_the_core_step_by_step_from_0_after_done():
    agent, rows, batch, _ = collect()
    outputs = agent.unroll(batch)
    for n in range(3):
        np.testing.assert_allclose(outputs[n], step_by_step(agent, rows, n)[0], atol=1e-6)
    pi = agent.policy(outputs, batch["masks"])
    np.testing.assert_allclose(pi.log_probs, batch["old_log_probs"], atol=1e-5)
    np.testing.assert_allclose(agent.value(outputs), batch["values"], atol=1e-5)
    batch["states"] = batch["states"].clone()
    batch["states"][:, 1:] = 9.0  # only the first row's state is read
    assert torch.equal(agent.unroll(batch), outputs)
    batch["states"][:, 0] = 0.5
    assert not torch.allclose(agent.unroll(batch)[:, 0], outputs[:, 0], atol=1e-2)


def test_the_gradient_goes_back_to_the_first_row_or_the_episode_s_and_no_further():
    agent, rows, batch, _ = collect()
    obs = batch["obs"] = batch["obs"].clone().requires_grad_()
    ends = batch["done"][0].nonzero().flatten()
    begins, end = int(ends[0]) + 1, int(ends[1])  # the first episode that lies within the rollout
    assert end - begins >= 2
    output = agent.unroll(batch)[0]
    (grad,) = torch.autograd.grad(output[end].sum(), obs, retain_graph=True)
    reached = grad.abs().sum(-1) > 0
    assert reached[0].nonzero().flatten().tolist() == list(range(begins, end + 1)) and not reached[1:].any()
    (grad,) = torch.autograd.grad(output[ends[0]].sum(), obs)
    assert (grad[0, : ends[0] + 1].abs().sum(-1) > 0).all()


@torch.no_grad()
def test_a_time_limit_s_successor_is_valued_with_the_running_state_and_a_terminal_one_not_at_all():
    agent, rows, batch, _ = collect(gae_lambda=0.0)
    seen = set()
    for n in range(3):
        outputs, successors = step_by_step(agent, rows, n)
        next_V = agent.value(successors)
        forgotten = agent.value(agent.remember(rows["next_obs"][:, n], torch.zeros(32, 128))[0])
        for t in range(32):
            terminated = rows["terminated"][t, n].item()
            bootstrap = 0.0 if terminated else 0.99 * next_V[t].item()
            assert batch["returns"][n, t].item() == pytest.approx(rows["rewards"][t, n].item() + bootstrap, abs=1e-4)
            seen.add((terminated, rows["done"][t, n].item()))
        assert (next_V - forgotten).abs().mean() > 1e-2  # so another state would show
    assert seen == {(False, False), (False, True), (True, True)}


def test_the_mean_over_minibatches_of_environments_is_the_loss_of_the_whole_batch():
    agent, rows, batch, args = collect(popart=True)
    agent, batch = agent.double(), {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
    whole, metrics = vmpo_lstm.loss(agent, batch, args)
    parts = [vmpo_lstm.loss(agent, batch, args, torch.tensor([n])) for n in (2, 0, 1)]
    assert sum(part.item() for part, _ in parts) / 3 == pytest.approx(whole.item(), rel=1e-9)
    for name, value in metrics.items():
        assert sum(m[name].item() for _, m in parts) / 3 == pytest.approx(value.item(), rel=1e-9, abs=1e-12)


# --- Runs ---------------------------------------------------------------------------------------------------------


def run(runs_dir, *flags, module=vmpo_lstm):
    """A run in this process, for speed; its folder."""
    module.main(module.parse_args([*SMALL, "--runs-dir", str(runs_dir), *map(str, flags)]))
    return only(runs_dir)


def test_memory_solves_what_none_can_without(tmp_path):
    """Without the cue before it any policy is right half the time."""
    flags = "--env-id Recall-v0 --num-envs 48 --num-steps 9 --num-minibatches 2 --update-epochs 4 --eval-episodes 100"
    flags += " --target-period 8 --total-timesteps 24000 --no-compile"  # an episode's 5 steps may lie in two rollouts
    results = {}
    for module in (vmpo_lstm, vmpo):
        folder = run(tmp_path / module.__name__, *flags.split(), module=module)
        returns = [float(row["return"]) for row in csv.DictReader(open(folder / "episodes.csv"))]
        greedy = json.loads((folder / "result.json").read_text())["eval_returns"]
        results[module] = np.mean(returns[-1000:]), np.mean(greedy)
    assert min(results[vmpo_lstm]) > 0.95 and max(results[vmpo]) < 0.6


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Recall-v0"])
def test_an_interrupted_run_resumes_to_the_bit_amid_its_episodes(env_id, tmp_path, monkeypatch):
    flags = ["--env-id", env_id, "--total-timesteps", 768, "--no-compile", "--checkpoint-every", 0]
    expected = run(tmp_path / "whole", *flags)
    save, saved = vmpo_lstm.save, []

    def save_and_interrupt(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(vmpo_lstm, "save", save_and_interrupt)
        run(tmp_path / "interrupted", *flags)
    folder = only(tmp_path / "interrupted")
    vmpo_lstm.main(vmpo_lstm.parse_args(["--resume", str(folder)]))
    assert_same_outcome(folder, expected)


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--num-minibatches 3", "--num-minibatches 3: must divide --num-envs 4"),
        ("--num-minibatches 8", "--num-minibatches 8: must divide --num-envs 4"),
        ("--num-steps 33", "--num-steps 33: compiles for minutes beyond 32; add --no-compile"),
    ],
)
def test_a_wrong_flag_is_one_line_that_says_what_to_do(flags, named, tmp_path, capfd):
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "runs", "--env-id", "Recall-v0", *flags.split())
    assert exit.value.code == 2 and capfd.readouterr().err == f"error: {named}\n"
    assert not (tmp_path / "runs").exists()


def test_uncompiled_rollouts_may_be_longer(tmp_path):
    flags = ["--env-id", "Recall-v0", "--num-steps", 40, "--total-timesteps", 160, "--no-compile"]
    assert (run(tmp_path, *flags) / "model.pt").exists()
