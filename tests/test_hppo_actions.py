"""hppo_hybrid.py between policy and environment: the action spaces, the two masks, and actions held for some steps."""

import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import FLAT, IMAGE, Toy, only
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, OneOf, Tuple

import hppo_hybrid as hppo
from hppo_hybrid import Args, Envs, HybridSpace, main, make_env, parse_args

SMALL = "--num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 2 --eval-episodes 1 --total-timesteps 128"
SMALL = [*SMALL.split(), "--encoder-sizes", "8", "--no-compile", "--device", "cpu"]


# --- Action spaces ------------------------------------------------------------------------------------------------

HOW, WAY = Discrete(3, start=5), MultiDiscrete([2, 3], start=[0, 7])
A = Box(np.float32([0, -2]), np.float32([1, 6]))
B = Box(-3, 1, (2, 3), np.float64)
C = Box(10, 30, (1,))
SCALAR, INTEGERS, BYTE = Box(0, 5, ()), Box(-2, 10, (2,), np.int16), Box(0, 255, (), np.uint8)
KINDS = {
    "gym-hybrid": Tuple([HOW, A]),
    "nested": Tuple([HOW, Tuple([A, B, C])]),
    "flat": Tuple([HOW, A, B, C]),
    "dict": Dict(force=A, how=HOW, where=B, z=C),
    "deep, the choice last": Dict(a=Tuple([A, Dict(b=C)]), z=HOW),
    "scalars and integers": Tuple([HOW, SCALAR, INTEGERS, BYTE]),
    "several choices": Dict(force=A, gear=Discrete(2), how=HOW),
    "MultiDiscrete": Tuple([SCALAR, WAY, A, HOW]),
    "MultiDiscrete of two dimensions": Tuple([MultiDiscrete([[2, 3], [4, 5]]), INTEGERS]),
}


def expected(space, choices: list, at):
    """The action with these choices, taken from the list, and all parameters at their lower bound, -1, or upper, 1."""
    if isinstance(space, Dict):
        return {name: expected(part, choices, at) for name, part in space.items()}
    if isinstance(space, Tuple):
        return tuple(expected(part, choices, at) for part in space)
    if isinstance(space, Discrete):
        return space.start + choices.pop(0)
    if isinstance(space, MultiDiscrete):
        return space.start + np.reshape([choices.pop(0) for _ in range(space.nvec.size)], space.shape)
    return space.low if at == -1 else space.high


def numbers(action) -> list:
    """The arrays and numbers of an action in their order, however deep."""
    if isinstance(action, dict):
        action = tuple(action.values())
    return [leaf for part in action for leaf in numbers(part)] if isinstance(action, tuple) else [action]


@pytest.mark.parametrize("kind", KINDS)
def test_an_action_is_mapped_to_the_space_and_its_bounds(kind):
    space, rng = KINDS[kind], np.random.default_rng(0)
    hybrid = HybridSpace(space)
    C, P = hybrid.parameter_mask.shape
    assert C == hybrid.nvec.sum() and hybrid.shape == (len(hybrid.nvec) + P,)
    for _ in range(20):
        choices = rng.integers(hybrid.nvec)
        for at in (-1, 1):
            action, wanted = hybrid.to_env(np.float32([*choices, *[at] * P])), expected(space, list(choices), at)
            assert space.contains(action) and type(action) is type(wanted)
            assert len(numbers(action)) == len(numbers(wanted))
            for found, value in zip(numbers(action), numbers(wanted)):
                np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("kind", KINDS)
def test_many_actions_at_once_are_the_same_as_one_by_one(kind):
    space, rng = KINDS[kind], np.random.default_rng(0)
    hybrid = HybridSpace(space)
    choices = rng.integers(hybrid.nvec, size=(64, len(hybrid.nvec)))
    x = rng.uniform(-1, 1, (64, hybrid.parameter_mask.shape[1]))
    actions = np.concatenate([choices, x], 1).astype(np.float32)
    many = hybrid.to_env(actions)
    assert gym.vector.utils.batch_space(space, 64).contains(many)
    for i, row in enumerate(actions):
        action = hybrid.to_env(row)
        assert space.contains(action)
        for found, one in zip(numbers(many), numbers(action)):
            assert found.dtype == one.dtype and np.array_equal(found[i], one)


