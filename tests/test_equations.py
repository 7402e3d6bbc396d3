"""Every equation of ppo_continuous.py against a float64 derivation of its own, written out here."""

import functools
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import spaces
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

import ppo_continuous as ppo

T, N = 37, 5
CPU = torch.device("cpu")


# --- Advantages ---------------------------------------------------------------------------------------------------


def gae_by_definition(rewards, values, next_values, terminated, done, gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_{t+k} up to the episode's (or the rollout's) end, one sum a row."""
    advantages = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                bootstrap = 0.0 if terminated[k, n] else gamma * next_values[k, n]
                advantages[t, n] += weight * (rewards[k, n] + bootstrap - values[k, n])
                if done[k, n]:
                    break
                weight *= gamma * lam
    return advantages


def test_gae_is_the_sum_of_its_definition():
    rng = np.random.default_rng(0)
    rewards, values, next_values = rng.normal(size=(3, T, N))
    terminated = rng.random((T, N)) < 0.1  # the environments end out of step
    done = terminated | (rng.random((T, N)) < 0.1)
    expected = gae_by_definition(rewards, values, next_values, terminated, done, 0.97, 0.9)
    np.testing.assert_allclose(ppo.gae(rewards, values, next_values, terminated, done, 0.97, 0.9), expected, atol=1e-12)
    f32 = [x.astype(np.float32) for x in (rewards, values, next_values)]
    np.testing.assert_allclose(ppo.gae(*f32, terminated, done, 0.97, 0.9), expected, atol=1e-5)


@pytest.mark.parametrize(
    "terminated, truncated, expected",
    [  # two steps, gamma 0.5, lambda 0.5, r = 1, V = 2, V(next_obs) = 4, so delta = 1 + 2 - 2 = 1, or 1 - 2 = -1
        ((0, 0), (0, 0), (1 + 0.25 * 1, 1)),  # the episode goes on into the next rollout: bootstrap
        ((1, 0), (0, 0), (-1, 1)),  # termination: no bootstrap, and the next episode does not reach back
        ((0, 0), (1, 0), (1, 1)),  # time limit: bootstrap, and the next episode does not reach back
        ((1, 0), (1, 0), (-1, 1)),  # both flags: a terminal state all the same
        ((0, 1), (0, 0), (1 + 0.25 * -1, -1)),
        ((0, 1), (0, 1), (1 + 0.25 * -1, -1)),
        ((0, 0), (0, 1), (1 + 0.25 * 1, 1)),
    ],
)
def test_gae_by_hand(terminated, truncated, expected):
    terminated, truncated = np.array([terminated, truncated], dtype=bool)[..., None]
    ones = np.ones((2, 1))
    advantages = ppo.gae(ones, 2 * ones, 4 * ones, terminated, terminated | truncated, 0.5, 0.5)
    np.testing.assert_array_equal(advantages[:, 0], expected)


def test_gae_of_a_split_rollout_is_the_tail_with_a_bootstrap():
    """An episode that spans two rollouts: lambda = 1 telescopes to the discounted rewards plus the last value."""
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 3, 1))
    next_values = np.concatenate([values[1:], [[7.0]]])
    no = np.zeros((3, 1), dtype=bool)
    advantages = ppo.gae(rewards, values, next_values, no, no, 0.9, 1.0)
    total = rewards[0] + 0.9 * rewards[1] + 0.81 * rewards[2] + 0.729 * 7.0
    np.testing.assert_allclose(advantages[0] + values[0], total, atol=1e-12)


def test_gae_ignores_a_value_behind_a_terminal_state():
    """V of a terminal observation may be anything, inf included."""
    args = [np.ones((1, 1)), np.zeros((1, 1)), np.full((1, 1), np.inf), np.ones((1, 1), bool), np.ones((1, 1), bool)]
    assert ppo.gae(*args, 0.99, 0.95) == 1


# --- Loss ---------------------------------------------------------------------------------------------------------


def loss_at(logratios, advantages, values=None, old_values=None, returns=None, **settings):
    """ppo.loss and its metrics for a policy of the given log r = log pi - 0 and a critic of the given values."""
    zeros = torch.zeros_like(logratios)
    pi = SimpleNamespace(log_prob=lambda actions: logratios, entropy=lambda: zeros)
    agent = SimpleNamespace(policy=lambda obs: pi, value=lambda obs: zeros if values is None else values)
    batch = {"obs": None, "actions": None, "logprobs": zeros, "advantages": advantages}
    batch |= {"values": zeros if old_values is None else old_values, "returns": zeros if returns is None else returns}
    return ppo.loss(agent, batch, ppo.Args(**settings))


def logratios_and_advantages(clip_coef, clip_space):
    """Random pairs, and the corners: exactly on either bound, at r = 1, at A = 0."""
    rng = np.random.default_rng(2)
    logratio, advantages = rng.normal(size=(2, 200))
    bounds = [-clip_coef, clip_coef] if clip_space == "log" else [math.log(1 - clip_coef), math.log(1 + clip_coef)]
    corners = [(x, a) for x in [*bounds, 0.0] for a in (-1.5, 0.0, 1.5)]
    return np.concatenate([logratio, [x for x, _ in corners]]), np.concatenate([advantages, [a for _, a in corners]])


@pytest.mark.parametrize("clip_space", ["ratio", "log"])
@pytest.mark.parametrize("clip_coef", [0.0, 0.1, 0.2, 0.5])
def test_the_policy_loss_and_each_sample_s_gradient(clip_coef, clip_space):
    logratio, advantages = logratios_and_advantages(clip_coef, clip_space)
    x = torch.tensor(logratio, requires_grad=True)
    loss, metrics = loss_at(x, torch.tensor(advantages), norm_adv=False, clip_coef=clip_coef, clip_space=clip_space)
    loss.backward()

    total, gradient = 0.0, np.zeros_like(logratio)
    for i, (log_r, A) in enumerate(zip(logratio, advantages)):
        r, center, slope = (math.exp(log_r), 1.0, math.exp(log_r)) if clip_space == "ratio" else (log_r, 0.0, 1.0)
        if clip_coef == 0:
            objective, active = r * A, True
        else:
            clipped = min(max(r, center - clip_coef), center + clip_coef)
            objective = min(r * A, clipped * A)
            # no gradient only where the objective sits on the flat part, beyond the bound that A pushes towards
            active = r * A <= clipped * A
        total -= objective / len(logratio)
        gradient[i] = -slope * A / len(logratio) if active else 0.0
    np.testing.assert_allclose([loss.item(), metrics["policy_loss"].item()], total, rtol=1e-12)
    # on a bound, rounding of exp(log(1 + eps)) decides the side: there either one-sided derivative is right
    r = np.exp(logratio) if clip_space == "ratio" else logratio
    center = 1.0 if clip_space == "ratio" else 0.0
    on_bound = (clip_coef > 0) & (np.abs(np.abs(r - center) - clip_coef) < 1e-12)
    np.testing.assert_allclose(x.grad[~on_bound], gradient[~on_bound], rtol=1e-12, atol=1e-15)
    slope = r if clip_space == "ratio" else np.ones_like(r)
    for i in np.flatnonzero(on_bound):
        assert np.isclose(x.grad[i], [0.0, -slope[i] * advantages[i] / len(r)]).any()


def test_clipping_stops_the_gradient_beyond_the_bound_and_only_there():
    x = torch.log(torch.tensor([1.3, 1.3, 0.7, 0.7], dtype=torch.float64)).requires_grad_()
    A = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss, metrics = loss_at(x, A, norm_adv=False)
    loss.backward()
    assert x.grad[0] == 0 and x.grad[3] == 0  # gained enough
    assert x.grad[1] > 0 and x.grad[2] < 0  # an overshoot is undone
    assert metrics["clipfrac"] == 1  # of the ratios, whether or not the min takes them


@pytest.mark.parametrize("settings", [{"clip_coef": 0.2}, {"clip_coef": 0.0}, {"clip_coef": 0.2, "clip_vloss": False}])
def test_the_value_loss_and_each_sample_s_gradient(settings):
    rng = np.random.default_rng(3)
    old, returns = rng.normal(size=(2, 300))
    values = old + rng.normal(size=300) * 0.4
    values[:2], returns[:2] = old[:2] + [0.2, -0.2], old[:2] + [1.0, -1.0]  # on the bound
    v, zeros = torch.tensor(values, requires_grad=True), torch.zeros(300, dtype=torch.float64)
    loss, metrics = loss_at(zeros, zeros, v, torch.tensor(old), torch.tensor(returns), vf_coef=0.7, **settings)
    loss.backward()
    total, gradient, eps = 0.0, np.zeros(300), settings["clip_coef"]
    for i, (V, V_old, R) in enumerate(zip(values, old, returns)):
        error, slope = (V - R) ** 2, 2 * (V - R)
        clipped = V_old + min(max(V - V_old, -eps), eps)
        if eps > 0 and "clip_vloss" not in settings and (clipped - R) ** 2 > error:
            error, slope = (clipped - R) ** 2, 0.0  # the clipped value does not depend on V
        total += 0.5 * error / 300
        gradient[i] = 0.7 * 0.5 * slope / 300
    np.testing.assert_allclose([loss.item() / 0.7, metrics["value_loss"].item()], total, rtol=1e-12)
    np.testing.assert_allclose(v.grad[2:], gradient[2:], rtol=1e-10, atol=1e-15)


def test_advantages_are_normalised_over_the_minibatch():
    def seen(advantages, **settings):
        """The advantages that the objective has, which at r = 1 are M times its gradient by log r."""
        x = torch.zeros_like(advantages, requires_grad=True)
        loss_at(x, advantages, **settings)[0].backward()
        return -len(x) * x.grad

    A = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 7 + 3
    torch.testing.assert_close(seen(A), (A - A.numpy().mean()) / A.numpy().std(ddof=1), rtol=1e-6, atol=1e-12)
    assert seen(torch.tensor([5.0])) == 5.0  # a minibatch of one
    assert seen(torch.full((64,), 0.25)).abs().max() == 0  # all equal: no blow-up
    torch.testing.assert_close(seen(A, norm_adv=False), A, rtol=1e-12, atol=0)


def test_approx_kl_estimates_the_kl():
    """E over pi_old of r - 1 - log r is KL[pi_old || pi], here known in closed form."""
    torch.manual_seed(6)
    old, new = Normal(torch.zeros(2_000_000, dtype=torch.float64), 1.0), Normal(0.3, 1.2)
    a = old.sample()
    _, metrics = loss_at(new.log_prob(a) - old.log_prob(a), torch.ones_like(a))
    exact, swapped = kl_divergence(Normal(0.0, 1.0), new), kl_divergence(new, Normal(0.0, 1.0))
    assert metrics["approx_kl"].item() == pytest.approx(exact.item(), rel=0.02)
    assert abs(swapped - exact) > 0.1 * exact


def test_sample_log_probability_and_entropy_are_those_of_torch_distributions():
    torch.manual_seed(5)
    x, mean, log_std = torch.randn(3, 50, 4, dtype=torch.float64)
    for spread in (log_std, log_std[0]):  # of each state, and one for all
        pi, wanted = ppo.Gaussian(mean, spread), Independent(Normal(mean, spread.exp()), 1)
        torch.testing.assert_close(pi.log_prob(x), wanted.log_prob(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pi.entropy().expand(50), wanted.entropy(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pi.sample(x), mean + spread.exp() * x, rtol=1e-12, atol=1e-12)
        assert torch.equal(pi.mode, mean)


def agent_and_batch(M=64, **settings):
    """An agent with statistics and heads that have moved, and a batch of what an older policy might have done."""
    torch.manual_seed(4)
    args = ppo.Args(**settings)
    agent = ppo.Agent(spaces(3, 2), args)
    with torch.no_grad():
        agent.actor_mean.weight.mul_(30)
        if args.std_type == "state":
            agent.actor_logstd.weight.mul_(30)
    agent.obs_rms.update(torch.randn(100, 3) * 2 + 1)
    batch = {
        "obs": torch.randn(M, 3) * 4,
        "actions": torch.randn(M, 2) * 1.5,
        "logprobs": torch.randn(M) * 0.3 - 3,
        "advantages": torch.randn(M),
        "returns": torch.randn(M),
        "values": torch.randn(M) * 0.3,
    }
    batch["obs"][:3] = torch.tensor([[1e3, 0, 0], [0, -1e3, 0], [0, 0, 1e3]])  # beyond the clip at 10
    return args, agent, batch


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ent_coef": 0.01, "vf_coef": 1.0},
        {"clip_coef": 0.0},
        {"clip_space": "log", "clip_vloss": False},
        {"norm_adv": False, "std_type": "state", "ent_coef": 0.02, "log_std_init": -0.5},
        {"std_type": "fixed", "log_std_init": -1.0, "norm_obs": False},
    ],
    ids=str,
)
def test_the_whole_loss_its_metrics_and_the_gradient_that_adam_gets(settings):
    args, agent, batch = agent_and_batch(max_grad_norm=1e9, **settings)
    agent, batch = agent.double(), {name: tensor.double() for name, tensor in batch.items()}
    loss, metrics = ppo.loss(agent, batch, args)
    optimizer, indices = ppo.init_optimizer(agent), torch.randperm(64).view(1, 64)
    after, names, means = ppo.update_step(optimizer, torch.tensor(3e-4), batch, indices, agent, args)
    grads = ppo.unflatten(after["exp_avg"] / 0.1, agent)  # the moment starts from 0

    # the same from torch.distributions and ordinary autograd
    z, rms = batch["obs"], agent.obs_rms
    if args.norm_obs:
        mean, scale = (x.float().double() for x in (rms.mean, 1 / (rms.var + 1e-8).sqrt()))
        z = ((z - mean) * scale).clamp(-10, 10)
        assert (z.abs() == 10).any()
    hidden, V = agent.actor(z), agent.critic(z)[:, 0]
    log_std = agent.actor_logstd(hidden) if args.std_type == "state" else agent.actor_logstd
    pi = Independent(Normal(agent.actor_mean(hidden), log_std.exp()), 1)
    log_r = pi.log_prob(batch["actions"]) - batch["logprobs"]
    A = batch["advantages"]
    if args.norm_adv:
        A = (A - A.mean()) / (((A - A.mean()) ** 2).sum() / (len(A) - 1)).sqrt()
    eps = args.clip_coef
    x, center = (log_r.exp(), 1.0) if args.clip_space == "ratio" else (log_r, 0.0)
    gain = x * A
    if eps > 0:
        beyond = torch.where(A > 0, x > center + eps, x < center - eps)
        gain = torch.where(beyond, (center + eps * A.sign()) * A, gain)
    error = (V - batch["returns"]) ** 2
    if eps > 0 and args.clip_vloss:
        close = torch.minimum(torch.maximum(V, batch["values"] - eps), batch["values"] + eps)
        error = torch.maximum(error, (close - batch["returns"]) ** 2)
    entropy = pi.entropy().mean()
    expected = -gain.mean() + args.vf_coef * error.mean() / 2 - args.ent_coef * entropy
    trainable = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    assert grads.keys() == trainable.keys() and ("actor_logstd" in grads) == (args.std_type == "independent")
    reference = torch.autograd.grad(expected, trainable.values())

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, wanted in zip(grads.values(), reference):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
    wanted = {
        "policy_loss": -gain.mean(),
        "value_loss": error.mean() / 2,
        "entropy": entropy,
        "approx_kl": (log_r.exp() - 1 - log_r).mean(),
        "clipfrac": ((x - center).abs() > eps).double().mean() if eps > 0 else torch.zeros(()),
    }
    wanted = {name: value.item() for name, value in wanted.items()}
    for found in ({name: value.item() for name, value in metrics.items()}, dict(zip(names, means.tolist()))):
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)


# --- Update -------------------------------------------------------------------------------------------------------


class Straight(nn.Module):
    """With `straight_loss`, the gradient of a, then b, is the minibatch's one row; c is not trained."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(20, 10)), nn.Parameter(torch.randn(100))
        self.c = nn.Parameter(torch.randn(7), requires_grad=False)

    def forward(self, function, *args):
        return function(self, *args)


