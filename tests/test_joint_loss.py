"""The losses of ppo_multidiscrete_joint_loss.py against float64 sums written out here, and its masked sub-actions."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import spaces
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch.distributions import Categorical, Normal

import ppo_continuous
import ppo_multidiscrete_joint_loss as ppo

torch.set_num_threads(1)

LOSSES = ("joint", "separate", "mix-ratio", "mix-loss")
B, D = 40, 5


# --- The losses ---------------------------------------------------------------------------------------------------


def sample(seed=0, B=B, D=D):
    """log r_i, what applies (in one sample of eight nothing does) and A."""
    rng = np.random.default_rng(seed)
    valid = rng.random((B, D)) < 0.7
    valid[::8] = False
    return rng.normal(0, 0.25, (B, D)), valid.astype(float), rng.normal(size=B)


def by_hand(logratios, valid, advantages, args):
    """The objective of the docstring, negated: one sub-action after the other."""
    eps, C, w = args.clip_coef, args.dual_clip, args.mix_weight

    def L(x, A):
        value = min(x * A, min(max(x, 1 - eps), 1 + eps) * A) if eps > 0 else x * A
        return max(value, C * A) if C > 0 and A < 0 else value

    objective = 0.0
    for logs, applies, A in zip(logratios, valid, advantages):
        logs = [x for x, v in zip(logs, applies) if v]
        joint = math.exp(sum(logs))
        ratios = [w * joint + (1 - w) * math.exp(x) if args.loss == "mix-ratio" else math.exp(x) for x in logs]
        separate = sum(L(ratio, A) for ratio in ratios)
        if args.sub_action_reduction == "mean" and logs:
            separate /= len(logs)
        objective += {"joint": L(joint, A), "mix-loss": w * L(joint, A) + (1 - w) * separate}.get(args.loss, separate)
    return -objective / len(logratios)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sub_action_reduction": "sum"},
        {"clip_coef": 0.0},
        {"clip_coef": 0.1, "dual_clip": 1.3},
        {"mix_weight": 0.2},
        {"mix_weight": 0.0},
    ],
)
def test_a_loss_and_its_gradient(loss, settings):
    args = ppo.Args(loss=loss, **settings)
    logratios, valid, advantages = sample()
    x = torch.tensor(logratios, requires_grad=True)
    value, alive = ppo.policy_loss(x, torch.tensor(valid), torch.tensor(advantages), args)
    value.backward()
    expected = by_hand(logratios, valid, advantages, args)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    survives = x.grad.numpy() != 0
    wanted = survives.any(1).sum() / valid.any(1).sum(), survives.sum() / valid.sum()
    np.testing.assert_allclose([a.item() for a in alive], wanted, rtol=1e-12)
    assert wanted[1] < 1 or settings.get("clip_coef") == 0
    for i, j in [(0, 0), (3, 1), (7, 4), (20, 2), (39, 3)]:  # central differences
        moved = [logratios.copy(), logratios.copy()]
        moved[0][i, j] += 1e-6
        moved[1][i, j] -= 1e-6
        up, down = (by_hand(m, valid, advantages, args) for m in moved)
        assert x.grad[i, j].item() == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_does_not_apply_has_no_gradient(loss):
    logratios, valid, advantages = sample(1)
    x = torch.tensor(logratios, requires_grad=True)
    ppo.policy_loss(x, torch.tensor(valid), torch.tensor(advantages), ppo.Args(loss=loss))[0].backward()
    assert (x.grad[torch.tensor(valid) == 0] == 0).all() and (x.grad != 0).any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_sub_action_makes_all_losses_ppo_s(loss, reduction):
    """Where it does not apply the ratio is 1, which has no gradient."""
    logratios, valid, advantages = sample(2, D=1)
    assert 0 < valid.mean() < 1
    x, A = torch.tensor(logratios, requires_grad=True), torch.tensor(advantages)
    y = torch.tensor(logratios[:, 0], requires_grad=True)
    for v in (torch.ones(B, 1), torch.tensor(valid)):
        value = ppo.policy_loss(x, v, A, ppo.Args(loss=loss, sub_action_reduction=reduction))[0]
        pi = SimpleNamespace(log_prob=lambda _, v=v: y * v[:, 0], entropy=lambda: torch.zeros(B))
        base = SimpleNamespace(policy=lambda _, pi=pi: pi, value=lambda _: torch.zeros(B))
        batch = {"obs": None, "actions": None, "advantages": A} | dict.fromkeys(("logprobs", "values", "returns"), 0)
        expected = ppo_continuous.loss(base, batch, ppo_continuous.Args(norm_adv=False))[0]
        gradients = torch.autograd.grad(value, x)[0][:, 0], torch.autograd.grad(expected, y)[0]
        torch.testing.assert_close(*gradients)
        if v.all() or loss == "joint":
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("loss, scale", list(zip(LOSSES, (1, 1 / D, (1 + 1 / D) / 2, (1 + 1 / D) / 2))))
def test_the_gradient_s_scale_at_ratio_1(loss, scale):
    """Against joint's, with the mean over D sub-actions that all apply."""
    A = torch.tensor(sample(3)[2])

    def gradient(loss):
        x = torch.zeros(B, D, dtype=torch.float64, requires_grad=True)
        value = ppo.policy_loss(x, torch.ones(B, D), A, ppo.Args(loss=loss))[0]
        return torch.autograd.grad(value, x)[0]

    torch.testing.assert_close(gradient(loss), scale * gradient("joint"))


