"""hppo_hybrid.py: its loss, its acting, and both in whole runs."""

import copy
import csv
import functools
import itertools
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import KILLER, assert_same_outcome, finish, only, scalars, spaces, start
from gymnasium.spaces import Box, Discrete, Tuple
from moviepy import VideoFileClip
from torch.distributions import Categorical, Normal

import hppo_hybrid as hppo
import ppo_continuous

METRICS = ["policy_loss", "value_loss", "entropy", "approx_kl", "kl_choice", "kl_parameters"]
METRICS += ["clipfrac", "clipfrac_choice", "clipfrac_parameters"]
HYBRID = "environments.hybrid:Hybrid"
SIZES = "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 2 --eval-episodes 2 --device cpu".split()
SMALL = [*SIZES, "--encoder-sizes", "16", "8", "--no-compile"]
MASK = [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 1]]  # C = 4, P = 3: shared, single and no parameters


def agent_of(mask, nvec=None, O=3, **settings):
    """Args and an agent for choices with P parameters, mask [C, P]; C choices of one Discrete, or nvec of some."""
    torch.manual_seed(4)
    args = hppo.Args(**{"encoder_sizes": (8, 8), **settings})
    choices = [Discrete(n) for n in nvec or [len(mask)]]
    space = hppo.HybridSpace(Tuple([*choices, Box(-1, 1, (np.shape(mask)[1],))]), mask)
    agent = hppo.Agent(SimpleNamespace(observation_space=Box(-np.inf, np.inf, (O,)), action_space=space), args)
    agent.mask = np.array(mask)
    return args, agent


# --- Loss ---------------------------------------------------------------------------------------------------------


def by_hand(agent, batch, args):
    """log p(k), log p(x), entropy of each row, one by one over the choices that are valid there, and the values."""
    hidden = [encoder(batch["obs"]) for encoder in agent.encoders]
    hidden = hidden if len(hidden) == 3 else hidden * 3
    logits, mean, V = agent.actor_logits(hidden[0]), agent.actor_mean(hidden[1]).tanh(), agent.critic(hidden[2])[:, 0]
    log_std = agent.actor_logstd(hidden[1]) if args.std_type == "state" else agent.actor_logstd.expand_as(mean)
    first, P, zero, rows = np.cumsum([0, *agent.nvec]), mean.shape[1], torch.zeros((), dtype=torch.float64), []
    for i, action in enumerate(batch["actions"]):
        k, x = tuple(int(c) for c in action[: len(agent.nvec)]), action[len(agent.nvec) :]
        valid = [[c for c in range(n) if batch["masks"][i, at + c]] for at, n in zip(first, agent.nvec)]
        total = [sum(logits[i, at + c].exp() for c in choices) for at, choices in zip(first, valid)]
        p, used = {}, {}
        for combination in itertools.product(*valid):
            p[combination] = math.prod(logits[i, at + c].exp() / z for at, c, z in zip(first, combination, total))
            uses = [agent.mask[at + c] for at, c in zip(first, combination)]
            used[combination] = [j for j in range(P) if args.parameters == "all" or all(row[j] for row in uses)]
        sigma = log_std[i].exp()
        density = [torch.exp(-(((x[j] - mean[i, j]) / sigma[j]) ** 2) / 2) / sigma[j] for j in used[k]]
        log_x = sum((d.log() - 0.5 * math.log(2 * math.pi) for d in density), zero)
        spread = {c: sum((0.5 * (2 * math.pi * math.e * sigma[j] ** 2).log() for j in used[c]), zero) for c in p}
        rows.append([p[k].log(), log_x, sum(p[c] * (spread[c] - p[c].log()) for c in p)])
    return *(torch.stack(column) for column in zip(*rows)), V


def batch_for(agent, args, masked=False, M=64):
    """The old log-probabilities are near the agent's, so that some ratios are clipped and some are not."""
    masks, k = [], []
    for n in agent.nvec:
        valid = torch.rand(M, n) < (0.6 if masked else 1)
        valid[torch.arange(M), torch.arange(M) % n] = True
        masks.append(valid)
        k.append(torch.multinomial(valid.double(), 1))
    batch = {
        "obs": torch.randn(M, 3),
        "actions": torch.cat([*k, torch.randn(M, agent.mask.shape[1])], -1),
        "advantages": torch.randn(M) + 0.5,
        "returns": torch.randn(M),
        "values": torch.randn(M) * 0.3,
    }
    batch = {name: tensor.double() for name, tensor in batch.items()}
    batch["masks"] = torch.cat(masks, -1)
    log_k, log_x, _, _ = by_hand(agent, batch, args)
    batch["logprobs"] = torch.stack([log_k, log_x], -1).detach() + torch.randn(M, 2) * 0.3
    return batch


