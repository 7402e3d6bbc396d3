"""hppo_hybrid.py between policy and environment: the action spaces, the two masks, and actions held for some steps."""

import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import FLAT, IMAGE, Toy, only
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, OneOf, Tuple

import hppo_hybrid as hppo
from hppo_hybrid import Args, hybrid_space, main, make_env, make_envs, parse_args

torch.set_num_threads(1)  # as the script does; two lose time on networks this small

SMALL = "--num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 2 --eval-episodes 1 --total-timesteps 128"
SMALL = [*SMALL.split(), "--encoder-sizes", "8", "--no-compile"]


# --- Action spaces ------------------------------------------------------------------------------------------------

HOW = Discrete(3, start=5)
A = Box(np.float32([0, -2]), np.float32([1, 6]))
B = Box(-3, 1, (2, 3), np.float64)
C = Box(10, 30, (1,))
KINDS = {
    "gym-hybrid": Tuple([HOW, A]),
    "nested": Tuple([HOW, Tuple([A, B, C])]),
    "flat": Tuple([HOW, A, B, C]),
    "dict": Dict(force=A, how=HOW, where=B, z=C),
    "dict of one box": Dict(how=HOW, where=B),
}
A_VALUES = {-1: [0, -2], 0: [0.5, 2], 1: [1, 6]}
B_VALUES = {-1: np.full((2, 3), -3), 0: np.full((2, 3), -1), 1: np.full((2, 3), 1)}
C_VALUES = {-1: [10], 0: [20], 1: [30]}


def leaves(action) -> list:
    """The numbers of an action in their order, however deep."""
    if isinstance(action, dict):
        action = tuple(action.values())
    return [leaf for part in action for leaf in leaves(part)] if isinstance(action, tuple) else [action]


