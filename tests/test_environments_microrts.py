"""The games of MicroRTS: orders, masks, rewards, ends and resets. Needs gym-microrts, jpype1 and a Java."""

import json
import os
import runpy
import subprocess
import sys
import xml.etree.ElementTree

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

microrts = pytest.importorskip("environments.microrts", exc_type=ImportError)

NONE, MOVE, HARVEST, RETURN, PRODUCE, ATTACK = range(6)
RESOURCE, BASE, BARRACKS, WORKER, LIGHT, HEAVY = range(1, 7)  # as the plane of types has them
NORTH, EAST, SOUTH, WEST = range(4)
OFFSETS = [(0, -1), (1, 0), (0, 1), (-1, 0)]  # dx, dy of the directions
DISABLED = AutoresetMode.DISABLED
PARTS = np.split(np.arange(78), np.cumsum(microrts.COMPONENTS)[:-1])


@pytest.fixture(scope="module", autouse=True)
def java():
    """Not before these tests run: a process with Java in it cannot be forked."""
    try:
        microrts.start_java()
    except ImportError as error:
        pytest.skip(str(error))


def make(num_envs=1, opponents=("passiveAI",), size="8x8", **kwargs):
    options = {"map": f"MicroRTS-{size}-basesWorkers", "autoreset_mode": DISABLED, **kwargs}
    return microrts.MicroRTSVectorEnv(num_envs, opponents=opponents, **options)


def order(action, direction=0, kind=0, dx=0, dy=0):
    return [action, *[direction] * 4, kind, 7 * (3 + dy) + 3 + dx]


def draw(masks, rng, all_cells=False):
    """Random actions within the masks; all_cells as for action_mode "gridnet"."""
    u = np.where(masks[:, :, 1:], rng.random((*masks.shape[:2], 78), dtype=np.float32), -1)
    orders = np.stack([u[:, :, part].argmax(-1) for part in PARTS], -1)
    if all_cells:
        return orders
    cells = np.where(masks[:, :, 0], rng.random(masks.shape[:2]), -1).argmax(1)
    return np.concatenate([cells[:, None], orders[np.arange(len(masks)), cells]], 1)


class Commander:
    """Orders for one seat's units, one after the other; the other seats do nothing."""

    def __init__(self, env, seat=0):
        self.height, self.width = env.single_observation_space.shape[1:]
        self.env, self.seat, self.rewards, self.over = env, seat, [], False
        self.see(env.reset()[0])

    def see(self, obs):
        self.hp, self.resources, self.owner, self.kind, self.busy = obs[self.seat]

    def cells(self, owner, kind):
        """(x, y) of all units of an owner and a type."""
        return [(int(x), int(y)) for y, x in np.argwhere((self.owner == owner) & (self.kind == kind))]

    def give(self, x, y, *what, **components):
        """An order to the unit there, until no unit is busy; what it was paid, raw [6], in its first step and later."""
        cell, paid = y * self.width + x, []
        row = self.env.masks[self.seat, cell]
        action = [cell, *order(*what, **components)]
        used = {MOVE: [1], HARVEST: [2], RETURN: [3], PRODUCE: [4, 5], ATTACK: [6]}.get(what[0], [])
        assert row[0] and all(row[1:][PARTS[part]][action[1 + part]] for part in [0, *used]), "the mask forbids it"
        actions = np.zeros((self.env.num_envs, 8), dtype=int)
        actions[self.seat] = action
        while True:
            obs, rewards, terminated, truncated, info = self.env.step(actions)
            self.see(obs)
            paid.append(info["raw_rewards"][self.seat])
            self.rewards.append(rewards[self.seat])
            self.over, self.won = bool(terminated[self.seat] or truncated[self.seat]), info["is_success"][self.seat]
            if self.over or not (self.busy * (self.owner == 1)).any():
                return paid[0], sum(paid[1:], np.zeros(6))
            actions[self.seat] = 0

    def go(self, x, y, to_x, to_y):
        """Walk a shortest way next to a cell; where the unit then stands."""
        ways, ends = {(x, y): []}, [(x, y)]
        while ends:
            x, y = ends.pop(0)
            if abs(x - to_x) + abs(y - to_y) == 1:
                break
            for direction, (dx, dy) in enumerate(OFFSETS):
                step = (x + dx, y + dy)
                inside = 0 <= step[0] < self.width and 0 <= step[1] < self.height
                if inside and step not in ways and self.kind[step[1], step[0]] == 0:
                    ways[step] = [*ways[x, y], direction]
                    ends.append(step)
        start = next(iter(ways))
        for direction in ways[x, y]:
            self.give(*start, MOVE, direction)
            start = (start[0] + OFFSETS[direction][0], start[1] + OFFSETS[direction][1])
            assert self.owner[start[1], start[0]] == 1
        return start

    def toward(self, x, y, to_x, to_y):
        return OFFSETS.index((to_x - x, to_y - y))


def paid(**rewards):
    return [rewards.get(name, 0) for name in microrts.REWARDS]


# What orders do.


