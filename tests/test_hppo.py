"""What is new in hppo_hybrid.py: its loss, its acting, and both in whole runs, on the command line and off it."""

import copy
import csv
import functools
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
from conftest import KILLER, LIMIT, assert_same_outcome, only, scalars, spaces
from moviepy import VideoFileClip
from torch.distributions import Categorical, Normal

import hppo_hybrid as hppo
import ppo_continuous

torch.set_num_threads(1)  # as the script does; two lose time on networks this small

SCRIPT = Path(__file__).parents[1] / "hppo_hybrid.py"
SIZES = "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 2 --eval-episodes 2 --device cpu".split()
SMALL = [*SIZES, "--encoder-sizes", "16", "8", "--no-compile"]
MASK = [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 1]]  # K = 4, P = 3: shared, single and no parameters


def agent_of(mask, O=3, masks_choices=False, **settings):
    """Args and an agent for K choices with P parameters, mask [K, P]; O numbers of an observation, and K of a mask."""
    torch.manual_seed(4)
    args = hppo.Args(**{"encoder_sizes": (8, 8), **settings})
    space = gym.spaces.Box(-np.inf, np.inf, (O + len(mask) * masks_choices,))
    hybrid = SimpleNamespace(mask=np.array(mask, dtype=bool))
    env = SimpleNamespace(hybrid=hybrid, observation_space=space, masks_choices=masks_choices)
    return args, hppo.Agent(env, args)


# --- Loss ---------------------------------------------------------------------------------------------------------


def by_hand(agent, batch, args):
    """log p(k), log p(x), entropy of each row, one by one over the choices that are valid there, and the values."""
    inputs, valid = batch["obs"][:, : agent.obs_dim], batch["obs"][:, agent.obs_dim :]
    hidden = [encoder(inputs) for encoder in agent.encoders]
    hidden = hidden if len(hidden) == 3 else hidden * 3
    logits, mean, V = agent.actor_logits(hidden[0]), agent.actor_mean(hidden[1]).tanh(), agent.critic(hidden[2])[:, 0]
    log_std = agent.actor_logstd(hidden[1]) if args.std_type == "state" else agent.actor_logstd.expand_as(mean)
    (K, P), zero, rows = agent.parameter_mask.shape, torch.zeros((), dtype=torch.float64), []
    for i, (k, *x) in enumerate(batch["actions"]):
        choices = [c for c in range(K) if not agent.masked or valid[i, c]]
        total = sum(logits[i, c].exp() for c in choices)
        p = {c: logits[i, c].exp() / total for c in choices}
        sigma = log_std[i].exp()
        used = {c: [j for j in range(P) if args.parameters == "all" or agent.parameter_mask[c, j]] for c in choices}
        density = [torch.exp(-(((x[j] - mean[i, j]) / sigma[j]) ** 2) / 2) / sigma[j] for j in used[int(k)]]
        log_x = sum((d.log() - 0.5 * math.log(2 * math.pi) for d in density), zero)
        spread = {c: sum((0.5 * (2 * math.pi * math.e * sigma[j] ** 2).log() for j in used[c]), zero) for c in choices}
        rows.append([p[int(k)].log(), log_x, sum(p[c] * (spread[c] - p[c].log()) for c in choices)])
    return *(torch.stack(column) for column in zip(*rows)), V


def batch_for(agent, args, M=64):
    """The old log-probabilities are near the agent's, so that some ratios are clipped and some are not."""
    K, P = agent.parameter_mask.shape
    valid = torch.rand(M, K) < 0.6
    valid[torch.arange(M), torch.arange(M) % K] = True
    k = torch.multinomial(valid.double() if agent.masked else torch.ones(M, K), 1)
    batch = {
        "obs": torch.cat([torch.randn(M, agent.obs_dim), *([valid] if agent.masked else [])], -1),
        "actions": torch.cat([k, torch.randn(M, P)], -1),
        "advantages": torch.randn(M) + 0.5,
        "returns": torch.randn(M),
        "values": torch.randn(M) * 0.3,
    }
    batch = {name: tensor.double() for name, tensor in batch.items()}
    log_k, log_x, _, _ = by_hand(agent, batch, args)
    batch["logprobs"] = torch.stack([log_k, log_x], -1).detach() + torch.randn(M, 2) * 0.3
    return batch