def test_parameters_are_scaled_onto_their_bounds():
    action = np.float32([1, 1, 2, -0.5, 0.5, 0, 0.25, -0.25])
    how, scalar, integers, way, c = HybridSpace(Tuple([HOW, SCALAR, INTEGERS, WAY, A])).to_env(action)
    assert (type(how), scalar.shape, integers.dtype) == (np.int64, (), np.int16)
    assert how == 6 and scalar == 1.25 and integers.tolist() == [7, 4] and way.tolist() == [1, 9]
    np.testing.assert_allclose(c, [0.625, 1])


def test_bounds_are_kept_in_float64_and_integers_are_rounded():
    """low + (high - low) can be the next number above high."""
    low, high = np.sort(np.random.default_rng(0).normal(size=(2, 500)), axis=0)
    assert (low + (high - low) > high).any()
    space = Tuple([Discrete(2), Box(low, high, dtype=np.float64), Box(0, 10, (1,), np.int32)])
    hybrid = HybridSpace(space)
    for at in (-1, 1):
        assert space.contains(hybrid.to_env(np.float32([0, *[at] * 501])))
    drawn = hybrid.to_env(np.random.default_rng(1).uniform(-1, 1, (20_000, 502)) * [0, *[1] * 501])[2]
    counts = np.bincount(drawn[:, 0])
    assert drawn.dtype == np.int32 and len(counts) == 11
    np.testing.assert_allclose(counts / 20_000, [0.05, *[0.1] * 9, 0.05], atol=0.01)


def test_without_a_mask_a_tuple_s_box_a_choice_is_its_own_and_all_else_is_for_all():
    block = [[1] * 2 + [0] * 7, [0] * 2 + [1] * 6 + [0], [0] * 8 + [1]]
    for kind, mask in [("gym-hybrid", np.ones((3, 2))), ("nested", block), ("flat", block), ("dict", np.ones((3, 9)))]:
        assert np.array_equal(HybridSpace(KINDS[kind]).parameter_mask, mask)
    assert HybridSpace(Tuple([HOW, A, C])).parameter_mask.all()
    assert HybridSpace(Tuple([HOW, Discrete(1), A, C, C])).parameter_mask.all()
    gears = Dict(gear=Discrete(2), steer=FLAT, throttle=FLAT)  # which a Dict sorts by name
    assert HybridSpace(gears).parameter_mask.all()
    mask = [[1, 0], [0, 1], [0, 0]]
    assert np.array_equal(HybridSpace(KINDS["gym-hybrid"], mask).parameter_mask, mask)


class Own(Toy):
    """Toy with a mask of its own."""

    parameter_mask = np.array([[1, 0, 0], [0, 1, 1]])


class Masked(Toy):
    """Toy whose action_mask is a method, as that of gymnasium's Taxi."""

    def action_mask(self, state):
        raise AssertionError("its arguments are its own")


class Odd(Toy):
    """Toy that tells masks of three choices where it has two."""

    action_mask = np.ones(3)


def inverted() -> Box:
    """gymnasium does not make such a Box, but an environment may change one."""
    box = Box(-1, 1, (2,))
    box.low[1] = 2
    return box


def register(name, action_space, observation_space=FLAT, env=Toy):
    spaces = {"observation_space": observation_space, "action_space": action_space}
    gym.register(f"Hppo{name}-v0", env, kwargs=spaces, max_episode_steps=10)