def test_units_move_where_they_are_sent():
    player, rng, seen = Commander(make()), np.random.default_rng(0), set()
    for _ in range(60):
        [(x, y)] = player.cells(1, WORKER)
        direction = rng.choice(np.flatnonzero(player.env.masks[0, 8 * y + x, 1:][PARTS[1]]))
        player.give(x, y, MOVE, direction)
        dx, dy = OFFSETS[direction]
        assert player.cells(1, WORKER) == [(x + dx, y + dy)]
        seen.add(int(direction))
    assert seen == {NORTH, EAST, SOUTH, WEST}


def test_an_economy_and_a_war():
    """Harvest, return, produce a worker, a building, a soldier, attack and win: each is paid when it is ordered."""
    player = Commander(make(max_steps=10_000))
    [(x, y)], [base], [spot] = player.cells(1, WORKER), player.cells(1, BASE), [(0, 0)]
    first, later = player.give(*base, PRODUCE, SOUTH, WORKER - 1)
    assert list(first) == paid(ProduceWorker=1) and not later.any()
    assert (base[0], base[1] + 1) in player.cells(1, WORKER)
    for _ in range(8):
        x, y = player.go(x, y, *spot)
        first, later = player.give(x, y, HARVEST, player.toward(x, y, *spot))
        assert list(first) == paid(ResourceGather=1) and not later.any()
        assert player.resources[y, x] == 1
        x, y = player.go(x, y, *base)
        first, later = player.give(x, y, RETURN, player.toward(x, y, *base))
        assert list(first) == paid(ResourceGather=1) and not later.any()
        assert player.resources[y, x] == 0
    builder = [cell for cell in player.cells(1, WORKER) if cell != (x, y)][0]
    first, later = player.give(*builder, PRODUCE, SOUTH, BARRACKS - 1)
    assert list(first) == paid(ProduceBuilding=1) and not later.any()
    barracks = (builder[0], builder[1] + 1)
    assert player.cells(1, BARRACKS) == [barracks]
    first, later = player.give(*barracks, PRODUCE, EAST, LIGHT - 1)
    assert list(first) == paid(ProduceCombatUnit=1) and not later.any()
    x, y = barracks[0] + 1, barracks[1]
    assert player.cells(1, LIGHT) == [(x, y)]
    while not player.over:
        target = (player.cells(2, WORKER) + player.cells(2, BASE))[0]
        x, y = player.go(x, y, *target)
        strength = player.hp[target[1], target[0]]
        first, later = player.give(x, y, ATTACK, dx=target[0] - x, dy=target[1] - y)
        assert list(first) == paid(Attack=1)
        assert player.hp[target[1], target[0]] < strength or strength == 4  # the plane is clipped
    assert list(later) == paid(WinLoss=1) and player.won
    assert player.rewards[-1] == 10
    assert not player.cells(2, WORKER) + player.cells(2, BASE)
    with pytest.raises(ValueError, match="reset"):
        player.env.step(np.zeros((1, 8), dtype=int))


def test_gridnet_orders_all_idle_units_at_once():
    env = make(action_mode="gridnet")
    obs = env.reset()[0][0]
    worker, base = np.argwhere(obs[3] == WORKER)[0], np.argwhere((obs[3] == BASE) & (obs[2] == 1))[0]
    assert list(worker) == [1, 1]
    actions = np.zeros((1, 64, 7), dtype=int)
    actions[:] = order(ATTACK)  # of no consequence where no idle unit of the seat stands
    actions[0, 8 * base[0] + base[1]] = order(PRODUCE, EAST, WORKER - 1)
    actions[0, 9] = order(MOVE, SOUTH)
    after = env.step(actions)[0][0]
    assert after[4][tuple(base)] == PRODUCE and after[4][1, 1] == MOVE
    assert (after[4] != 0).sum() == 2 and not env.masks.any()
    # Games with different numbers of idle units are stepped together.
    pair = make(2, action_mode="gridnet")
    pair.reset()
    actions = np.repeat(np.zeros_like(actions), 2, 0)
    actions[1, 8 * base[0] + base[1]] = order(PRODUCE, EAST, WORKER - 1)
    pair.step(actions)
    assert list(pair.masks[:, :, 0].sum(1)) == [2, 1]
    actions[1, 9] = order(MOVE, SOUTH)
    after = pair.step(actions)[0]
    assert after[1, 4, 1, 1] == MOVE and after[1, 4][tuple(base)] == PRODUCE and not after[0, 4].any()
    # Both want the same cell: one goes on, the other waits.
    actions = np.zeros((1, 64, 7), dtype=int)
    env.reset()
    actions[0, 8 * base[0] + base[1]] = order(PRODUCE, SOUTH, WORKER - 1)
    actions[0, 9] = order(MOVE, SOUTH)
    for _ in range(12):
        env.step(actions)
    actions[0, 8 * 2 + 1] = order(MOVE, EAST)
    after = env.step(actions)[0][0]
    assert after[4][tuple(base)] == PRODUCE and after[4][2, 1] == NONE


# Masks.