def clipped_gain(log_r, A, args):
    """E[min(r A, clip(r) A)], and the rate of r beyond a bound."""
    r, center = (log_r.exp(), 1.0) if args.clip_space == "ratio" else (log_r, 0.0)
    bound = center + args.clip_coef * A.sign()
    beyond = torch.where(A > 0, r > bound, r < bound) & (args.clip_coef > 0)
    rate = ((r - center).abs() > args.clip_coef).double().mean() * (args.clip_coef > 0)
    return torch.where(beyond, bound * A, r * A).mean(), rate


SETTINGS = [
    {},
    {"ent_coef": 0.05, "norm_adv": False},
    {"ent_coef": 0.05, "masks_choices": True},
    {"clip_coef": 0.0, "shared_encoder": False, "std_type": "fixed"},
    {"clip_space": "log", "std_type": "state", "log_std_init": -0.5, "ent_coef": 0.02},
]


@pytest.mark.parametrize("parameters", ["chosen", "all"])
@pytest.mark.parametrize("loss", ["separate", "joint"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_whole_loss_its_gradient_and_metrics(settings, loss, parameters):
    args, agent = agent_of(MASK, **{**settings, "loss": loss, "parameters": parameters, "clip_vloss": False})
    with torch.no_grad():  # else the choices would be nearly uniform, and the means 0
        agent.actor_logits.weight.mul_(100), agent.actor_mean.weight.mul_(50)
        if args.std_type == "independent":
            agent.actor_logstd += torch.tensor([0.3, 0.0, -0.4])
    agent = agent.double()
    batch = batch_for(agent, args)
    params = hppo.unflatten(hppo.init_optimizer(agent)["theta"], agent)
    grads, (total, metrics) = torch.func.grad_and_value(hppo.loss, has_aux=True)(params, agent, batch, {}, args)

    log_k, log_x, entropy, V = by_hand(agent, batch, args)
    A = batch["advantages"]
    if args.norm_adv:
        A = (A - A.mean()) / (((A - A.mean()) ** 2).sum() / (len(A) - 1)).sqrt()
    log_d, log_c = log_k - batch["logprobs"][:, 0], log_x - batch["logprobs"][:, 1]
    (gain_d, rate_d), (gain_c, rate_c) = clipped_gain(log_d, A, args), clipped_gain(log_c, A, args)
    joint_gain, rate = clipped_gain(log_d + log_c, A, args)
    gain, rates = gain_d + gain_c if loss == "separate" else joint_gain, (rate, rate_d, rate_c)
    v_loss = ((V - batch["returns"]) ** 2).mean() / 2
    expected = -gain + args.vf_coef * v_loss - args.ent_coef * entropy.mean()
    trainable = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    assert grads.keys() == trainable.keys()
    reference = torch.autograd.grad(expected, trainable.values())

    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, wanted in zip(grads.values(), reference):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-8)
    kls = [(log_r.exp() - 1 - log_r).mean() for log_r in (log_d + log_c, log_d, log_c)]
    wanted = dict(zip(hppo.METRICS, torch.stack([-gain, v_loss, entropy.mean(), *kls, *rates]).tolist()))
    assert dict(zip(hppo.METRICS, metrics.tolist())) == pytest.approx(wanted, rel=1e-6)
    assert list(wanted)[3:] == [
        "approx_kl",
        "kl_choice",
        "kl_parameters",
        "clipfrac",
        "clipfrac_choice",
        "clipfrac_parameters",
    ]
    if args.clip_coef:
        assert 0.2 < rate_d < 0.8 and 0.2 < rate_c < 0.8 and rate_d != rate_c


def test_parameters_that_the_choice_does_not_use_have_no_gradient_at_all():
    (args, agent), mask = agent_of(MASK), torch.tensor(MASK)
    k, x = torch.arange(40) % 4, torch.randn(40, 3)
    leaves = [torch.randn(40, n).requires_grad_() for n in (4, 3, 3)]  # logits, mean, log_std
    actions = torch.cat([k[:, None], x], -1)
    for loss in ("separate", "joint"):
        for parameters, used in (("chosen", mask[k] == 1), ("all", torch.ones(40, 3, dtype=torch.bool))):
            args.loss, args.parameters = loss, parameters
            logratios = hppo.hybrid_logprobs(agent, actions, *leaves, args)
            logratios = logratios - logratios.detach()
            parts = logratios.unbind(-1) if loss == "separate" else [logratios.sum(-1)]
            total = sum(hppo.policy_loss(part, torch.ones(40), 0.2, "ratio") for part in parts)
            _, *grads = torch.autograd.grad(total, leaves)
            for gradient in grads:
                assert torch.equal(gradient != 0, used)

    agent = agent_of(MASK)[1]  # the same through the whole loss: choices 0 and 2 do not use parameter 1
    batch = {name: tensor.float() for name, tensor in batch_for(agent.double(), args).items()}
    agent, batch["actions"][:, 0] = agent.float(), torch.arange(64) % 2 * 2
    params = hppo.unflatten(hppo.init_optimizer(agent)["theta"], agent)
    args = hppo.Args(encoder_sizes=(8, 8))
    grads, _ = torch.func.grad(hppo.loss, has_aux=True)(params, agent, batch, {}, args)
    for name in ("actor_mean.weight", "actor_mean.bias", "actor_logstd"):
        assert (grads[name][1] == 0).all() and (grads[name][[0, 2]] != 0).all()


@pytest.mark.parametrize("parameters", ["chosen", "all"])
def test_entropy_is_minus_the_mean_log_probability_of_what_is_drawn(parameters):
    args, agent = agent_of(MASK, parameters=parameters)
    n = 400_000
    logits = torch.tensor([1.0, -0.5, 0.3, 0.0], dtype=torch.float64).expand(n, 4)
    log_std = torch.tensor([-1.0, 0.5, 0.2], dtype=torch.float64).expand(n, 3)
    k = torch.multinomial(logits[0].softmax(-1), n, replacement=True)
    x = log_std.exp() * torch.randn(n, 3)
    drawn = hppo.hybrid_logprobs(agent.double(), torch.cat([k[:, None], x], -1), logits, 0 * x, log_std, args).sum(-1)
    entropy = hppo.hybrid_entropy(agent, logits[:1], log_std[:1], args).item()
    assert entropy == pytest.approx(-drawn.mean().item(), abs=5 * drawn.std().item() / math.sqrt(n))


@pytest.mark.parametrize("parameters", ["chosen", "all"])
@pytest.mark.parametrize("loss", ["separate", "joint"])
@pytest.mark.parametrize("norm_adv", [True, False])
def test_with_one_choice_an_update_is_that_of_ppo_continuous(norm_adv, loss, parameters):
    """The ratio of the only choice is 1: it adds a constant to the loss, and nothing to its gradient."""
    settings = {"norm_adv": norm_adv, "ent_coef": 0.01, "clip_vloss": True}
    args, agent = agent_of([[1, 1]], encoder_sizes=(64, 64), shared_encoder=False, loss=loss, **settings)
    args.parameters, base_args = parameters, ppo_continuous.Args(**settings)
    base = ppo_continuous.Agent(spaces(3, 2), base_args)
    for target, source in [(agent.encoders[1], base.actor), (agent.encoders[2], base.critic[:-1])]:
        target.load_state_dict(source.state_dict())
    for name in ("actor_mean", "actor_logstd"):
        setattr(agent, name, copy.deepcopy(getattr(base, name)))
    agent.critic = copy.deepcopy(base.critic[-1])
    base_mean, base.actor_mean = base.actor_mean, torch.nn.Sequential(base.actor_mean, torch.nn.Tanh())

    batch = {name: tensor.float() for name, tensor in batch_for(agent.double(), args).items()}
    agent, coefs, indices = agent.float(), {"learning_rate": torch.tensor(1e-3)}, torch.randperm(64).view(4, 16)
    base_batch = {**batch, "actions": batch["actions"][:, 1:], "logprobs": batch["logprobs"][:, 1]}
    batch["logprobs"][:, 0] = 0  # of the only choice
    optimizer, metrics = hppo.update_step(hppo.init_optimizer(agent), batch, indices, coefs, agent, args)
    base_step = functools.partial(ppo_continuous.update_step, agent=base, args=base_args)
    base_optimizer = ppo_continuous.init_optimizer(base)
    wanted, names, base_metrics = base_step(base_optimizer, coefs["learning_rate"], base_batch, indices)
    before = base_mean.weight.clone()
    hppo.write_parameters(optimizer["theta"], agent)
    with torch.no_grad():
        for name, value in ppo_continuous.unflatten(wanted["theta"], base).items():
            base.get_parameter(name).copy_(value)
    assert (base_mean.weight - before).abs().max() > 1e-3  # four steps of Adam
    pairs = [(agent.encoders[1], base.actor), (agent.encoders[2], base.critic[:-1]), (agent.critic, base.critic[-1])]
    pairs = [(a.state_dict(), b.state_dict()) for a, b in [*pairs, (agent.actor_mean, base_mean)]]
    for found, expected in [*pairs, ({"": agent.actor_logstd}, {"": base.actor_logstd})]:
        assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)
    metrics = dict(zip(hppo.METRICS, metrics.tolist()))
    constant = 0 if norm_adv or loss == "joint" else -batch["advantages"].mean().item()
    metrics["policy_loss"] -= constant
    for name, value in zip(names, base_metrics.tolist()):
        assert metrics[name] == pytest.approx(value, abs=1e-5)
    assert metrics["kl_choice"] == metrics["clipfrac_choice"] == 0
    assert (
        metrics["kl_parameters"] == metrics["approx_kl"] and metrics["clipfrac_parameters"] == metrics["clipfrac"] > 0
    )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("loss", ["separate", "joint"])