def single(batch):
    """The batch in float32."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def gradient(agent, batch, args):
    """The loss, {parameter: its gradient}, and the metrics."""
    params = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    total, metrics = hppo.loss(agent, batch, args)
    return total, dict(zip(params, torch.autograd.grad(total, params.values()))), metrics


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
    {"ent_coef": 0.05, "masked": True},
    {"ent_coef": 0.05, "masked": True, "nvec": [2, 2]},
    {"clip_coef": 0.0, "shared_encoder": False, "std_type": "fixed"},
    {"clip_space": "log", "std_type": "state", "log_std_init": -0.5, "ent_coef": 0.02},
]


@pytest.mark.parametrize("parameters", ["chosen", "all"])
@pytest.mark.parametrize("loss", ["separate", "joint"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_whole_loss_its_gradient_and_metrics(settings, loss, parameters):
    settings = {**settings, "loss": loss, "parameters": parameters, "clip_vloss": False, "norm_obs": False}
    masked = settings.pop("masked", False)
    args, agent = agent_of(MASK, **settings)
    with torch.no_grad():  # else the choices would be nearly uniform, and the means 0
        agent.actor_logits.weight.mul_(100), agent.actor_mean.weight.mul_(50)
        if args.std_type == "independent":
            agent.actor_logstd += torch.tensor([0.3, 0.0, -0.4])
    agent = agent.double()
    batch = batch_for(agent, args, masked)
    total, grads, metrics = gradient(agent, batch, args)

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
    reference = torch.autograd.grad(expected, [agent.get_parameter(name) for name in grads])

    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, wanted in zip(grads.values(), reference):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    kls = [(log_r.exp() - 1 - log_r).mean() for log_r in (log_d + log_c, log_d, log_c)]
    wanted = dict(zip(METRICS, torch.stack([-gain, v_loss, entropy.mean(), *kls, *rates]).tolist()))
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(wanted, rel=1e-6)
    if args.clip_coef:
        assert 0.2 < rate_d < 0.8 and 0.2 < rate_c < 0.8 and rate_d != rate_c


@pytest.mark.parametrize("parameters", ["chosen", "all"])
@pytest.mark.parametrize("nvec", [[4], [2, 2]], ids=str)
def test_parameters_that_the_choices_do_not_use_have_no_gradient(nvec, parameters):
    _, agent = agent_of(MASK, nvec, parameters=parameters)
    mean, log_std = torch.randn(2, 40, 3).requires_grad_().unbind()
    k = torch.stack([torch.randint(n, (40,)) for n in nvec], -1)
    log_probs = [torch.randn(40, n).log_softmax(-1) for n in nvec]
    pi = hppo.Hybrid(log_probs, hppo.Gaussian(mean, log_std), agent.uses)
    total = pi.log_prob(torch.cat([k, torch.randn(40, 3)], -1)).sum()
    used = torch.tensor(MASK)[k + torch.tensor(nvec).cumsum(0) - torch.tensor(nvec)].all(-2)
    for found in torch.autograd.grad(total, [mean, log_std]):
        assert torch.equal(found != 0, used if parameters == "chosen" else torch.ones_like(used))


@pytest.mark.parametrize("loss", ["separate", "joint"])
def test_the_loss_moves_no_parameter_that_no_choice_of_the_batch_uses(loss):
    args, agent = agent_of(MASK, loss=loss)
    batch = single(batch_for(agent.double(), args))
    batch["actions"][:, 0] = torch.arange(64) % 2 * 2  # choices 0 and 2 do not use parameter 1
    _, grads, _ = gradient(agent.float(), batch, args)
    for name in ("actor_mean.weight", "actor_mean.bias", "actor_logstd"):
        assert (grads[name][1] == 0).all() and (grads[name][[0, 2]] != 0).all()


@pytest.mark.parametrize("parameters", ["chosen", "all"])
@pytest.mark.parametrize("nvec", [[4], [2, 2]], ids=str)
def test_entropy_is_minus_the_mean_log_probability_of_what_is_drawn(nvec, parameters):
    _, agent = agent_of(MASK, nvec, parameters=parameters)
    agent, n = agent.double(), 400_000
    logits = torch.tensor([[1.0, -0.5, 0.3, 0.0]]).double()
    log_probs = [part.log_softmax(-1) for part in logits.split(nvec, -1)]
    log_std = torch.tensor([-1.0, 0.5, 0.2]).double().expand(1, 3)
    pi = hppo.Hybrid(log_probs, hppo.Gaussian(0 * log_std, log_std), agent.uses)
    many = [part.expand(n, -1) for part in log_probs]
    drawn = hppo.Hybrid(many, hppo.Gaussian(torch.zeros(n, 3), log_std.expand(n, 3)), agent.uses)
    log_p = drawn.log_prob(drawn.sample(agent.noise(n).double())).sum(-1)
    assert pi.entropy().item() == pytest.approx(-log_p.mean().item(), abs=5 * log_p.std().item() / math.sqrt(n))


def four_steps(module, agent, batch, args) -> dict:
    """One pass over the batch of 64 in minibatches of 16, at a learning rate of 1e-3; its metrics."""
    args.update_epochs, args.num_minibatches = 1, 4
    step, learning_rate = functools.partial(module.update_step, agent=agent, args=args), torch.tensor(1e-3)
    torch.manual_seed(7)
    return module.update(step, agent, module.init_optimizer(agent), learning_rate, batch, args)


@pytest.mark.parametrize("parameters", ["chosen", "all"])
@pytest.mark.parametrize("loss", ["separate", "joint"])
@pytest.mark.parametrize("norm_adv", [True, False])
def test_with_one_choice_an_update_is_that_of_ppo_continuous(norm_adv, loss, parameters):
    """The ratio of the only choice is 1: it adds a constant to the loss, and nothing to its gradient."""
    settings = {"norm_adv": norm_adv, "ent_coef": 0.01, "clip_vloss": True}
    sizes = {"encoder_sizes": (64, 64), "shared_encoder": False}
    args, agent = agent_of([[1, 1]], loss=loss, parameters=parameters, **sizes, **settings)
    base_args = ppo_continuous.Args(**settings)
    base = ppo_continuous.Agent(spaces(3, 2), base_args)
    for target, source in [(agent.encoders[1], base.actor), (agent.encoders[2], base.critic[:-1])]:
        target.load_state_dict(source.state_dict())
    for name in ("actor_mean", "actor_logstd"):
        setattr(agent, name, copy.deepcopy(getattr(base, name)))
    agent.critic = copy.deepcopy(base.critic[-1])
    base_mean, base.actor_mean = base.actor_mean, torch.nn.Sequential(base.actor_mean, torch.nn.Tanh())

    batch, agent = single(batch_for(agent.double(), args)), agent.float()
    base_batch = {**batch, "actions": batch["actions"][:, 1:], "logprobs": batch["logprobs"][:, 1]}
    batch["logprobs"][:, 0] = 0  # of the only choice
    before = base_mean.weight.clone()
    metrics = four_steps(hppo, agent, batch, args)
    wanted = four_steps(ppo_continuous, base, base_batch, base_args)
    assert (base_mean.weight - before).abs().max() > 1e-3  # four steps of Adam
    pairs = [(agent.encoders[1], base.actor), (agent.encoders[2], base.critic[:-1]), (agent.critic, base.critic[-1])]
    pairs = [(a.state_dict(), b.state_dict()) for a, b in [*pairs, (agent.actor_mean, base_mean)]]
    for found, expected in [*pairs, ({"": agent.actor_logstd}, {"": base.actor_logstd})]:
        assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)
    constant = 0 if norm_adv or loss == "joint" else -batch["advantages"].mean().item()
    metrics["policy_loss"] -= constant
    for name, value in wanted.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5)
    assert metrics["kl_choice"] == metrics["clipfrac_choice"] == 0
    assert metrics["kl_parameters"] == metrics["approx_kl"]
    assert metrics["clipfrac_parameters"] == metrics["clipfrac"] > 0


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("loss", ["separate", "joint"])
def test_without_parameters_an_update_is_that_of_discrete_ppo(loss):
    args, agent = agent_of(np.zeros((4, 0)), loss=loss, ent_coef=0.01)
    batch, agent = single(batch_for(agent.double(), args)), agent.float()
    batch["logprobs"][:, 1] = 0
    reference = copy.deepcopy(agent)
    adam = torch.optim.Adam([p for p in reference.parameters() if p.numel()], lr=1e-3, eps=1e-5)
    torch.manual_seed(7)  # as in four_steps
    for rows in torch.randperm(64).view(4, 16):
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
    before = agent.actor_logits.weight.clone()
    metrics = four_steps(hppo, agent, batch, args)
    assert (agent.actor_logits.weight - before).abs().max() > 1e-3
    for (name, found), wanted in zip(agent.named_parameters(), reference.parameters()):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6, msg=name)
    assert metrics["kl_choice"] == metrics["approx_kl"] > 0
    assert metrics["kl_parameters"] == metrics["clipfrac_parameters"] == 0


# --- Acting -------------------------------------------------------------------------------------------------------


EVERY = torch.ones(1, 4, dtype=torch.bool)


def opinionated():
    """An agent with choices of probability 0.1, 0.2, 0.3, 0.4, and means -0.5, 0.2, 0.9."""
    _, agent = agent_of(MASK)
    with torch.no_grad():
        agent.actor_logits.weight.zero_(), agent.actor_mean.weight.zero_()
        agent.actor_logits.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log() + 5)  # softmax does not mind the 5
        agent.actor_mean.bias.copy_(torch.tensor([-0.5, 0.2, 0.9]).atanh())
        agent.actor_logstd.copy_(torch.tensor([0.5, 1.0, 2.0]).log())
    return agent


def test_actions_are_drawn_from_the_softmax_and_the_gaussian():
    agent, n = opinionated(), 400_000
    actions = agent.policy(torch.zeros(n, 3), EVERY.expand(n, 4)).sample(agent.noise(n))
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


def test_the_mode_is_the_likeliest_choice_and_the_mean():
    agent = opinionated()
    greedy = torch.tensor([3.0, -0.5, 0.2, 0.9]).expand(5, 4)
    torch.testing.assert_close(agent.policy(torch.zeros(5, 3), EVERY.expand(5, 4)).mode, greedy)
    assert agent.noise(7, 5).shape == (7, 5, 4 + 3)


def test_several_choices_are_drawn_from_a_softmax_each():
    _, agent = agent_of(np.ones((5, 1)), [2, 3])
    agent.actor_logits.weight.data.zero_()
    agent.actor_logits.bias.data.copy_(torch.tensor([0.2, 0.8, 0.5, 0.3, 0.2]).log())
    n = 200_000
    masks = torch.tensor([True, True, True, False, True]).expand(n, 5)
    k = agent.policy(torch.zeros(n, 3), masks).sample(agent.noise(n))[:, :2].long()
    counts = torch.bincount(k[:, 0] * 3 + k[:, 1], minlength=6) / n
    wanted = torch.tensor([0.2 * 5 / 7, 0, 0.2 * 2 / 7, 0.8 * 5 / 7, 0, 0.8 * 2 / 7])
    torch.testing.assert_close(counts, wanted, rtol=0, atol=5 * math.sqrt(0.25 / n))
    assert agent.policy(torch.zeros(1, 3), masks[:1]).mode[0, :2].tolist() == [1, 0]


def test_a_masked_choice_has_probability_0_and_is_never_drawn():
    agent, n = opinionated(), 200_000
    with torch.no_grad():
        agent.actor_logits.bias += torch.tensor([0.0, 80.0, 0.0, 0.0])  # not even the one that all speaks for
    obs, masks = torch.zeros(n, 3), torch.tensor([True, False, True, False]).expand(n, 4)
    pi = agent.policy(obs, masks)
    p = pi.log_probs[0][0].exp()
    assert p[1] == p[3] == 0
    torch.testing.assert_close(p, torch.tensor([0.25, 0, 0.75, 0]))
    k = pi.sample(agent.noise(n))[:, 0]
    assert set(k.tolist()) == {0, 2}
    assert (k == 0).double().mean().item() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / n))
    assert pi.mode[0, 0] == 2


def test_a_masked_choice_gets_no_gradient_and_no_nan():
    """Values and gradients under random masks are in test_whole_loss; here the same choice is masked in all rows."""
    args, agent = agent_of(MASK, ent_coef=0.05)
    agent.actor_logits.bias.data[2] += 80.0
    batch = batch_for(agent.double(), args)
    batch["masks"][:] = torch.tensor([True, True, False, True])
    batch["actions"][:, 0] = torch.arange(64) % 2 * 3
    _, grads, metrics = gradient(agent, batch, args)
    assert all(value.isfinite() for value in metrics.values())
    assert all(found.isfinite().all() for found in grads.values())
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
        "",
        "--env-id HalfCheetah-v4 --hold 1 2 4 8 --parameters all",
        f"--env-id {HYBRID}Moving-v0",
        f"--env-id {HYBRID}Sliding-v0 --loss joint --parameters all --no-shared-encoder",
        f"--env-id {HYBRID}CatchPoint-v0 --std-type state --ent-coef 0.01",
        f"--env-id {HYBRID}HardMove10-v0 --loss joint --no-norm-obs",
        f"--env-id {HYBRID}Platform-v0",
    ],
)
def test_a_whole_run(flags, tmp_path, capfd):
    flags = flags.split()
    folder = run(tmp_path, *SMALL, "--total-timesteps", 512, *flags)
    out, err = capfd.readouterr()
    assert "notice" not in out + err
    result = result_of(folder)
    assert result["global_step"] == 512 and len(result["eval_returns"]) == 2
    hybrid = any(HYBRID in flag for flag in flags)
    assert (result["eval_success"] in (0, 0.5, 1)) if hybrid else "eval_success" not in result
    logged = {tag for tag, step, _ in scalars(folder) if step == 512}
    assert logged >= {f"losses/{name}" for name in METRICS}
    means = {step: value for tag, step, value in scalars(folder) if tag == "charts/episodic_return" and step > 0}
    with open(folder / "episodes.csv") as file:
        rows = list(csv.DictReader(file))
    episodes = [(math.ceil(int(row["global_step"]) / 256) * 256, float(row["return"])) for row in rows]
    by_batch = {step: np.mean([value for batch, value in episodes if batch == step]) for step, _ in episodes}
    assert means == pytest.approx(by_batch, rel=1e-5) and (means or "HardMove" not in str(flags))
    hppo.main(hppo.parse_args(["--eval", str(folder), *flags[:2]]))  # the same model, the same episodes
    assert all(line in out for line in capfd.readouterr().out.splitlines()[:2])


def test_compiled_and_plain_updates_agree(tmp_path):
    flags = f"--env-id {HYBRID}Moving-v0 --total-timesteps 64 --num-envs 2 --num-steps 32 --update-epochs 2"
    models = []
    for mode in ("--compile", "--no-compile"):
        folder = run(tmp_path / mode, *flags.split(), "--num-minibatches", 2, "--encoder-sizes", 16, mode)
        models.append(torch.load(folder / "model.pt", weights_only=True))
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=0, atol=1e-5)


def script(*flags, **env) -> tuple[int, str, str]:
    """The script in a process of its own."""
    return finish(start(*flags, script="hppo_hybrid.py", **env))


@pytest.mark.parametrize("flags", [f"--env-id {HYBRID}Moving-v0", "--env-id Hopper-v4 --hold 1 2 4"])
def test_a_killed_run_resumes_to_the_bit(flags, tmp_path):
    """Of environments that are stepped as one batch, and one by one."""
    (tmp_path / "killer").mkdir()
    (tmp_path / "killer" / "sitecustomize.py").write_text(KILLER)
    flags = [*SMALL, *flags.split(), "--total-timesteps", 8 * 256, "--checkpoint-every", 0]
    status, _, err = script(*flags, "--runs-dir", tmp_path / "whole")
    assert status == 0, err
    env = {"KILL_BEFORE": "replace checkpoint.pt 5", "PYTHONPATH": str(tmp_path / "killer")}
    status, _, err = script(*flags, "--runs-dir", tmp_path / "killed", **env)
    assert status == -signal.SIGKILL, err
    folder, expected = only(tmp_path / "killed"), only(tmp_path / "whole")
    status, out, err = script("--resume", folder, *flags[len(SMALL) : len(SMALL) + 2])
    assert status == 0, err
    assert "notice" not in out + err
    assert_same_outcome(folder, expected)


def test_capture_video_films_hybrid_environments(tmp_path):
    flags = [*SMALL, "--env-id", f"{HYBRID}Moving-v0", "--total-timesteps", 256, "--capture-video"]
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
    flags = ["--env-id", f"{HYBRID}HardMove4-v0", *sizes.split(), "--learning-rate", "1e-3", *flags.split()]
    folder = run(tmp_path, *flags, "--total-timesteps", 60_000)
    assert "uncompiled" not in capfd.readouterr().err  # the notice of a compiler that failed
    returns = [float(row["return"]) for row in csv.DictReader(open(folder / "episodes.csv"))]
    assert np.mean(returns[:100]) < -0.5 and np.mean(returns[-100:]) > 1.5
    assert result_of(folder)["eval_success"] >= 0.95


def test_a_run_s_own_settings_may_be_repeated_on_resume(tmp_path, capsys):
    """JSON makes lists of tuples; they are the same settings all the same."""
    folder = str(run(tmp_path, *SMALL, "--total-timesteps", 256))
    args = hppo.parse_args(["--resume", folder, "--encoder-sizes", "16", "8"])
    assert args.encoder_sizes == (16, 8) and args.hold == (1, 2, 4)
    with pytest.raises(SystemExit):
        hppo.parse_args(["--resume", folder, "--encoder-sizes", "16", "16"])
    assert "error: --encoder-sizes (16, 16): the run in" in capsys.readouterr().err