@pytest.mark.parametrize("kwargs", [{"opponents": ("passiveAI", "workerRushAI")}, {"selfplay": 2}])
def test_masked_orders_are_carried_out(kwargs):
    """5,000 steps each. The next observation shows the unit at work on its order, but for the two clashes that masks
    do not tell: the cell belongs to another unit's order, or both sides wanted it, or the money is another unit's."""
    env, rng = make(4, **kwargs), np.random.default_rng(1)
    prices = [0, 10, 5, 1, 2, 2, 2]

    def claims(i):
        """The cells that orders under way will use, and the money that is left for others."""
        game, player = env.seats[i]
        state = env.game_state(game)
        usage = state.getResourceUsage()
        money = state.getPlayer(player).getResources() - usage.getResourcesUsed(player)
        return {int(cell) for cell in usage.getPositionsUsed()}, money

    env.reset()
    carried_out = np.zeros(6, dtype=int)
    for _ in range(1250):
        masks, before = env.masks, [claims(i) for i in range(4)]
        actions = draw(masks, rng)
        obs, _, terminated, truncated, _ = env.step(actions)
        _, _, owner, _, busy = obs.transpose(1, 0, 2, 3)
        for i in np.flatnonzero(masks[:, :, 0].any(1)):
            cell, action = actions[i, 0], actions[i, 1]
            x, y = cell % 8, cell // 8
            if action == NONE or owner[i, y, x] != 1:  # killed in this very step
                continue
            if busy[i, y, x] == action:
                assert not env.masks[i, cell].any()
                carried_out[action] += 1
                continue
            assert action in (MOVE, PRODUCE)
            dx, dy = OFFSETS[actions[i, 2 if action == MOVE else 5]]
            taken = 8 * (y + dy) + x + dx in before[i][0] | claims(i)[0]
            near = [(y + dy + v, x + dx + u) for u, v in OFFSETS]
            both = any(0 <= v < 8 and 0 <= u < 8 and owner[i, v, u] == 2 and busy[i, v, u] == NONE for v, u in near)
            poor = action == PRODUCE and before[i][1] < prices[actions[i, 6]]
            assert taken or both or poor
        done = terminated | truncated
        if done.any():
            env.reset(options={"reset_mask": done})
    assert carried_out.sum() > 500 and (carried_out[1:] > 0).all()


def test_orders_outside_the_masks_are_not_carried_out():
    env, rng = make(8, ("workerRushAI", "passiveAI")), np.random.default_rng(2)
    env.reset()
    accepted = waited = 0
    for _ in range(1000):
        masks = env.masks
        actions = rng.integers(0, env.single_action_space.nvec, (8, 8))
        actions[:, 0] = draw(masks, rng)[:, 0]
        obs, _, terminated, truncated, _ = env.step(actions)
        busy = obs[:, 4].reshape(8, 64)
        for i in np.flatnonzero(masks[:, :, 0].any(1)):
            cell, action = actions[i, :2]
            row = masks[i, cell, 1:]
            used = {MOVE: [1], HARVEST: [2], RETURN: [3], PRODUCE: [4, 5], ATTACK: [6]}.get(action, [])
            if all(row[PARTS[part]][actions[i, 1 + part]] for part in [0, *used]):
                accepted += action != NONE
            else:
                waited += 1
                assert busy[i, cell] == NONE
        if (terminated | truncated).any():
            env.reset(options={"reset_mask": terminated | truncated})
    assert accepted > 50 and waited > 500


@pytest.mark.parametrize("partial_obs", [False, True])
def test_masks_are_those_of_java(partial_obs):
    """Only some rows are read; all others must be zeros."""
    env = make(6, ("workerRushAI", "lightRushAI"), selfplay=2, partial_obs=partial_obs, max_steps=150)
    rng = np.random.default_rng(3)
    env.reset()
    for _ in range(400):
        whole = np.array(env.client.getMasks(0)).reshape(6, 64, 79)
        assert set(np.unique(whole)) <= {0, 1}
        assert (env.masks == whole).all()
        _, _, terminated, truncated, _ = env.step(draw(env.masks, rng))
        if (terminated | truncated).any():
            env.reset(options={"reset_mask": terminated | truncated})


def test_a_new_array_of_masks_each_step():
    env = make()
    first = env.reset()[1]["action_mask"]
    before = first.copy()
    _, _, _, _, info = env.step(np.array([[9, *order(MOVE, SOUTH)]]))
    assert (info["action_mask"] == env.masks).all() and (first == before).all()
    assert (info["action_mask"] != before).any()


# Rewards and ends.


def test_rewards_are_the_weights_times_the_raw_ones():
    weights = (7.0, -1.0, 0.5, 2.0, 3.0, 11.0)
    env, rng = make(8, ("randomBiasedAI", "workerRushAI"), reward_weights=weights), np.random.default_rng(4)
    env.reset()
    seen = np.zeros(6)
    for _ in range(800):
        _, rewards, terminated, truncated, info = env.step(draw(env.masks, rng))
        raw = info["raw_rewards"]
        assert rewards.dtype == raw.dtype == np.float64 and raw.shape == (8, 6)
        np.testing.assert_allclose(rewards, (raw * weights).sum(1), rtol=1e-12)
        assert (terminated == (raw[:, 0] != 0)).all() and (info["is_success"] == (raw[:, 0] == 1)).all()
        seen += abs(raw).sum(0)
        if (terminated | truncated).any():
            env.reset(options={"reset_mask": terminated | truncated})
    assert (seen[[0, 1, 2, 4]] > 0).all()