TWO = Tuple([Discrete(2), FLAT])
register("Two", TWO)
register("Own", TWO, env=Own)
register("Odd", TWO, env=Odd)
register("Masked", TWO, env=Masked)
register("OneOf", OneOf([Discrete(2), FLAT]))
register("WithText", Tuple([Discrete(2), FLAT, MultiBinary(2)]))
register("Unbounded", Tuple([Discrete(2), Box(-np.inf, np.inf, (2,))]))
register("HalfBounded", Tuple([Discrete(2), FLAT, Box(np.float32([0, 0]), np.float32([1, np.inf]))]))
register("Inverted", Tuple([Discrete(2), inverted()]))
register("UnboundedBox", Box(-np.inf, np.inf, (2,)))
register("MultiDiscrete", MultiDiscrete([2, 3]))
register("NoBox", Tuple([Discrete(2)]))
register("NoDiscrete", Tuple([FLAT, FLAT]))
register("Image", TWO, IMAGE)
register("Nested", Dict(a=Discrete(2), b=Tuple([SCALAR, INTEGERS]), c=WAY), Tuple([FLAT, Discrete(20)]))


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--env-id HppoUnbounded-v0", "finite bounds"),
        ("--env-id HppoHalfBounded-v0", "finite bounds"),
        ("--env-id HppoUnboundedBox-v0", "finite bounds"),
        ("--env-id HppoInverted-v0", "low <= high"),
        ("--env-id CartPole-v1", "needed are Discretes and Boxes"),
        ("--env-id HppoMultiDiscrete-v0", "needed are Discretes and Boxes"),
        ("--env-id HppoNoBox-v0", "needed are Discretes and Boxes"),
        ("--env-id HppoNoDiscrete-v0", "needed are Discretes and Boxes"),
        ("--env-id HppoWithText-v0", "needed are Discretes and Boxes"),
        ("--env-id HppoOneOf-v0", "needed are Discretes and Boxes"),
        ("--env-id HppoImage-v0", "(8, 8, 3)"),
        ("--env-id HppoOdd-v0", "3 numbers; needed are 2"),
        ("--env-id HppoTwo-v0 --parameter-mask [[1,0,1]]", "(1, 3); needed are 0s and 1s of shape [2, 3]"),
        ("--env-id HppoTwo-v0 --parameter-mask [[1,0,1],[0,2,0]]", "0s and 1s"),
        ("--env-id HppoTwo-v0 --parameter-mask [[1,0],[1]]", "--env-id HppoTwo-v0 "),
        ("--env-id HppoTwo-v0 --parameter-mask no/such/file", "error: --parameter-mask no/such/file: "),
        ("--env-id HppoTwo-v0 --parameter-mask tests", "error: --parameter-mask tests: "),
        ("--env-id CartPole-v1 --hold 1 2", "--hold needs a Box"),
        ("--env-id HppoTwo-v0 --hold 1 2", "--hold needs a Box"),
        ("--env-id HalfCheetah-v4 --hold 0 1", "error: --hold (0, 1): "),
        ("--env-id HalfCheetah-v4 --hold", "error: --hold (): "),
        ("--encoder-sizes 0", "error: --encoder-sizes (0,): "),
        ("--encoder-sizes 64 -1", "--encoder-sizes"),
        ("--encoder-sizes", "error: --encoder-sizes (): "),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(flags, says, tmp_path, capfd):
    with pytest.raises(SystemExit) as exit, warnings.catch_warnings():
        warnings.simplefilter("error")  # pytest would hide what a user would see
        warnings.simplefilter("ignore", DeprecationWarning)
        main(parse_args(["--runs-dir", str(tmp_path / "runs"), *SMALL[:-5], *flags.split()]))
    (line,) = capfd.readouterr().err.splitlines()
    assert (exit.value.code, line[:7]) == (2, "error: ") and says in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", ["--hold 2.5", "--loss both", "--parameters some", "--rescale-actions"])
def test_a_flag_that_cannot_be_read_is_an_error(flags, capfd):
    with pytest.raises(SystemExit) as exit:
        parse_args(flags.split())
    assert exit.value.code == 2 and flags.split()[0] in capfd.readouterr().err


def test_the_parameter_mask_is_the_command_lines_or_the_environments(tmp_path):
    mask = [[1, 1, 0], [0, 0, 1]]
    (tmp_path / "mask.json").write_text(json.dumps(mask))

    def found(env_id, **settings):
        args = Args(env_id=env_id, **settings)
        hppo.check(args)
        return make_env(args).action_space.parameter_mask.astype(int).tolist()

    assert found("HppoTwo-v0") == [[1, 1, 1]] * 2
    assert found("HppoOwn-v0") == Own.parameter_mask.tolist()
    for env_id in ("HppoTwo-v0", "HppoOwn-v0"):
        for text in (json.dumps(mask), str(tmp_path / "mask.json")):
            assert found(env_id, parameter_mask=text) == mask
    flags = [*SMALL, "--env-id", "HppoTwo-v0", "--parameter-mask", str(tmp_path / "mask.json")]
    main(parse_args([*flags, "--runs-dir", str(tmp_path / "runs")]))
    (tmp_path / "mask.json").unlink()
    main(parse_args(["--eval", str(only(tmp_path / "runs"))]))  # the run has the mask, not the file's name