def test_without_parameters_an_update_is_that_of_discrete_ppo(loss):
    args, agent = agent_of(np.zeros((4, 0)), loss=loss, ent_coef=0.01)
    batch = {name: tensor.float() for name, tensor in batch_for(agent.double(), args).items()}
    agent, indices = agent.float(), torch.randperm(64).view(4, 16)
    batch["logprobs"][:, 1] = 0
    reference = copy.deepcopy(agent)
    adam = torch.optim.Adam([p for p in reference.parameters() if p.numel()], lr=1e-3, eps=1e-5)
    for rows in indices:
        k, A, R, V_old = (batch[name][rows] for name in ("actions", "advantages", "returns", "values"))
        hidden = reference.encoders[0](batch["obs"][rows])
        pi, V = Categorical(logits=reference.actor_logits(hidden)), reference.critic(hidden)[:, 0]
        A = (A - A.mean()) / A.std()
        r = (pi.log_prob(k[:, 0]) - batch["logprobs"][rows, 0]).exp()
        gain = torch.min(r * A, r.clamp(0.8, 1.2) * A).mean()
        error = torch.max((V - R) ** 2, (V_old + (V - V_old).clamp(-0.2, 0.2) - R) ** 2).mean()
        adam.zero_grad()
        (-gain + 0.25 * error - 0.01 * pi.entropy().mean()).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        adam.step()
    coefs, before = {"learning_rate": torch.tensor(1e-3)}, agent.actor_logits.weight.clone()
    optimizer, metrics = hppo.update_step(hppo.init_optimizer(agent), batch, indices, coefs, agent, args)
    hppo.write_parameters(optimizer["theta"], agent)
    assert (agent.actor_logits.weight - before).abs().max() > 1e-3
    for (name, found), wanted in zip(agent.named_parameters(), reference.parameters()):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6, msg=name)
    metrics = dict(zip(hppo.METRICS, metrics.tolist()))
    assert metrics["kl_choice"] == metrics["approx_kl"] > 0
    assert metrics["kl_parameters"] == metrics["clipfrac_parameters"] == 0