def test_the_time_limit_truncates_and_shows_the_true_last_state():
    short, long = make(3, ("workerRushAI",), max_steps=40), make(3, ("workerRushAI",), max_steps=41)
    rng = np.random.default_rng(5)
    short.reset(), long.reset()
    for t in range(1, 41):
        actions = draw(short.masks, rng)
        (obs, rewards, terminated, truncated, _), other = short.step(actions), long.step(actions)
        assert (obs == other[0]).all() and (rewards == other[1]).all()
        assert not terminated.any() and (truncated == (t == 40)).all() and not other[3].any()
    assert long.step(draw(long.masks, rng))[3].all()
    with pytest.raises(ValueError, match="reset"):
        short.step(actions)


def test_reset_starts_the_masked_games_only():
    env, rng = make(5, ("workerRushAI",)), np.random.default_rng(6)
    first = env.reset()[0]
    for _ in range(60):
        obs = env.step(draw(env.masks, rng))[0]
    mask, masks = np.array([False, True, False, False, True]), env.masks
    after, info = env.reset(options={"reset_mask": mask})
    assert (after[mask] == first[mask]).all() and (after[~mask] == obs[~mask]).all()
    assert (info["action_mask"][~mask] == masks[~mask]).all()
    assert list(env.t) == [60, 0, 60, 60, 0]
    assert not (env.step(draw(env.masks, rng))[0][~mask] == first[~mask]).all()


def test_autoreset_in_the_next_step():
    """The same games as with DISABLED and resets at once, but for one step at each end, which is the reset."""
    rng = np.random.default_rng(7)
    env = make(4, ("workerRushAI",), max_steps=90, autoreset_mode=AutoresetMode.NEXT_STEP)
    reference = make(4, ("workerRushAI",), max_steps=90)
    first, _ = env.reset()
    reference.reset()
    over, ends = np.zeros(4, dtype=bool), 0
    for _ in range(300):
        actions = draw(env.masks, rng)
        obs, rewards, terminated, truncated, info = env.step(actions)
        assert (obs[over] == first[over]).all() and not rewards[over].any() and not info["raw_rewards"][over].any()
        assert not (terminated | truncated)[over].any() and not info["is_success"][over].any()
        same = reference.step(actions)
        assert (obs[~over] == same[0][~over]).all() and (rewards[~over] == same[1][~over]).all()
        assert (truncated[~over] == same[3][~over]).all() and (terminated[~over] == same[2][~over]).all()
        if not over.any():
            over = terminated | truncated
            ends += over.sum()
            if over.any():
                assert not (obs[over] == first[over]).all()
                reference.reset(options={"reset_mask": over})
        else:
            env.reset(), reference.reset()  # games that ended at different times have drifted apart by a step
            over[:] = False
    assert ends >= 4


STREAM = """
import hashlib
import numpy as np
from environments import microrts
bots = ["workerRushAI", "lightRushAI", "passiveAI"]
env = microrts.MicroRTSVectorEnv(6, "MicroRTS-8x8-basesWorkers", bots, max_steps=150)
digest, rng = hashlib.sha256(), np.random.default_rng(8)
obs, info = env.reset()
for _ in range(400):
    digest.update(obs.tobytes() + info["action_mask"].tobytes())
    cells = np.where(info["action_mask"][:, :, 0], rng.random((6, 64)), -1).argmax(1)
    orders = rng.integers(0, microrts.COMPONENTS, (6, 7))
    obs, rewards, *ends, info = env.step(np.concatenate([cells[:, None], orders], 1))
    digest.update(rewards.tobytes() + np.array(ends).tobytes())
digest = digest.hexdigest()
"""


def child(code):
    """The output of this code in a process of its own, which has no display."""
    environ = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_games_follow_from_the_actions():
    """The bots without randomness, in another process and after whatever this one's Java has seen."""
    names = {}
    exec(STREAM, names)
    assert child(STREAM + "print(digest)") == names["digest"]


# Seats.


def test_opponents_take_turns():
    env = make(7, ("coacAI", "workerRushAI"), selfplay=1)
    assert env.opponents == ["selfplay"] * 2 + ["coacAI", "workerRushAI"] * 2 + ["coacAI"]
    assert make(4, (), selfplay=2).opponents == ["selfplay"] * 4


def test_both_seats_of_a_selfplay_game_see_the_same():
    """Mirrored orders keep the mirrored map's two views equal, resources included."""
    env, rng = make(2, size="16x16", selfplay=1), np.random.default_rng(9)
    obs, _ = env.reset()
    directions = [2, 3, 0, 1]
    turned = np.concatenate(
        [np.arange(7)]
        + [7 + 4 * k + np.array(directions) for k in range(4)]
        + [np.arange(23, 30), np.arange(78, 29, -1)]
    )
    seen = obs
    assert (seen[:, 2][seen[:, 3] == RESOURCE] == 0).all()
    assert (seen[:, 2][seen[:, 3] == WORKER] > 0).all()
    for _ in range(250):
        view = obs
        assert (view[0] == view[1, :, ::-1, ::-1]).all()
        assert (env.masks[0] == env.masks[1, ::-1][:, turned]).all()
        action = draw(env.masks[:1], rng)[0]
        mirrored = [255 - action[0], action[1], *((action[2:6] + 2) % 4), action[6], 48 - action[7]]
        obs, rewards, _, _, _ = env.step(np.array([action, mirrored]))
        assert rewards[0] == rewards[1]