# --- Sub-actions --------------------------------------------------------------------------------------------------


def agent_for(action_space, num_masks=0, obs_dim=3, map_size=None, plane_sizes=None, **settings):
    torch.manual_seed(4)
    obs_space = Box(-1, 1, (obs_dim + num_masks,))
    env = SimpleNamespace(action_space=action_space, observation_space=obs_space, num_masks=num_masks)
    env.map_size, env.plane_sizes = map_size, plane_sizes
    args = ppo.Args(**settings)
    return ppo.Agent(env, args), args


def test_a_box_s_sub_actions_are_normal():
    agent, _ = agent_for(Box(-1, 1, (2,)), log_std_init=-0.3)
    obs, actions = torch.randn(7, 3), torch.randn(7, 2)
    (mean, log_std), _ = agent(obs)
    logprobs, entropies, valid = agent.sub_actions((mean, log_std), obs, actions)
    pi = Normal(mean, log_std.exp())
    torch.testing.assert_close(logprobs, pi.log_prob(actions))
    torch.testing.assert_close(entropies, pi.entropy())
    assert valid.shape == (7, 2) and (valid == 1).all()


@pytest.mark.parametrize("space", [MultiDiscrete([3, 2, 4]), Discrete(5)])
def test_a_multidiscrete_s_sub_actions_are_categorical(space):
    agent, _ = agent_for(space)
    obs = torch.randn(7, 3)
    nvec = [5] if isinstance(space, Discrete) else [3, 2, 4]
    actions = torch.stack([torch.randint(n, (7,)) for n in nvec], 1).float()
    logits, _ = agent(obs)
    logprobs, entropies, valid = agent.sub_actions(logits, obs, actions)
    for d, part in enumerate(logits.split(nvec, 1)):
        pi = Categorical(logits=part)
        torch.testing.assert_close(logprobs[:, d], pi.log_prob(actions[:, d]))
        torch.testing.assert_close(entropies[:, d], pi.entropy())
    assert (valid == 1).all()