def expected(kind, k, at):
    a, b, c = A_VALUES[at], B_VALUES[at], C_VALUES[at]
    return {
        "gym-hybrid": (k, a),
        "nested": (k, (a, b, c)),
        "flat": (k, a, b, c),
        "dict": {"force": a, "how": k, "where": b, "z": c},
        "dict of one box": {"how": k, "where": b},
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_an_action_is_mapped_to_the_space_and_its_bounds(kind):
    space, rng = KINDS[kind], np.random.default_rng(0)
    hybrid = hybrid_space(space)
    K, P = hybrid.mask.shape
    assert K == 3
    for k in range(3):
        for at in (-1, 0, 1):
            action, wanted = hybrid.to_env(np.float32([k, *[at] * P])), expected(kind, 5 + k, at)
            assert space.contains(action) and type(action) is type(wanted)
            assert len(leaves(action)) == len(leaves(wanted))
            for found, value in zip(leaves(action), leaves(wanted)):
                np.testing.assert_array_equal(found, value)
    x = np.concatenate([rng.integers(3, size=(64, 1)), rng.uniform(-1, 1, (64, P))], 1).astype(np.float32)
    many = leaves(hybrid.to_env(x))  # of a vector environment
    for i, row in enumerate(x):
        action = hybrid.to_env(row)
        assert space.contains(action)
        for found, one in zip(many, leaves(action)):
            assert found.dtype == one.dtype and np.array_equal(found[i], one)
    bounds = [(np.concatenate([h.ravel() for h in column])) for column in zip(*((b.low, b.high) for b in hybrid.boxes))]
    found = np.concatenate([leaf.reshape(64, -1) for leaf in many if leaf.dtype.kind == "f"], 1)
    np.testing.assert_allclose((found - bounds[0]) / (bounds[1] - bounds[0]) * 2 - 1, x[:, 1:], atol=1e-6)


def test_bounds_are_kept_in_float64_and_integers_are_rounded():
    """low + (high - low) can be the next number above high."""
    low, high = np.sort(np.random.default_rng(0).normal(size=(2, 500)), axis=0)
    assert (low + (high - low) > high).any()
    space = Tuple([Discrete(2), Box(low, high, dtype=np.float64), Box(0, 10, (1,), np.int32)])
    hybrid = hybrid_space(space)
    for at in (-1, 1):
        assert space.contains(hybrid.to_env(np.float32([0, *[at] * 501])))
    drawn = hybrid.to_env(np.random.default_rng(1).uniform(-1, 1, (20_000, 502)) * [0, *[1] * 501])[2]
    counts = np.bincount(drawn[:, 0])
    assert drawn.dtype == np.int32 and len(counts) == 11
    np.testing.assert_allclose(counts / 20_000, [0.05, *[0.1] * 9, 0.05], atol=0.01)


def test_without_a_mask_a_tuple_s_box_a_choice_is_its_own_and_all_else_is_for_all():
    block = [[1] * 2 + [0] * 7, [0] * 2 + [1] * 6 + [0], [0] * 8 + [1]]
    for kind, mask in [("gym-hybrid", np.ones((3, 2))), ("nested", block), ("flat", block), ("dict", np.ones((3, 9)))]:
        assert np.array_equal(hybrid_space(KINDS[kind]).mask, mask)
    assert hybrid_space(Tuple([HOW, A, C])).mask.all()
    gears = Dict(gear=Discrete(2), steer=FLAT, throttle=FLAT)  # which a Dict sorts by name
    assert hybrid_space(gears).mask.all()
    assert np.array_equal(hybrid_space(KINDS["gym-hybrid"], [[1, 0], [0, 1], [0, 0]]).mask, [[1, 0], [0, 1], [0, 0]])


class Own(Toy):
    """Toy with a mask of its own."""

    parameter_mask = np.array([[1, 0, 0], [0, 1, 1]])


class Masked(Toy):
    """Toy whose action_mask is a method, as that of gymnasium's Taxi."""

    def action_mask(self, state):
        raise AssertionError("its arguments are its own")


class NoSeed(Toy):
    """Toy of the days before reset had a seed."""

    def reset(self):
        raise AssertionError("it cannot come here")


class Odd(Toy):
    """Toy that tells masks of three choices where it has two."""

    action_mask = np.ones(3)


def inverted() -> Box:
    """gymnasium does not make such a Box, but an environment may change one."""
    box = Box(-1, 1, (2,))
    box.low[1] = 2
    return box


def register(name, action_space, observation_space=FLAT, env=Toy, **kwargs):
    spaces = {"observation_space": observation_space, "action_space": action_space}
    gym.register(f"Hppo{name}-v0", env, kwargs=spaces, max_episode_steps=10, **kwargs)


TWO = Tuple([Discrete(2), FLAT])
register("Two", TWO)
register("Own", TWO, env=Own)
register("Odd", TWO, env=Odd)
register("Masked", TWO, env=Masked)
register("NoSeed", TWO, env=NoSeed)
register("OneOf", OneOf([Discrete(2), FLAT]))
register("Unbounded", Tuple([Discrete(2), Box(-np.inf, np.inf, (2,))]))
register("HalfBounded", Tuple([Discrete(2), FLAT, Box(np.float32([0, 0]), np.float32([1, np.inf]))]))
register("Inverted", Tuple([Discrete(2), inverted()]))
register("Box", FLAT)
register("MultiDiscrete", MultiDiscrete([2, 3]))
register("NoBox", Tuple([Discrete(2)]))
register("NoDiscrete", Tuple([FLAT, FLAT]))
register("TwoDiscretes", Dict(a=Discrete(2), b=Discrete(2), c=FLAT))
register("DiscreteLast", Tuple([FLAT, Discrete(2)]))
register("Deep", Dict(a=Discrete(2), b=Tuple([FLAT, FLAT])))
register("Image", TWO, IMAGE)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--env-id HppoUnbounded-v0", "finite bounds"),
        ("--env-id HppoHalfBounded-v0", "finite bounds"),
        ("--env-id HppoInverted-v0", "low <= high"),
        ("--env-id HppoBox-v0", "ppo_continuous.py"),
        ("--env-id HalfCheetah-v4", "ppo_continuous.py"),
        ("--env-id CartPole-v1", "vmpo.py"),
        ("--env-id HppoMultiDiscrete-v0", "ppo_multidiscrete_joint_loss.py"),
        ("--env-id HppoNoBox-v0", "one Discrete and Boxes"),
        ("--env-id HppoNoDiscrete-v0", "one Discrete and Boxes"),
        ("--env-id HppoTwoDiscretes-v0", "one Discrete and Boxes"),
        ("--env-id HppoDeep-v0", "one Discrete and Boxes"),
        ("--env-id HppoDiscreteLast-v0", "must come first"),
        ("--env-id HppoOneOf-v0", "one Discrete and Boxes"),
        ("--env-id HppoNoSeed-v0", "--env-id HppoNoSeed-v0: "),
        ("--env-id HppoImage-v0", "(8, 8, 3)"),
        ("--env-id HppoOdd-v0", "(3,); needed is [2]"),
        ("--env-id HybridMovin-v0", "HybridMoving-v0"),
        ("--env-id HppoTwo-v0 --parameter-mask [[1,0,1]]", "(1, 3); needed are 0s and 1s of shape [2, 3]"),
        ("--env-id HppoTwo-v0 --parameter-mask [[1,0,1],[0,2,0]]", "0s and 1s"),
        ("--env-id HppoTwo-v0 --parameter-mask [[1,0],[1]]", "--parameter-mask [[1,0],[1]]: "),
        ("--env-id HppoTwo-v0 --parameter-mask no/such/file", "--parameter-mask no/such/file: "),
        ("--env-id HppoTwo-v0 --parameter-mask tests", "--parameter-mask tests: "),
        ("--env-id CartPole-v1 --hold 1 2", "--hold needs a Box"),
        ("--env-id HppoTwo-v0 --hold 1 2", "--hold needs a Box"),
        ("--env-id HalfCheetah-v4 --hold 0 1", "error: --hold (0, 1): "),
        ("--env-id HalfCheetah-v4 --hold 2.5", "--hold"),
        ("--encoder-sizes 0", "error: --encoder-sizes (0,): "),
        ("--encoder-sizes 64 -1", "--encoder-sizes"),
        ("--encoder-sizes", "--encoder-sizes"),
        ("--loss both", "--loss"),
        ("--parameters some", "--parameters"),
        ("--backend gymnasium", "--backend"),  # ppo_continuous.py has it
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(flags, says, tmp_path, capfd):
    with pytest.raises(SystemExit) as exit, warnings.catch_warnings():
        warnings.simplefilter("error")  # pytest would hide what a user would see
        warnings.simplefilter("ignore", DeprecationWarning)
        main(parse_args(["--runs-dir", str(tmp_path / "runs"), *SMALL[:-3], *flags.split()]))
    (line,) = capfd.readouterr().err.splitlines()
    assert (exit.value.code, line[:7]) == (2, "error: ") and says in line
    assert not (tmp_path / "runs").exists()


def test_help_names_the_new_flags(capfd, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process goes on
    with pytest.raises(SystemExit) as exit:
        parse_args(["--help"])
    out, err = capfd.readouterr()
    assert (exit.value.code, err) == (0, "")
    lines = {line.split()[0].rstrip(","): line for line in out.splitlines() if line.startswith("  --")}
    assert "{separate,joint}" in lines["--loss"] and lines["--loss"].endswith("[separate]")
    assert "{chosen,all}" in lines["--parameters"] and lines["--parameters"].endswith("[chosen]")
    assert "INT ..." in lines["--encoder-sizes"] and "256" in lines["--encoder-sizes"]
    assert lines["--shared-encoder"].endswith("[on]") and "INT ..." in lines["--hold"] and "--parameter-mask" in lines
    assert max(map(len, lines.values())) <= 120 and "envpool" not in out.lower()


def test_the_parameter_mask_is_the_command_lines_or_the_environments(tmp_path):
    mask = [[1, 1, 0], [0, 0, 1]]
    (tmp_path / "mask.json").write_text(json.dumps(mask))

    def found(env_id, **settings):
        return make_env(Args(env_id=env_id, **settings)).hybrid.mask.astype(int).tolist()

    assert found("HppoTwo-v0") == [[1, 1, 1]] * 2
    assert found("HppoOwn-v0") == Own.parameter_mask.tolist()
    for env_id in ("HppoTwo-v0", "HppoOwn-v0"):
        for text in (json.dumps(mask), str(tmp_path / "mask.json")):
            assert found(env_id, parameter_mask=text) == mask
    assert not make_env(Args(env_id="HppoMasked-v0")).masks_choices
    flags = [*SMALL, "--env-id", "HppoTwo-v0", "--parameter-mask", str(tmp_path / "mask.json")]
    main(parse_args([*flags, "--runs-dir", str(tmp_path / "runs")]))
    (tmp_path / "mask.json").unlink()
    main(parse_args(["--eval", str(only(tmp_path / "runs"))]))  # the run has the mask, not the file's name


# --- Observations -------------------------------------------------------------------------------------------------


def refuse(**kwargs):
    raise AssertionError("observations that are no single array cannot be stepped as one")


register("Step", KINDS["nested"], Tuple([FLAT, Discrete(200)]))  # as Platform has it
register("DictObs", TWO, Dict(b=Box(-1, 1, (2,)), a=Tuple([FLAT, Discrete(4)])), vector_entry_point=refuse)


def test_nested_observations_are_flat_vectors():
    env = make_env(Args(env_id="HppoStep-v0"))
    (state, step), _ = gym.make("HppoStep-v0", disable_env_checker=True).reset(seed=3)
    obs, _ = env.reset(seed=3)
    assert obs.dtype == np.float32 and np.array_equal(obs, np.float32([*state, step]))
    assert env.observation_space.shape == (4,)
    envs = make_envs(Args(env_id="HppoDictObs-v0", num_envs=2), 1)
    assert isinstance(envs, hppo.GymnasiumEnvs) and envs.reset([0, 1], 1).shape == (2, 6)
    one, other = (hppo.flat({"b": [1.0, 2.0], "a": (3.0, 4)}), hppo.flat({"a": (3.0, 4), "b": [1.0, 2.0]}))
    assert np.array_equal(one, other) and sorted(one) == [1, 2, 3, 4]  # whatever the order the dict was made in


# --- Masks of choices ---------------------------------------------------------------------------------------------


class Echo(gym.Env):
    """The observation is [seed, t, k, x_1, x_2] as the environment saw them; choice (seed + t) % 3 is invalid. An
    episode ends after 3 + seed % 4 steps."""

    observation_space = Box(-np.inf, np.inf, (5,))
    action_space = Tuple([Discrete(3, start=2), Box(np.float32([0, -3]), np.float32([1, 5]))])
    tells = "info"

    def valid(self):
        return (np.arange(3) != (self.seed + self.t) % 3).astype(np.int8)

    def reset(self, *, seed=None, options=None):
        self.seed, self.t = self.seed if seed is None else seed, 0
        return np.float32([self.seed, 0, 0, 0, 0]), {"action_mask": self.valid()}

    def step(self, action):
        k, x = action
        assert self.action_space.contains(action) and self.valid()[k - 2], "an invalid choice"
        self.t += 1
        end = self.t == 3 + self.seed % 4
        info = {} if end else {"action_mask": self.valid()}  # behind the end there is nothing to choose
        return np.float32([self.seed, self.t, k, *x]), float(k), end, False, info


class EchoAttribute(Echo):
    @property
    def action_mask(self):
        return self.valid() if hasattr(self, "t") else np.ones(3)

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0], {}

    def step(self, action):
        return *super().step(action)[:4], {}


class EchoVector(gym.vector.VectorEnv):
    """Many, stepped by one call."""

    def __init__(self, num_envs, autoreset_mode):
        self.metadata = {"autoreset_mode": autoreset_mode}
        self.num_envs, self.envs, self.obs = num_envs, [Echo() for _ in range(num_envs)], np.zeros((num_envs, 5))

    def valid(self):
        return {"action_mask": np.array([env.valid() for env in self.envs])}

    def reset(self, *, seed=None, options=None):
        for i in np.flatnonzero(options["reset_mask"]):
            self.obs[i] = self.envs[i].reset(seed=None if seed is None else seed + i)[0]
        return self.obs, self.valid()

    def step(self, actions):
        results = [env.step((k, x)) for env, k, x in zip(self.envs, *actions)]
        self.obs[:] = [result[0] for result in results]
        rewards, terminated, truncated = (np.array(column) for column in list(zip(*results))[1:4])
        return self.obs, rewards, terminated, truncated, self.valid()


gym.register("EchoInfo-v0", Echo)
gym.register("EchoAttribute-v0", EchoAttribute)
gym.register("EchoVector-v0", Echo, vector_entry_point=EchoVector)


class OwnResets(EchoVector):
    """It takes the keyword and goes on resetting by itself."""

    def __init__(self, num_envs, **kwargs):
        super().__init__(num_envs, gym.vector.AutoresetMode.NEXT_STEP)


def refuses(num_envs, autoreset_mode):
    raise ValueError("another mode, please")


@pytest.mark.parametrize("entry_point, says", [(OwnResets, "NEXT_STEP"), (refuses, "another mode, please")])
def test_a_vector_environment_that_resets_by_itself_is_not_used(entry_point, says, capfd):
    """Its rollouts would hold rows that join two episodes."""
    gym.register("EchoOther-v0", Echo, vector_entry_point=entry_point)
    try:
        assert isinstance(make_envs(Args(env_id="EchoOther-v0", num_envs=2), 1), hppo.GymnasiumEnvs)
    finally:
        del gym.registry["EchoOther-v0"]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("notice: ") and says in line


@pytest.mark.parametrize("env_id", ["EchoInfo-v0", "EchoAttribute-v0", "EchoVector-v0"])
def test_masks_of_choices_travel_with_the_observations(env_id):
    args = Args(env_id=env_id, num_envs=3, num_steps=100, seed=3, encoder_sizes=(8,), norm_reward=False)
    env, envs = make_env(args), make_envs(args, 3)
    assert isinstance(envs, hppo.BatchedEnvs) == (env_id == "EchoVector-v0")
    torch.manual_seed(0)
    agent, running = hppo.Agent(env, args), hppo.start_episodes(envs, 3, 3)
    rows, _ = hppo.rollout(envs, agent, running, env.action_space, args, 0)
    agent.obs_rms.update(rows["obs"])
    batch, _ = hppo.make_batch(rows, agent, running, hppo.RunningMeanStd(), args)
    obs, next_obs, actions, done = (rows[name].numpy() for name in ("obs", "next_obs", "actions", "done"))
    wanted = np.arange(3) != ((obs[..., 0] + obs[..., 1]) % 3)[..., None]
    assert obs.shape == (100, 3, 5 + 3) and np.array_equal(obs[..., 5:], wanted)
    assert np.array_equal(batch["obs"][:, 5:], wanted.reshape(-1, 3))  # 0 and 1 still, though the rest is scaled
    assert np.array_equal(done, obs[..., 1] + 1 == 3 + obs[..., 0] % 4) and done.sum() > 50
    assert np.array_equal(obs[1:][~done[:-1]], next_obs[:-1][~done[:-1]])
    k, x = actions[..., 0], np.clip(actions[..., 1:], -1, 1)
    assert np.take_along_axis(wanted, k[..., None].astype(int), -1).all() and len(np.unique(k)) == 3
    np.testing.assert_allclose(next_obs[..., 2], k + 2)
    np.testing.assert_allclose(next_obs[..., 3:5], [0, -3] + (x + 1) / 2 * [1, 8], atol=1e-6)
    assert np.abs(actions[..., 1:]).max() > 1  # stored as drawn

    logits, mean, log_std, _ = agent(batch["obs"])
    logits = torch.where(torch.from_numpy(wanted.reshape(-1, 3)), logits, torch.tensor(-torch.inf))
    log_k = torch.distributions.Categorical(logits=logits).log_prob(batch["actions"][:, 0])
    log_x = torch.distributions.Normal(mean, log_std.exp()).log_prob(batch["actions"][:, 1:]).sum(-1)
    torch.testing.assert_close(batch["logprobs"], torch.stack([log_k, log_x], -1))


@pytest.mark.parametrize("env_id", ["EchoInfo-v0", "EchoAttribute-v0", "EchoVector-v0"])
def test_a_run_with_masked_choices(env_id, tmp_path):
    """Echo raises where a run, its evaluation included, chooses what it must not."""
    main(parse_args([*SMALL, "--env-id", env_id, "--ent-coef", "0.01", "--runs-dir", str(tmp_path)]))
    model = torch.load(only(tmp_path) / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in model.values())


# --- Hold ---------------------------------------------------------------------------------------------------------

HOLDS = (1, 2, 4, 8)


def test_a_held_action_is_that_action_repeated():
    held = make_env(Args(env_id="HalfCheetah-v4", hold=HOLDS))
    raw = gym.make("HalfCheetah-v4")
    rng = np.random.default_rng(0)
    assert np.array_equal(held.reset(seed=3)[0], np.float32(raw.reset(seed=3)[0]))
    assert held.hybrid.mask.shape == (4, 6) and held.hybrid.mask.all()
    for i in range(60):
        k, x = i % 4, np.float32(rng.integers(-64, 65, 6) / 64)  # which the mapping leaves as they are, to the bit
        found = held.step(np.float32([k, *x]))
        total = 0.0
        for _ in range(HOLDS[k]):
            obs, reward, _, _, _ = raw.step(x)
            total += reward
        assert np.array_equal(found[0], np.float32(obs)) and found[1] == total
        assert found[2:4] == (False, False) and found[4]["steps_held"] == HOLDS[k]


class Clock(gym.Env):
    """Each step is worth its number; it ends by itself after 13."""

    observation_space, action_space = Box(-1, 1, (2,)), Box(-1, 1, (2, 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.float32([0, 0.5]), {"duration": "not a number of the script's"}

    def step(self, action):
        self.t += 1
        return np.float32([self.t / 20, action[0, 0]]), float(self.t), self.t == 13, False, {"duration": "none"}


gym.register("Clock-v0", Clock)
gym.register("ClockLimit-v0", Clock, max_episode_steps=10)


@pytest.mark.parametrize("env_id, ends", [("ClockLimit-v0", (2, False, True)), ("Clock-v0", (1, True, False))])
def test_the_end_of_an_episode_ends_a_hold(env_id, ends):
    env = make_env(Args(env_id=env_id, hold=(4,)))
    env.reset()
    t = 0
    while True:
        _, reward, terminated, truncated, info = env.step(np.float32([0, 0.25, 0]))
        steps = info["steps_held"]
        assert reward == sum(range(t + 1, t + steps + 1))
        t += steps
        if terminated or truncated:
            break
        assert steps == 4
    assert (steps, terminated, truncated) == ends


@pytest.mark.parametrize("env_id", ["ClockLimit-v0", "Clock-v0"])
def test_gae_discounts_by_the_steps_that_were_held(env_id):
    args = Args(env_id=env_id, hold=HOLDS, num_envs=3, num_steps=60, norm_reward=False, gamma=0.9, gae_lambda=0.8)
    env, envs = make_env(args), make_envs(args, 1)
    torch.manual_seed(0)
    agent, running = hppo.Agent(env, args), hppo.start_episodes(envs, 3, 1)
    rows, episodes = hppo.rollout(envs, agent, running, env.action_space, args, 0)
    batch, _ = hppo.make_batch(rows, agent, running, hppo.RunningMeanStd(), args)
    elapsed = np.rint(rows["next_obs"][..., 0].numpy() * 20) - np.rint(rows["obs"][..., 0].numpy() * 20)
    assert np.array_equal(rows["durations"], elapsed) and set(elapsed.ravel()) > set(HOLDS[:3])
    with torch.no_grad():
        V, next_V = (agent(agent.normalize(rows[name]))[-1].double().numpy() for name in ("obs", "next_obs"))
    terminated, done = rows["terminated"].numpy(), rows["done"].numpy()
    assert done.any() and terminated.any() == (env_id == "Clock-v0")
    wanted = np.zeros((60, 3))
    for n in range(3):
        for t in reversed(range(60)):
            gamma = 0.9 ** elapsed[t, n]
            delta = rows["rewards"][t, n].item() - V[t, n] + (0 if terminated[t, n] else gamma * next_V[t, n])
            wanted[t, n] = delta + (0 if done[t, n] or t == 59 else gamma * 0.8 * wanted[t + 1, n])
    np.testing.assert_allclose(batch["advantages"].view(60, 3), wanted, rtol=1e-5, atol=1e-4)
    whole = sum(range(1, 11)) if env_id == "ClockLimit-v0" else sum(range(1, 14))
    assert {episode_return for _, episode_return, _ in episodes} == {whole}


def test_the_reward_scale_discounts_by_the_steps_that_were_held():
    """std of R_t = r_t + gamma^(steps of decision t - 1) R_{t-1}, from one rollout to the next."""
    args = Args(env_id="Clock-v0", hold=HOLDS, num_envs=3, num_steps=20, gamma=0.9)
    env, envs = make_env(args), make_envs(args, 1)
    torch.manual_seed(0)
    agent, running, rms = hppo.Agent(env, args), hppo.start_episodes(envs, 3, 1), hppo.RunningMeanStd()
    seen, carry = [], np.zeros(3)
    for _ in range(2):
        rows, _ = hppo.rollout(envs, agent, running, env.action_space, args, 0)
        hppo.make_batch(rows, agent, running, rms, args)
        for reward, steps, done in zip(*(rows[name].numpy() for name in ("rewards", "durations", "done"))):
            seen.append(carry + reward)
            carry = np.where(done, 0, 0.9**steps * seen[-1])
    assert rms.var.item() == pytest.approx(np.var(seen), rel=1e-6)


def step_and_reset(envs, actions: np.ndarray) -> list[np.ndarray]:
    obs, rewards, terminated, truncated = envs.step(actions)
    done = terminated | truncated
    first = envs.reset(np.flatnonzero(done)) if done.any() else np.empty(0)
    return [obs, rewards, terminated, truncated, first]


def test_the_state_of_held_environments_continues_to_the_bit():
    args = Args(env_id="Hopper-v4", hold=HOLDS, num_envs=2)
    envs, others, rng = make_envs(args, 1), make_envs(args, 1), np.random.default_rng(1)
    actions = np.concatenate([rng.integers(4, size=(120, 2, 1)), rng.uniform(-1, 1, (120, 2, 3))], -1)
    envs.reset(range(2), seed=1)
    others.reset(range(2), seed=2)
    for a in actions[:40]:
        step_and_reset(envs, a)
    others.load_state(envs.state())
    for a in actions[40:]:
        for array, other in zip(step_and_reset(envs, a), step_and_reset(others, a)):
            assert np.array_equal(array, other)
