"""vmpo.py: each term of its loss against float64 formulas written out here, its target network, PopArt, learning."""

import copy
import csv
import itertools
import math
import re
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_outcome, load, only
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Categorical, Normal, kl_divergence

import vmpo

CPU = torch.device("cpu")
SPACES = {"gaussian": Box(-1, 1, (3,)), "softmax": Discrete(4), "factors": MultiDiscrete([3, 2, 5])}
SMALL = "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 2 --eval-episodes 1 --device cpu".split()


def agent_for(space, seed=0, **settings):
    torch.manual_seed(seed)
    args = vmpo.Args(**settings)
    envs = SimpleNamespace(observation_space=Box(-9, 9, (5,)), action_space=space)
    return vmpo.make_agent(envs, args), args


def distributions(pi) -> list:
    """A policy's sub-actions as torch.distributions."""
    if isinstance(pi, vmpo.Gaussian):
        return [Normal(mean, log_std.exp()) for mean, log_std in zip(pi.mean.unbind(-1), pi.log_std.unbind(-1))]
    return [Categorical(probs=log_probs.exp()) for log_probs in pi.log_probs.unbind(-2)]


def whole_batch(kind, B=24, rho=False, **settings):
    """An agent in float64, and a batch that another, older policy gathered; with rho the target is not that policy."""
    space = SPACES[kind]
    agent, args = agent_for(space, **settings)
    old, _ = agent_for(space, seed=1, **settings)
    agent, old = agent.double(), old.double().requires_grad_(False)
    for module in (agent, old):  # policies that differ, in heads that start at almost 0
        torch.manual_seed(7 if module is agent else 8)
        for name, parameter in module.named_parameters():
            parameter.data += (0.05 if name.startswith("torso") else 0.3) * torch.randn_like(parameter)
    agent.duals.data = torch.rand_like(agent.duals) + 0.3
    if args.popart:  # V in a unit of mean 3 and standard deviation 2
        agent.value_rms.shift.fill_(3.0)
        agent.value_rms.scale.fill_(0.5)
    torch.manual_seed(3)
    obs = torch.randn(B, 5, dtype=torch.float64)
    masks = torch.ones(B, int(vmpo.nvec_of(space).sum()), dtype=torch.bool)
    pi_old = old.policy(obs, masks)
    pi_b = old.policy(obs.roll(1, 0), masks) if rho else pi_old
    actions = torch.stack([d.sample() for d in distributions(pi_b)], -1)
    advantages = torch.randn(B, dtype=torch.float64)
    batch = {
        "obs": obs,
        "masks": masks,
        "actions": actions,
        "logprobs": pi_b.log_prob(actions),
        "log_rho": -torch.rand(B, dtype=torch.float64) * rho,
        "advantages": advantages,
        "selected": advantages > advantages.median(),
        "returns": torch.randn(B, dtype=torch.float64),
        "values": torch.randn(B, dtype=torch.float64),
        **{f"old_{name}": tensor for name, tensor in vars(pi_old).items()},
        **{f"behaviour_{name}": tensor for name, tensor in vars(pi_b).items()},
    }
    return agent, args, batch


def gradients(agent, batch, args, rows=None):
    """{name: gradient}, 0 where there is none, and {metric: float}."""
    params = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    total, metrics = vmpo.loss(agent, batch, args, rows)
    found = torch.autograd.grad(total, params.values(), allow_unused=True)
    grads = {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), found)}
    return grads, {"total": total.item(), **{name: value.item() for name, value in metrics.items()}}


# --- E-step -------------------------------------------------------------------------------------------------------


def e_step_by_hand(eta, A, selected, rho, eps):
    """psi, L_eta and its derivative by eta, in float64, over the indices in D~."""
    A, rho, D = np.asarray(A, float), np.asarray(rho, float), np.flatnonzero(selected)
    top = A[D].max()
    weights = {i: rho[i] * math.exp((A[i] - top) / eta) for i in D}
    total = sum(weights.values())
    psi = np.array([weights.get(i, 0.0) / total for i in range(len(A))])
    log_mean = math.log(total / len(D)) + top / eta
    return psi, eta * eps + eta * log_mean, eps + log_mean - sum(psi[i] * A[i] / eta for i in D)