def straight_loss(agent, batch, args):
    (gradient,) = batch["gradient"]
    return torch.cat([agent.a.flatten(), agent.b]) @ gradient + agent.c.sum(), {"number": batch["number"].mean()}


def test_adam_and_clipping_are_torchs_over_100_steps(monkeypatch):
    monkeypatch.setattr(ppo, "loss", straight_loss)
    torch.manual_seed(7)
    agent = Straight().double()
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in (agent.a, agent.b)]
    reference = torch.optim.Adam(copies, eps=1e-5)
    gradients = torch.randn(100, 300, dtype=torch.float64) * 0.001
    gradients[torch.arange(100) % 3 > 0] *= 10_000  # these exceed the norm
    batch, optimizer = {"gradient": gradients, "number": torch.arange(100.0)}, ppo.init_optimizer(agent)
    for k, indices in enumerate(torch.arange(100).view(50, 2, 1)):  # two steps a call
        learning_rate = reference.param_groups[0]["lr"] = 3e-4 * (1 - k / 50)
        for row in indices[:, 0]:
            copies[0].grad, copies[1].grad = gradients[row, :200].view(20, 10).clone(), gradients[row, 200:].clone()
            assert (torch.nn.utils.clip_grad_norm_(copies, 0.5) > 0.5) == (row % 3 > 0)
            reference.step()
        rate = torch.tensor(learning_rate)
        optimizer, names, means = ppo.update_step(optimizer, rate, batch, indices, agent, ppo.Args(max_grad_norm=0.5))
        assert names == ["number"] and means.tolist() == [2 * k + 0.5]  # the mean over the two steps
        theta = torch.cat([copy.detach().flatten() for copy in copies])
        torch.testing.assert_close(optimizer["theta"], theta, rtol=0, atol=1e-8)
        for name in ("exp_avg", "exp_avg_sq"):
            moment = torch.cat([reference.state[copy][name].flatten() for copy in copies])
            torch.testing.assert_close(optimizer[name], moment, rtol=1e-10, atol=1e-12)
    assert optimizer["step"] == 100


