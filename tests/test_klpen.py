"""What is new in ppo_klpen.py: the KL, the loss with its penalty, the rule for beta, and both of them in a run."""

import copy
import csv
import functools
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KILLER, assert_same_outcome, finish, load, only, scalars, spaces, start
from torch.distributions import Independent, Normal, kl_divergence

import ppo_continuous
import ppo_klpen as ppo

SIZES = "--num-envs 2 --num-steps 64 --num-minibatches 4 --update-epochs 2 --eval-episodes 1 --device cpu".split()
HOPPER = [*SIZES, "--env-id", "Hopper-v4"]
# A step so large for its target that KL falls short of it, meets it and exceeds it within 16 iterations.
RESTLESS = "--kl-target 1e-3 --learning-rate 1e-3 --no-anneal-lr --update-epochs 4 --total-timesteps 2048".split()


# --- KL -----------------------------------------------------------------------------------------------------------


def kl_by_hand(old_mean, old_log_std, mean, log_std):
    """sum_i ln(s_i / s_old_i) + (s_old_i^2 + (m_i - m_old_i)^2) / (2 s_i^2) - 1/2 and its two gradients, in float64."""
    old_mean, old_log_std, mean, log_std = (x.detach().double().numpy() for x in (old_mean, old_log_std, mean, log_std))
    old_var, var = np.exp(2 * old_log_std), np.exp(2 * log_std)
    spread = old_var + (mean - old_mean) ** 2
    kl = (0.5 * np.log(var / old_var) + spread / (2 * var) - 0.5).sum(-1)
    return kl, (mean - old_mean) / var, 1 - spread / var


def gaussians(dtype=torch.float64):
    """Old and new mean and log sigma, [40, 3] each; sigma from 0.1 to 10, means up to several sigma apart."""
    rng = np.random.default_rng(0)
    means, log_stds = rng.normal(size=(2, 40, 3)), rng.uniform(-2.3, 2.3, (2, 40, 3))
    return [torch.tensor(x, dtype=dtype) for x in (means[0], log_stds[0], means[1], log_stds[1])]


def gaussian_kl(old_mean, old_log_std, mean, log_std):
    return ppo.Gaussian(old_mean, old_log_std).kl(ppo.Gaussian(mean, log_std))


def kl_and_gradients(kl, old_mean, old_log_std, mean, log_std):
    mean, log_std = mean.clone().requires_grad_(), log_std.clone().requires_grad_()
    values = kl(old_mean, old_log_std, mean, log_std)
    return [values.detach(), *torch.autograd.grad(values.sum(), [mean, log_std])]


def test_gaussian_kl_and_its_gradient_are_the_formula_s():
    inputs = gaussians()
    for found, wanted in zip(kl_and_gradients(gaussian_kl, *inputs), kl_by_hand(*inputs)):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gaussian_kl(*gaussians(torch.float32)), kl_by_hand(*inputs)[0], rtol=1e-5)


def test_gaussian_kl_and_its_gradient_are_those_of_torch_distributions():
    def reference(old_mean, old_log_std, mean, log_std):
        old, new = Normal(old_mean, old_log_std.exp()), Normal(mean, log_std.exp())
        return kl_divergence(Independent(old, 1), Independent(new, 1))

    inputs = gaussians()
    found, wanted = (kl_and_gradients(kl, *inputs) for kl in (gaussian_kl, reference))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    swapped = reference(*inputs[2:], *inputs[:2])
    assert ((found[0] - swapped).abs() > 0.01).all()  # the other direction would not have passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_kl_from_a_policy_to_itself_is_exactly_0_and_so_is_its_gradient(dtype):
    mean, log_std = gaussians(dtype)[:2]
    for found in kl_and_gradients(gaussian_kl, mean, log_std, mean, log_std):
        assert (found == 0).all()


# --- Beta ---------------------------------------------------------------------------------------------------------

EXACT = 0.75  # as d_targ has exact bounds: 0.5 below it, 1.125 above it


