"""vmpo.py: each term of its loss against float64 formulas written out here, its target network, PopArt and memory."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import KILLER, assert_same_outcome, only
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Categorical, Normal, kl_divergence

import vmpo

torch.set_num_threads(1)  # as the script does; two lose time on networks this small

SCRIPT = Path(__file__).parents[1] / "vmpo.py"
SPACES = {"gaussian": Box(-1, 1, (3,)), "softmax": Discrete(4), "factors": MultiDiscrete([3, 2, 5])}
SMALL = "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 2 --eval-episodes 1 --device cpu".split()


def agent_for(space, obs_dim=5, seed=0, **settings):
    torch.manual_seed(seed)
    args = vmpo.Args(**settings)
    env = SimpleNamespace(observation_space=Box(-9, 9, (obs_dim,)), action_space=space)
    return vmpo.Agent(env, args), args


def distributions(policy, space):
    """The policy's factors as torch.distributions."""
    if isinstance(space, Box):
        return [Normal(factor[..., 0], factor[..., 1].exp()) for factor in policy.unbind(1)]
    sizes = np.ravel(getattr(space, "nvec", getattr(space, "n", None)))
    return [Categorical(probs=factor[..., :n].exp()) for n, factor in zip(sizes, policy.unbind(1))]


def whole_batch(space, B=24, rho=False, **settings):
    """An agent in float64, a batch that another, older policy gathered, and what else the loss takes."""
    agent, args = agent_for(space, **settings)
    old, _ = agent_for(space, seed=1, **settings)
    agent, old = agent.double(), old.double()
    for module in (agent, old):  # policies that differ, in heads that start at almost 0
        torch.manual_seed(7 if module is agent else 8)
        for parameter in module.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    agent.duals.data = torch.rand_like(agent.duals) + 0.3
    generator = torch.Generator().manual_seed(3)
    obs = torch.randn(B, 5, generator=generator, dtype=torch.float64)
    target = old.policy(obs).detach()
    behaviour = target.roll(1, 0) if rho else target
    torch.manual_seed(4)
    actions = torch.stack([d.sample() for d in distributions(target, space)], -1).double()
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    log_rho = -torch.rand(B, generator=generator, dtype=torch.float64) * rho
    if args.popart:  # V in a unit of mean 3 and standard deviation 2
        agent.value_rms.shift.fill_(3.0), agent.value_rms.scale.fill_(0.5)
    batch = {
        "obs": obs,
        "done": torch.zeros(B, dtype=torch.bool),
        "actions": actions,
        "behaviour": behaviour,
        "target": target,
        "logprobs": vmpo.describe(behaviour, actions, agent.discrete)[0],
        "log_rho": log_rho,
        "advantages": advantages,
        "selected": advantages >= advantages.median() + 1e-9,
        "returns": torch.randn(B, generator=generator, dtype=torch.float64),
        "values": torch.randn(B, generator=generator, dtype=torch.float64),
    }
    return agent, args, batch


def params_of(agent) -> dict:
    return {name: p.detach().clone().requires_grad_() for name, p in agent.named_parameters() if p.requires_grad}


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
    ("gaussian", {"rho": True, "norm_adv": False, "std_type": "state", "clip_vloss": False}),
    ("gaussian", {"kl": "coupled", "rho": True}),
    ("gaussian", {"control_variate": False}),
    ("gaussian", {"kl_per_dimension": True, "std_type": "state"}),
    ("gaussian", {"kl_per_dimension": True, "kl": "coupled"}),
    ("gaussian", {"dual_parameterisation": "softplus", "ent_coef": 0.01}),
    ("gaussian", {"std_type": "fixed"}),
    ("gaussian", {"popart": True}),
    ("softmax", {"norm_adv": False}),
    ("softmax", {"control_variate": False}),
    ("softmax", {"rho": True, "vf_coef": 1.0}),
    ("factors", {"rho": True}),
    ("factors", {"kl_per_dimension": True, "dual_parameterisation": "softplus"}),
]


