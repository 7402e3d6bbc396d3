"""Every equation of ppo_continuous.py against a float64 derivation of its own, written out here."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal

import ppo_continuous as ppo

torch.set_num_threads(1)  # as the script does; two lose time on networks this small

T, N = 37, 5


def spaces(obs_dim: int, action_dim: int):
    """What an agent looks at of an environment."""
    box = gym.spaces.Box
    return SimpleNamespace(observation_space=box(-9, 9, (obs_dim,)), action_space=box(-1, 1, (action_dim,)))


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


def logratios_and_advantages(clip_coef, clip_space):
    """Random pairs, and the corners: exactly on either bound, at r = 1, at A = 0."""
    rng = np.random.default_rng(2)
    logratio, advantages = rng.normal(size=(2, 200))
    bounds = [-clip_coef, clip_coef] if clip_space == "log" else [math.log(1 - clip_coef), math.log(1 + clip_coef)]
    corners = [(x, a) for x in [*bounds, 0.0] for a in (-1.5, 0.0, 1.5)]
    return np.concatenate([logratio, [x for x, _ in corners]]), np.concatenate([advantages, [a for _, a in corners]])


@pytest.mark.parametrize("clip_space", ["ratio", "log"])
@pytest.mark.parametrize("clip_coef", [0.0, 0.1, 0.2, 0.5])
def test_policy_loss_and_its_gradient(clip_coef, clip_space):
    logratio, advantages = logratios_and_advantages(clip_coef, clip_space)
    x = torch.tensor(logratio, requires_grad=True)
    loss = ppo.policy_loss(x, torch.tensor(advantages), clip_coef, clip_space)
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
    np.testing.assert_allclose(loss.item(), total, rtol=1e-12)
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
    ppo.policy_loss(x, torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64), 0.2, "ratio").backward()
    assert x.grad[0] == 0 and x.grad[3] == 0  # gained enough
    assert x.grad[1] > 0 and x.grad[2] < 0  # an overshoot is undone


@pytest.mark.parametrize("clip_coef", [0.0, 0.2])
def test_value_loss_and_its_gradient(clip_coef):
    rng = np.random.default_rng(3)
    old, returns = rng.normal(size=(2, 300))
    values = old + rng.normal(size=300) * 0.4
    values[:2], returns[:2] = old[:2] + [0.2, -0.2], old[:2] + [1.0, -1.0]  # on the bound
    v = torch.tensor(values, requires_grad=True)
    loss = ppo.value_loss(v, torch.tensor(old), torch.tensor(returns), clip_coef)
    loss.backward()
    total, gradient = 0.0, np.zeros(300)
    for i, (V, V_old, R) in enumerate(zip(values, old, returns)):
        error, slope = (V - R) ** 2, 2 * (V - R)
        clipped = V_old + min(max(V - V_old, -clip_coef), clip_coef)
        if clip_coef > 0 and (clipped - R) ** 2 > error:
            error, slope = (clipped - R) ** 2, 0.0  # the clipped value does not depend on V
        total += 0.5 * error / 300
        gradient[i] = 0.5 * slope / 300
    np.testing.assert_allclose(loss.item(), total, rtol=1e-12)
    np.testing.assert_allclose(v.grad[2:], gradient[2:], rtol=1e-10, atol=1e-15)


def agent_and_batch(M=64, **settings):
    torch.manual_seed(4)
    args = ppo.Args(**settings)
    agent = ppo.Agent(spaces(3, 2), args).double()
    batch = {
        "obs": torch.randn(M, 3),
        "actions": torch.randn(M, 2) * 1.5,
        "logprobs": torch.randn(M) * 0.3 - 3,
        "advantages": torch.randn(M),
        "returns": torch.randn(M),
        "values": torch.randn(M) * 0.3,
    }
    return args, agent, {name: tensor.double() for name, tensor in batch.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ent_coef": 0.01, "vf_coef": 1.0},
        {"clip_coef": 0.0},
        {"clip_space": "log", "clip_vloss": False},
        {"norm_adv": False, "std_type": "state", "ent_coef": 0.02, "log_std_init": -0.5},
        {"std_type": "fixed", "log_std_init": -1.0},
    ],
)
def test_whole_loss_its_gradient_and_metrics(settings):
    args, agent, batch = agent_and_batch(**settings)
    params = ppo.unflatten(ppo.init_optimizer(agent)["theta"], agent)
    grads, (total, metrics) = torch.func.grad_and_value(ppo.loss, has_aux=True)(params, agent, batch, {}, args)

    # the same from torch.distributions and ordinary autograd
    mean, log_std, V = agent(batch["obs"])
    pi = Normal(mean, log_std.exp())
    log_r = pi.log_prob(batch["actions"]).sum(1) - batch["logprobs"]
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
        moved = V - batch["values"]
        held = batch["values"] + moved.sign() * torch.where(moved.abs() < eps, moved.abs(), torch.tensor(eps).double())
        error = torch.where((held - batch["returns"]) ** 2 > error, (held - batch["returns"]) ** 2, error)
    entropy = pi.entropy().sum(1).mean()
    expected = -gain.mean() + args.vf_coef * error.mean() / 2 - args.ent_coef * entropy
    trainable = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    assert grads.keys() == trainable.keys()
    reference = torch.autograd.grad(expected, trainable.values(), allow_unused=True)

    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, wanted in zip(grads.values(), reference):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
    r = log_r.exp()
    clipfrac = ((x - center).abs() > eps).double().mean().item() if eps > 0 else 0.0
    wanted = [-gain.mean(), error.mean() / 2, entropy, (r - 1 - log_r).mean()]
    wanted = [value.item() for value in wanted] + [clipfrac]
    np.testing.assert_allclose(metrics.numpy(), wanted, rtol=1e-6, atol=1e-12)


def test_entropy_and_logprob_against_distributions():
    torch.manual_seed(5)
    x, mean, log_std = torch.randn(3, 50, 4, dtype=torch.float64)
    pi = Normal(mean, log_std.exp())
    torch.testing.assert_close(ppo.gaussian_logprob(x, mean, log_std), pi.log_prob(x).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ppo.gaussian_entropy(log_std), pi.entropy().sum(-1), rtol=1e-12, atol=1e-12)


def test_approx_kl_estimates_the_kl():
    """E over pi_old of r - 1 - log r is KL[pi_old || pi], here known in closed form."""
    torch.manual_seed(6)
    old, new = Normal(torch.zeros(2_000_000, dtype=torch.float64), 1.0), Normal(0.3, 1.2)
    a = old.sample()
    log_r = new.log_prob(a) - old.log_prob(a)
    exact = torch.distributions.kl_divergence(Normal(0.0, 1.0), Normal(0.3, 1.2)).item()
    assert (log_r.exp() - 1 - log_r).mean().item() == pytest.approx(exact, rel=0.02)


def test_advantage_normalisation():
    x = torch.randn(64, dtype=torch.float64) * 7 + 3
    z = ppo.normalize_advantages(x)
    assert z.mean().abs() < 1e-12 and z.std().item() == pytest.approx(1, rel=1e-6)
    assert ppo.normalize_advantages(torch.tensor([5.0])) == 5.0  # a minibatch of one
    assert ppo.normalize_advantages(torch.full((64,), 0.25)).abs().max() == 0  # all equal: no blow-up


# --- Update -------------------------------------------------------------------------------------------------------


def test_adam_and_clipping_are_torchs_over_100_steps():
    torch.manual_seed(7)
    theta = torch.randn(300)
    p = theta.clone().requires_grad_()
    reference = torch.optim.Adam([p], lr=3e-4, eps=1e-5)
    optimizer = {"theta": theta, "exp_avg": torch.zeros(300), "exp_avg_sq": torch.zeros(300)}
    optimizer["step"] = torch.zeros((), dtype=torch.float64)
    for k in range(100):
        grad = torch.randn(300) * (10.0 if k % 3 else 0.001)  # with and without reaching the norm
        p.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_([p], 0.5)
        clipped = ppo.clip_grad_norm(grad, 0.5)
        torch.testing.assert_close(clipped, p.grad, rtol=1e-6, atol=1e-9)
        assert (clipped.norm() < 0.501) and (norm > 0.5 or torch.equal(clipped, grad))
        learning_rate = 3e-4 * (1 - k / 100)
        reference.param_groups[0]["lr"] = learning_rate
        reference.step()
        optimizer = ppo.adam(optimizer, clipped, torch.tensor(learning_rate))
        torch.testing.assert_close(optimizer["theta"], p.detach(), rtol=0, atol=1e-6)
    assert optimizer["step"] == 100


def test_flatten_and_unflatten_are_inverse_and_leave_out_what_is_not_trained():
    for std_type, count in (("independent", 1), ("fixed", 0), ("state", 2)):
        agent = ppo.Agent(spaces(3, 2), ppo.Args(std_type=std_type))
        theta = ppo.init_optimizer(agent)["theta"]
        params = ppo.unflatten(theta, agent)
        assert sum(name.startswith("actor_logstd") for name in params) == count
        assert torch.equal(ppo.flatten(params), theta)
        ppo.write_parameters(theta + 1, agent)
        assert torch.equal(ppo.init_optimizer(agent)["theta"], theta + 1)


@pytest.mark.parametrize("num_minibatches", [1, 4, 5])
def test_each_epoch_uses_every_transition_once(num_minibatches):
    args = ppo.Args(num_minibatches=num_minibatches, update_epochs=3, target_kl=1e9)
    seen = []

    def step(optimizer, batch, indices, coefs):
        assert indices.shape[1] == 40 // num_minibatches
        seen.append(indices.flatten())
        return optimizer, torch.zeros(len(ppo.METRICS))

    ppo.update(step, {"theta": torch.zeros(1)}, {"obs": torch.zeros(40, 1)}, {}, args)
    epochs = torch.cat(seen).view(3, 40)
    assert all(torch.equal(epoch.sort().values, torch.arange(40)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_target_kl_ends_the_epochs_by_the_mean_of_an_epoch():
    args = ppo.Args(num_minibatches=4, update_epochs=10, target_kl=0.1)
    kls = iter([0.0, 0.15] + [0.0, 0.25] + [9.0, 9.0])  # means 0.075, 0.125: stops after the second epoch

    def step(optimizer, batch, indices, coefs):
        return optimizer, torch.tensor([0.0, 0.0, 0.0, next(kls), 0.0])

    _, metrics = ppo.update(step, {"theta": torch.zeros(1)}, {"obs": torch.zeros(8, 1)}, {}, args)
    assert metrics["approx_kl"] == pytest.approx(0.1)  # the mean over all four calls


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
        assert rms.count == 1000


def test_normalize_uses_the_statistics_and_clips():
    agent = ppo.Agent(spaces(2, 1), ppo.Args())
    agent.obs_rms.update(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    z = agent.normalize(torch.tensor([[2.0, 5.0], [100.0, 6.0]]))
    torch.testing.assert_close(z, torch.tensor([[1.0, 0.0], [10.0, 10.0]]))  # a constant entry gives 0, not nan
    obs = torch.randn(4, 2)
    assert torch.equal(ppo.Agent(spaces(2, 1), ppo.Args(norm_obs=False)).normalize(obs), obs)


def test_reward_scale_follows_the_discounted_return_and_starts_again_at_done():
    rng = np.random.default_rng(9)
    rewards = rng.normal(size=(2, T, N)) * 3 + 1
    done = rng.random((2, T, N)) < 0.1
    running, rms = {"discounted_return": np.zeros(N)}, ppo.RunningMeanStd()
    seen, carry = [], [0.0] * N
    for part in range(2):  # the sum is carried from one rollout to the next
        scaled = ppo.scale_rewards(rewards[part], done[part], running, rms, 0.9)
        for t in range(T):
            for n in range(N):
                carry[n] = 0.9 * carry[n] + rewards[part, t, n]
                seen.append(carry[n])
                carry[n] = 0.0 if done[part, t, n] else carry[n]
        np.testing.assert_allclose(scaled, np.clip(rewards[part] / np.std(seen), -10, 10), rtol=1e-6)