def masked(M=400):
    """An agent with MultiDiscrete [3, 4] and M observations whose masks leave two choices of the first component, and
    all four, one, or none of the second, in turn."""
    agent, args = agent_for(MultiDiscrete([3, 4]), num_masks=7, norm_obs=False)
    second = torch.tensor([[1.0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).repeat(M // 3 + 1, 1)[:M]
    obs = torch.cat([torch.randn(M, 3), torch.tensor([1.0, 0, 1]).expand(M, 3), second], 1)
    return agent, args, obs


def test_masked_choices_are_never_drawn_and_have_no_gradient():
    agent, _, obs = masked()
    actions = ppo.act(agent, obs, ppo.draw_noise(agent, len(obs))).clone()
    assert set(actions[:, 0].tolist()) == {0.0, 2.0}
    assert set(actions[1::3, 1].tolist()) == {2.0} and len(set(actions[0::3, 1].tolist())) == 4
    logits = agent(obs)[0].detach().requires_grad_()
    logprobs, entropies, valid = agent.sub_actions(logits, obs, actions)
    (gradient,) = torch.autograd.grad((logprobs * valid).sum() + entropies.sum(), logits)
    assert torch.isfinite(gradient).all() and torch.isfinite(logprobs).all()
    assert (gradient[:, 1] == 0).all()
    assert (gradient[1::3, 3:] == 0).all() and (gradient[2::3, 3:] == 0).all() and (gradient[0::3, 3:] != 0).any()
    # one choice is no choice, and none neither: they do not apply
    assert (valid[:, 0] == 1).all() and valid[0::3, 1].all() and not valid[1::3, 1].any() and not valid[2::3, 1].any()
    two = Categorical(logits=logits[:, [0, 2]])
    torch.testing.assert_close(entropies[:, 0], two.entropy())
    torch.testing.assert_close(logprobs[:, 0].exp(), two.probs[torch.arange(len(obs)), (actions[:, 0] / 2).long()])


def test_draws_follow_the_masked_probabilities():
    agent, _, obs = masked(1)
    obs = obs.expand(40_000, -1)
    actions = ppo.act(agent, obs, ppo.draw_noise(agent, len(obs)))
    part = agent(obs[:1])[0][0, 3:].softmax(0)
    counts = torch.bincount(actions[:, 1].long(), minlength=4) / len(obs)
    torch.testing.assert_close(counts, part.detach(), atol=0.01, rtol=0)


def test_noise_0_takes_the_likeliest_valid_choice():
    agent, _, obs = masked(3)
    logits = agent(obs)[0]
    greedy = ppo.act(agent, obs, torch.zeros(3, agent.noise_dim))
    assert (greedy[:, 0] == torch.where(logits[:, 0] >= logits[:, 2], 0, 2)).all()
    assert greedy[0, 1] == logits[0, 3:].argmax() and greedy[1, 1] == 2


def microrts(action_mode: str, M=6):
    """A random state of a 4 x 5 map, uint8 as the environment gives it: some idle units, each with some orders."""
    cells = 20
    space = MultiDiscrete([cells, *ppo.MICRORTS_COMPONENTS] if action_mode == "unit" else [[1]])
    sizes = (5, 5, 3, 8, 6)
    agent, args = agent_for(space, cells * 79, 5 * cells, (4, 5), sizes, action_mode=action_mode)
    rng = np.random.default_rng(5)
    planes = np.stack([rng.integers(0, n, (M, cells)) for n in sizes], 1).reshape(M, -1)
    idle = rng.random((M, cells)) < 0.3
    idle[:, 3], idle[0] = True, False  # the first sample has none
    masks = np.concatenate([idle[..., None], (rng.random((M, cells, 78)) < 0.5) & idle[..., None]], 2)
    masks[..., 1] |= idle  # to wait is always possible
    obs = np.concatenate([planes, masks.reshape(M, -1)], 1).astype(np.uint8)
    return agent, args, torch.from_numpy(obs), masks


USED = {0: [], 1: [1], 2: [2], 3: [3], 4: [4, 5], 5: [6]}  # of an order's components, by its type


def applies(mask: np.ndarray, order: np.ndarray) -> list[bool]:
    """Of the seven components of an order under this mask [78]: used by its type, with more than one choice."""
    starts = np.cumsum([0, *ppo.MICRORTS_COMPONENTS])
    several = [mask[a:b].sum() > 1 for a, b in zip(starts, starts[1:])]
    return [several[c] and (c == 0 or c in USED[int(order[0])]) for c in range(7)]


def test_one_unit_a_step():
    agent, _, obs, masks = microrts("unit")
    seen = set()
    for _ in range(60):
        actions = ppo.act(agent, obs, ppo.draw_noise(agent, len(obs)))
        policy, values = agent(obs)
        logprobs, entropies, valid = agent.sub_actions(policy, obs, actions)
        assert values.shape == (6,) and torch.isfinite(logprobs).all() and torch.isfinite(entropies).all()
        assert not valid[0].any()  # no idle unit, nothing to decide
        for i in range(1, 6):
            cell, order = int(actions[i, 0]), actions[i, 1:].numpy()
            seen.add(cell)
            assert masks[i, cell, 0]
            expected = [masks[i, :, 0].sum() > 1, *applies(masks[i, cell, 1:], order)]
            assert valid[i].bool().tolist() == expected
            row, at = masks[i, cell, 1:], 0
            for n, choice in zip(ppo.MICRORTS_COMPONENTS, order.astype(int)):
                if row[at : at + n].any():
                    assert row[at + choice]  # only what the unit may do
                    logits = (
                        policy[i, 20 + at : 20 + at + n].detach().masked_fill(~torch.tensor(row[at : at + n]), -1e30)
                    )
                    d = list(np.cumsum([0, *ppo.MICRORTS_COMPONENTS])).index(at) + 1
                    torch.testing.assert_close(logprobs[i, d].detach(), logits.log_softmax(0)[choice])
                at += n
    assert len(seen) > 5


def test_all_units_a_step():
    agent, _, obs, masks = microrts("gridnet")
    actions = ppo.act(agent, obs, ppo.draw_noise(agent, len(obs)))
    policy, values = agent(obs)
    logprobs, entropies, valid = agent.sub_actions(policy, obs, actions)
    assert actions.shape == logprobs.shape == valid.shape == (6, 20 * 7) and values.shape == (6,)
    orders = actions.reshape(6, 20, 7).numpy()
    expected = [
        [masks[i, cell, 0] and each for cell in range(20) for each in applies(masks[i, cell, 1:], orders[i, cell])]
        for i in range(6)
    ]
    assert valid.bool().tolist() == [[bool(each) for each in row] for row in expected]
    loss = (logprobs * valid).sum() + (entropies * valid).sum() + values.sum()
    grads = torch.autograd.grad(loss, list(agent.parameters()))
    assert all(torch.isfinite(g).all() for g in grads) and any((g != 0).any() for g in grads)


@pytest.mark.parametrize("mode", ["unit", "gridnet"])
def test_a_rollout_in_parts_is_the_rollout(mode):
    """Of 2 T + 1 steps, so that the last part is a short one; all at once would be gigabytes on a large map."""
    agent, _, obs, _ = microrts(mode)
    obs = obs.repeat(2 * ppo.STEPS_AT_ONCE + 1, 1, 1)
    obs = obs.flatten(0, 1)[torch.randperm(obs[..., 0].numel())].view_as(obs)  # no part is another again
    actions = ppo.act(agent, obs.flatten(0, 1), ppo.draw_noise(agent, obs[..., 0].numel())).unflatten(0, obs.shape[:2])
    sizes, features = [], agent.features
    agent.features = lambda part: sizes.append(len(part)) or features(part)
    with torch.no_grad():
        logprobs, values = agent.logprobs_and_values(obs, actions)
        next_values = agent.value(obs)
        assert sizes == [ppo.STEPS_AT_ONCE, ppo.STEPS_AT_ONCE, 1] * 2
        policy, expected = agent(obs)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(next_values, expected)
    torch.testing.assert_close(logprobs, agent.sub_actions(policy, obs, actions)[0])


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (9, 12), (10, 10), (16, 16), (24, 24)])
def test_the_networks_fit_any_map(size):
    cells = math.prod(size)
    planes = torch.zeros(2, 27, *size)
    trunk, actor, critic = ppo.unit_networks(size, 27, cells + 78)
    assert actor(trunk(planes)).shape == (2, cells + 78) and critic(trunk(planes)).shape == (2, 1)
    trunk, actor, critic = ppo.gridnet_networks(size, 27, cells * 78)
    pools, pooled = [layer for layer in trunk if isinstance(layer, torch.nn.MaxPool2d)], []
    for pool in pools:
        pool.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0][0, 0].numel()))
    assert actor(trunk(planes)).shape == (2, cells * 78) and critic(trunk(planes)).shape == (2, 1)
    assert pools and min(pooled) > 1  # compiled for a GPU, a pool of one cell has no gradient