@pytest.mark.parametrize("env_id", ["HppoNested-v0", "HppoMasked-v0"])
def test_a_run_with_unusual_spaces(env_id, tmp_path):
    """Toy asserts that its action space has the action. A method action_mask with arguments is no mask."""
    main(parse_args([*SMALL, "--env-id", env_id, "--runs-dir", str(tmp_path)]))
    model = torch.load(only(tmp_path) / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in model.values())


# --- Masks of choices ---------------------------------------------------------------------------------------------


class Echo(gym.Env):
    """The observation is [seed, t, k, x_1, x_2] as the environment saw them, the seed modulo 64; choice (seed + t) % 3
    is invalid. An episode ends after 3 + seed % 4 steps."""

    observation_space = Box(-np.inf, np.inf, (5,))
    action_space = Tuple([Discrete(3, start=2), Box(np.float32([0, -3]), np.float32([1, 5]))])
    seed = t = 0

    def valid(self):
        return (np.arange(3) != (self.seed + self.t) % 3).astype(np.int8)

    def told(self, obs, ended: bool):
        """Observation and info; behind the end there is nothing to choose."""
        return obs, {} if ended else {"action_mask": self.valid()}

    def reset(self, *, seed=None, options=None):
        self.seed, self.t = self.seed if seed is None else seed % 64, 0
        return self.told(np.float32([self.seed, 0, 0, 0, 0]), False)

    def step(self, action):
        k, x = action
        if not (self.action_space.contains(action) and self.valid()[k - 2]):
            raise ValueError("an invalid choice")
        self.t += 1
        ended = self.t == 3 + self.seed % 4
        obs, info = self.told(np.float32([self.seed, self.t, k, *x]), ended)
        return obs, float(k), ended, False, info


class EchoAttribute(Echo):
    @property
    def action_mask(self):
        return self.valid()

    def told(self, obs, ended):
        return obs, {}


class EchoMethod(Echo):
    def action_masks(self):
        return self.valid()

    def told(self, obs, ended):
        return obs, {}


class EchoObservation(Echo):
    observation_space = Dict(observation=Echo.observation_space, action_mask=MultiBinary(3))

    def told(self, obs, ended):
        return {"observation": obs, "action_mask": self.valid()}, {}


class EchoVector(gym.vector.VectorEnv):
    """Many, stepped by one call."""

    def __init__(self, num_envs, autoreset_mode):
        self.metadata = {"autoreset_mode": autoreset_mode}
        self.num_envs, self.envs, self.obs = num_envs, [Echo() for _ in range(num_envs)], np.zeros((num_envs, 5))
        self.single_observation_space, self.single_action_space = Echo.observation_space, Echo.action_space
        self.action_space = gym.vector.utils.batch_space(Echo.action_space, num_envs)

    def valid(self):
        return {"action_mask": np.array([env.valid() for env in self.envs])}

    def reset(self, *, seed=None, options=None):
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        for i in np.flatnonzero(mask):
            self.obs[i] = self.envs[i].reset(seed=seed[i] if isinstance(seed, list) else seed)[0]
        return self.obs, self.valid()

    def step(self, actions):
        results = [env.step((k, x)) for env, k, x in zip(self.envs, *actions)]
        self.obs[:] = [result[0] for result in results]
        rewards, terminated, truncated = (np.array(column) for column in list(zip(*results))[1:4])
        return self.obs, rewards, terminated, truncated, self.valid()


gym.register("EchoInfo-v0", Echo)
gym.register("EchoAttribute-v0", EchoAttribute)
gym.register("EchoMethod-v0", EchoMethod)
gym.register("EchoObservation-v0", EchoObservation)
gym.register("EchoVector-v0", Echo, vector_entry_point=EchoVector)
ECHOES = [f"Echo{name}-v0" for name in ("Info", "Attribute", "Method", "Observation", "Vector")]