# --- Acting -------------------------------------------------------------------------------------------------------


def opinionated(masks_choices=False):
    """An agent with choices of probability 0.1, 0.2, 0.3, 0.4, and means -0.5, 0.2, 0.9."""
    _, agent = agent_of(MASK, masks_choices=masks_choices)
    with torch.no_grad():
        agent.actor_logits.weight.zero_(), agent.actor_mean.weight.zero_()
        agent.actor_logits.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log() + 5)  # softmax does not mind the 5
        agent.actor_mean.bias.copy_(torch.tensor([-0.5, 0.2, 0.9]).atanh())
        agent.actor_logstd.copy_(torch.tensor([0.5, 1.0, 2.0]).log())
    return agent


def test_act_draws_from_the_softmax_and_the_gaussian():
    agent, n = opinionated(), 400_000
    actions = hppo.act(agent, torch.zeros(n, 3), hppo.draw_noise(agent, n))
    assert actions.shape == (n, 4)
    k, x = actions[:, 0], actions[:, 1:]
    for choice, p in enumerate([0.1, 0.2, 0.3, 0.4]):
        drawn = k == choice
        assert drawn.double().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))
        for j, (mean, std) in enumerate([(-0.5, 0.5), (0.2, 1), (0.9, 2)]):  # for any choice the same
            assert x[drawn, j].mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(drawn.sum()))
            assert x[drawn, j].std().item() == pytest.approx(std, rel=0.02)
            below = (x[drawn, j] < mean - std).double().mean().item()
            assert below == pytest.approx(Normal(0, 1).cdf(torch.tensor(-1.0)).item(), abs=0.01)