def test_gridnet_s_logits_of_a_cell_are_78_in_a_row():
    image = torch.arange(3 * 2 * 4.0).reshape(1, 3, 2, 4)
    rows = ppo.CellsFirst()(image).reshape(8, 3)
    for y in range(2):
        for x in range(4):
            assert rows[y * 4 + x].tolist() == image[0, :, y, x].tolist()


# --- The whole update ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, D", [("joint", 6), *((loss, 1) for loss in LOSSES)])
def test_joint_or_one_sub_action_on_a_box_is_ppo_continuous(loss, D):
    """Same weights, same batch: a gradient step of each."""
    space = Box(-1, 1, (D,))
    agent, args = agent_for(space, obs_dim=17, loss=loss)
    base_args = ppo_continuous.Args()
    base = ppo_continuous.Agent(spaces(17, D), base_args)
    assert dict(agent.named_parameters()).keys() == dict(base.named_parameters()).keys()
    base.load_state_dict(dict(agent.named_parameters()), strict=False)
    obs, actions = torch.randn(64, 17), torch.randn(64, D)
    pi = base.policy(obs)
    shared = {"obs": obs, "actions": actions, "advantages": torch.randn(64), "returns": torch.randn(64)}
    shared["values"] = base.value(obs).detach() + 0.1 * torch.randn(64)
    old = Normal(pi.mean, pi.log_std.exp()).log_prob(actions).detach() + 0.05 * torch.randn(64, D)
    coefs, indices = {"learning_rate": torch.tensor(3e-4)}, torch.arange(64).view(1, -1)
    ours, our_metrics = ppo.update_step(
        ppo.init_optimizer(agent), {**shared, "logprobs": old}, indices, coefs, agent, args
    )
    optimizer, batch = ppo_continuous.init_optimizer(base), {**shared, "logprobs": old.sum(-1)}
    learning_rate = coefs["learning_rate"]
    theirs, names, metrics = ppo_continuous.update_step(optimizer, learning_rate, batch, indices, base, base_args)
    assert list(ppo.METRICS[: len(names)]) == names
    torch.testing.assert_close(ours["theta"], theirs["theta"], rtol=0, atol=1e-6)
    torch.testing.assert_close(our_metrics[: len(metrics)], metrics, rtol=1e-4, atol=1e-6)