@pytest.mark.parametrize("eta", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("lag", [False, True])
def test_the_e_step_and_the_temperature_s_loss_and_gradient(eta, lag):
    rng = np.random.default_rng(0)
    A, selected = rng.normal(size=30), rng.random(30) < 0.5
    selected[A.argmax()] = True  # the largest is always in D~
    rho = rng.random(30) if lag else np.ones(30)
    psi, value, slope = e_step_by_hand(eta, A, selected, rho, 0.1)
    eta = torch.tensor(eta, dtype=torch.float64, requires_grad=True)
    got, loss = vmpo.e_step(eta, torch.tensor(A), torch.tensor(selected), torch.tensor(rho).log(), 0.1)
    loss.backward()
    assert not got.requires_grad
    np.testing.assert_allclose(got, psi, rtol=1e-10)
    np.testing.assert_allclose([loss.item(), eta.grad.item()], [value, slope], rtol=1e-9)


@pytest.mark.parametrize("eta", [1e-8, 1e8])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_no_temperature_is_too_small_or_too_large_in_float32(eta, scale):
    A = torch.randn(2048, generator=torch.Generator().manual_seed(0)) * scale
    selected = A >= A.median()
    eta = torch.tensor(eta, requires_grad=True)
    psi, loss = vmpo.e_step(eta, A, selected, torch.zeros(2048), 0.1)
    loss.backward()
    n = selected.sum().item()
    assert psi.sum().item() == pytest.approx(1, abs=1e-5) and math.isfinite(loss.item())
    if eta < 1:  # all weight on the best; the gradient is eps + log(1 / n)
        assert psi[A.argmax()] == 1 and eta.grad.item() == pytest.approx(0.1 - math.log(n), rel=1e-5)
        assert loss.item() == pytest.approx(A.max().item() + 1e-8 * (0.1 - math.log(n)), rel=1e-6)
    else:  # the same weight on all
        np.testing.assert_allclose(psi[selected], 1 / n, rtol=1e-4)
        assert eta.grad.item() == pytest.approx(0.1, abs=1e-4)


def test_equal_advantages_have_equal_weights():
    eta = torch.tensor(0.7, requires_grad=True)
    psi, loss = vmpo.e_step(eta, torch.full((10,), 3.0), torch.ones(10, dtype=torch.bool), torch.zeros(10), 0.1)
    loss.backward()
    np.testing.assert_allclose(psi, 0.1, rtol=1e-6)
    assert loss.item() == pytest.approx(3 + 0.07) and eta.grad.item() == pytest.approx(0.1, abs=1e-6)


# --- The whole loss -----------------------------------------------------------------------------------------------

CASES = [
    ("gaussian", {}),
    ("gaussian", {"rho": True, "norm_adv": False, "std_type": "state"}),
    ("gaussian", {"kl": "coupled", "rho": True, "ent_coef": 0.01}),
    ("gaussian", {"control_variate": True, "rho": True}),
    ("gaussian", {"network": "shared", "std_type": "state", "vf_coef": 1.0}),
    ("gaussian", {"std_type": "fixed", "norm_obs": False}),
    ("gaussian", {"popart": True}),
    ("softmax", {"norm_adv": False}),
    ("softmax", {"control_variate": True, "network": "shared"}),
    ("softmax", {"rho": True, "vf_coef": 1.0, "ent_coef": 0.01}),
    ("factors", {"rho": True}),
    ("factors", {"control_variate": True, "popart": True}),
]


def policy_by_hand(agent, obs, kind) -> list:
    """The sub-actions' torch.distributions, from the agent's layers."""
    hidden = agent.actor(agent.torso(obs))
    if kind != "gaussian":
        return [Categorical(logits=part) for part in agent.actor_mean(hidden).split(agent.nvec, -1)]
    log_std = agent.actor_logstd
    if isinstance(log_std, torch.nn.Linear):
        log_std = log_std(hidden)
    mean = agent.actor_mean(hidden)
    return [Normal(mean[:, k], log_std.expand_as(mean)[:, k].exp()) for k in range(3)]


def given_by_hand(batch, prefix, kind) -> list:
    """The same of the distributions that a batch holds."""
    if kind == "gaussian":
        return [Normal(batch[f"{prefix}mean"][:, k], batch[f"{prefix}log_std"][:, k].exp()) for k in range(3)]
    nvec = vmpo.nvec_of(SPACES[kind])
    return [Categorical(probs=batch[f"{prefix}log_probs"][:, k, :n].exp()) for k, n in enumerate(nvec)]


def loss_by_hand(agent, batch, kind, args):
    """The docstring's L_pi + L_eta + L_alpha + c_v L_V - c_e S, and the KLs that are bounded."""
    new, old = policy_by_hand(agent, batch["obs"], kind), given_by_hand(batch, "old_", kind)
    eta, alphas = agent.duals[0], agent.duals[1:]
    A = batch["advantages"]
    A = (A - A.mean()) / ((A - A.mean()) ** 2).sum().div(len(A) - 1).sqrt().add(1e-8) if args.norm_adv else A
    D = [i for i in range(len(A)) if batch["selected"][i]]
    weights = [(batch["log_rho"][i] + A[i] / eta).exp() for i in D]
    psi = [w.detach() / sum(w.detach() for w in weights) for w in weights]
    logp = sum(d.log_prob(batch["actions"][:, k]) for k, d in enumerate(new))
    L_pi = -sum(p * logp[i] for p, i in zip(psi, D))
    if args.control_variate:
        acted = given_by_hand(batch, "behaviour_", kind)
        logp_b = sum(d.log_prob(batch["actions"][:, k]) for k, d in enumerate(acted))
        L_pi = L_pi + (logp - logp_b + sum(kl_divergence(b, n) for b, n in zip(acted, new))).mean()
    L_eta = eta * args.eps_eta + eta * (sum(weights) / len(D)).log()
    if kind == "gaussian" and args.kl == "decoupled":
        kls = {
            "kl_mean": sum(kl_divergence(o, Normal(n.loc, o.scale)) for o, n in zip(old, new)).mean(),
            "kl_cov": sum(kl_divergence(o, Normal(o.loc, n.scale)) for o, n in zip(old, new)).mean(),
        }
    else:
        kls = {"kl": sum(kl_divergence(o, n) for o, n in zip(old, new)).mean()}
    assert len(alphas) == len(kls)
    L_alpha = 0
    for alpha, eps, kl in zip(alphas, (args.eps_alpha, args.eps_alpha_cov), kls.values()):
        L_alpha = L_alpha + alpha * (eps - kl.detach()) + alpha.detach() * kl
    output = agent.critic_value(agent.critic(agent.torso(batch["obs"]))).squeeze(-1)
    returns = (batch["returns"] - 3) / 2 if args.popart else batch["returns"]  # in V's unit
    S = sum(d.entropy() for d in new).mean()
    return L_pi + L_eta + L_alpha + args.vf_coef * ((output - returns) ** 2).mean() / 2 - args.ent_coef * S, kls


@pytest.mark.parametrize("kind, settings", CASES, ids=str)
def test_the_loss_and_its_gradient_are_the_docstring_s(kind, settings):
    agent, args, batch = whole_batch(kind, **settings)
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    grads, metrics = gradients(agent, batch, args, rows)
    expected, kls = loss_by_hand(agent, batch, kind, args)
    params = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    assert metrics["total"] == pytest.approx(expected.item(), rel=1e-9)
    for (name, found), wanted in zip(grads.items(), torch.autograd.grad(expected, params.values())):
        np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-11, err_msg=name)
    assert {name for name in metrics if name.startswith("kl")} == set(kls)
    for name, kl in kls.items():
        assert kl > 1e-3 and metrics[name] == pytest.approx(kl.item(), rel=1e-9)