@pytest.mark.parametrize(
    "beta, kl, kl_target, expected",
    [
        (1.0, EXACT, EXACT, 1.0),
        (1.0, 0.5, EXACT, 1.0),  # on the lower bound
        (1.0, math.nextafter(0.5, 0), EXACT, 0.5),
        (1.0, math.nextafter(0.5, 1), EXACT, 1.0),
        (1.0, 1.125, EXACT, 1.0),  # on the upper bound
        (1.0, math.nextafter(1.125, 0), EXACT, 1.0),
        (1.0, math.nextafter(1.125, 2), EXACT, 2.0),
        (0.3, 0.0, 0.01, 0.15),
        (0.3, 0.0066, 0.01, 0.15),
        (0.3, 0.01 / 1.5, 0.01, 0.3),
        (0.3, 0.0067, 0.01, 0.3),
        (0.3, 0.0149, 0.01, 0.3),
        (0.3, 0.01 * 1.5, 0.01, 0.3),
        (0.3, 0.0151, 0.01, 0.6),
        (0.3, 1e30, 0.01, 0.6),
        (64.0, 0.01, 1.0, 32.0),
        (64.0, 0.01, 1e-3, 128.0),
        (0.3, -1e-7, 0.01, 0.15),  # rounding can put a KL of 0 below it
    ],
)
def test_the_rule_for_beta(beta, kl, kl_target, expected):
    assert ppo.adapt_beta(beta, kl, kl_target) == expected


@pytest.mark.parametrize("beta", [1.0, 0.3, 1e-6, 1e6])
@pytest.mark.parametrize("kl, back, factor", [(0.0, 1e30, 2.0), (1e30, 0.0, 0.5)])
def test_beta_stays_finite_and_above_0_for_ever_and_can_come_back(beta, kl, back, factor):
    """In float32 too, as the loss takes it: 0 could never be doubled, nor inf be halved."""
    for _ in range(2000):
        before, beta = beta, ppo.adapt_beta(beta, kl, 0.01)
        assert 0 < torch.tensor(beta, dtype=torch.float32) < math.inf
    assert beta == before  # it has met its bound
    assert beta < 1e-8 if kl == 0 else beta > 1e8
    for _ in range(10):
        before, beta = beta, ppo.adapt_beta(beta, back, 0.01)
        assert beta == before * factor


# --- Loss ---------------------------------------------------------------------------------------------------------


def agent_and_batch(M=64, **settings):
    """The batch's old policy is near the agent's, but does not go with its logprobs: a mixed-up term would show."""
    torch.manual_seed(4)
    args = ppo.Args(**settings)
    agent = ppo.Agent(spaces(3, 2), args)
    agent.obs_rms.update(torch.randn(100, 3) * 2 + 1)
    batch = {
        "obs": torch.randn(M, 3),
        "actions": torch.randn(M, 2) * 1.5,
        "logprobs": torch.randn(M) * 0.3 - 3,
        "advantages": torch.randn(M),
        "returns": torch.randn(M),
        "values": torch.randn(M),
        "mean": torch.randn(M, 2) * 0.5,
        "log_std": args.log_std_init + torch.randn(M, 2) * 0.3,
    }
    return args, agent, batch