def test_without_noise_act_is_greedy():
    agent = opinionated()
    noise = torch.zeros_like(hppo.draw_noise(agent, 5))
    greedy = torch.tensor([3.0, -0.5, 0.2, 0.9]).expand(5, 4)
    torch.testing.assert_close(hppo.act(agent, torch.zeros(5, 3), noise), greedy)
    assert hppo.draw_noise(agent, 7, 5).shape == (7, 5, 4 + 3)


def test_a_masked_choice_has_probability_0_and_is_never_drawn():
    agent, n = opinionated(masks_choices=True), 200_000
    agent.obs_rms.update(torch.randn(50, 7) * 3 + 2)  # the mask must not be scaled with the observation
    with torch.no_grad():
        agent.actor_logits.bias += torch.tensor([0.0, 80.0, 0.0, 0.0])  # not even the one that all speaks for
    obs = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]).expand(n, 7)
    logits, _, _, V = agent(agent.normalize(obs[:1]))
    p = logits.softmax(-1)[0]
    assert p[1] == p[3] == 0
    torch.testing.assert_close(p, torch.tensor([0.25, 0, 0.75, 0]))
    k = hppo.act(agent, obs, hppo.draw_noise(agent, n))[:, 0]
    assert set(k.tolist()) == {0, 2}
    assert (k == 0).double().mean().item() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / n))
    assert hppo.act(agent, obs[:1], torch.zeros(1, 7))[0, 0] == 2
    none = obs[:1].clone()
    none[:, 3:] = 0  # behind an episode's end nothing may be valid: still a number, and no other value
    logits, _, _, value = agent(agent.normalize(none))
    assert logits.softmax(-1).isfinite().all() and torch.equal(value, V)