def test_the_default_loss_has_no_control_variate():
    agent, args, batch = whole_batch("gaussian")
    found = gradients(agent, batch, args)[1]["total"]
    args.control_variate = False
    assert gradients(agent, batch, args)[1]["total"] == found
    args.control_variate = True
    assert abs(gradients(agent, batch, args)[1]["total"] - found) > 0.1


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("control_variate", [True, False])
def test_the_mean_over_minibatches_is_the_loss_of_the_whole_batch(kind, control_variate):
    """psi and the temperature's loss come from all of it, whatever the minibatch: so also for one without any of D~."""
    agent, args, batch = whole_batch(kind, rho=True, control_variate=control_variate)
    whole, metrics = gradients(agent, batch, args)
    order = batch["advantages"].argsort()  # the worst half first
    parts = [gradients(agent, batch, args, rows) for rows in order.view(4, 6)]
    for name in whole:
        mean = sum(grads[name] for grads, _ in parts) / 4
        np.testing.assert_allclose(mean, whole[name], rtol=1e-7, atol=1e-12, err_msg=name)
    for name in metrics:
        assert sum(m[name] for _, m in parts) / 4 == pytest.approx(metrics[name], rel=1e-9, abs=1e-12)
    worst = parts[0][1]
    assert (worst["policy_loss"] == 0) == (not control_variate)
    assert worst["eta_loss"] == metrics["eta_loss"]


@pytest.mark.parametrize("kind", SPACES)
def test_the_control_variate_s_mean_is_0_for_every_policy_over_the_actions_that_pi_b_may_take(kind):
    """Exactly: summed over all choices, or by Gauss-Hermite quadrature, which 3 nodes make exact for a log-density."""
    agent, args, batch = whole_batch(kind, rho=True)
    one = {name: tensor[:1] for name, tensor in batch.items()} | {"selected": torch.ones(1, dtype=torch.bool)}
    acted = given_by_hand(one, "behaviour_", kind)
    if kind == "gaussian":
        nodes, weights = np.polynomial.hermite_e.hermegauss(3)
        z = torch.cartesian_prod(*[torch.tensor(nodes)] * 3)
        probabilities = torch.cartesian_prod(*[torch.tensor(weights / weights.sum())] * 3).prod(-1)
        actions = torch.stack([d.loc + z[:, k] * d.scale for k, d in enumerate(acted)], -1)
    else:
        actions = torch.cartesian_prod(*[torch.arange(n) for n in vmpo.nvec_of(SPACES[kind])]).view(-1, len(acted))
        probabilities = sum(d.log_prob(actions[:, k]) for k, d in enumerate(acted)).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    means, size = {}, 0.0
    for action, probability in zip(actions, probabilities):
        one["actions"] = action[None]
        one["logprobs"] = sum(d.log_prob(action[k]) for k, d in enumerate(acted))
        terms = []
        for args.control_variate in (True, False):
            grads, metrics = gradients(agent, one, args)
            terms.append(grads | {"policy_loss": torch.tensor(metrics["policy_loss"], dtype=torch.float64)})
        for name in terms[0]:
            c = terms[0][name] - terms[1][name]
            means[name] = means.get(name, 0) + probability * c
            size = max(size, c.abs().max().item())
    assert size > 0.1
    for name, mean in means.items():
        np.testing.assert_allclose(mean, 0, atol=1e-11, err_msg=name)