@pytest.mark.parametrize("env_id", ECHOES)
@torch.no_grad()
def test_masks_of_choices_travel_with_the_observations(env_id):
    args = Args(env_id=env_id, num_envs=3, num_steps=100, seed=3, encoder_sizes=(8,), norm_reward=False)
    envs = Envs(args, range(3))
    assert isinstance(envs.vector_env, hppo.Loop) == (env_id != "EchoVector-v0")
    torch.manual_seed(0)
    agent = hppo.Agent(envs, args)
    rows = hppo.rollout(envs, agent, args)
    agent.obs_rms.update(rows["obs"])
    batch = hppo.make_batch(rows, agent, torch.device("cpu"), args)
    obs, next_obs, actions, done = (rows[name].numpy() for name in ("obs", "next_obs", "actions", "done"))
    wanted = np.arange(3) != ((obs[..., 0] + obs[..., 1]) % 3)[..., None]
    assert obs.shape == (100, 3, 5) and np.array_equal(rows["masks"], wanted)
    assert np.array_equal(batch["masks"], wanted.reshape(-1, 3))
    assert np.array_equal(done, obs[..., 1] + 1 == 3 + obs[..., 0] % 4) and done.sum() > 50
    assert np.array_equal(obs[1:][~done[:-1]], next_obs[:-1][~done[:-1]])
    k, x = actions[..., 0], np.clip(actions[..., 1:], -1, 1)
    assert np.take_along_axis(wanted, k[..., None].astype(int), -1).all() and len(np.unique(k)) == 3
    np.testing.assert_allclose(next_obs[..., 2], k + 2)
    np.testing.assert_allclose(next_obs[..., 3:5], [0, -3] + (x + 1) / 2 * [1, 8], atol=1e-6)
    assert np.abs(actions[..., 1:]).max() > 1  # stored as drawn

    hidden = agent.encoders[0](agent.normalize(batch["obs"]))
    logits = agent.actor_logits(hidden).where(batch["masks"], torch.tensor(-torch.inf))
    log_k = torch.distributions.Categorical(logits=logits).log_prob(batch["actions"][:, 0])
    pi_x = torch.distributions.Normal(agent.actor_mean(hidden).tanh(), agent.actor_logstd.exp())
    log_x = pi_x.log_prob(batch["actions"][:, 1:]).sum(-1)
    torch.testing.assert_close(batch["logprobs"], torch.stack([log_k, log_x], -1))


class EchoSeveral(Echo):
    """Two choices, of two and of three; a mask each. The first one's is all where the second one's is not."""

    action_space = Dict(a=Discrete(2), b=Discrete(3), c=Box(0, 1, ()))

    def masks(self):
        return np.arange(2) != (self.seed + self.t) % 2, self.valid()

    def told(self, obs, ended):
        return obs, {} if ended else {"action_mask": self.masks()}

    def step(self, action):
        if not (self.action_space.contains(action) and all(m[action[i]] for m, i in zip(self.masks(), "ab"))):
            raise ValueError("an invalid choice")
        self.t += 1
        ended = self.t == 3 + self.seed % 4
        obs, info = self.told(np.float32([self.seed, self.t, action["a"], action["b"], action["c"]]), ended)
        return obs, 0.0, ended, False, info


gym.register("EchoSeveral-v0", EchoSeveral)


@pytest.mark.parametrize("env_id", [*ECHOES, "EchoSeveral-v0"])
def test_a_run_with_masked_choices(env_id, tmp_path):
    """Echo raises where a run, its evaluation included, chooses what it must not."""
    main(parse_args([*SMALL, "--env-id", env_id, "--ent-coef", "0.01", "--runs-dir", str(tmp_path)]))
    model = torch.load(only(tmp_path) / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in model.values())


# --- Hold ---------------------------------------------------------------------------------------------------------

HOLDS = (1, 2, 4, 8)