def conquer(env, seat=0):
    """Have a seat's worker kill all that the idle enemy has; all steps' results."""
    results, step = [], env.step
    env.step = lambda actions: results.append(step(actions)) or results[-1]
    player = Commander(env, seat)
    [(x, y)] = player.cells(1, WORKER)
    while not player.over:
        target = (player.cells(2, WORKER) + player.cells(2, BASE))[0]
        x, y = player.go(x, y, *target)
        player.give(x, y, ATTACK, dx=target[0] - x, dy=target[1] - y)
    env.step = step
    return results


@pytest.mark.parametrize("winner", [0, 1])
def test_a_selfplay_game_ends_for_both(winner):
    env = make(3, selfplay=1)
    _, rewards, terminated, truncated, info = conquer(env, winner)[-1]
    assert rewards[winner] == 10 and rewards[1 - winner] == -10 and rewards[2] == 0
    assert list(terminated) == [True, True, False] == list(env.over) and not truncated.any()
    with pytest.raises(ValueError, match="share"):
        env.reset(options={"reset_mask": np.array([True, False, False])})
    env.reset(options={"reset_mask": np.array([True, True, False])})
    _, rewards, terminated, _, info = env.step(np.zeros((3, 8), dtype=int))
    assert not rewards.any() and not terminated.any() and not info["is_success"].any()


def test_a_selfplay_game_starts_again_in_the_next_step():
    env = make(2, (), selfplay=1, autoreset_mode=AutoresetMode.NEXT_STEP)
    first, _ = env.reset()
    assert conquer(env)[-1][2].all()
    ignored = np.array([[8 + 2, *order(PRODUCE, SOUTH, WORKER - 1)], np.zeros(8, dtype=int)])  # the first one's base
    for actions in (ignored, np.zeros_like(ignored)):
        obs, rewards, terminated, truncated, info = env.step(actions)
        assert not rewards.any() and not info["raw_rewards"].any() and not (terminated | truncated).any()
        assert (obs == first).all()


def test_a_game_that_is_over_at_the_time_limit_is_not_truncated():
    steps = len(conquer(make()))
    _, _, terminated, truncated, _ = conquer(make(max_steps=steps))[-1]
    assert terminated[0] and not truncated[0]
    results = conquer(make(max_steps=steps - 1))
    assert len(results) == steps - 1 and results[-1][3][0] and not results[-1][2][0]


def test_bots_win_and_play_on():
    env, rng = make(8, ("coacAI",), autoreset_mode=AutoresetMode.NEXT_STEP), np.random.default_rng(13)
    env.reset()
    wins = 0
    for _ in range(700):
        _, rewards, terminated, _, info = env.step(draw(env.masks, rng))
        assert (info["raw_rewards"][terminated, 0] == -1).all() and not info["is_success"].any()
        wins += terminated.sum()
    assert wins >= 8


def test_partial_observability():
    """Own units are seen as in the open game, at once; others within sight only."""
    hidden, open_ = (make(2, ("passiveAI",), partial_obs=partial) for partial in (True, False))
    rng = np.random.default_rng(10)
    (obs, _), (whole, _) = hidden.reset(), open_.reset()
    assert hidden.single_observation_space.high[:, 0, 0].tolist() == [4, 4, 2, 7, 5, 1] and obs.shape == (2, 6, 8, 8)
    for _ in range(300):
        view, true = obs, whole
        visible = view[:, 5] == 1
        assert (visible[true[:, 2] == 1]).all() and not visible.all()
        assert (view[:, :5].transpose(0, 2, 3, 1)[visible] == true.transpose(0, 2, 3, 1)[visible]).all()
        assert not view[:, :4].transpose(0, 2, 3, 1)[~visible].any()
        actions = draw(hidden.masks, rng)
        obs, whole = hidden.step(actions)[0], open_.step(actions)[0]


# As a gymnasium environment.


def test_every_map_of_the_package():
    maps = microrts.package_maps()
    files = list(microrts.FOLDER.glob("maps/**/*.xml"))
    assert len(maps) == len(files) > 100 and set(maps.values()) == set(map(str, files))
    assert "MicroRTS-10x10-basesWorkers" in maps and "MicroRTS-16x16-basesWorkersA" in maps
    for name, path in maps.items():
        assert name in gym.registry
        if name == "MicroRTS-4x4-meleeMixed2":  # the one whose format is older
            with pytest.raises(ValueError, match="map"):
                microrts.MicroRTSVectorEnv(1, name, ("passiveAI",))
            continue
        env = microrts.MicroRTSVectorEnv(1, name, ("passiveAI",))
        root = xml.etree.ElementTree.parse(path).getroot()
        assert env.single_observation_space.shape == (5, int(root.get("height")), int(root.get("width")))
        obs, _ = env.reset()
        assert obs in env.observation_space
        assert (obs[0, 2] == 1).any() and env.masks.any()