def test_the_control_variate_takes_variance_from_the_policy_s_gradient():
    """Over minibatches of Hopper-v4, at the policy that acted."""
    agent, _, _, batch, args = collect(env_id="Hopper-v4", num_envs=8, num_steps=512)
    agent.duals.data[0] = 2.0  # where training keeps eta
    minibatches, variance = torch.randperm(4096).view(64, 64), {}
    for args.control_variate in (True, False):
        grads = [gradients(agent, batch, args, rows)[0]["actor_mean.weight"] for rows in minibatches]
        variance[args.control_variate] = torch.stack(grads).var(0).sum().item()
    assert variance[True] < 0.8 * variance[False]


def test_only_the_temperature_s_loss_moves_eta_and_only_alpha_s_loss_the_alphas():
    agent, args, batch = whole_batch("gaussian", norm_adv=False)
    grads, metrics = gradients(agent, batch, args)
    eta = agent.duals[0].item()
    _, _, slope = e_step_by_hand(eta, batch["advantages"], batch["selected"], np.ones(24), args.eps_eta)
    expected = [slope, args.eps_alpha - metrics["kl_mean"], args.eps_alpha_cov - metrics["kl_cov"]]
    np.testing.assert_allclose(grads["duals"], expected, rtol=1e-8)


# --- Policies -----------------------------------------------------------------------------------------------------