def loss_by_hand(agent, params, batch, space, args):
    """The docstring's L_pi + L_eta + L_alpha + c_v L_V - c_e S from torch.distributions, and its KLs [C, A]."""
    policy, V = torch.func.functional_call(agent, params, (batch["obs"],))
    new, old = distributions(policy, space), distributions(batch["target"], space)
    raw = params["duals"]
    duals = torch.log1p(raw.exp()) + 1e-8 if args.dual_parameterisation == "softplus" else raw
    eta, alphas = duals[0], duals[1:]
    A = batch["advantages"]
    A = (A - A.mean()) / ((A - A.mean()) ** 2).sum().div(len(A) - 1).sqrt().add(1e-8) if args.norm_adv else A
    D = [i for i in range(len(A)) if batch["selected"][i]]
    weights = [(batch["log_rho"][i] + A[i] / eta).exp() for i in D]
    psi = [w.detach() / sum(w.detach() for w in weights) for w in weights]
    logp = sum(d.log_prob(batch["actions"][:, k]) for k, d in enumerate(new))
    L_pi = -sum(p * logp[i] for p, i in zip(psi, D))
    if args.control_variate:
        acted = distributions(batch["behaviour"], space)
        logp_b = sum(d.log_prob(batch["actions"][:, k]) for k, d in enumerate(acted))
        L_pi = L_pi + (logp - logp_b + sum(kl_divergence(b, n) for b, n in zip(acted, new))).mean()
    L_eta = eta * args.eps_eta + eta * (sum(weights) / len(D)).log()
    if isinstance(space, Box) and args.kl == "decoupled":
        kl = torch.stack(
            [
                torch.stack([kl_divergence(o, Normal(n.loc, o.scale)).mean() for o, n in zip(old, new)]),
                torch.stack([kl_divergence(o, Normal(o.loc, n.scale)).mean() for o, n in zip(old, new)]),
            ]
        )
    else:
        kl = torch.stack([kl_divergence(o, n).mean() for o, n in zip(old, new)])[None]
    bounded = kl if args.kl_per_dimension else kl.sum(1, keepdim=True)
    L_alpha = 0
    for c, eps in zip(range(len(kl)), (args.eps_alpha, args.eps_alpha_cov)):
        for k in range(bounded.shape[1]):
            alpha, d = alphas[c * bounded.shape[1] + k], bounded[c, k]
            L_alpha = L_alpha + alpha * (eps - d.detach()) + alpha.detach() * d
    error = (V - batch["returns"]) ** 2
    if args.popart:  # in V's unit: the critic's output against the return less 3, over 2
        critic = {name.removeprefix("critic."): p for name, p in params.items() if name.startswith("critic.")}
        output = torch.func.functional_call(agent.critic, critic, (batch["obs"],)).squeeze(-1)
        error = (output - (batch["returns"] - 3) / 2) ** 2
    if args.clip_vloss:
        held = batch["values"] + (V - batch["values"]).clamp(-args.clip_coef, args.clip_coef)
        error = torch.maximum(error, (held - batch["returns"]) ** 2)
    S = sum(d.entropy() for d in new).mean()
    return L_pi + L_eta + L_alpha + args.vf_coef * error.mean() / 2 - args.ent_coef * S, kl