def test_a_masked_choice_gets_no_gradient_and_no_nan():
    """Values and gradients under random masks are in test_whole_loss; here the same choice is masked in all rows."""
    args, agent = agent_of(MASK, masks_choices=True, ent_coef=0.05)
    agent.actor_logits.bias.data[2] += 80.0
    batch = batch_for(agent.double(), args)
    batch["obs"][:, 3:] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    batch["actions"][:, 0] = torch.arange(64) % 2 * 3
    params = hppo.unflatten(hppo.init_optimizer(agent)["theta"], agent)
    grads, metrics = torch.func.grad(hppo.loss, has_aux=True)(params, agent, batch, {}, args)
    assert metrics.isfinite().all() and all(gradient.isfinite().all() for gradient in grads.values())
    assert (grads["actor_logits.weight"][2] == 0).all() and grads["actor_logits.bias"][2] == 0
    assert (grads["actor_logits.bias"][[0, 1, 3]] != 0).all()


# --- Runs ---------------------------------------------------------------------------------------------------------


def run(runs_dir, *flags) -> Path:
    """A run in this process, for speed; its folder."""
    hppo.main(hppo.parse_args(["--runs-dir", str(runs_dir), *map(str, flags)]))
    return only(runs_dir)


def result_of(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    "flags",
    [
        "--env-id HybridMoving-v0",
        "--env-id HybridSliding-v0 --loss joint --parameters all --no-shared-encoder",
        "--env-id HybridCatchPoint-v0 --std-type state --ent-coef 0.01",
        "--env-id HybridHardMove10-v0 --loss joint --no-norm-obs",
        "--env-id gym_platform:Platform-v0 --parameters all",
        "--env-id HalfCheetah-v4 --hold 1 2 4 8",
    ],
)
def test_a_whole_run(flags, tmp_path, capfd):
    if "Platform" in flags:
        pytest.importorskip("gym_platform", reason="hybrid-platform is not installed")
    folder = run(tmp_path, *SMALL, "--total-timesteps", 512, *flags.split())
    out, err = capfd.readouterr()
    embedded = "Hybrid" in flags
    assert ("BatchedEnvs" if embedded else "GymnasiumEnvs") in out and "notice" not in out + err
    result = result_of(folder)
    assert result["global_step"] == 512 and len(result["eval_returns"]) == 2
    assert result["eval_success"] in (0, 0.5, 1) if embedded else "eval_success" not in result
    assert (", success " in out) == embedded
    logged = {tag for tag, step, _ in scalars(folder) if step == 512}
    assert logged >= {f"losses/{name}" for name in hppo.METRICS}
    means = {step: value for tag, step, value in scalars(folder) if tag == "charts/episodic_return"}
    with open(folder / "episodes.csv") as file:
        rows = list(csv.DictReader(file))
    episodes = [(math.ceil(int(row["global_step"]) / 256) * 256, float(row["return"])) for row in rows]
    by_batch = {step: np.mean([value for batch, value in episodes if batch == step]) for step, _ in episodes}
    assert means == pytest.approx(by_batch, rel=1e-5) and (means or "Half" in flags)
    hppo.main(hppo.parse_args(["--eval", str(folder)]))  # the same model, the same episodes
    again = capfd.readouterr().out
    assert again.splitlines()[0] in out and again.splitlines()[1] in out


def test_compiled_and_plain_updates_agree(tmp_path):
    flags = "--env-id HybridMoving-v0 --total-timesteps 64 --num-envs 2 --num-steps 32 --update-epochs 2"
    models = []
    for mode in ("--compile", "--no-compile"):
        folder = run(tmp_path / mode, *flags.split(), "--num-minibatches", 2, "--encoder-sizes", 16, mode)
        models.append(torch.load(folder / "model.pt", weights_only=True))
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=0, atol=1e-5)