def test_the_kls_are_gaussian_and_decoupled_ones_add_up_where_one_part_is_shared():
    torch.manual_seed(0)
    mean, log_std, other_mean, other_log_std = torch.randn(4, 50, 3, dtype=torch.float64)
    old, new = vmpo.Gaussian(mean, log_std), vmpo.Gaussian(other_mean, other_log_std)
    full = kl_divergence(Normal(mean, log_std.exp()), Normal(other_mean, other_log_std.exp()))
    torch.testing.assert_close(old.kl(new), full, rtol=1e-9, atol=1e-12)
    moved = vmpo.Gaussian(other_mean, log_std)
    torch.testing.assert_close(old.kl_mean(moved), old.kl(moved), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(old.kl_cov(moved), torch.zeros(50, 3).double(), rtol=0, atol=1e-14)
    spread = vmpo.Gaussian(mean, other_log_std)
    torch.testing.assert_close(old.kl_cov(spread), old.kl(spread), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(old.kl_mean(spread), torch.zeros(50, 3).double(), rtol=0, atol=1e-14)


def test_the_kl_of_choices_is_that_of_each_sub_action_whose_missing_ones_add_nothing():
    _, _, batch = whole_batch("factors", rho=True)
    p, q = vmpo.Categorical(batch["old_log_probs"]), vmpo.Categorical(batch["behaviour_log_probs"])
    pairs = zip(given_by_hand(batch, "old_", "factors"), given_by_hand(batch, "behaviour_", "factors"))
    expected = torch.stack([kl_divergence(a, b) for a, b in pairs], -1)
    assert expected.max() > 0.01
    torch.testing.assert_close(p.kl(q), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", SPACES)
def test_actions_come_from_the_policy_and_their_probabilities_belong_to_them(kind):
    n = 40_000
    agent, _ = agent_for(SPACES[kind], norm_obs=False)
    agent.actor_mean.weight.data *= 100
    agent.requires_grad_(False)
    torch.manual_seed(0)
    obs = torch.randn(1, 5).expand(n, 5)
    masks = torch.ones(n, int(vmpo.nvec_of(SPACES[kind]).sum()), dtype=torch.bool)
    pi, factors = agent.policy(obs, masks), policy_by_hand(agent, obs, kind)
    actions = pi.sample(agent.noise(n))
    expected = sum(d.log_prob(actions[:, k]) for k, d in enumerate(factors))
    np.testing.assert_allclose(pi.log_prob(actions), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pi.entropy(), sum(d.entropy() for d in factors), rtol=1e-4)
    for k, factor in enumerate(factors):
        if kind == "gaussian":
            assert actions[:, k].mean().item() == pytest.approx(factor.mean[0].item(), abs=0.03)
            assert actions[:, k].std().item() == pytest.approx(factor.scale[0].item(), abs=0.03)
            assert pi.mode[0, k].item() == pytest.approx(factor.mean[0].item(), rel=1e-5)
        else:
            share = torch.bincount(actions[:, k], minlength=len(factor.probs[0])) / n
            np.testing.assert_allclose(share, factor.probs[0], atol=0.012)  # 5 standard deviations
            assert pi.mode[0, k] == factor.probs[0].argmax()


def test_choices_that_a_sub_action_lacks_have_no_probability_and_spaces_may_start_anywhere():
    agent, args = agent_for(SPACES["factors"])
    probs = agent.policy(torch.randn(6, 5), torch.ones(6, 10, dtype=torch.bool)).log_probs.exp()
    assert probs.shape == (6, 3, 5) and probs[:, [0, 0, 1, 1, 1], [3, 4, 2, 3, 4]].max() == 0
    np.testing.assert_allclose(probs.sum(-1).detach(), 1, rtol=1e-6)
    assert vmpo.to_env(np.array([[2], [0]]), Discrete(3, start=-1), args).tolist() == [1, -1]
    grid = vmpo.to_env(np.arange(4)[None], MultiDiscrete([[4, 4], [4, 4]], start=[[0, 0], [1, 1]]), args)
    assert grid.tolist() == [[[0, 1], [3, 4]]]


# --- Batch --------------------------------------------------------------------------------------------------------


class Chance(gym.Env):
    """Random observations and rewards; an episode ends, by termination or time, one step in ten."""

    observation_space, action_space = Box(-9, 9, (5,)), Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=5), {}

    def step(self, action):
        ends = self.np_random.random(2) < 0.1
        return self.np_random.normal(size=5), 100 + self.np_random.normal() * (1 + action), *map(bool, ends), {}


gym.register("Chance-v0", Chance)


def collect(env_id="Chance-v0", num_envs=3, num_steps=40, **settings):
    """A rollout and the batch that it makes, with an agent that has moved on from the target, which acted."""
    args = vmpo.Args(env_id=env_id, num_envs=num_envs, num_steps=num_steps, compile=False, **settings)
    torch.manual_seed(0)
    envs = vmpo.Envs(args, range(num_envs))
    agent = vmpo.make_agent(envs, args)
    target = copy.deepcopy(agent)
    target.obs_rms, target.value_rms = agent.obs_rms, agent.value_rms
    if env_id == "Chance-v0":
        for parameter in agent.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    rows = vmpo.rollout(envs, target, args)
    agent.obs_rms.update(rows["obs"])
    return agent, target, rows, vmpo.make_batch(rows, agent, target, CPU, args), args


@pytest.mark.parametrize("top_half", [True, False])
@pytest.mark.parametrize(
    "advantages, count",
    [([4, 1, 3, 2], 2), ([5, 1, 3, 2, 4], 3), ([1, 2, 2, 3], 3), ([2, 2, 2, 1], 3), ([7, 7, 7, 7], 4), ([9], 1)],
)
def test_the_better_half_has_all_that_equal_its_least(advantages, count, top_half, monkeypatch):
    monkeypatch.setattr(vmpo, "gae", lambda rewards, *_: np.float32(advantages).reshape(rewards.shape))
    _, _, _, batch, _ = collect(num_envs=1, num_steps=len(advantages), top_half=top_half)
    assert batch["selected"].sum() == (count if top_half else len(advantages))
    rest = batch["advantages"][~batch["selected"]].tolist()
    assert all(batch["advantages"][batch["selected"]].min() > other for other in rest)


@pytest.mark.parametrize("gae_lambda", [0.95, 1.0])
def test_values_are_the_online_network_s_the_policy_the_target_s(gae_lambda):
    agent, target, rows, batch, _ = collect(gae_lambda=gae_lambda, norm_reward=False)
    with torch.no_grad():
        V, next_V = agent.value(rows["obs"]).numpy(), agent.value(rows["next_obs"]).numpy()
        assert not np.allclose(V, target.value(rows["obs"]), rtol=1e-2)
        pi_old = target.policy(rows["obs"], rows["masks"])
        assert not np.allclose(agent.policy(rows["obs"], rows["masks"]).log_probs, pi_old.log_probs, rtol=1e-2)
    np.testing.assert_allclose(batch["values"].view(40, 3), V, rtol=1e-5)
    for name in ("old_log_probs", "behaviour_log_probs"):
        np.testing.assert_allclose(batch[name].view(40, 3, 1, 4), pi_old.log_probs, rtol=1e-5)
    expected = np.zeros((40, 3))
    for n, t in itertools.product(range(3), range(40)):  # from each row on to the episode's or the rollout's end
        weight = 1.0
        for k in range(t, 40):
            successor = 0.0 if rows["terminated"][k, n] else 0.99 * next_V[k, n]
            expected[t, n] += weight * (rows["rewards"][k, n].item() + successor - V[k, n])
            if rows["done"][k, n]:
                break
            weight *= 0.99 * gae_lambda
    if gae_lambda == 1:  # the paper's n-step return, less V
        n_step, k = 0.0, int(rows["done"][:, 0].float().argmax())
        for t in range(k + 1):
            n_step += 0.99**t * rows["rewards"][t, 0].item()
        n_step += 0.0 if rows["terminated"][k, 0] else 0.99 ** (k + 1) * next_V[k, 0]
        assert expected[0, 0] == pytest.approx(n_step - V[0, 0], rel=1e-5)
    np.testing.assert_allclose(batch["advantages"].view(40, 3), expected, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(batch["returns"].view(40, 3), expected + V, rtol=1e-3, atol=1e-2)
    assert batch["log_rho"].abs().max() == 0


# --- PopArt -------------------------------------------------------------------------------------------------------


def test_popart_changes_the_unit_and_not_the_values():
    agent, _, rows, batch, _ = collect(popart=True)
    assert abs(agent.value_rms.shift) > 100 and agent.value_rms.scale < 0.1  # rewards are 100 or so
    np.testing.assert_allclose(agent.value(rows["obs"]).detach().flatten(), batch["values"], atol=2e-4)
    returns = batch["returns"].double()
    np.testing.assert_allclose(agent.value_rms.shift, returns.mean(), rtol=1e-5)
    np.testing.assert_allclose(1 / agent.value_rms.scale, returns.std(correction=0), rtol=1e-4)
    in_unit = (batch["returns"] - batch["values"]) * agent.value_rms.scale
    np.testing.assert_allclose(batch["advantages"], in_unit, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, sigma", [(1e-9, 1e-2), (1e12, 1e6)])
def test_popart_s_unit_has_bounds_and_forgets_slowly(size, sigma):
    agent, args = agent_for(Discrete(2), popart=True, update_epochs=5, num_minibatches=2)
    vmpo.popart(agent, torch.from_numpy(np.random.default_rng(0).normal(size=1000) * size), args)
    assert 1 / agent.value_rms.scale.item() == pytest.approx(sigma, rel=1e-5)
    vmpo.popart(agent, torch.full((1000,), size, dtype=torch.float64), args)
    # The second thousand has a weight of 5 x 2 x 1e-4 against what is kept of the first, 1000 of them: so one half.
    assert agent.value_rms.mean.item() == pytest.approx(0.5 * size, rel=0.1)
    for _ in range(3000):
        vmpo.popart(agent, torch.zeros(1000), args)
    # 1 / 1000 a call once a thousand calls are in
    assert agent.value_rms.mean.item() / size == pytest.approx(1e-3 * math.exp(-2), rel=0.1)


# --- Update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [0.5, math.inf])
def test_a_step_is_adam_s_with_a_rate_of_its_own_and_no_clipping_for_the_multipliers(max_grad_norm):
    agent, args, batch = whole_batch("gaussian", max_grad_norm=max_grad_norm, dual_learning_rate=0.02)
    reference = copy.deepcopy(agent)
    others = [p for p in reference.parameters() if p is not reference.duals]
    groups = [{"params": [reference.duals], "lr": 0.02}, {"params": others, "lr": 1e-3}]
    adam, norms = torch.optim.Adam(groups, eps=1e-5), []
    indices = torch.randperm(24, generator=torch.Generator().manual_seed(5)).view(3, 8)
    for rows in indices:
        adam.zero_grad()
        vmpo.loss(reference, batch, args, rows)[0].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(others, max_grad_norm))
        adam.step()
        reference.duals.data.clamp_(min=1e-8)
    assert min(norms) > 0.5
    learning_rate = torch.tensor(1e-3, dtype=torch.float64)
    after, _, _ = vmpo.update_step(vmpo.init_optimizer(agent), learning_rate, batch, indices, agent, args)
    wanted = vmpo.init_optimizer(reference)["theta"]
    np.testing.assert_allclose(after["theta"], wanted, rtol=1e-6, atol=1e-8)


def test_multipliers_stay_positive():
    agent, args, batch = whole_batch("gaussian", dual_learning_rate=50.0, eps_alpha=1e6, eps_alpha_cov=1e6)
    learning_rate = torch.tensor(1e-3, dtype=torch.float64)
    inputs = learning_rate, batch, torch.arange(24).view(2, 12), agent, args
    after, _, _ = vmpo.update_step(vmpo.init_optimizer(agent), *inputs)
    assert after["theta"][:3].tolist()[1:] == [1e-8, 1e-8]  # eta rises
    after, _, metrics = vmpo.update_step(after, *inputs)
    assert metrics.isfinite().all() and after["theta"][:3].min() >= 1e-8


def test_multipliers_start_at_1_and_the_alpha_of_choices_at_5():
    assert agent_for(SPACES["gaussian"])[0].duals.tolist() == [1, 1, 1]
    assert agent_for(SPACES["gaussian"], kl="coupled")[0].duals.tolist() == [1, 1]
    assert agent_for(SPACES["softmax"])[0].duals.tolist() == [1, 5]
    assert agent_for(SPACES["factors"])[0].duals.tolist() == [1, 5]


@pytest.mark.parametrize("period", [0, 1, 3, 6, 8, 20])
@pytest.mark.parametrize("weights", [True, False])
def test_the_target_follows_every_so_many_gradient_steps_whatever_ends_the_batches(period, weights, monkeypatch):
    settings = {"num_minibatches": 4, "update_epochs": 2, "importance_weights": weights}
    agent, target, rows, batch, args = collect(target_period=period, **settings)
    kept = {name: batch[name].clone() for name in ("logprobs", "behaviour_log_probs")}
    optimizer, refreshed = vmpo.init_optimizer(agent), []
    refresh = vmpo.refresh

    def watched(target, theta, batch, args):
        refresh(target, theta, batch, args)
        refreshed.append((int(optimizer["step"]), theta.clone()))
        assert torch.equal(vmpo.init_optimizer(target)["theta"], theta)
        with torch.no_grad():
            pi_old = target.policy(batch["obs"], batch["masks"])
        assert torch.equal(batch["old_log_probs"], pi_old.log_probs)
        log_rho = torch.minimum(pi_old.log_prob(batch["actions"]) - batch["logprobs"], torch.zeros(()))
        np.testing.assert_allclose(batch["log_rho"], log_rho if weights else torch.zeros(120), atol=1e-6)

    monkeypatch.setattr(vmpo, "refresh", watched)
    learning_rate, ends = torch.tensor(1e-3), []
    step = vmpo.compile_update(agent, optimizer, learning_rate, batch, args)
    for args.target_kl in (None, 1e-12, 1e-12, None, 1e-12):  # a small one ends a batch after its first pass
        vmpo.update(step, agent, target, optimizer, learning_rate, batch, args)
        ends.append(int(optimizer["step"]))
        assert torch.equal(vmpo.init_optimizer(agent)["theta"], optimizer["theta"])
        if refreshed:
            assert torch.equal(vmpo.init_optimizer(target)["theta"], refreshed[-1][1])
    assert ends == [8, 12, 16, 24, 28]
    assert [steps for steps, _ in refreshed] == (ends if period == 0 else list(range(period, 29, period)))
    assert all(torch.equal(batch[name], before) for name, before in kept.items())


# --- Runs ---------------------------------------------------------------------------------------------------------


def run(runs_dir, *flags):
    """A run in this process, for speed; its folder."""
    vmpo.main(vmpo.parse_args([*SMALL, "--runs-dir", str(runs_dir), *map(str, flags)]))
    return only(runs_dir)


def logged(folder, name) -> list:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in events.Scalars(f"losses/{name}")]


def test_the_target_acts_and_the_agent_is_the_online_network_also_in_model_pt(tmp_path, monkeypatch):
    acted, evaluated = [], []
    rollout, evaluate = vmpo.rollout, vmpo.evaluate

    def watched_rollout(envs, actor, args):
        acted.append(actor.actor_mean.weight.detach().clone())
        return rollout(envs, actor, args)

    def watched_evaluate(actor, args, run_dir):
        evaluated.append(actor.actor_mean.weight.detach().clone())
        return evaluate(actor, args, run_dir)

    monkeypatch.setattr(vmpo, "rollout", watched_rollout)
    monkeypatch.setattr(vmpo, "evaluate", watched_evaluate)
    flags = ["--env-id", "CartPole-v1", "--total-timesteps", 1024, "--no-compile", "--target-period", 20]
    folder = run(tmp_path, *flags)  # 8 gradient steps a batch, so the third batch changes the target
    checkpoint, model = load(folder / "checkpoint.pt"), load(folder / "model.pt")
    assert torch.equal(acted[0], acted[1]) and torch.equal(acted[1], acted[2])
    assert not torch.equal(acted[2], acted[3])
    name = "actor_mean.weight"
    assert torch.equal(checkpoint["target"][name], acted[3])
    assert torch.equal(model[name], evaluated[0]) and torch.equal(model[name], checkpoint["agent"][name])
    assert not torch.equal(model[name], acted[3])
    assert torch.equal(checkpoint["optimizer"]["theta"][:2], model["duals"])


def paper_flags() -> str:
    """Those that benchmarks/vmpo_paper.sh gives to every run."""
    script = (ROOT / "benchmarks" / "vmpo_paper.sh").read_text()
    return " ".join(re.findall(r'^\w+="(--.*)"$', script, re.M))


def test_a_run_in_the_paper_s_settings_has_a_trust_region(tmp_path, capfd):
    flags = paper_flags()
    assert "--target-period 100" in flags and "--update-epochs 1 --num-minibatches 1" in flags
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 103 * 8 * 39, "--num-envs", 8, *flags.split()]
    folder = run(tmp_path, *flags, "--no-compile")
    assert "trust region" not in capfd.readouterr().err
    for name in ("kl_mean", "kl_cov"):  # before each of the steps
        kl = logged(folder, name)
        assert kl[0] < 1e-10 and min(kl[1:100]) > 1e-9  # the first target is the policy that starts
        assert kl[100] < 1e-10 and min(kl[101:]) > 1e-9  # another one after 100 steps
        alpha = logged(folder, name.replace("kl", "alpha"))
        assert alpha[0] == 1 and all(a != b for a, b in zip(alpha, alpha[1:]))
        assert 5e-5 < max(abs(a - b) for a, b in zip(alpha, alpha[1:])) < 2e-4  # Adam's step size is 1e-4
    assert max(logged(folder, "kl_mean")) > 1e-5


@pytest.mark.parametrize("flags", ["--update-epochs 1 --num-minibatches 1", "--target-period 1"])
def test_a_notice_where_the_target_is_the_policy_itself_in_each_step(flags, tmp_path, capfd):
    run_flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 512, "--no-compile"]
    folder = run(tmp_path / "itself", *run_flags, *flags.split())
    assert capfd.readouterr().err.count("no trust region") == 1
    assert max(logged(folder, "kl_mean")) < 1e-10
    folder = run(tmp_path / "older", *run_flags, *flags.split(), "--target-period", 2)
    assert "no trust region" not in capfd.readouterr().err
    assert max(logged(folder, "kl_mean")) > 1e-8