def batch_of(agent, args, obs, seed=0):
    """A batch [M, ...] of actions drawn from the agent, whose log-probabilities have moved a little since."""
    torch.manual_seed(seed)
    actions = ppo.act(agent, obs, ppo.draw_noise(agent, len(obs))).clone()
    policy, values = agent(agent.normalize(obs))
    logprobs = agent.sub_actions(policy, obs, actions)[0]
    noise = 0.1 * torch.randn(logprobs.shape)
    batch = {"obs": obs, "actions": actions, "logprobs": logprobs + noise, "values": values}
    batch |= {"advantages": torch.randn(len(obs)), "returns": values + torch.randn(len(obs))}
    return {name: tensor.detach() for name, tensor in batch.items()}


@pytest.mark.parametrize("count_inapplicable", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_whole_loss_of_masked_sub_actions(loss, count_inapplicable):
    """Samples with all, one and none of the second component's choices open, against torch.distributions."""
    agent, args, obs = masked(300)
    args.loss, args.ent_coef, args.count_inapplicable = loss, 0.1, count_inapplicable
    batch = batch_of(agent, args, obs)
    params = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    total, metrics = ppo.loss(params, agent, batch, {}, args)

    logits, values = agent(obs)
    log_pi, entropies = torch.zeros(300, 2), torch.zeros(300, 2)
    for i in range(300):
        for d, at in enumerate((slice(0, 3), slice(3, 7))):
            row = obs[i, 3:][at] == 1
            if row.sum() > 1:
                pi = Categorical(logits=logits[i, at].masked_fill(~row, -torch.inf))
                log_pi[i, d] = pi.log_prob(batch["actions"][i, d])
                entropies[i, d] = -(pi.probs * pi.probs.clamp(min=1e-30).log()).sum()
    valid = torch.stack([torch.ones(300), (obs[:, 6:].sum(1) > 1).float()], 1)
    logratios = torch.where(valid == 1, log_pi, batch["logprobs"]) - batch["logprobs"]
    if count_inapplicable:  # the noise of batch_of stands for a component that moved though the action did not use it
        logratios = torch.where(
            valid == 1, logratios, agent.sub_actions(logits, obs, batch["actions"])[0] - batch["logprobs"]
        )
    A = batch["advantages"]
    A = (A - A.mean()) / A.std()
    counts = torch.ones_like(valid) if count_inapplicable else valid
    pg_loss = by_hand(logratios.double().detach().numpy(), counts.numpy(), A.numpy(), args)
    v_loss = ppo.value_loss(values, batch["values"], batch["returns"], args.clip_coef)
    expected = pg_loss + 0.5 * v_loss - 0.1 * entropies.sum(1).mean()
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    found = dict(zip(ppo.METRICS, metrics.tolist()))
    assert found["entropy"] == pytest.approx(entropies.sum(1).mean().item(), rel=1e-5)
    joint = (logratios * counts).sum(1)
    assert found["approx_kl"] == pytest.approx((joint.exp() - 1 - joint).mean().item(), rel=1e-4)
    grads = torch.autograd.grad(total, list(params.values()))
    assert all(torch.isfinite(gradient).all() for gradient in grads)
    w = agent.actor_mean.weight
    assert (grads[list(params).index("actor_mean.weight")][1] == 0).all() and w.shape[0] == 7  # choice 1 is never open


@pytest.mark.parametrize("kind", ["masked", "unit"])  # gridnet takes minutes to compile
def test_compiled_and_plain_updates_agree(kind, capsys):
    agent, args, obs = masked(64) if kind == "masked" else microrts(kind, M=64)[:3]
    args.loss, args.ent_coef, args.num_minibatches = "mix-ratio", 0.01, 1
    batch, coefs = batch_of(agent, args, obs), {"learning_rate": torch.tensor(1e-3)}
    optimizer, indices = ppo.init_optimizer(agent), torch.randperm(64).view(1, -1)
    step = ppo.compile_update(agent, optimizer, coefs, batch, args)
    assert "notice" not in capsys.readouterr().err  # of an update that runs uncompiled
    plain, plain_metrics = ppo.update_step(optimizer, batch, indices, coefs, agent, args)
    compiled, metrics = step(optimizer, batch, indices, coefs)
    assert (plain["theta"] - optimizer["theta"]).abs().max() > 5e-4
    torch.testing.assert_close(compiled["theta"], plain["theta"], rtol=0, atol=1e-5)
    torch.testing.assert_close(metrics, plain_metrics, rtol=1e-3, atol=1e-4)


class Lock(gym.Env):
    """Two dials; each step says which positions are allowed, and the one reward is for the highest of those on both."""

    observation_space, action_space = Box(0, 1, (4,)), MultiDiscrete([4, 4])

    def observe(self):
        self.action_mask = self.np_random.random(8) < 0.5
        self.action_mask[[0, 4]] = True
        self.steps += 1
        return self.np_random.random(4, dtype=np.float32), {"action_mask": self.action_mask}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe()

    def step(self, action):
        allowed = self.action_mask.reshape(2, 4)
        assert allowed[0, action[0]] and allowed[1, action[1]], "a masked choice"
        best = [np.flatnonzero(row).max() for row in allowed]
        reward = float(action[0] == best[0] and action[1] == best[1])
        obs, info = self.observe()
        return obs, reward, False, self.steps > 10, info


class TupleMask(Lock):
    """Its mask is a tuple of one for each dial, as MultiDiscrete.sample takes it."""

    def observe(self):
        obs, info = super().observe()
        return obs, {"action_mask": tuple(info["action_mask"].reshape(2, 4))}


class ShortMask(Lock):
    """Its mask is one number short."""

    def observe(self):
        return super().observe()[0], {"action_mask": np.ones(7)}


for env in (Lock, TupleMask, ShortMask):
    gym.register(f"{env.__name__}-v0", env)


def test_a_mask_may_be_a_tuple_of_one_a_component():
    env, raw = ppo.make_env(ppo.Args(env_id="TupleMask-v0")), gym.make("TupleMask-v0")
    obs, (_, info) = env.reset(seed=1)[0], raw.reset(seed=1)
    assert np.array_equal(obs[4:], np.concatenate(info["action_mask"])) and env.num_masks == 8


@pytest.mark.parametrize("loss", ["joint", "separate"])
def test_masks_travel_with_the_batch_and_a_masked_policy_learns(loss, tmp_path, capsys):
    """The environment refuses masked choices, so a mask that went astray would end the run."""
    flags = f"--env-id Lock-v0 --loss {loss} --num-steps 64 --num-minibatches 4 --total-timesteps 30000 --device cpu"
    ppo.main(ppo.parse_args([*flags.split(), "--no-compile", "--runs-dir", str(tmp_path)]))
    (folder,) = tmp_path.iterdir()
    rows = np.loadtxt(folder / "episodes.csv", delimiter=",", skiprows=1)
    assert rows[:50, 1].mean() < 6 and rows[-50:, 1].mean() > 8.5  # of 10


@pytest.mark.parametrize(
    "flags",
    [
        "--mix-weight 1.5",
        "--dual-clip 0.5",
        "--hidden-sizes -1",
        "--hidden-sizes",
        "--env-id ShortMask-v0",
        "--env-id MicroRTS-8x8-basesWorkers --partial-obs",
        "--selfplay -1",
        "--loss both",
        "--env-id MicroRTS-1x1-nothing",
        "--env-id MicroRTS-8x8-basesWorkers --opponent bobAI",
    ],
)
def test_a_wrong_value_is_one_line(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        ppo.main(ppo.parse_args([*flags.split(), "--runs-dir", str(tmp_path)]))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