@pytest.mark.parametrize("kind, settings", CASES)
def test_the_loss_and_its_gradient_are_the_docstring_s(kind, settings):
    agent, args, batch = whole_batch(SPACES[kind], **settings)
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    params = {name: p.detach() for name, p in params_of(agent).items()}
    grads, (total, metrics) = torch.func.grad_and_value(vmpo.loss, has_aux=True)(params, agent, batch, rows, {}, args)
    reference = params_of(agent)
    expected, kl = loss_by_hand(agent, reference, batch, SPACES[kind], args)
    expected.backward()
    np.testing.assert_allclose(total, expected.item(), rtol=1e-9)
    assert grads.keys() == reference.keys()
    for name, parameter in reference.items():
        slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        np.testing.assert_allclose(grads[name], slope, rtol=1e-7, atol=1e-12, err_msg=name)
    named = dict(zip(vmpo.METRICS, metrics.tolist()))
    assert named["kl_mean"] == pytest.approx(kl[0].sum().item(), rel=1e-9)
    assert ("kl_cov" in named) == (kind == "gaussian" and args.kl == "decoupled")
    if "kl_cov" in named:
        assert named["kl_cov"] == pytest.approx(kl[1].sum().item(), rel=1e-9)


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("control_variate", [True, False])
def test_the_mean_over_minibatches_is_the_loss_of_the_whole_batch(kind, control_variate):
    """psi and the temperature's loss come from all of it, whatever the minibatch: so also for one without any of D~."""
    agent, args, batch = whole_batch(SPACES[kind], rho=True, control_variate=control_variate)
    gradient = torch.func.grad(vmpo.loss, has_aux=True)
    params = {name: p.detach() for name, p in params_of(agent).items()}
    whole, metrics = gradient(params, agent, batch, torch.arange(24), {}, args)
    order = batch["advantages"].argsort()  # the worst half first
    parts = [gradient(params, agent, batch, rows, {}, args) for rows in order.view(4, 6)]
    for name in whole:
        np.testing.assert_allclose(sum(grads[name] for grads, _ in parts) / 4, whole[name], rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(sum(m for _, m in parts) / 4, metrics, rtol=1e-9, atol=1e-12)
    worst = dict(zip(vmpo.METRICS, parts[0][1].tolist()))
    assert (worst["policy_loss"] == 0) == (not control_variate)
    assert worst["eta_loss"] == metrics[vmpo.METRICS.index("eta_loss")]


@pytest.mark.parametrize("kind", SPACES)
def test_the_control_variate_s_mean_is_0_for_every_policy_over_the_actions_that_pi_b_may_take(kind):
    """Exactly: summed over all choices, or by Gauss-Hermite quadrature, which 3 nodes make exact for a log-density."""
    space = SPACES[kind]
    agent, args, batch = whole_batch(space, rho=True)
    one = {name: tensor[:1] for name, tensor in batch.items()} | {"selected": torch.ones(1, dtype=torch.bool)}
    behaviour = one["behaviour"]
    if kind == "gaussian":
        nodes, weights = np.polynomial.hermite_e.hermegauss(3)
        z = torch.cartesian_prod(*[torch.tensor(nodes)] * 3)
        probabilities = torch.cartesian_prod(*[torch.tensor(weights / weights.sum())] * 3).prod(-1)
        actions = behaviour[0, :, 0] + z * behaviour[0, :, 1].exp()
    else:
        factors = [torch.arange(n) for n in np.ravel(getattr(space, "nvec", getattr(space, "n", None)))]
        actions = torch.cartesian_prod(*factors).view(-1, len(factors))
        probabilities = vmpo.describe(behaviour.expand(len(actions), -1, -1), actions, True)[0].exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    gradient = torch.func.grad_and_value(vmpo.loss, has_aux=True)
    params = {name: p.detach() for name, p in params_of(agent).items()}
    means, size = {}, 0.0
    for action, probability in zip(actions, probabilities):
        one["actions"] = action[None].double()
        one["logprobs"] = vmpo.describe(behaviour, one["actions"], agent.discrete)[0]
        terms = []
        for args.control_variate in (True, False):
            grads, (_, metrics) = gradient(params, agent, one, torch.zeros(1, dtype=torch.long), {}, args)
            terms.append(grads | {"value": metrics[0]})
        for name in terms[0]:
            c = terms[0][name] - terms[1][name]
            means[name] = means.get(name, 0) + probability * c
            size = max(size, c.abs().max().item())
    assert size > 0.1
    for name, mean in means.items():
        np.testing.assert_allclose(mean, 0, atol=1e-11, err_msg=name)


def test_the_control_variate_takes_variance_from_the_policy_s_gradient():
    """Over minibatches of Hopper-v4, at the policy that acted."""
    args = vmpo.Args(env_id="Hopper-v4", num_steps=512, update_epochs=1)
    torch.manual_seed(0)
    env, envs = vmpo.make_env(args), vmpo.make_envs(args, seed=0)
    agent, running = vmpo.Agent(env, args), vmpo.start_episodes(envs, args.num_envs, seed=0)
    agent.duals.data[0] = 2.0  # where training keeps eta
    theta = vmpo.init_optimizer(agent)["theta"]
    rows, _ = vmpo.rollout(envs, agent, running, env.action_space, args, 0)
    batch, _ = vmpo.make_batch(rows, agent, theta, running, vmpo.RunningMeanStd(), args)
    minibatches, variance = torch.randperm(4096).view(64, 64), {}
    for args.control_variate in (True, False):
        gradient, params = torch.func.grad(vmpo.loss, has_aux=True), vmpo.unflatten(theta, agent)
        grads = [gradient(params, agent, batch, rows, {}, args)[0]["actor_mean.weight"] for rows in minibatches]
        variance[args.control_variate] = torch.stack(grads).var(0).sum().item()
    assert variance[True] < 0.8 * variance[False]


def test_only_the_temperature_s_loss_moves_eta_and_only_alpha_s_loss_the_alphas():
    agent, args, batch = whole_batch(SPACES["gaussian"], norm_adv=False)
    params = {name: p.detach() for name, p in params_of(agent).items()}
    gradient = torch.func.grad(vmpo.loss, has_aux=True)
    grads, metrics = gradient(params, agent, batch, torch.arange(24), {}, args)
    eta = params["duals"][0].item()
    _, _, slope = e_step_by_hand(eta, batch["advantages"], batch["selected"], np.ones(24), args.eps_eta)
    named = dict(zip(vmpo.METRICS, metrics.tolist()))
    expected = [slope, args.eps_alpha - named["kl_mean"], args.eps_alpha_cov - named["kl_cov"]]
    np.testing.assert_allclose(grads["duals"], expected, rtol=1e-8)


def test_the_kls_are_gaussian_and_decoupled_ones_add_up_where_one_part_is_shared():
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 50, 3, 2, generator=generator, dtype=torch.float64).unbind(0)
    full = kl_divergence(Normal(old[..., 0], old[..., 1].exp()), Normal(new[..., 0], new[..., 1].exp()))
    np.testing.assert_allclose(vmpo.kl_terms(old, new, False, True)[0], full, rtol=1e-9)
    for shared in (0, 1):
        other = new.clone()
        other[..., shared] = old[..., shared]
        full = kl_divergence(Normal(old[..., 0], old[..., 1].exp()), Normal(other[..., 0], other[..., 1].exp()))
        terms = vmpo.kl_terms(old, other, False, False)
        np.testing.assert_allclose(terms.sum(0), full, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(terms[shared], 0, atol=1e-14)


# --- Policies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPACES)
def test_actions_come_from_the_policy_and_their_probabilities_belong_to_them(kind):
    space, n = SPACES[kind], 40_000
    agent, _ = agent_for(space, norm_obs=False)
    agent.actor_mean.weight.data *= 100
    torch.manual_seed(0)
    obs = torch.randn(1, 5).expand(n, 5)
    actions = vmpo.act(agent, obs, vmpo.draw_noise(agent, n))
    policy = agent.policy(obs).detach()
    factors = distributions(policy, space)
    logprobs, entropy = vmpo.describe(policy, actions, agent.discrete)
    expected = sum(d.log_prob(actions[:, k]) for k, d in enumerate(factors))
    np.testing.assert_allclose(logprobs, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(entropy, sum(d.entropy() for d in factors), rtol=1e-4)
    likeliest = vmpo.act(agent, obs[:1], torch.zeros_like(vmpo.draw_noise(agent, 1)))[0]
    for k, factor in enumerate(factors):
        if isinstance(space, Box):
            assert (
                abs(actions[:, k].mean() - factor.mean[0]) < 0.03 and abs(actions[:, k].std() - factor.scale[0]) < 0.03
            )
            assert likeliest[k].item() == pytest.approx(factor.mean[0].item(), rel=1e-5)
        else:
            share = torch.bincount(actions[:, k].long(), minlength=len(factor.probs[0])) / n
            np.testing.assert_allclose(share, factor.probs[0], atol=0.012)  # 5 standard deviations
            assert likeliest[k] == factor.probs[0].argmax()


def test_choices_that_a_factor_lacks_have_no_probability_and_spaces_may_start_anywhere():
    agent, _ = agent_for(SPACES["factors"])
    policy = agent.policy(torch.randn(6, 5))
    assert policy.shape == (6, 3, 5) and policy.exp()[:, [0, 0, 1, 1, 1], [3, 4, 2, 3, 4]].abs().max() == 0
    np.testing.assert_allclose(policy.exp().sum(-1).detach(), 1, rtol=1e-6)
    actions = np.array([[2.0], [0.0]], dtype=np.float32)
    assert vmpo.to_env(actions, Discrete(3, start=-1)).tolist() == [1, -1]
    grid = vmpo.to_env(np.arange(4.0)[None], MultiDiscrete([[4, 4], [4, 4]]))
    assert grid.tolist() == [[[0, 1], [2, 3]]]


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


gym.register("Chance-v0", Chance)
gym.register("Recall-v0", Recall)


def collect(**settings):
    """A rollout of Chance-v0 and the batch that it makes, with a target network that lags behind."""
    args = vmpo.Args(env_id="Chance-v0", num_envs=3, num_steps=40, **settings)
    vmpo.check_args(args)
    torch.manual_seed(0)
    agent = vmpo.Agent(vmpo.make_env(args), args)
    envs = vmpo.make_envs(args, 1)
    running = vmpo.start_episodes(envs, 3, 1)
    optimizer = vmpo.init_optimizer(agent)
    optimizer["theta"] = optimizer["theta"] + 0.05 * torch.randn_like(optimizer["theta"])
    rows, _ = vmpo.rollout(envs, agent, running, envs.envs[0].action_space, args, 0)
    agent.obs_rms.update(rows["obs"])
    before = {name: tensor.clone() for name, tensor in optimizer.items()}
    batch, _ = vmpo.make_batch(rows, agent, optimizer["theta"], running, vmpo.RunningMeanStd(), args)
    return agent, optimizer, rows, batch, before, args


@pytest.mark.parametrize("top_half", [True, False])
@pytest.mark.parametrize(
    "advantages, count",
    [([4, 1, 3, 2], 2), ([5, 1, 3, 2, 4], 3), ([1, 2, 2, 3], 3), ([2, 2, 2, 1], 3), ([7, 7, 7, 7], 4), ([9], 1)],
)
def test_the_better_half_has_all_that_equal_its_least(advantages, count, top_half, monkeypatch):
    monkeypatch.setattr(vmpo, "gae", lambda rewards, *_: np.float32(advantages).reshape(rewards.shape))
    args = vmpo.Args(env_id="Chance-v0", num_envs=1, num_steps=len(advantages), top_half=top_half)
    agent, envs = vmpo.Agent(vmpo.make_env(args), args), vmpo.make_envs(args, 1)
    running = vmpo.start_episodes(envs, 1, 1)
    rows, _ = vmpo.rollout(envs, agent, running, envs.envs[0].action_space, args, 0)
    theta = vmpo.init_optimizer(agent)["theta"]
    batch, _ = vmpo.make_batch(rows, agent, theta, running, vmpo.RunningMeanStd(), args)
    assert batch["selected"].sum() == (count if top_half else len(advantages))
    rest = batch["advantages"][~batch["selected"]].tolist()
    assert all(batch["advantages"][batch["selected"]].min() > other for other in rest)


@pytest.mark.parametrize("advantage", ["gae", "nstep"])
def test_values_are_the_online_network_s_the_policy_the_target_s(advantage):
    agent, optimizer, rows, batch, _, args = collect(advantage=advantage, norm_reward=False)
    online, _ = agent_for(Discrete(4))
    online.load_state_dict(agent.state_dict())
    vmpo.write_parameters(optimizer["theta"], online)
    obs, next_obs = (agent.normalize(rows[name]) for name in ("obs", "next_obs"))
    V, next_V = online(obs)[1].detach().numpy(), online(next_obs)[1].detach().numpy()
    np.testing.assert_allclose(batch["values"].view(40, 3), V, rtol=1e-5)
    np.testing.assert_allclose(batch["target"].view(40, 3, 1, 4), agent(obs)[0].detach(), rtol=1e-5)
    assert not np.allclose(V, agent(obs)[1].detach(), rtol=1e-2)
    lam = 0.95 if advantage == "gae" else 1.0
    expected = np.zeros((40, 3))
    for n in range(3):  # from each row on to the episode's or the rollout's end
        for t in range(40):
            weight = 1.0
            for k in range(t, 40):
                successor = 0.0 if rows["terminated"][k, n] else 0.99 * next_V[k, n]
                expected[t, n] += weight * (rows["rewards"][k, n].item() + successor - V[k, n])
                if rows["done"][k, n]:
                    break
                weight *= 0.99 * lam
    np.testing.assert_allclose(batch["advantages"].view(40, 3), expected, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(batch["returns"].view(40, 3), expected + V, rtol=1e-3, atol=1e-2)
    assert batch["log_rho"].abs().max() == 0


# --- PopArt -------------------------------------------------------------------------------------------------------


def test_popart_changes_the_unit_and_not_the_values():
    agent, optimizer, rows, batch, before, args = collect(popart=True)
    obs = agent.normalize(rows["obs"])
    assert abs(agent.value_rms.shift) > 100 and agent.value_rms.scale < 0.1  # rewards are 100 or so
    plain, _ = agent_for(Discrete(4), popart=True)
    plain.obs_rms.load_state_dict(agent.obs_rms.state_dict())
    vmpo.write_parameters(before["theta"], plain)
    values = torch.func.functional_call(agent, vmpo.unflatten(optimizer["theta"], agent), (obs,))[1]
    assert not torch.equal(before["theta"], optimizer["theta"])
    np.testing.assert_allclose(values.detach(), plain(obs)[1].detach(), atol=2e-4)
    torch.manual_seed(0)
    untouched = vmpo.Agent(vmpo.make_env(args), args)  # the target network, as it was
    untouched.obs_rms.load_state_dict(agent.obs_rms.state_dict())
    np.testing.assert_allclose(agent(obs)[1].detach(), untouched(obs)[1].detach(), atol=2e-4)
    returns = batch["returns"].double()
    np.testing.assert_allclose(agent.value_rms.shift, returns.mean(), rtol=1e-5)
    np.testing.assert_allclose(1 / agent.value_rms.scale, returns.std(correction=0), rtol=1e-4)


@pytest.mark.parametrize("size, sigma", [(1e-9, 1e-2), (1e12, 1e6)])
def test_popart_s_unit_has_bounds_and_forgets_slowly(size, sigma):
    agent, args = agent_for(Discrete(2), popart=True, update_epochs=5, num_minibatches=2)
    theta = vmpo.init_optimizer(agent)["theta"]
    with torch.no_grad():
        vmpo.popart(agent, theta, np.random.default_rng(0).normal(size=1000) * size, args)
        assert 1 / agent.value_rms.scale.item() == pytest.approx(sigma, rel=1e-5)
        vmpo.popart(agent, theta, np.full(1000, size), args)
    # The second thousand has a weight of 5 x 2 x 1e-4 against what is kept of the first, 1000 of them: so one half.
    assert agent.value_rms.mean.item() == pytest.approx(0.5 * size, rel=0.1)
    with torch.no_grad():
        for _ in range(3000):
            vmpo.popart(agent, theta, np.zeros(1000), args)
    kept = agent.value_rms.mean.item() / size
    # 1 / 1000 a call once a thousand calls are in
    assert kept == pytest.approx(1e-3 * math.exp(-2), rel=0.1)


# --- Update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterisation", ["projection", "softplus"])
def test_multipliers_stay_positive_and_have_their_own_step(parameterisation):
    agent, args, batch = whole_batch(
        SPACES["gaussian"], dual_parameterisation=parameterisation, dual_learning_rate=50.0, eps_alpha=1e6
    )
    start, _ = agent_for(SPACES["gaussian"], dual_parameterisation=parameterisation)
    initial = torch.nn.functional.softplus(start.duals) if parameterisation == "softplus" else start.duals
    np.testing.assert_allclose(initial.detach(), 1, rtol=1e-6)
    optimizer = vmpo.init_optimizer(agent)
    assert torch.equal(optimizer["theta"][:3], agent.duals.detach())
    coefs = {"learning_rate": torch.tensor(1e-3, dtype=torch.float64)}
    after, _ = vmpo.update_step(optimizer, batch, torch.arange(24)[None], coefs, agent, args)
    moved = (after["theta"] - optimizer["theta"]).abs()
    assert moved[3:].max() <= 1.001e-3
    if parameterisation == "projection":
        assert after["theta"][1] == 1e-8
    else:
        assert moved[1] == pytest.approx(50, rel=1e-3)
        duals = dict(zip(vmpo.METRICS, vmpo.update_step(after, batch, torch.arange(24)[None], coefs, agent, args)[1]))
        assert duals["alpha_mean"] > 0


def test_alphas_of_a_softmax_start_at_5():
    assert agent_for(SPACES["softmax"])[0].duals.tolist() == [1, 5]
    assert agent_for(SPACES["factors"], kl_per_dimension=True)[0].duals.tolist() == [1, 5, 5, 5]


@pytest.mark.parametrize("period", [1, 3, 8, 20])
@pytest.mark.parametrize("weights", [True, False])
def test_the_target_follows_every_so_many_gradient_steps(period, weights, monkeypatch):
    agent, optimizer, rows, batch, _, args = collect(
        target_period=period, num_minibatches=4, update_epochs=2, importance_weights=weights, compile=False
    )
    copies = []
    refresh = vmpo.refresh_target

    def watched(agent, theta, batch, args):
        refresh(agent, theta, batch, args)
        policy = agent(batch["obs"])[0]
        assert torch.equal(batch["target"], policy)
        lag = vmpo.describe(policy, batch["actions"], True)[0] - batch["logprobs"]
        expected = torch.minimum(lag, torch.zeros(())) if weights else torch.zeros(len(lag))
        np.testing.assert_allclose(batch["log_rho"], expected.detach(), atol=1e-6)
        copies.append(theta.clone())

    monkeypatch.setattr(vmpo, "refresh_target", watched)
    step = vmpo.compile_update(agent, optimizer, {}, batch, args)
    coefs, behaviour, steps = {"learning_rate": torch.tensor(1e-3)}, batch["logprobs"].clone(), []
    for _ in range(5):  # 8 gradient steps each
        optimizer, _ = vmpo.update(step, agent, optimizer, batch, coefs, args)
        steps.append(len(copies))
        if copies:
            assert torch.equal(vmpo.init_optimizer(agent)["theta"], copies[-1])
    assert steps == [8 * (i + 1) // period for i in range(5)]
    assert torch.equal(batch["logprobs"], behaviour)


def script(*flags, **env):
    command = [sys.executable, SCRIPT, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def run(runs_dir, *flags) -> Path:
    """A run in this process, for speed; its folder."""
    vmpo.main(vmpo.parse_args([*SMALL, "--runs-dir", str(runs_dir), *map(str, flags)]))
    return only(runs_dir)


def logged(folder, name) -> list:
    events = EventAccumulator(str(folder)).Reload()
    return [event.value for event in events.Scalars(f"losses/{name}")]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v4"])
def test_alphas_rise_while_the_kl_exceeds_its_bound_and_fall_while_it_does_not(env_id, tmp_path):
    flags = ["--env-id", env_id, "--total-timesteps", 2560, "--no-compile", "--target-period", 8]
    flags += ["--dual-learning-rate", 0.5, "--learning-rate", 3e-3, "--no-anneal-lr"]
    flags += ["--no-control-variate"]  # with it the covariance moves too little in 10 iterations to be held back
    tight = run(tmp_path / "tight", *flags, "--eps-alpha", "1e-9", "--eps-alpha-cov", "1e-12")
    loose = run(tmp_path / "loose", *flags, "--eps-alpha", "10", "--eps-alpha-cov", "10")
    names = ["mean", "cov"] if env_id == "Hopper-v4" else ["mean"]
    for name in names:
        rising, falling = logged(tight, f"alpha_{name}"), logged(loose, f"alpha_{name}")
        assert len(rising) == 10 and all(a < b for a, b in zip(rising, rising[1:]))
        assert all(a > b or b < 1e-7 for a, b in zip(falling, falling[1:])) and falling[-1] < falling[0]
        assert np.mean(logged(tight, f"kl_{name}")[-3:]) < 0.5 * np.mean(logged(loose, f"kl_{name}")[-3:])


@pytest.mark.parametrize("flags", [["--env-id", "CartPole-v1"], ["--env-id", "Hopper-v4", "--popart"]])
def test_compiled_and_plain_updates_agree(flags, tmp_path):
    flags = [*flags, "--total-timesteps", 512, "--target-period", 6]
    models = []
    for mode in ("--compile", "--no-compile"):
        folder = run(tmp_path / mode, *flags, mode)
        models.append(torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]["theta"])
    np.testing.assert_allclose(models[0], models[1], atol=2e-5)


def test_a_killed_run_resumes_with_multipliers_moments_target_and_the_place_in_its_period(tmp_path):
    (tmp_path / "killer").mkdir()
    (tmp_path / "killer" / "sitecustomize.py").write_text(KILLER)
    flags = [*SMALL, "--env-id", "Hopper-v4", "--total-timesteps", 3072, "--no-compile", "--checkpoint-every", 3]
    flags += ["--target-period", 38, "--popart"]  # 8 gradient steps an iteration
    whole = script(*flags, "--runs-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    env = {"KILL_BEFORE": "replace checkpoint.pt 4", "PYTHONPATH": str(tmp_path / "killer")}
    killed = script(*flags, "--runs-dir", tmp_path / "killed", **env)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder, expected = only(tmp_path / "killed"), only(tmp_path / "whole")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    theta, duals = checkpoint["optimizer"]["theta"], checkpoint["agent"]["duals"]
    assert checkpoint["optimizer"]["step"] == 48 and not torch.equal(theta[:3], duals)  # the target is 10 steps old
    resumed = script("--resume", folder)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_outcome(folder, expected)
    ends = [torch.load(path / "checkpoint.pt", weights_only=True)["optimizer"] for path in (folder, expected)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# --- Memory -------------------------------------------------------------------------------------------------------


def test_the_unrolled_core_is_the_core_that_acted():
    args = vmpo.Args(env_id="Chance-v0", num_envs=3, num_steps=40, recurrent=True, num_minibatches=1)
    torch.manual_seed(0)
    agent, envs = vmpo.Agent(vmpo.make_env(args), args), vmpo.make_envs(args, 1)
    running = vmpo.start_episodes(envs, 3, 1)
    theta = vmpo.init_optimizer(agent)["theta"]
    for _ in range(2):  # the second rollout begins amid episodes
        rows, _ = vmpo.rollout(envs, agent, running, envs.envs[0].action_space, args, 0)
    batch, _ = vmpo.make_batch(rows, agent, theta, running, vmpo.RunningMeanStd(), args)
    assert batch["obs"].shape == (3, 40, 5 + 4 + 1 + 128) and rows["done"].sum() > 5
    policy, values = agent(batch["obs"], batch["done"])
    np.testing.assert_allclose(policy.detach(), batch["target"], atol=1e-5)
    np.testing.assert_allclose(values.detach(), batch["values"], atol=1e-5)
    done, obs, actions = rows["done"], rows["obs"], rows["actions"]
    for t in range(39):
        state, shown = actions[t, :, 1:], obs[t + 1]
        kept = ~done[t]
        assert torch.equal(shown[kept][:, -128:], state[kept]) and shown[done[t]][:, 5:].abs().sum() == 0
        one_hot = torch.eye(4)[actions[t, kept, 0].long()]
        assert torch.equal(shown[kept][:, 5:9], one_hot)
        np.testing.assert_allclose(shown[kept][:, 9], rows["rewards"][t][kept], rtol=1e-6)
        assert torch.equal(rows["next_obs"][t][:, -128:], state)  # also where the episode ends
    changed = batch["obs"].clone()
    changed[:, 1:, -128:] = 9  # only the first row's state is read
    np.testing.assert_allclose(agent(changed, batch["done"])[0].detach(), policy.detach(), atol=1e-6)


RECALL = "--env-id Recall-v0 --num-envs 16 --num-steps 30 --num-minibatches 2 --update-epochs 4 --eval-episodes 200"
RECALL += " --target-period 8 --learning-rate 1e-3 --total-timesteps 48000 --no-compile"


def test_memory_solves_what_none_can_without(tmp_path):
    """Without the cue before it any policy is right half the time."""
    results = {}
    for flag in ("--recurrent", "--no-recurrent"):
        folder = run(tmp_path / flag, *RECALL.split(), flag)
        returns = [float(row["return"]) for row in csv.DictReader(open(folder / "episodes.csv"))]
        greedy = json.loads((folder / "result.json").read_text())["eval_returns"]
        results[flag] = np.mean(returns[-1000:]), np.mean(greedy)
    assert min(results["--recurrent"]) > 0.95 and max(results["--no-recurrent"]) < 0.6


def test_a_recurrent_run_resumes_to_the_bit(tmp_path):
    flags = ["--env-id", "Hopper-v4", "--recurrent", "--total-timesteps", 1024, "--checkpoint-every", 2]
    (tmp_path / "killer").mkdir()
    (tmp_path / "killer" / "sitecustomize.py").write_text(KILLER)
    whole = script(*SMALL, *flags, "--runs-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    env = {"KILL_BEFORE": "replace checkpoint.pt 3", "PYTHONPATH": str(tmp_path / "killer")}
    assert script(*SMALL, *flags, "--runs-dir", tmp_path / "killed", **env).returncode == -signal.SIGKILL
    assert script("--resume", only(tmp_path / "killed")).returncode == 0
    assert_same_outcome(only(tmp_path / "killed"), only(tmp_path / "whole"))


# --- Command line -------------------------------------------------------------------------------------------------


class Nested(Chance):
    action_space = gym.spaces.Tuple([Discrete(2), Box(-1, 1, (2,))])


class Unbounded(Chance):
    action_space = Box(-np.inf, np.inf, (2,))


gym.register("Nested-v0", Nested)
gym.register("Unbounded-v0", Unbounded)


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--env-id Nested-v0", "hppo_hybrid.py"),
        ("--env-id Unbounded-v0", "finite bounds"),
        ("--eps-eta 0", "--eps-eta"),
        ("--eps-alpha -1", "--eps-alpha"),
        ("--eps-alpha-cov nan", "--eps-alpha-cov"),
        ("--target-period -1", "--target-period"),
        ("--target-period 100000000", "--target-period"),
        ("--popart --clip-vloss", "--popart"),
        ("--dual-learning-rate 0", "--dual-learning-rate"),
        ("--dual-parameterisation exp", "--dual-parameterisation"),
        ("--recurrent --backend envpool", "--recurrent"),
        ("--recurrent --num-envs 8 --num-minibatches 32", "--recurrent"),
        ("--clip-space log", "--clip-space"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(flags, named, tmp_path, capfd):
    with pytest.raises(SystemExit) as exit:
        vmpo.main(vmpo.parse_args(["--env-id", "CartPole-v1", "--runs-dir", str(tmp_path / "runs"), *flags.split()]))
    err = capfd.readouterr().err
    assert exit.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert not (tmp_path / "runs").exists()


# --- Learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("env_id, steps, least", [("CartPole-v1", 100_000, 475), ("Pendulum-v1", 200_000, -300)])
def test_it_learns(env_id, steps, least, seed, tmp_path):
    flags = ["--env-id", env_id, "--total-timesteps", steps, "--seed", seed, "--device", "cpu"]
    flags += ["--gamma", 0.95, "--learning-rate", 1e-3] if env_id == "Pendulum-v1" else []
    done = script(*flags, "--runs-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    returns = [float(row["return"]) for row in csv.DictReader(open(only(tmp_path) / "episodes.csv"))]
    assert np.mean(returns[:50]) < least / 4 if least > 0 else np.mean(returns[:50]) < 3 * least
    assert np.mean(returns[-100:]) >= least