@pytest.mark.parametrize("beta", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("std_type", ["independent", "state", "fixed"])
@pytest.mark.parametrize(
    "settings", [{}, {"norm_adv": False}, {"ent_coef": 0.02, "vf_coef": 1.0, "log_std_init": -0.5}], ids=str
)
def test_the_whole_loss_its_metrics_and_the_gradient_that_adam_gets(settings, std_type, beta):
    args, agent, batch = agent_and_batch(std_type=std_type, max_grad_norm=1e9, kl_beta=7.0, **settings)
    agent, batch = agent.double(), {name: tensor.double() for name, tensor in batch.items()}
    agent.kl_beta.fill_(beta)  # what counts, and not what the run began with
    total, metrics = ppo.loss(agent, batch, args)
    optimizer, indices = ppo.init_optimizer(agent), torch.randperm(64).view(1, 64)
    after, names, means = ppo.update_step(optimizer, torch.tensor(3e-4), batch, indices, agent, args)
    grads = ppo.unflatten(after["exp_avg"] / 0.1, agent)  # the moment starts from 0

    # the same from the formulas and ordinary autograd
    pi, V = agent.policy(batch["obs"]), agent.value(batch["obs"])
    mean, log_std = pi.mean, pi.log_std
    sigma, old_sigma = log_std.exp(), batch["log_std"].exp()
    density = torch.exp(-((batch["actions"] - mean) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    r = density.prod(1) / batch["logprobs"].exp()
    A = batch["advantages"]
    if args.norm_adv:
        A = (A - A.mean()) / (((A - A.mean()) ** 2).sum() / (len(A) - 1)).sqrt()
    surrogate = (r * A).mean()
    kl = (sigma / old_sigma).log() + (old_sigma**2 + (batch["mean"] - mean) ** 2) / (2 * sigma**2) - 0.5
    kl = kl.sum(1).mean()
    v_loss = ((V - batch["returns"]) ** 2).mean() / 2
    entropy = (0.5 * (2 * math.pi * math.e * sigma**2).log()).sum(-1).mean()
    expected = -(surrogate - beta * kl - args.vf_coef * v_loss + args.ent_coef * entropy)
    trainable = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    assert grads.keys() == trainable.keys()
    reference = torch.autograd.grad(expected, trainable.values())

    assert kl > 0.1  # so that the penalty counts
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, wanted in zip(grads.values(), reference):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
    wanted = {
        "policy_loss": -surrogate,
        "value_loss": v_loss,
        "entropy": entropy,
        "approx_kl": (r - 1 - r.log()).mean(),
    }
    wanted = {name: value.item() for name, value in wanted.items()}
    for found in ({name: value.item() for name, value in metrics.items()}, dict(zip(names, means.tolist()))):
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_the_compiled_update_follows_beta(capfd):
    """Beta moves in place after the graph is made, which must not have taken its value for a constant."""
    args, agent, batch = agent_and_batch(num_minibatches=4)
    optimizer, learning_rate = ppo.init_optimizer(agent), torch.tensor(3e-4)
    plain = functools.partial(ppo.update_step, agent=agent, args=args)
    compiled = ppo.compile_update(agent, optimizer, learning_rate, batch, args)
    assert "uncompiled" not in capfd.readouterr().err  # the notice of a compiler that failed
    indices, moments = torch.randperm(64).view(4, 16)[:2], []
    for beta in (0.0, 1.0, 8.0):
        agent.kl_beta.fill_(beta)
        found, wanted = (step(optimizer, learning_rate, batch, indices)[0] for step in (compiled, plain))
        torch.testing.assert_close(found["exp_avg"], wanted["exp_avg"], rtol=1e-3, atol=1e-6)
        moments.append(wanted["exp_avg"])
    assert min((a - b).norm() / b.norm() for a, b in zip(moments, moments[1:])) > 0.1  # each beta has its own gradient


# --- Runs in this process -----------------------------------------------------------------------------------------


def run(module, runs_dir, *flags) -> Path:
    """A run in this process, for speed; its folder."""
    module.main(module.parse_args([*HOPPER, "--runs-dir", str(runs_dir), *map(str, flags)]))
    return only(runs_dir)


def same(one: Path, other: Path) -> bool:
    """Whether two runs end with the same model, to the bit."""
    one, other = load(one / "model.pt"), load(other / "model.pt")
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def logged(folder, name) -> dict:
    """{step: value} of a loss, each step logged once."""
    rows = [(step, value, times) for (tag, step, value), times in scalars(folder).items() if tag == f"losses/{name}"]
    assert len({step for step, _, _ in rows}) == sum(times for _, _, times in rows)
    return {step: value for step, value, _ in sorted(rows)}


@pytest.mark.parametrize("flags", ["--no-compile", "--no-compile --std-type state", "--compile"])
def test_without_penalty_a_run_is_that_of_ppo_continuous_without_clipping_to_the_bit(flags, tmp_path, capfd):
    flags = ["--total-timesteps", "512", *flags.split()]
    free = run(ppo, tmp_path / "free", *flags, "--kl-mode", "fixed", "--kl-beta", "0")
    base = run(ppo_continuous, tmp_path / "base", *flags, "--clip-coef", "0")
    assert same(free, base)
    assert (free / "episodes.csv").read_bytes() == (base / "episodes.csv").read_bytes()
    assert "uncompiled" not in capfd.readouterr().err  # the notice of a compiler that failed
    if "--no-compile" in flags:  # the two would differ if anything did
        held = run(ppo, tmp_path / "held", *flags, "--kl-mode", "fixed", "--kl-beta", "1")
        clipped = run(ppo_continuous, tmp_path / "clipped", *flags)
        assert not same(held, free) and not same(clipped, free)


def test_beta_is_logged_each_iteration_and_follows_the_rule_from_the_kl_logged_before(tmp_path, monkeypatch):
    used, update = [], ppo.update

    def watched_update(step, agent, *rest):
        used.append(agent.kl_beta.item())
        return update(step, agent, *rest)

    monkeypatch.setattr(ppo, "update", watched_update)
    folder = run(ppo, tmp_path, *RESTLESS, "--no-compile", "--kl-beta", "0.75")
    kl, beta = logged(folder, "kl"), logged(folder, "kl_beta")
    assert list(kl) == list(beta) == list(range(128, 2048 + 1, 128))
    expected, factors = [0.75], []
    for d in kl.values():
        factors.append(0.5 if d < 1e-3 / 1.5 else 2.0 if d > 1e-3 * 1.5 else 1.0)
        expected.append(expected[-1] * factors[-1])
    assert set(factors[:-1]) == {0.5, 1.0, 2.0}, "the run shows only a part of the rule"
    assert list(beta.values()) == expected[:-1]  # to the bit: all are 0.75 times a power of 2
    assert used == expected[:-1]  # what is logged is what the iteration's update was given
    assert load(folder / "checkpoint.pt")["progress"]["kl_beta"] == expected[-1]


def test_fixed_beta_never_moves(tmp_path):
    folder = run(ppo, tmp_path, *RESTLESS, "--no-compile", "--kl-mode", "fixed", "--kl-beta", "0.3")
    kl, beta = logged(folder, "kl"), logged(folder, "kl_beta")
    assert list(kl) == list(beta) == list(range(128, 2048 + 1, 128))
    assert set(beta.values()) == {np.float32(0.3)}
    assert any(d > 1.5e-3 for d in kl.values())  # adaptive, it would have moved


@pytest.mark.parametrize("std_type", ["independent", "state", "fixed"])
def test_the_logged_kl_is_that_of_the_policies_before_and_after_over_the_whole_batch(std_type, tmp_path, monkeypatch):
    """Both policies are copied whole, so that nothing the script keeps of the old one can move along with the new."""
    make_batch, update, kls, shift_parts, kept = ppo.make_batch, ppo.update, [], [], []

    @torch.no_grad()
    def policy(agent, obs):
        """Mean and log sigma for every observation of the rollout, in float64."""
        pi = copy.deepcopy(agent).double().policy(obs.double())
        return pi.mean, pi.log_std.expand_as(pi.mean)

    def watched_make_batch(rows, agent, *rest):
        obs = rows["obs"].flatten(0, 1)
        kept[:] = obs, policy(agent, obs)
        return make_batch(rows, agent, *rest)

    def watched_update(step, agent, *rest):
        metrics, (obs, old) = update(step, agent, *rest), kept
        mean, log_std = policy(agent, obs)
        assert len(mean) == 128
        kls.append(kl_by_hand(*old, mean, log_std)[0].mean())
        shift_parts.append(kl_by_hand(old[0], log_std, mean, log_std)[0].mean())  # as if sigma had stood still
        return metrics

    monkeypatch.setattr(ppo, "make_batch", watched_make_batch)
    monkeypatch.setattr(ppo, "update", watched_update)
    folder = run(ppo, tmp_path, *RESTLESS, "--no-compile", "--std-type", std_type)
    found, kls, shift_parts = np.array(list(logged(folder, "kl").values())), np.array(kls), np.array(shift_parts)
    assert len(found) == 16
    np.testing.assert_allclose(found, kls, rtol=1e-3, atol=1e-6)
    if std_type != "fixed":  # sigma's part is large enough to be missed
        assert (np.abs(shift_parts - kls) > 0.01 * kls).sum() > 8


@pytest.mark.parametrize("kl_mode", ["adaptive", "fixed"])
def test_a_run_from_another_s_model_begins_with_the_beta_it_is_given(kl_mode, tmp_path):
    first = run(ppo, tmp_path / "first", "--total-timesteps", 512, "--no-compile", "--kl-beta", 0.5)
    flags = ["--total-timesteps", 256, "--no-compile", "--kl-mode", kl_mode, "--init-from", first]
    given = run(ppo, tmp_path / "given", *flags, "--kl-beta", 3)
    default = run(ppo, tmp_path / "default", *flags)
    assert logged(given, "kl_beta")[128] == 3 and logged(default, "kl_beta")[128] == 1


# --- Resume -------------------------------------------------------------------------------------------------------


def script(*flags, **env) -> tuple[int, str, str]:
    """The script in a process of its own: its exit status, and what it printed."""
    return finish(start(*flags, script="ppo_klpen.py", **env))


def test_a_run_killed_between_two_checkpoints_resumes_with_its_beta(tmp_path):
    (tmp_path / "killer").mkdir()
    (tmp_path / "killer" / "sitecustomize.py").write_text(KILLER)
    flags = [*HOPPER, *RESTLESS, "--no-compile", "--checkpoint-every", 0, "--kl-target", "1e-4"]
    status, _, err = script(*flags, "--runs-dir", tmp_path / "whole")
    assert status == 0, err
    # The run dies with iteration 4 in its logs, and 3 in its checkpoint.
    env = {"KILL_BEFORE": "replace checkpoint.pt 4", "PYTHONPATH": str(tmp_path / "killer")}
    status, _, err = script(*flags, "--runs-dir", tmp_path / "killed", **env)
    assert status == -signal.SIGKILL, err
    folder, expected = only(tmp_path / "killed"), only(tmp_path / "whole")
    progress = load(folder / "checkpoint.pt")["progress"]
    assert progress["iteration"] == 3 and len(logged(folder, "kl_beta")) == 4
    assert progress["kl_beta"] != ppo.Args.kl_beta  # a resumed run that started it anew would go another way

    status, _, err = script("--resume", folder)
    assert status == 0, err
    betas = list(logged(folder, "kl_beta").values())
    assert betas[3] == progress["kl_beta"] and betas == list(logged(expected, "kl_beta").values())
    assert len(betas) == 16 and len(set(betas)) >= 4
    assert_same_outcome(folder, expected)


# --- Command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--kl-mode adaptive --kl-beta 0", "--kl-beta"),
        ("--kl-beta 0", "--kl-beta"),  # adaptive is the default
        ("--kl-beta 1e-12", "--kl-beta"),  # which the adaptation's bounds would change
        ("--kl-beta -1", "--kl-beta"),
        ("--kl-mode fixed --kl-beta -0.5", "--kl-beta"),
        ("--kl-beta nan", "--kl-beta"),
        ("--kl-beta inf", "--kl-beta"),
        ("--kl-target 0", "--kl-target"),
        ("--kl-target -0.01", "--kl-target"),
        ("--kl-target nan", "--kl-target"),
    ],
)
def test_a_value_out_of_range_is_one_line_that_names_it(flags, named, tmp_path, capfd):
    with pytest.raises(SystemExit) as exit:
        ppo.main(ppo.parse_args([*HOPPER, "--runs-dir", str(tmp_path / "runs"), *flags.split()]))
    (line,) = capfd.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert line.startswith("error: ") and named in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--kl-mode clip", "--kl-mode"),
        ("--clip-coef 0.2", "--clip-coef"),  # ppo_continuous.py has it
        ("--no-clip-vloss", "--no-clip-vloss"),
    ],
)
def test_an_unknown_flag_or_choice_is_named(flags, named, capfd):
    with pytest.raises(SystemExit) as exit:
        ppo.parse_args(flags.split())
    assert exit.value.code == 2 and named in capfd.readouterr().err


def test_help_has_the_flags_of_the_penalty_and_none_of_the_clipping(capfd):
    with pytest.raises(SystemExit) as exit:
        ppo.parse_args(["--help"])
    out, err = capfd.readouterr()
    assert (exit.value.code, err) == (0, "")
    for flag, default in (("--kl-mode {adaptive,fixed}", "adaptive"), ("--kl-beta", "1.0"), ("--kl-target", "0.01")):
        assert f"(default: {default})" in " ".join(out.split(flag)[1].replace("│", " ").split())[:200]
    assert "clip-coef" not in out and "clip-vloss" not in out


# --- Learning -----------------------------------------------------------------------------------------------------


def test_inverted_pendulum_is_solved_within_100k_steps(tmp_path):
    """A random policy keeps the pole up for some 6 steps, 1000 is the most there is."""
    flags = "--env-id InvertedPendulum-v4 --total-timesteps 100000 --seed 1 --device cpu".split()
    status, _, err = script(*flags, "--runs-dir", tmp_path)
    assert status == 0, err
    returns = [float(row["return"]) for row in csv.DictReader(open(only(tmp_path) / "episodes.csv"))]
    assert sum(returns[:100]) / 100 < 100
    assert sum(returns[-50:]) / 50 >= 900
