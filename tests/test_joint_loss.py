"""The losses of ppo_multidiscrete_joint_loss.py against float64 sums written out here, and its masked sub-actions."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, only, spaces
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch.distributions import Categorical, Normal

import ppo_continuous
import ppo_multidiscrete_joint_loss as ppo

LOSSES = ("joint", "separate", "mix-ratio", "mix-loss")
B, D = 40, 5


# --- The losses ---------------------------------------------------------------------------------------------------


def sample(seed=0, B=B, D=D):
    """log r_i, what applies (in one sample of eight nothing does) and A."""
    rng = np.random.default_rng(seed)
    applies = rng.random((B, D)) < 0.7
    applies[::8] = False
    return rng.normal(0, 0.25, (B, D)), applies.astype(float), rng.normal(size=B)


def by_hand(logratios, applies, advantages, args):
    """The objective of the docstring, negated: one sub-action after the other."""
    eps, C, w = args.clip_coef, args.dual_clip, args.mix_weight

    def L(x, A):
        value = min(x * A, min(max(x, 1 - eps), 1 + eps) * A) if eps > 0 else x * A
        return max(value, C * A) if C > 0 and A < 0 else value

    objective = 0.0
    for logs, of_use, A in zip(logratios, applies, advantages):
        logs = [x for x, v in zip(logs, of_use) if v or args.count_inapplicable]
        joint = math.exp(sum(logs))
        ratios = [w * joint + (1 - w) * math.exp(x) if args.loss == "mix-ratio" else math.exp(x) for x in logs]
        separate = sum(L(ratio, A) for ratio in ratios)
        if args.sub_action_reduction == "mean" and logs:
            separate /= len(logs)
        objective += {"joint": L(joint, A), "mix-loss": w * L(joint, A) + (1 - w) * separate}.get(args.loss, separate)
    return -objective / len(logratios)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("count_inapplicable", [True, False])
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
def test_a_loss_and_its_gradient(loss, count_inapplicable, settings):
    args = ppo.Args(loss=loss, count_inapplicable=count_inapplicable, **settings)
    logratios, applies, advantages = sample()
    x = torch.tensor(logratios, requires_grad=True)
    value, alive = ppo.policy_loss(x, torch.tensor(applies), torch.tensor(advantages), args)
    value.backward()
    assert value.item() == pytest.approx(by_hand(logratios, applies, advantages, args), rel=1e-12)
    survives, counts = x.grad.numpy() != 0, np.ones_like(applies) if count_inapplicable else applies
    assert not survives[counts == 0].any()
    survives &= applies > 0
    wanted = survives.any(1).sum() / applies.any(1).sum(), survives.sum() / applies.sum()
    np.testing.assert_allclose([a.item() for a in alive], wanted, rtol=1e-12)
    assert wanted[1] < 1 or settings.get("clip_coef") == 0 or (loss == "mix-ratio" and count_inapplicable)
    for i, j in [(0, 0), (3, 1), (7, 4), (20, 2), (39, 3)]:  # central differences
        moved = [logratios.copy(), logratios.copy()]
        moved[0][i, j] += 1e-6
        moved[1][i, j] -= 1e-6
        up, down = (by_hand(m, applies, advantages, args) for m in moved)
        assert x.grad[i, j].item() == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-8)


def test_by_default_the_mean_is_over_all_sub_actions_as_in_the_paper():
    """Of five two apply: their gradient is two fifths of what it is where the mean is over those two."""
    logratios, applies = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([[1.0, 0, 0, 1, 0]])
    gradients = []
    for args in (ppo.Args(loss="separate"), ppo.Args(loss="separate", count_inapplicable=False)):
        value, _ = ppo.policy_loss(logratios, applies.expand(3, 5), torch.ones(3), args)
        gradients.append(torch.autograd.grad(value, logratios)[0])
    torch.testing.assert_close(gradients[0] * applies, 0.4 * gradients[1])
    assert (gradients[0] != 0).all() and (gradients[1] != 0).sum() == 6


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_sub_action_makes_all_losses_ppo_s(loss, reduction):
    """Where it does not apply, and does not count, there is no gradient."""
    logratios, applies, advantages = sample(2, D=1)
    assert 0 < applies.mean() < 1
    x, A = torch.tensor(logratios, requires_grad=True), torch.tensor(advantages)
    y = torch.tensor(logratios[:, 0], requires_grad=True)
    args = ppo.Args(loss=loss, sub_action_reduction=reduction, count_inapplicable=False)
    for v in (torch.ones(B, 1), torch.tensor(applies)):
        value = ppo.policy_loss(x, v, A, args)[0]
        pi = SimpleNamespace(log_prob=lambda _, v=v: y * v[:, 0], entropy=lambda: torch.zeros(B))
        base = SimpleNamespace(policy=lambda _, pi=pi: pi, value=lambda _: torch.zeros(B))
        batch = {"obs": None, "actions": None, "advantages": A} | dict.fromkeys(("logprobs", "values", "returns"), 0)
        expected = ppo_continuous.loss(base, batch, ppo_continuous.Args(norm_adv=False))[0]
        gradients = torch.autograd.grad(value, x)[0][:, 0], torch.autograd.grad(expected, y)[0]
        torch.testing.assert_close(*gradients)
        assert not v.all() or value.item() == pytest.approx(expected.item())


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


def agent_for(action_space, obs_space=None, **settings):
    torch.manual_seed(4)
    args = ppo.Args(**settings)
    envs = SimpleNamespace(action_space=action_space, observation_space=obs_space or Box(-1, 1, (3,)))
    return ppo.make_agent(envs, args), args


@pytest.mark.parametrize("std_type", ["independent", "state"])
def test_a_box_s_sub_actions_are_normal(std_type):
    agent, _ = agent_for(Box(-1, 1, (2,)), log_std_init=-0.3, std_type=std_type)
    obs, actions = torch.randn(7, 3), torch.randn(7, 2)
    pi = agent.policy(obs, torch.ones(7, 0, dtype=torch.bool))
    expected = Normal(pi.mean, pi.log_std.exp())
    torch.testing.assert_close(pi.log_prob(actions), expected.log_prob(actions))
    torch.testing.assert_close(pi.entropy().expand(7, 2), expected.entropy().expand(7, 2))
    assert pi.applies(actions).shape == (7, 2) and (pi.applies(actions) == 1).all()


@pytest.mark.parametrize("space", [MultiDiscrete([3, 2, 4]), MultiDiscrete([[3, 2], [4, 5]]), Discrete(5)])
def test_other_sub_actions_are_categorical(space):
    agent, _ = agent_for(space)
    nvec = [5] if isinstance(space, Discrete) else space.nvec.ravel().tolist()
    obs, masks = torch.randn(7, 3), torch.ones(7, sum(nvec), dtype=torch.bool)
    actions = torch.stack([torch.randint(n, (7,)) for n in nvec], 1)
    pi = agent.policy(obs, masks)
    logits = agent.actor_mean(agent.actor(agent.normalize(obs)))
    for d, part in enumerate(logits.split(nvec, 1)):
        expected = Categorical(logits=part)
        torch.testing.assert_close(pi.log_prob(actions)[:, d], expected.log_prob(actions[:, d]))
        torch.testing.assert_close(pi.entropy()[:, d], expected.entropy())
        assert (pi.mode[:, d] == part.argmax(1)).all()
    assert (pi.applies(actions) == 1).all()
    assert agent.value(obs).shape == (7,)


def masked(M=400):
    """An agent with MultiDiscrete [3, 4], M observations, and masks that leave two choices of the first component, and
    all four, one, or none of the second, in turn."""
    agent, args = agent_for(MultiDiscrete([3, 4]), norm_obs=False)
    second = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).repeat(M // 3 + 1, 1)[:M]
    masks = torch.cat([torch.tensor([1, 0, 1]).expand(M, 3), second], 1).bool()
    return agent, args, torch.randn(M, 3), masks


def draw(agent, obs, masks):
    with torch.no_grad():
        return agent.policy(obs, masks).sample(agent.noise(*obs.shape[: masks.dim() - 1]))


def test_masked_choices_are_never_drawn_and_have_no_gradient():
    agent, _, obs, masks = masked()
    actions = draw(agent, obs, masks)
    assert set(actions[:, 0].tolist()) == {0, 2}
    assert set(actions[1::3, 1].tolist()) == {2} and len(set(actions[0::3, 1].tolist())) == 4
    logits = torch.randn(400, 7, requires_grad=True)
    pi = ppo.Categorical(logits, masks, [3, 4])
    logprobs, entropies, applies = pi.log_prob(actions), pi.entropy(), pi.applies(actions)
    (gradient,) = torch.autograd.grad((logprobs * applies).sum() + entropies.sum(), logits)
    assert torch.isfinite(gradient).all() and torch.isfinite(logprobs).all()
    assert (gradient[:, 1] == 0).all()
    assert (gradient[1::3, 3:] == 0).all() and (gradient[2::3, 3:] == 0).all() and (gradient[0::3, 3:] != 0).any()
    # one choice is no choice, and none neither: they do not apply
    assert applies[:, 0].all() and applies[0::3, 1].all() and not applies[1::3, 1].any() and not applies[2::3, 1].any()
    two = Categorical(logits=logits[:, [0, 2]])
    torch.testing.assert_close(entropies[:, 0], two.entropy())
    torch.testing.assert_close(logprobs[:, 0].exp(), two.probs[torch.arange(400), actions[:, 0] // 2])


def test_draws_follow_the_masked_probabilities():
    agent, _, obs, masks = masked(1)
    agent.actor_mean.bias.data[3:] = torch.tensor([0.0, 1.0, -1.0, 0.5])
    actions = draw(agent, obs.expand(40_000, -1), masks.expand(40_000, -1))
    part = agent.policy(obs, masks).log_probs[1][0].exp()
    torch.testing.assert_close(torch.bincount(actions[:, 1], minlength=4) / 40_000, part.detach(), atol=0.01, rtol=0)
    assert part.max() > 4 * part.min()


def test_the_mode_is_the_likeliest_valid_choice():
    agent, _, obs, masks = masked(3)
    agent.actor_mean.bias.data = torch.tensor([1.0, 9, 2, 1, 2, 1, 3])  # the masked second is the likeliest
    assert agent.policy(obs, masks).mode[:2].tolist() == [[2, 3], [2, 2]]


# --- MicroRTS -----------------------------------------------------------------------------------------------------

SIZES = (5, 5, 3, 8, 6)
USED = {0: [], 1: [1], 2: [2], 3: [3], 4: [4, 5], 5: [6]}  # of an order's components, by its type


def planes_space(h, w):
    high = np.broadcast_to((np.array(SIZES) - 1)[:, None, None], (len(SIZES), h, w)).astype(np.uint8)
    return Box(np.zeros_like(high), high, dtype=np.uint8)


def orders_space(kind, cells):
    return MultiDiscrete([cells, *ppo.ORDER] if kind == "unit" else np.tile(ppo.ORDER, (cells, 1)))


def microrts(kind, M=6, **settings):
    """A random state of a 4 x 5 map as the environment gives it: some idle units, each with some orders."""
    cells = 20
    agent, args = agent_for(orders_space(kind, cells), planes_space(4, 5), **settings)
    rng = np.random.default_rng(5)
    obs = np.stack([rng.integers(0, n, (M, 4, 5)) for n in SIZES], 1).astype(np.uint8)
    idle = rng.random((M, cells)) < 0.3
    idle[:, 3], idle[0] = True, False  # the first sample has none
    masks = np.concatenate([idle[..., None], (rng.random((M, cells, 78)) < 0.5) & idle[..., None]], 2)
    masks[..., 1] |= idle  # to wait is always possible
    return agent, args, torch.from_numpy(obs), torch.from_numpy(masks.reshape(M, -1))


def applies_to(mask, order) -> list[bool]:
    """Of the seven components of an order under this mask [78]: used by its type, with more than one choice."""
    starts = np.cumsum([0, *ppo.ORDER])
    several = [mask[a:b].sum() > 1 for a, b in zip(starts, starts[1:])]
    return [bool(several[c] and (c == 0 or c in USED[int(order[0])])) for c in range(7)]


def test_the_spaces_choose_the_agent():
    assert type(agent_for(Box(-1, 1, (2,)))[0]) is ppo.GaussianAgent
    assert type(agent_for(MultiDiscrete([20, *ppo.ORDER]))[0]) is ppo.CategoricalAgent  # no planes
    assert type(microrts("unit")[0]) is ppo.UnitAgent and type(microrts("gridnet")[0]) is ppo.GridnetAgent


def test_one_unit_a_step():
    agent, _, obs, masks = microrts("unit")
    cells, seen, starts = masks.view(6, 20, 79), set(), np.cumsum([0, *ppo.ORDER])
    logits = agent.actor_mean(agent.trunk(agent.normalize(obs))).detach()
    for _ in range(60):
        actions = draw(agent, obs, masks)
        pi = agent.policy(obs, masks)
        logprobs, entropies, applies = pi.log_prob(actions), pi.entropy(actions), pi.applies(actions)
        assert torch.isfinite(logprobs).all() and torch.isfinite(entropies).all()
        assert not applies[0].any()  # no idle unit, nothing to decide
        for i in range(1, 6):
            cell, order = int(actions[i, 0]), actions[i, 1:]
            seen.add(cell)
            assert cells[i, cell, 0]
            expected = Categorical(logits=logits[i, :20].masked_fill(~cells[i, :, 0], -1e30))
            torch.testing.assert_close(logprobs[i, 0].detach(), expected.log_prob(actions[i, 0]))
            several_cells = bool(cells[i, :, 0].sum() > 1)
            assert applies[i].bool().tolist() == [several_cells, *applies_to(cells[i, cell, 1:], order)]
            for c, (a, b) in enumerate(zip(starts, starts[1:])):
                row = cells[i, cell, 1 + a : 1 + b]
                if row.any():
                    assert row[order[c]]  # only what the unit may do
                    expected = Categorical(logits=logits[i, 20 + a : 20 + b].masked_fill(~row, -1e30))
                    torch.testing.assert_close(logprobs[i, 1 + c].detach(), expected.log_prob(order[c]))
                    torch.testing.assert_close(entropies[i, 1 + c].detach(), expected.entropy())
    assert len(seen) > 5


def test_the_likeliest_order_is_for_the_likeliest_cell():
    agent, _, obs, masks = microrts("unit")
    logits, cells = agent.actor_mean(agent.trunk(agent.normalize(obs))), masks.view(6, 20, 79)
    mode = agent.policy(obs, masks).mode
    for i in range(1, 6):
        cell = logits[i, :20].masked_fill(~cells[i, :, 0], -1e30).argmax()
        assert mode[i, 0] == cell
        assert mode[i, 1] == logits[i, 20:26].masked_fill(~cells[i, cell, 1:7], -1e30).argmax()


def test_all_units_a_step():
    agent, _, obs, masks = microrts("gridnet")
    actions, cells = draw(agent, obs, masks), masks.view(6, 20, 79)
    pi, values = agent.policy_and_value(obs, masks)
    logprobs, entropies, applies = pi.log_prob(actions), pi.entropy(actions), pi.applies(actions)
    assert actions.shape == logprobs.shape == applies.shape == (6, 20 * 7) and values.shape == (6,)
    orders, starts = actions.view(6, 20, 7), np.cumsum([0, *ppo.ORDER])
    image = agent.actor_mean(agent.trunk(agent.normalize(obs)))  # [6, 78, 4, 5]
    for i in range(6):
        for cell in range(20):
            idle, row, of_cell = cells[i, cell, 0], cells[i, cell, 1:], slice(7 * cell, 7 * cell + 7)
            expected = [bool(idle) and each for each in applies_to(row, orders[i, cell])]
            assert applies[i, of_cell].bool().tolist() == expected
            for c in np.flatnonzero(expected):
                a, b = starts[c], starts[c + 1]
                logits = image[i, a:b, cell // 5, cell % 5].masked_fill(~row[a:b], -1e30)
                choice = int(orders[i, cell, c])
                assert row[a + choice]
                torch.testing.assert_close(logprobs[i, 7 * cell + c], logits.log_softmax(0)[choice])
                torch.testing.assert_close(entropies[i, 7 * cell + c], Categorical(logits=logits).entropy())
    loss = (logprobs * applies).sum() + (entropies * applies).sum() + values.sum()
    grads = torch.autograd.grad(loss, list(agent.parameters()))
    assert all(torch.isfinite(g).all() for g in grads) and any((g != 0).any() for g in grads)


def test_planes_become_one_hot_planes():
    agent, _, obs, _ = microrts("unit")
    expected = [torch.nn.functional.one_hot(obs[:, k].long(), n).permute(0, 3, 1, 2) for k, n in enumerate(SIZES)]
    assert torch.equal(agent.normalize(obs), torch.cat(expected, 1).float())


@pytest.mark.parametrize("kind", ["unit", "gridnet"])
def test_a_rollout_in_parts_is_the_rollout(kind):
    """Of 2 T + 1 steps, so that the last part is a short one; all at once would be gigabytes on a large map."""
    agent, args, obs, masks = microrts(kind, M=3 * (2 * ppo.MicroRTSAgent.steps_at_once + 1))
    obs, masks = obs.unflatten(0, (-1, 3)), masks.unflatten(0, (-1, 3))
    actions, T = draw(agent, obs, masks), len(obs)
    rows = {"obs": obs, "masks": masks, "actions": actions, "next_obs": obs.flip(0)}
    rows |= {name: torch.zeros(T, 3, dtype=torch.float64) for name in ("rewards", "discounted")}
    rows |= {name: torch.zeros(T, 3, dtype=torch.bool) for name in ("terminated", "done")}
    sizes, normalize = [], agent.normalize
    agent.normalize = lambda part: sizes.append(len(part)) or normalize(part)
    batch = ppo.make_batch(rows, agent, torch.device("cpu"), args)
    assert sizes == [agent.steps_at_once] * 4 + [1] * 2
    pi, values = agent.policy_and_value(obs, masks)
    torch.testing.assert_close(batch["values"], values.flatten())
    torch.testing.assert_close(batch["logprobs"], pi.log_prob(actions).flatten(0, 1))
    delta = args.gamma * values.flip(0)[-1] - values[-1]
    torch.testing.assert_close(batch["advantages"].view(T, 3)[-1], delta)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (9, 12), (10, 10), (16, 16), (24, 24)])
def test_the_networks_fit_any_map(size):
    cells = math.prod(size)
    obs, masks = torch.zeros(2, 5, *size, dtype=torch.uint8), torch.ones(2, cells * 79, dtype=torch.bool)
    for kind, shape in (("unit", (2, 8)), ("gridnet", (2, 7 * cells))):
        agent, _ = agent_for(orders_space(kind, cells), planes_space(*size))
        pools, pooled = [layer for layer in agent.trunk if isinstance(layer, torch.nn.MaxPool2d)], []
        for pool in pools:
            pool.register_forward_pre_hook(lambda _, inputs, pooled=pooled: pooled.append(inputs[0][0, 0].numel()))
        assert draw(agent, obs, masks).shape == shape and agent.value(obs).shape == (2,)
        assert kind == "unit" or (pools and min(pooled) > 1)  # compiled for a GPU, a pool of one cell has no gradient


# --- The whole update ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, D", [("joint", 6), *((loss, 1) for loss in LOSSES)])
def test_joint_or_one_sub_action_on_a_box_is_ppo_continuous(loss, D):
    """Same weights, same batch: a gradient step of each."""
    envs, args, base_args = spaces(17, D), ppo.Args(loss=loss), ppo_continuous.Args()
    torch.manual_seed(4)
    agent = ppo.make_agent(envs, args)
    torch.manual_seed(4)
    base = ppo_continuous.Agent(envs, base_args)
    for (name, p), (base_name, q) in zip(agent.state_dict().items(), base.state_dict().items(), strict=True):
        assert name == base_name and torch.equal(p, q)
    obs, actions = torch.randn(64, 17), torch.randn(64, D)
    pi = base.policy(obs)
    shared = {"obs": obs, "actions": actions, "advantages": torch.randn(64), "returns": torch.randn(64)}
    shared["values"] = base.value(obs).detach() + 0.1 * torch.randn(64)
    old = Normal(pi.mean, pi.log_std.exp()).log_prob(actions).detach() + 0.05 * torch.randn(64, D)
    learning_rate, indices = torch.tensor(3e-4), torch.arange(64).view(1, -1)
    batch = {**shared, "masks": torch.ones(64, 0, dtype=torch.bool), "logprobs": old}
    ours, our_names, our_metrics = ppo.update_step(
        ppo.init_optimizer(agent), learning_rate, batch, indices, agent, args
    )
    batch = {**shared, "logprobs": old.sum(-1)}
    optimizer = ppo_continuous.init_optimizer(base)
    theirs, names, metrics = ppo_continuous.update_step(optimizer, learning_rate, batch, indices, base, base_args)
    assert our_names[: len(names)] == names
    torch.testing.assert_close(ours["theta"], theirs["theta"], rtol=0, atol=1e-6)
    torch.testing.assert_close(our_metrics[: len(metrics)], metrics, rtol=1e-4, atol=1e-6)


def batch_of(agent, obs, masks, seed=0):
    """A batch [M, ...] of actions drawn from the agent, whose log-probabilities have moved a little since."""
    torch.manual_seed(seed)
    actions = draw(agent, obs, masks)
    pi, values = agent.policy_and_value(obs, masks)
    logprobs = pi.log_prob(actions)
    batch = {"obs": obs, "masks": masks, "actions": actions, "values": values}
    batch |= {"logprobs": logprobs + 0.1 * torch.randn(logprobs.shape)}
    batch |= {"advantages": torch.randn(len(obs)), "returns": values + torch.randn(len(obs))}
    return {name: tensor.detach() for name, tensor in batch.items()}


@pytest.mark.parametrize("count_inapplicable", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_whole_loss_of_masked_sub_actions(loss, count_inapplicable):
    """Samples with all, one and none of the second component's choices open, against torch.distributions. Where there
    is no choice the ratio is 1, whatever --count-inapplicable says of the mean."""
    agent, args, obs, masks = masked(300)
    args.loss, args.ent_coef, args.count_inapplicable = loss, 0.1, count_inapplicable
    batch = batch_of(agent, obs, masks)
    pi = agent.policy(obs, masks)
    unmoved = pi.log_prob(batch["actions"]).detach()
    batch["logprobs"] = torch.where(pi.applies(batch["actions"]) > 0, batch["logprobs"], unmoved)
    total, metrics = ppo.loss(agent, batch, args)

    logits, values = agent.actor_mean(agent.actor(obs)), agent.critic(obs).squeeze(-1)
    log_pi, entropies = torch.zeros(300, 2), torch.zeros(300, 2)
    applies = torch.stack([torch.ones(300), (masks[:, 3:].sum(1) > 1).float()], 1)
    for i in range(300):
        for d, at in enumerate((slice(0, 3), slice(3, 7))):
            if applies[i, d]:
                pi = Categorical(logits=logits[i, at].masked_fill(~masks[i, at], -torch.inf))
                log_pi[i, d] = pi.log_prob(batch["actions"][i, d])
                entropies[i, d] = -(pi.probs * pi.probs.clamp(min=1e-30).log()).sum()
    logratios = (log_pi - batch["logprobs"]) * applies
    A = batch["advantages"]
    A = (A - A.mean()) / A.std()
    pg_loss = by_hand(logratios.double().detach().numpy(), applies.numpy(), A.numpy(), args)
    clipped = batch["values"] + (values - batch["values"]).clamp(-0.2, 0.2)
    v_error = torch.maximum((values - batch["returns"]) ** 2, (clipped - batch["returns"]) ** 2)
    expected = pg_loss + 0.5 * 0.5 * v_error.mean() - 0.1 * entropies.sum(1).mean()
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["entropy"].item() == pytest.approx(entropies.sum(1).mean().item(), rel=1e-5)
    joint = logratios.sum(1)
    assert metrics["approx_kl"].item() == pytest.approx((joint.exp() - 1 - joint).mean().item(), rel=1e-4)
    params = dict(agent.named_parameters())
    grads = dict(zip(params, torch.autograd.grad(total, list(params.values()))))
    assert all(torch.isfinite(gradient).all() for gradient in grads.values())
    assert (grads["actor_mean.weight"][1] == 0).all() and grads["actor_mean.weight"].shape[0] == 7  # never open


@pytest.mark.parametrize("kind", ["masked", "unit"])  # gridnet takes minutes to compile
def test_compiled_and_plain_updates_agree(kind, capsys):
    agent, args, obs, masks = masked(64) if kind == "masked" else microrts(kind, M=64)
    args.loss, args.ent_coef, args.num_minibatches = "mix-ratio", 0.01, 1
    batch, learning_rate = batch_of(agent, obs, masks), torch.tensor(1e-3)
    optimizer, indices = ppo.init_optimizer(agent), torch.randperm(64).view(1, -1)
    step = ppo.compile_update(agent, optimizer, learning_rate, batch, args)
    assert "notice" not in capsys.readouterr().err  # of an update that runs uncompiled
    plain, names, plain_metrics = ppo.update_step(optimizer, learning_rate, batch, indices, agent, args)
    compiled, compiled_names, metrics = step(optimizer, learning_rate, batch, indices)
    assert (plain["theta"] - optimizer["theta"]).abs().max() > 5e-4 and names == compiled_names
    torch.testing.assert_close(compiled["theta"], plain["theta"], rtol=0, atol=1e-5)
    torch.testing.assert_close(metrics, plain_metrics, rtol=1e-3, atol=1e-4)


# --- Whole runs ---------------------------------------------------------------------------------------------------


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


gym.register("Lock-v0", Lock)


@pytest.mark.parametrize("loss", ["joint", "separate"])
def test_masks_travel_with_the_batch_and_a_masked_policy_learns(loss, tmp_path, capsys):
    """The environment refuses masked choices, so a mask that went astray would end the run."""
    flags = f"--env-id Lock-v0 --loss {loss} --num-steps 64 --num-minibatches 4 --total-timesteps 30000 --device cpu"
    ppo.main(ppo.parse_args([*flags.split(), "--no-compile", "--runs-dir", str(tmp_path)]))
    rows = np.loadtxt(only(tmp_path) / "episodes.csv", delimiter=",", skiprows=1)
    assert rows[:50, 1].mean() < 6 and rows[-50:, 1].mean() > 8.5  # of 10


def test_an_evaluation_takes_the_likeliest_actions_or_draws_them(tmp_path):
    args = ppo.Args(env_id="CartPole-v1", eval_episodes=2)
    envs = ppo.Envs(args, range(-1, 0), evaluation=True)
    torch.manual_seed(0)
    agent = ppo.make_agent(envs, args)
    greedy = [[episode[1] for episode in ppo.evaluate(agent, args, tmp_path)] for _ in range(2)]
    args.eval_sample = True
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        drawn.append([episode[1] for episode in ppo.evaluate(agent, args, tmp_path)])
        assert torch.equal(torch.get_rng_state(), before)  # the training draws on as if there had been no evaluation
    assert greedy[0] == greedy[1] and drawn[0] != drawn[1]


def test_the_paper_s_three_layers(tmp_path):
    flags = "--num-envs 2 --num-steps 8 --num-minibatches 1 --total-timesteps 16 --eval-episodes 0 --no-compile".split()
    flags += ["--env-id", "Pendulum-v1", "--rescale-actions", "--hidden-layers", "3", "--runs-dir", str(tmp_path)]
    ppo.main(ppo.parse_args(flags))
    model = load(only(tmp_path) / "model.pt")
    widths = {name: list(tensor.shape) for name, tensor in model.items() if name.endswith("weight")}
    assert [widths[f"actor.{k}.weight"] for k in (0, 2, 4)] == [[64, 3], [64, 64], [64, 64]]
    assert [widths[f"critic.{k}.weight"] for k in (0, 2, 4, 6)] == [[64, 3], [64, 64], [64, 64], [1, 64]]


@pytest.mark.parametrize("flags", ["--mix-weight 1.5", "--dual-clip 0.5", "--dual-clip -1", "--hidden-layers 0"])
def test_a_wrong_value_is_one_line(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        ppo.main(ppo.parse_args([*flags.split(), "--runs-dir", str(tmp_path)]))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith(f"error: {flags.split()[0]} ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