def test_the_shared_network_and_the_head_for_sigma_train(tmp_path, monkeypatch):
    agents, init_optimizer = [], vmpo.init_optimizer

    def watched(agent):
        agents.append(copy.deepcopy(agent))
        return init_optimizer(agent)

    monkeypatch.setattr(vmpo, "init_optimizer", watched)
    flags = ["--network", "shared", "--std-type", "state", "--no-compile"]
    model = load(run(tmp_path, "--env-id", "Hopper-v4", "--total-timesteps", 512, *flags) / "model.pt")
    start, end = agents[0], copy.deepcopy(agents[0])
    end.load_state_dict(model)
    assert [tuple(p.shape) for name, p in start.named_parameters() if name.endswith("weight")] == [
        *[(512, 11), (256, 512)],
        *[(256, 256), (1, 256)],
        *[(256, 256), (3, 256), (3, 256)],
    ]
    for name, before in start.named_parameters():
        assert not torch.equal(before, model[name]), name
    spread = end.policy(torch.randn(50, 11), torch.ones(50, 0, dtype=torch.bool)).log_std
    assert spread.std(0).min() > 1e-3


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v4"])
def test_alphas_rise_while_the_kl_exceeds_its_bound_and_fall_while_it_does_not(env_id, tmp_path):
    flags = ["--env-id", env_id, "--total-timesteps", 2560, "--no-compile", "--target-period", 8]
    flags += ["--dual-learning-rate", 0.5, "--learning-rate", 3e-3, "--no-anneal-lr"]
    tight = run(tmp_path / "tight", *flags, "--eps-alpha", "1e-8", "--eps-alpha-cov", "1e-8")
    loose = run(tmp_path / "loose", *flags, "--eps-alpha", "10", "--eps-alpha-cov", "10")
    names = [("kl_mean", "alpha_mean"), ("kl_cov", "alpha_cov")] if env_id == "Hopper-v4" else [("kl", "alpha")]
    for kl, alpha in names:
        rising, falling = logged(tight, alpha), logged(loose, alpha)
        assert len(rising) == 10 and all(a < b for a, b in zip(rising, rising[1:]))
        assert all(a > b or b < 1e-7 for a, b in zip(falling, falling[1:])) and falling[-1] < falling[0]
        assert np.mean(logged(tight, kl)[-3:]) < 0.5 * np.mean(logged(loose, kl)[-3:])