def script(*flags, **env) -> subprocess.CompletedProcess:
    """The script in a process of its own."""
    command = [sys.executable, SCRIPT, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=LIMIT)


def test_a_killed_run_resumes_to_the_bit(tmp_path):
    (tmp_path / "killer").mkdir()
    (tmp_path / "killer" / "sitecustomize.py").write_text(KILLER)
    flags = [*SMALL, "--env-id", "HybridMoving-v0", "--total-timesteps", 16 * 256, "--checkpoint-every", 3]
    whole = script(*flags, "--runs-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    # Call 1 is the checkpoint at the start, 2 that of iteration 3; the run dies with iterations 4 to 6 in its logs.
    env = {"KILL_BEFORE": "replace checkpoint.pt 3", "PYTHONPATH": str(tmp_path / "killer")}
    killed = script(*flags, "--runs-dir", tmp_path / "killed", **env)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder, expected = only(tmp_path / "killed"), only(tmp_path / "whole")
    resumed = script("--resume", folder)
    assert resumed.returncode == 0, resumed.stderr
    assert "notice" not in resumed.stdout + resumed.stderr
    assert_same_outcome(folder, expected)
    assert result_of(folder)["eval_success"] == result_of(expected)["eval_success"]


def test_capture_video_films_the_embedded_environments(tmp_path):
    flags = [*SMALL, "--env-id", "HybridMoving-v0", "--total-timesteps", 256, "--capture-video"]
    films = sorted(run(tmp_path, *flags).glob("videos/*/*.mp4"))
    assert len(films) == 2  # of --eval-episodes 2
    for path in films:
        with VideoFileClip(str(path)) as clip:
            assert clip.size == [240, 240] and clip.n_frames > 1
            red, green, blue = np.moveaxis(clip.get_frame(0).astype(int), -1, 0)
            target, agent = (green > red + 60) & (green > blue), (blue > red + 60) & (blue > green)
            assert target.any() and agent.any() and (red > 200).mean() > 0.9


@pytest.mark.parametrize("flags", ["--compile", "--no-compile --loss joint", "--no-compile --parameters all"])
def test_hard_move_is_solved_within_60k_steps(flags, tmp_path, capfd):
    """A random policy leaves the field or runs out of steps, for a return of about -0.9; the most there is is 2."""
    sizes = "--num-envs 32 --num-steps 64 --num-minibatches 16 --encoder-sizes 64 64 --eval-episodes 200 --device cpu"
    flags = ["--env-id", "HybridHardMove4-v0", *sizes.split(), "--learning-rate", "1e-3", *flags.split()]
    folder = run(tmp_path, *flags, "--total-timesteps", 60_000)
    assert "uncompiled" not in capfd.readouterr().err  # the notice of a compiler that failed
    returns = [float(row["return"]) for row in csv.DictReader(open(folder / "episodes.csv"))]
    assert np.mean(returns[:100]) < -0.5 and np.mean(returns[-100:]) > 1.5
    assert result_of(folder)["eval_success"] >= 0.95


def test_a_run_s_own_settings_may_be_repeated_on_resume(tmp_path, capsys):
    """JSON makes lists of tuples; they are the same settings all the same."""
    hppo.main(hppo.parse_args([*SMALL, "--total-timesteps", "256", "--runs-dir", str(tmp_path)]))
    folder = str(only(tmp_path))
    args = hppo.parse_args(["--resume", folder, "--encoder-sizes", "16", "8"])
    assert args.encoder_sizes == (16, 8) and args.hold == ()
    with pytest.raises(SystemExit):
        hppo.parse_args(["--resume", folder, "--encoder-sizes", "16", "16"])
    assert "error: --encoder-sizes (16, 16): the run in" in capsys.readouterr().err