def test_a_masked_random_agent_with_plain_gymnasium():
    rng = np.random.default_rng(11)
    name = "environments.microrts:MicroRTS-8x8-basesWorkers"
    envs = gym.make_vec(name, num_envs=4, opponents=["randomBiasedAI", "lightRushAI"], max_steps=80)
    assert isinstance(envs.unwrapped, microrts.MicroRTSVectorEnv)
    obs, info = envs.reset(seed=1)
    ends = 0
    for _ in range(200):
        assert obs.dtype == np.uint8 and obs in envs.observation_space
        actions = draw(info["action_mask"], rng)
        assert actions in envs.action_space
        obs, rewards, terminated, truncated, info = envs.step(actions)
        ends += (terminated | truncated).sum()
    assert ends >= 8
    env = gym.make(name, opponents=["workerRushAI"], action_mode="gridnet", max_steps=30)
    obs, info = env.reset(seed=1)
    done, steps = False, 0
    while not done:
        assert obs.dtype == np.uint8 and obs in env.observation_space
        action = draw(info["action_mask"][None], rng, all_cells=True)[0]
        assert action in env.action_space
        obs, reward, terminated, truncated, info = env.step(action)
        done, steps = terminated or truncated, steps + 1
    assert steps == 30 and truncated and isinstance(reward, float) and not info["is_success"]
    envs.close(), env.close()


@pytest.mark.parametrize("kwargs", [{}, {"action_mode": "gridnet", "partial_obs": True, "opponents": ["lightRushAI"]}])
@pytest.mark.filterwarnings("error")
def test_gymnasium_finds_no_fault(kwargs):
    check_env(gym.make("environments.microrts:MicroRTS-8x8-basesWorkers", **kwargs).unwrapped)


def test_the_observation_space_tells_the_planes_and_the_map():
    env = microrts.MicroRTSVectorEnv(2, "MicroRTS-letMeOut", ["passiveAI"])
    space = env.single_observation_space
    assert space.shape == (5, 8, 16) and space.dtype == np.uint8 and not space.low.any()
    for plane, size in enumerate([5, 5, 3, 8, 6]):
        assert (space.high[plane] == size - 1).all()
    obs, _ = env.reset()
    resources = np.argwhere(obs[0, 3] == RESOURCE)
    assert obs.shape == (2, 5, 8, 16) and [0, 0] in resources.tolist() and [7, 15] in resources.tolist()
    assert obs[0, 1, 0, 0] == 4  # it has 20, which is clipped


def test_keyword_arguments_may_come_from_json():
    kwargs = json.loads(
        """{"map": ["MicroRTS-8x8-basesWorkers", "MicroRTS-8x8-basesWorkersA"], "selfplay": 1, "partial_obs": true,
        "opponents": ["lightRushAI", "ai.abstraction.WorkerRush"], "max_steps": 25, "action_mode": "gridnet",
        "reward_weights": [1, 0, 0, 0, 0, 0]}"""
    )
    name = "environments.microrts:MicroRTS-16x16-basesWorkers"
    envs = gym.make_vec(name, num_envs=5, autoreset_mode=DISABLED, **kwargs)
    opponents = ["selfplay", "selfplay", "lightRushAI", "ai.abstraction.WorkerRush", "lightRushAI"]
    assert envs.unwrapped.opponents == opponents
    env = gym.make(name, **kwargs)  # plays one seat, which is against the first bot, on the first map
    assert env.unwrapped.games.opponents == ["lightRushAI"]
    (views, info), (view, single_info) = envs.reset(), env.reset()
    for t in range(1, 26):
        assert (view == views[4]).all() and (single_info["action_mask"] == info["action_mask"][4]).all()
        actions = envs.action_space.sample()
        views, rewards, terminated, truncated, info = envs.step(actions)
        view, *outcome, single_info = env.step(actions[4])
        assert outcome == [rewards[4], False, t == 25] == [rewards[4], terminated[4], truncated[4]]


def test_one_map_and_one_bot_need_no_list():
    env = gym.make("environments.microrts:MicroRTS-8x8-basesWorkers", opponents="workerRushAI")
    assert env.unwrapped.games.opponents == ["workerRushAI"]


# Maps and bots.


def test_several_maps_take_turns():
    """Each game is the one that an environment with its map alone plays; a self-play pair shares one."""
    names = [f"MicroRTS-8x8-basesWorkers{letter}" for letter in ("", "B", "L")]
    several, *alone = (
        make(7, ["workerRushAI"], map=maps, selfplay=2, max_steps=60, autoreset_mode=AutoresetMode.NEXT_STEP)
        for maps in (names, *names)
    )
    seats = [[0, 1, 5], [2, 3, 6], [4]]  # of each map
    rng = np.random.default_rng(14)
    results = [env.reset() for env in (several, *alone)]
    firsts = [results[0][0][i] for i in (0, 2, 4)]
    assert (firsts[0] != firsts[1]).any() and (firsts[1] != firsts[2]).any() and (firsts[0] != firsts[2]).any()
    for _ in range(200):
        for same, result in zip(seats, results[1:]):
            for ours, theirs in zip(results[0][:-1], result[:-1]):
                assert (ours[same] == theirs[same]).all()
            assert (results[0][-1]["action_mask"][same] == result[-1]["action_mask"][same]).all()
        actions = draw(results[0][-1]["action_mask"], rng)
        results = [env.step(actions) for env in (several, *alone)]