def test_an_update_moves_the_agent_to_theta_and_leaves_what_is_not_trained():
    args, agent, batch = agent_and_batch(std_type="fixed", num_minibatches=4, update_epochs=3)
    agent.critic[0].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    optimizer, kept = ppo.init_optimizer(agent), {"critic.0.bias", "actor_logstd"}
    trained = dict(agent.named_parameters()).keys() - kept
    step, theta = functools.partial(ppo.update_step, agent=agent, args=args), optimizer["theta"].clone()
    ppo.update(step, agent, optimizer, torch.tensor(1e-3), batch, args)
    assert optimizer["step"] == 3 * 4 and not torch.equal(optimizer["theta"], theta)
    assert ppo.unflatten(optimizer["theta"], agent).keys() == trained
    for name, tensor in agent.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name
    assert torch.equal(ppo.init_optimizer(agent)["theta"], optimizer["theta"])

    agent.actor[0].bias.data += 1  # what moves the agent between two updates is kept
    bias = agent.actor[0].bias.clone()
    ppo.update(step, agent, optimizer, torch.tensor(0.0), batch, args)
    assert torch.equal(agent.actor[0].bias, bias)


@pytest.mark.parametrize("num_minibatches", [1, 4, 5])
def test_each_epoch_uses_every_transition_once(num_minibatches):
    args, agent, batch = agent_and_batch(M=40, num_minibatches=num_minibatches, update_epochs=3, target_kl=1e9)
    seen = []

    def step(optimizer, learning_rate, batch, indices):
        assert indices.shape[1] == 40 // num_minibatches
        seen.append(indices.flatten())
        return optimizer, ["approx_kl"], torch.zeros(1)

    ppo.update(step, agent, ppo.init_optimizer(agent), torch.tensor(1e-3), batch, args)
    epochs = torch.cat(seen).view(3, 40)
    assert all(torch.equal(epoch.sort().values, torch.arange(40)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_target_kl_ends_the_epochs_by_the_mean_of_an_epoch():
    args, agent, batch = agent_and_batch(M=8, num_minibatches=4, update_epochs=10, target_kl=0.1)
    kls = itertools.chain([0.0, 0.15], [0.0, 0.25], itertools.repeat(9.0))  # means 0.075, 0.125: two epochs

    def step(optimizer, learning_rate, batch, indices):
        return optimizer, ["policy_loss", "approx_kl"], torch.tensor([5.0, next(kls)])

    metrics = ppo.update(step, agent, ppo.init_optimizer(agent), torch.tensor(1e-3), batch, args)
    assert metrics == pytest.approx({"policy_loss": 5.0, "approx_kl": 0.1})  # the mean over all four calls


@pytest.mark.parametrize("settings", [{"num_minibatches": 4}, {"num_minibatches": 1, "std_type": "state"}], ids=str)
def test_the_compiled_update_is_the_plain_one(settings, capfd):
    args, agent, batch = agent_and_batch(ent_coef=0.01, update_epochs=2, **settings)
    learning_rate, plain = torch.tensor(0.0), functools.partial(ppo.update_step, agent=agent, args=args)
    compiled = ppo.compile_update(agent, ppo.init_optimizer(agent), learning_rate, batch, args)
    assert "uncompiled" not in capfd.readouterr().err  # the notice of a compiler that failed
    outcomes, start = [], {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    for step in (plain, compiled):
        agent.load_state_dict(start)
        torch.manual_seed(9)
        optimizer = ppo.init_optimizer(agent)
        for rate in (1e-3, 3e-3):  # it moves in place, and so do the agent and the optimizer
            learning_rate.fill_(rate)
            metrics = ppo.update(step, agent, optimizer, learning_rate, batch, args)
        outcomes.append((optimizer, metrics))
    (wanted, wanted_metrics), (found, metrics) = outcomes
    assert list(metrics) == list(wanted_metrics) and metrics == pytest.approx(wanted_metrics, rel=1e-4, abs=1e-5)
    assert (agent.actor_mean.weight - start["actor_mean.weight"]).abs().max() > 0.004
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


# --- Scales -------------------------------------------------------------------------------------------------------


def test_running_statistics_are_numpys_in_any_order_of_batches():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(1000, 3)) * [1, 1e-3, 1e4] + [0, 100, -1e5]
    for order in (x, x[rng.permutation(1000)]):
        rms = ppo.RunningMeanStd(3)
        for part in np.split(order, [1, 2, 300, 310, 999]):
            rms.update(torch.from_numpy(part))
        np.testing.assert_allclose(rms.mean, x.mean(0), rtol=1e-10)
        np.testing.assert_allclose(rms.var, x.var(0), rtol=1e-8)
        np.testing.assert_allclose(rms.shift, x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(rms.scale, 1 / np.sqrt(x.var(0) + 1e-8), rtol=1e-6)
        assert rms.count == 1000


def test_normalize_uses_the_statistics_and_clips():
    agent = ppo.Agent(spaces(2, 1), ppo.Args())
    agent.obs_rms.update(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    z = agent.normalize(torch.tensor([[2.0, 5.0], [100.0, 6.0]]))
    torch.testing.assert_close(z, torch.tensor([[1.0, 0.0], [10.0, 10.0]]))  # a constant entry gives 0, not nan
    obs = torch.randn(4, 2)
    assert torch.equal(ppo.Agent(spaces(2, 1), ppo.Args(norm_obs=False)).normalize(obs), obs)


@pytest.mark.parametrize("norm_reward", [True, False])
def test_a_batch_s_rewards_are_divided_by_the_std_of_the_discounted_returns_so_far(norm_reward):
    """Without gamma a return is its scaled reward. That the discounted return starts again is a test of the rows."""
    args = ppo.Args(gamma=0.0, norm_reward=norm_reward)
    agent, rng, seen = ppo.Agent(spaces(3, 2), args), np.random.default_rng(9), np.zeros((0, N))
    for size in (1.0, 50.0):  # from one rollout to the next
        arrays = {"obs": rng.normal(size=(T, N, 3)), "next_obs": rng.normal(size=(T, N, 3))}
        arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
        arrays |= {"actions": rng.normal(size=(T, N, 2)).astype(np.float32)}
        arrays |= {"rewards": rng.normal(size=(T, N)) * 30, "discounted": rng.normal(size=(T, N)) * size + 7}
        arrays |= {"terminated": rng.random((T, N)) < 0.1, "done": np.ones((T, N), dtype=bool)}
        rows = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch = ppo.make_batch(rows, agent, CPU, args)
        seen = np.concatenate([seen, arrays["discounted"]])
        scaled = np.clip(arrays["rewards"] / seen.std(), -10, 10) if norm_reward else arrays["rewards"]
        assert (np.abs(scaled) == 10).any() == (norm_reward and size == 1)
        np.testing.assert_allclose(batch["returns"].view(T, N), scaled, rtol=1e-4, atol=1e-5)