@pytest.mark.parametrize(
    "flags",
    [
        "--env-id Taxi-v4 --control-variate --popart",
        "--env-id Hopper-v4 --network shared --std-type state --max-grad-norm inf --target-period 5",
    ],
)
def test_compiled_and_plain_updates_agree(flags, tmp_path, capfd):
    models = []
    for mode in ("--compile", "--no-compile"):
        folder = run(tmp_path / mode, *flags.split(), "--total-timesteps", 512, mode)
        models.append(load(folder / "checkpoint.pt")["optimizer"]["theta"])
    assert "uncompiled" not in capfd.readouterr().err
    np.testing.assert_allclose(models[0], models[1], atol=2e-5)


def test_an_interrupted_run_resumes_with_multipliers_moments_target_and_the_place_in_its_period(tmp_path, monkeypatch):
    flags = ["--env-id", "Hopper-v4", "--total-timesteps", 3072, "--no-compile", "--checkpoint-every", 0, "--popart"]
    flags += ["--target-period", 38]  # 8 gradient steps an iteration
    expected = run(tmp_path / "whole", *flags)
    save, saved = vmpo.save, []

    def save_and_interrupt(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(vmpo, "save", save_and_interrupt)
        run(tmp_path / "interrupted", *flags)
    folder = only(tmp_path / "interrupted")
    checkpoint = load(folder / "checkpoint.pt")
    assert checkpoint["optimizer"]["step"] == 48  # the target is 10 steps old
    assert not torch.equal(checkpoint["target"]["duals"], checkpoint["agent"]["duals"])
    vmpo.main(vmpo.parse_args(["--resume", str(folder)]))
    assert_same_outcome(folder, expected)
    ends = [load(path / "checkpoint.pt") for path in (folder, expected)]
    for part in ("optimizer", "target"):
        assert all(torch.equal(ends[0][part][name], ends[1][part][name]) for name in ends[0][part])


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--eps-eta 0", "--eps-eta"),
        ("--eps-alpha -1", "--eps-alpha"),
        ("--eps-alpha-cov nan", "--eps-alpha-cov"),
        ("--target-period -1", "--target-period"),
        ("--dual-learning-rate inf", "--dual-learning-rate"),
        ("--num-minibatches 7", "--num-minibatches"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(flags, named, tmp_path, capfd):
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "runs", "--env-id", "CartPole-v1", *flags.split())
    err = capfd.readouterr().err
    assert exit.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert not (tmp_path / "runs").exists()


# --- Learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("env_id, steps, least", [("CartPole-v1", 100_000, 475), ("Pendulum-v1", 160_000, -300)])
def test_it_learns(env_id, steps, least, seed, tmp_path):
    flags = ["--env-id", env_id, "--total-timesteps", steps, "--seed", seed, "--device", "cpu", "--no-compile"]
    flags += ["--gamma", 0.95, "--learning-rate", 3e-3] if env_id == "Pendulum-v1" else []
    vmpo.main(vmpo.parse_args([*map(str, flags), "--runs-dir", str(tmp_path)]))
    returns = [float(row["return"]) for row in csv.DictReader(open(only(tmp_path) / "episodes.csv"))]
    assert np.mean(returns[:50]) < (least / 4 if least > 0 else 3 * least)
    assert np.mean(returns[-100:]) >= least