def test_maps_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"^map .*one size.*\(8, 8\).*\(16, 16\)"):
        microrts.MicroRTSVectorEnv(2, ["MicroRTS-8x8-basesWorkers", "MicroRTS-16x16-basesWorkers"])


def test_a_map_file_of_ones_own(tmp_path, monkeypatch):
    tree = xml.etree.ElementTree.parse(microrts.package_maps()["MicroRTS-8x8-basesWorkers"])
    for unit in tree.getroot().iter("rts.units.Unit"):
        if unit.get("type") == "Worker" and unit.get("player") == "0":
            unit.set("x", "5"), unit.set("y", "2"), unit.set("type", "Heavy")
    tree.write(tmp_path / "mine.xml")
    monkeypatch.chdir(tmp_path)
    for path in ("mine.xml", str(tmp_path / "mine.xml")):
        env = gym.make("environments.microrts:MicroRTS-8x8-basesWorkers", map=path, opponents=["passiveAI"])
        obs, _ = env.reset()
        assert obs[2:4, 2, 5].tolist() == [1, 6] and (obs[3] == WORKER).sum() == 1
    (tmp_path / "broken.xml").write_text("<a>")
    with pytest.raises(ValueError, match="^map broken.xml: MicroRTS cannot read it"):
        microrts.MicroRTSVectorEnv(1, "broken.xml")


def test_any_bot_of_the_jars_by_its_java_name():
    by_name, by_class = make(2, ["workerRushAI"]), make(2, ["ai.abstraction.WorkerRush"])
    rng = np.random.default_rng(15)
    (obs, info), (other, _) = by_name.reset(), by_class.reset()
    for _ in range(60):
        assert (obs == other).all()
        actions = draw(info["action_mask"], rng)
        obs, *_, info = by_name.step(actions)
        other = by_class.step(actions)[0]
    heavy, others = make(1, ["ai.abstraction.HeavyRush"]), make(2, ["ai.competition.tiamat.Tiamat", "ai.RandomAI"])
    obs, _ = heavy.reset()
    steps = 0
    while not (obs[0, 3] == HEAVY).any():
        obs, _, terminated, _, _ = heavy.step(np.zeros((1, 8), dtype=int))
        steps += 1
        assert steps < 600 and not terminated[0]
    first, _ = others.reset()
    for _ in range(30):
        obs = others.step(np.zeros((2, 8), dtype=int))[0]
    assert (obs != first).any((1, 2, 3)).all()


@pytest.mark.parametrize(
    "name, problem",
    [
        ("deepBlue", "no Java class"),
        ("ai.abstraction.Nothing", "no Java class"),
        ("java.util.ArrayList", "no ai.core.AI"),
        ("ai.core.AI", "cannot be made"),
        ("ai.jni.JNIAI", "cannot be made"),
    ],
)
def test_what_is_no_bot_is_named(name, problem):
    for bots in ([name], ["passiveAI", name]):
        with pytest.raises(ValueError, match=f"^opponents {name}: .*{problem}"):
            make(1, bots)


# What it leaves to the caller.


def test_what_was_returned_stays_as_it_was():
    env, rng = make(4, ["workerRushAI"], selfplay=1, max_steps=40), np.random.default_rng(16)
    obs, info = env.reset()
    returned = [obs, info["action_mask"]]
    copies = [array.copy() for array in returned]
    for _ in range(100):
        obs, rewards, terminated, truncated, info = env.step(draw(info["action_mask"], rng))
        arrays = [obs, rewards, terminated, truncated, *info.values()]
        done = terminated | truncated
        if done.any():
            obs, info = env.reset(seed=[1, 2, 3, 4], options={"reset_mask": done})
            arrays += [obs, *info.values()]
        returned += arrays
        copies += [array.copy() for array in arrays]
    assert all((array == copy).all() for array, copy in zip(returned, copies))


def test_selfplay_seats_have_no_success():
    """A win rate over the last infos of finished games is the one against bots."""
    env = make(3, selfplay=1)
    *_, info = conquer(env, 0)[-1]
    assert info["raw_rewards"][:, 0].tolist() == [1, -1, 0]
    assert info["_is_success"].tolist() == [False, False, True] and not info["is_success"].any()
    listed = gym.wrappers.vector.DictInfoToList(make(3, selfplay=1, max_steps=1))
    listed.reset()
    *_, truncated, infos = listed.step(np.zeros((3, 8), dtype=int))
    assert truncated.all() and ["is_success" in info for info in infos] == [False, False, True]
    assert all("action_mask" in info for info in infos)


def test_unmasked_actions_do_no_harm():
    for mode in ("unit", "gridnet"):
        env = make(6, ("coacAI", "workerRushAI"), selfplay=1, action_mode=mode, max_steps=100)
        env.action_space.seed(12)
        env.reset()
        for _ in range(150):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            if (terminated | truncated).any():
                env.reset(options={"reset_mask": terminated | truncated})


def test_render():
    env = make(2, ("workerRushAI",), render_mode="rgb_array")
    env.reset()
    first = env.render()
    assert len(first) == 2 and first[0].shape == (480, 480, 3) and first[0].dtype == np.uint8
    assert (first[0] == first[1]).all() and len(np.unique(first[0].reshape(-1, 3), axis=0)) > 5
    for _ in range(30):
        env.step(np.array([[9, *order(MOVE, SOUTH)], [0, *order(NONE)]]))
    second = env.render()
    assert (second[0] != second[1]).any() and (second[1] != first[1]).any()
    large = gym.make("MicroRTS-24x24-basesWorkersA", render_mode="rgb_array", opponents=("passiveAI",))
    large.reset()
    assert large.render().shape == (960, 960, 3)