def test_a_held_action_is_that_action_repeated():
    held = make_env(Args(env_id="HalfCheetah-v4", hold=HOLDS, gamma=0.9))
    raw = gym.make("HalfCheetah-v4")
    rng = np.random.default_rng(0)
    assert np.array_equal(held.reset(seed=3)[0], raw.reset(seed=3)[0])
    assert held.action_space.parameter_mask.shape == (4, 6) and held.action_space.parameter_mask.all()
    for i in range(60):
        k, x = i % 4, np.float32(rng.integers(-64, 65, 6) / 64)  # which the mapping leaves as they are, to the bit
        found = held.step(np.float32([k, *x]))
        rewards = []
        for _ in range(HOLDS[k]):
            obs, reward, _, _, _ = raw.step(x)
            rewards.append(reward)
        assert np.array_equal(found[0], obs) and found[1] == pytest.approx(sum(rewards), rel=1e-12)
        discounted = sum(0.9**i * reward for i, reward in enumerate(rewards))
        assert found[2:4] == (False, False)
        assert found[4]["reward_and_discount"] == pytest.approx((discounted, 0.9 ** HOLDS[k]), rel=1e-12)


class Clock(gym.Env):
    """Each step is worth its number; it ends by itself after 13."""

    observation_space, action_space = Box(-1, 1, (2,)), Box(-1, 1, (2, 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.float32([0, 0.5]), {}

    def step(self, action):
        self.t += 1
        return np.float32([self.t / 20, action[0, 0]]), float(self.t), self.t == 13, False, {}


def no_batch(**kwargs):
    """A vector environment of the Box actions, which nothing would hold."""
    env = gym.vector.SyncVectorEnv([Clock] * kwargs["num_envs"])
    env.metadata = {"autoreset_mode": kwargs.get("autoreset_mode")}
    return env


gym.register("Clock-v0", Clock, vector_entry_point=no_batch)
gym.register("ClockLimit-v0", Clock, max_episode_steps=10)


@pytest.mark.parametrize("env_id, ends", [("ClockLimit-v0", (2, False, True)), ("Clock-v0", (1, True, False))])
def test_the_end_of_an_episode_ends_a_hold(env_id, ends):
    env = make_env(Args(env_id=env_id, hold=(4,), gamma=0.5))
    env.reset()
    t = 0
    while True:
        _, reward, terminated, truncated, info = env.step(np.float32([0, 0.25, 0]))
        steps = round(-np.log2(info["reward_and_discount"][1]))
        assert reward == sum(range(t + 1, t + steps + 1))
        t += steps
        if terminated or truncated:
            break
        assert steps == 4
    assert (steps, terminated, truncated) == ends


def rollout_of(args):
    envs = Envs(args, range(args.num_envs))
    torch.manual_seed(0)
    agent = hppo.Agent(envs, args)
    return envs, agent, hppo.rollout(envs, agent, args)


@pytest.mark.parametrize("env_id", ["ClockLimit-v0", "Clock-v0"])
def test_a_held_action_is_worth_its_discounted_rewards_and_gae_discounts_by_its_steps(env_id):
    args = Args(env_id=env_id, hold=HOLDS, num_envs=3, num_steps=60, norm_reward=False, gamma=0.9, gae_lambda=0.8)
    envs, agent, rows = rollout_of(args)
    assert isinstance(envs.vector_env, hppo.Loop)
    batch = hppo.make_batch(rows, agent, torch.device("cpu"), args)
    before, after = (np.rint(rows[name][..., 0].numpy() * 20).astype(int) for name in ("obs", "next_obs"))
    steps = after - before
    assert set(steps.ravel()) > set(HOLDS[:3])
    np.testing.assert_allclose(rows["gammas"], 0.9**steps, rtol=1e-12)
    V, next_V = (agent.value(rows[name]).detach().double().numpy() for name in ("obs", "next_obs"))
    terminated, done = rows["terminated"].numpy(), rows["done"].numpy()
    assert done.any() and terminated.any() == (env_id == "Clock-v0")
    wanted = np.zeros((60, 3))
    for n in range(3):
        for t in reversed(range(60)):
            reward = sum(0.9**i * (before[t, n] + 1 + i) for i in range(steps[t, n]))
            assert rows["rewards"][t, n].item() == pytest.approx(reward, rel=1e-12)
            gamma = 0.9 ** steps[t, n]
            delta = reward - V[t, n] + (0 if terminated[t, n] else gamma * next_V[t, n])
            wanted[t, n] = delta + (0 if done[t, n] or t == 59 else gamma * 0.8 * wanted[t + 1, n])
    np.testing.assert_allclose(batch["advantages"].view(60, 3), wanted, rtol=1e-5, atol=1e-4)
    whole = sum(range(1, 11)) if env_id == "ClockLimit-v0" else sum(range(1, 14))
    assert {episodic_return for _, episodic_return, _, _ in envs.finished} == {whole}  # without discount
    decisions = np.flatnonzero(done[:, 0])[0] + 1
    assert envs.global_step == 180 and decisions in {length for _, _, length, _ in envs.finished}


class Constant(gym.Env):
    """The same reward in each step whatever is done, without end."""

    observation_space, action_space = Box(-1, 1, (1,)), Box(-1, 1, (1,))

    def __init__(self, reward):
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(1, dtype=np.float32), self.reward, False, False, {}


gym.register("Constant-v0", Constant)


@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_no_duration_is_preferred_where_nothing_that_is_done_matters(reward):
    """Each is worth (1 - gamma^tau) / (1 - gamma) + gamma^tau V = V for V = 1 / (1 - gamma)."""
    kwargs = json.dumps({"reward": reward})
    args = Args(env_id="Constant-v0", env_kwargs=kwargs, hold=HOLDS, num_envs=2, num_steps=100, norm_reward=False)
    _, agent, rows = rollout_of(args)
    V = reward / (1 - args.gamma)
    tau = np.array(HOLDS)[rows["actions"][..., 0].long().numpy()]
    assert set(tau.ravel()) == set(HOLDS)
    found, gammas = rows["rewards"].numpy(), rows["gammas"].numpy()
    np.testing.assert_allclose(found, V * (1 - args.gamma**tau), rtol=1e-12)
    V_rows, never = np.full((100, 2), V), np.zeros((100, 2), dtype=bool)
    advantages = hppo.gae(found, V_rows, V_rows, never, never, gammas, args.gae_lambda)  # in float64
    assert abs(advantages).max() < 1e-10
    np.testing.assert_allclose(rows["discounted"][-1], V * (1 - args.gamma ** tau.sum(0)), rtol=1e-10)

    agent.critic.weight.data.zero_()
    agent.critic.bias.data.fill_(V)
    batch = hppo.make_batch(rows, agent, torch.device("cpu"), args)
    assert batch["advantages"].abs().max() < 1e-3  # of float32 values of 100


def test_the_reward_scale_discounts_by_the_steps_that_were_held():
    """std of R_t = r_t + gamma^tau R_{t-1}, from one rollout to the next."""
    args = Args(env_id="Clock-v0", hold=HOLDS, num_envs=3, num_steps=20, gamma=0.9)
    envs, agent, rows = rollout_of(args)
    seen, carry = [], np.zeros(3)
    for part in (rows, hppo.rollout(envs, agent, args)):
        hppo.make_batch(part, agent, torch.device("cpu"), args)
        for reward, gamma, done in zip(*(part[name].numpy() for name in ("rewards", "gammas", "done"))):
            seen.append(reward + gamma * carry)
            carry = np.where(done, 0, seen[-1])
    assert agent.return_rms.var.item() == pytest.approx(np.var(seen), rel=1e-6)


# --- Resume -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id", ["Hopper-v4", "EchoInfo-v0", "EchoSeveral-v0", "EchoVector-v0", "environments.hybrid:HybridHardMove4-v0"]
)
def test_another_process_s_environments_continue_to_the_bit(env_id, capfd):
    args = Args(env_id=env_id, num_envs=3, num_steps=100, encoder_sizes=(8,))
    envs, agent, _ = rollout_of(args)
    others, both = Envs(args, range(3)), []
    others.load_state_dict(envs.state_dict())
    for one in (envs, others):
        torch.manual_seed(1)
        both.append(hppo.rollout(one, agent, args))
    assert both[0]["done"].any() and all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    assert "notice" not in capfd.readouterr().err