def test_the_picture_shows_the_whole_map_and_what_is_seen():
    blue, light_blue, green = [16, 116, 188], [156, 202, 228], [194, 223, 174]
    for partial in (False, True):
        env = make(1, partial_obs=partial, render_mode="rgb_array")
        env.reset()
        (picture,) = env.render()
        rows, columns = np.nonzero((picture == green).all(2))  # resources stand in the map's first and last corners
        assert rows.min() == columns.min() < 60 and 420 < rows.max() == columns.max() < 460
        assert (picture == blue).all(2).any()
        assert (picture == light_blue).all(2).any() == partial


def test_a_film_of_a_game(tmp_path):
    name = "environments.microrts:MicroRTS-8x8-basesWorkers"
    env = gym.make(name, opponents=["workerRushAI"], max_steps=20, render_mode="rgb_array")
    env = gym.wrappers.RecordVideo(env, str(tmp_path), disable_logger=True)
    rng, done = np.random.default_rng(17), False
    _, info = env.reset()
    while not done:
        *_, terminated, truncated, info = env.step(draw(info["action_mask"][None], rng)[0])
        done = terminated or truncated
    env.close()
    (film,) = tmp_path.glob("*.mp4")
    moviepy = pytest.importorskip("moviepy")
    with moviepy.VideoFileClip(str(film)) as clip:
        assert clip.size == [480, 480] and clip.fps == 20 and round(clip.duration * 20) == 21


@pytest.mark.parametrize(
    "kwargs",
    [
        {"map": "MicroRTS-8x8-nowhere"},
        {"opponents": ("deepBlue",)},
        {"opponents": ()},
        {"selfplay": 2},
        {"selfplay": -1},
        {"max_steps": 0},
        {"reward_weights": (1, 2)},
        {"action_mode": "joystick"},
        {"opponents": ("coacAI",), "partial_obs": True},
        {"autoreset_mode": AutoresetMode.SAME_STEP},
    ],
)
def test_what_cannot_be(kwargs):
    with pytest.raises(ValueError, match=f"^{'partial_obs' if 'partial_obs' in kwargs else [*kwargs][0]} "):
        microrts.MicroRTSVectorEnv(**{"num_envs": 2, **kwargs})


@pytest.mark.parametrize(
    "actions",
    [
        np.zeros((2, 7), dtype=int),
        np.zeros((3, 8), dtype=int),
        np.zeros((2, 8)),
        np.full((2, 8), -1),
        np.eye(2, 8, dtype=int) * 64,  # the cell after the last one
        np.eye(2, 8, 1, dtype=int) * 6,
        np.eye(2, 8, 6, dtype=int) * 49,
        np.full((2, 8), 2**40),
    ],
)
def test_impossible_actions_do_not_reach_java(actions):
    env = make(2)
    obs, _ = env.reset()
    with pytest.raises(ValueError, match="actions"):
        env.step(actions)
    assert list(env.t) == [0, 0]
    env.step(np.zeros((2, 8), dtype=np.int64))


def test_impossible_resets():
    env = make(4, selfplay=1)
    with pytest.raises(ValueError, match="reset"):
        env.step(np.zeros((4, 8), dtype=int))
    for mask in (np.ones(3, dtype=bool), np.ones(4), np.array([True, False, True, True])):
        with pytest.raises(ValueError, match="reset_mask"):
            env.reset(options={"reset_mask": mask})


def test_importing_starts_nothing():
    code = """
import sys, gymnasium
from environments import microrts
ids = sum(name.startswith("MicroRTS-") for name in gymnasium.registry)
print(ids, microrts.jpype.isJVMStarted(), "gym_microrts" in sys.modules, "torch" in sys.modules)
"""
    assert child(code) == f"{len(microrts.package_maps())} False False False"


@pytest.mark.parametrize("missing", ["gym_microrts", "jpype"])
def test_a_missing_package_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"needs the module {missing}: pip install .*jpype1==.*gym-microrts==0.4.3"):
        runpy.run_path(microrts.__file__)


def test_a_missing_java_is_named(monkeypatch):
    def start(*args, **kwargs):
        raise microrts.jpype.JVMNotFoundException("no JVM found")

    monkeypatch.setattr(microrts.jpype, "isJVMStarted", lambda: False)
    monkeypatch.setattr(microrts.jpype, "startJVM", start)
    with pytest.raises(ImportError, match="^Java does not start: no JVM found; set JAVA_HOME, or pip install jpype1"):
        microrts.start_java.__wrapped__()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_is_told_to_spawn():
    code = """
import os
from environments import microrts
microrts.MicroRTSVectorEnv(1, "MicroRTS-8x8-basesWorkers")
child = os.fork()
try:
    microrts.MicroRTSVectorEnv(1, "MicroRTS-8x8-basesWorkers")
except RuntimeError as error:
    print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    assert "use spawn" in child(code)
