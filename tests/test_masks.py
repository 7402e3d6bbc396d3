"""Action masks: every script with discrete choices honours them, in whatever way an environment gives them."""

from collections import Counter, namedtuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_same_outcome, load, only
from gymnasium.envs import registration
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

import hppo_hybrid
import ppo_multidiscrete_joint_loss as joint_loss
import vmpo
import vmpo_lstm

SMALL = "--num-envs 4 --num-steps 32 --num-minibatches 2 --update-epochs 2 --eval-episodes 3 --no-compile".split()
SOURCES = ["info", "action_mask", "action_masks()", "observations"]
ONE, SEVERAL = Discrete(5), MultiDiscrete([3, 5, 4])
STEPS = Counter()  # of all the environments below, by whether every choice was valid
BATCH_STEPS = Counter()  # of the batches below, by their size

# What makes an agent, and the layer whose outputs are the choices' logits
Case = namedtuple("Case", "script space make_agent head")
CASES = [
    Case(vmpo, ONE, vmpo.make_agent, "actor_mean"),
    Case(vmpo, SEVERAL, vmpo.make_agent, "actor_mean"),
    Case(vmpo_lstm, ONE, vmpo_lstm.make_agent, "actor_mean"),
    Case(vmpo_lstm, SEVERAL, vmpo_lstm.make_agent, "actor_mean"),
    Case(joint_loss, ONE, joint_loss.make_agent, "actor_mean"),
    Case(joint_loss, SEVERAL, joint_loss.make_agent, "actor_mean"),
    Case(hppo_hybrid, gym.spaces.Tuple([ONE, Box(-1, 1, (2,))]), hppo_hybrid.Agent, "actor_logits"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.script.__name__}-{case.space}")


class Guarded(gym.Env):
    """Counts invalid choices. Which are valid is drawn for each step: at least the first of each sub-action, the last
    never. `source` says where it gives the mask, or "nowhere"; `fault` what it does wrong after 20 steps. An episode
    has 50; behind its end no choice is valid, and the info has no mask."""

    def __init__(self, space, source="info", form="flat", fault=None):
        self.action_space, self.source, self.form, self.fault = space, source, form, fault
        discrete = space[0] if isinstance(space, gym.spaces.Tuple) else space
        self.nvec = discrete.nvec if isinstance(discrete, MultiDiscrete) else np.array([discrete.n])
        self.observation_space = Box(-9, 9, (3,))
        if source == "observations":
            masks = MultiBinary(int(self.nvec.sum()))
            self.observation_space = gym.spaces.Dict({"observation": self.observation_space, "action_mask": masks})
        if source == "action_masks()":
            self.action_masks = self.mask

    def mask(self):
        if self.fault and self.count == 20:
            faulty = {"invalid": np.zeros(self.nvec.sum()), "size": np.ones(self.nvec.sum() + 1), "missing": None}
            return faulty[self.fault]
        if self.form == "tuple":
            return tuple(part.astype(np.int8) for part in self.valid)
        if self.form == "padded":
            rows = np.zeros((len(self.nvec), self.nvec.max()))
            for row, part in zip(rows, self.valid):
                row[: len(part)] = part
            return rows
        return np.concatenate(self.valid).astype(np.int8)

    def outcome(self):
        """The observation and the info."""
        over = self.count == 50
        self.valid = [self.np_random.random(n) < 0.5 for n in self.nvec]
        for part in self.valid:
            part[0], part[-1] = True, False
            part &= not over
        obs = self.np_random.normal(size=3).astype(np.float32)
        if self.source == "observations":
            obs = {"observation": obs, "action_mask": self.mask()}
        if self.source == "action_mask":
            self.action_mask = self.mask()
        gives = self.source == "info" and not over and not (self.fault == "missing" and self.count == 20)
        return obs, {"action_mask": self.mask()} if gives else {}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.outcome()

    def step(self, action):
        choices = np.ravel(action[0] if isinstance(action, tuple) else action)
        STEPS[all(part[k] for part, k in zip(self.valid, choices))] += 1
        self.count += 1
        obs, info = self.outcome()
        return obs, float(self.np_random.normal()), self.count == 50, False, info


class Batch(gym.vector.VectorEnv):
    """Guarded environments as one batch, with their masks in info["action_mask"], [N, M]."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(self, num_envs, space, autoreset_mode, **kwargs):
        self.num_envs, self.envs = num_envs, [Guarded(space, "nowhere", **kwargs) for _ in range(num_envs)]
        self.single_observation_space, self.single_action_space = self.envs[0].observation_space, space
        self.action_space = gym.vector.utils.batch_space(space, num_envs)

    def info(self):
        if any(env.fault == "missing" and env.count == 20 for env in self.envs):
            return {}
        return {"action_mask": np.array([env.mask() for env in self.envs])}

    def reset(self, *, seed=None, options=None):
        starting = np.ones(self.num_envs, dtype=bool) if options is None else options["reset_mask"]
        seeds = seed if isinstance(seed, list) else [seed] * self.num_envs
        self.obs = np.zeros((self.num_envs, 3), np.float32) if options is None else self.obs.copy()
        for i in np.flatnonzero(starting):
            self.obs[i] = self.envs[i].reset(seed=seeds[i])[0]
        return self.obs, self.info()

    def step(self, actions):
        BATCH_STEPS[self.num_envs] += 1
        steps = map(Guarded.step, self.envs, gym.vector.utils.iterate(self.action_space, actions))
        self.obs, rewards, terminated, truncated, _ = map(np.array, zip(*steps))
        return self.obs, rewards, terminated, truncated, self.info()


@pytest.fixture
def register(monkeypatch):
    """A function that registers Guarded environments of such arguments, and gives their id; none is left afterwards."""
    monkeypatch.setattr(registration, "registry", dict(registration.registry))
    STEPS.clear()

    def id_of(space, batch=False, **kwargs) -> str:
        entry_points = {"entry_point": Guarded, "vector_entry_point": Batch if batch else None}
        registration.registry.pop("Guarded-v0", None)
        gym.register("Guarded-v0", kwargs={"space": space, **kwargs}, **entry_points)
        return "Guarded-v0"

    return id_of


def run(script, runs_dir, env_id, *flags):
    """A run in this process, for speed; its folder."""
    flags = [*SMALL, "--env-id", env_id, "--total-timesteps", "512", "--runs-dir", str(runs_dir), *flags]
    script.main(script.parse_args(flags))
    return only(runs_dir)


@torch.no_grad()
def one_step_after_another(case, env_id, steps):
    """Environments that have taken so many steps of the likeliest choices that their masks allow."""
    envs = case.script.Envs(case.script.Args(env_id=env_id, num_envs=2), range(2))
    agent = case.make_agent(envs, envs.args)
    for _ in range(steps):
        envs.step(policy_of(agent, torch.from_numpy(envs.obs), torch.from_numpy(envs.masks)).mode.numpy())
    return envs


def policy_of(agent, obs, masks):
    """The policy at the beginning of an episode."""
    if hasattr(agent, "core"):  # which sees the last action and reward too, and gives the policy its output
        inputs = torch.cat([obs, torch.zeros(len(obs), agent.obs_rms.mean.numel() - obs.shape[1])], -1)
        obs, _ = agent.remember(inputs, torch.zeros(len(obs), 2 * agent.core.hidden_size))
    return agent.policy(obs, masks)


# --- Honoured -----------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("source", SOURCES)
def test_no_invalid_choice_reaches_the_environment_from_wherever_the_mask_comes(
    source, case, register, tmp_path, monkeypatch, capfd
):
    heads, init_optimizer = [], case.script.init_optimizer

    def watched(agent):
        heads.append(agent.get_submodule(case.head).weight.detach().clone())
        return init_optimizer(agent)

    monkeypatch.setattr(case.script, "init_optimizer", watched)
    folder = run(case.script, tmp_path, register(case.space, source=source), "--eval-episodes", "0")
    assert STEPS == {True: 512}
    assert capfd.readouterr().out.splitlines()[0].endswith(f", masks from {source}")
    STEPS.clear()
    case.script.main(case.script.parse_args(["--eval", str(folder), "--eval-episodes", "3"]))
    assert STEPS == {True: 3 * 50}
    # no update has touched the choices that never are valid, and each has touched the others
    never = np.zeros(heads[0].shape[0], dtype=bool)
    never[Guarded(case.space).nvec.cumsum() - 1] = True
    moved = (load(folder / "model.pt")[f"{case.head}.weight"] != heads[0]).any(1).numpy()
    assert np.array_equal(moved, ~never)


@every_case
def test_an_environment_that_gives_no_mask_counts_many(case, register, tmp_path, capfd):
    """So the counts of the test above could be others."""
    run(case.script, tmp_path, register(case.space, source="nowhere"), "--eval-episodes", "0")
    assert STEPS[False] > 150 and "masks from" not in capfd.readouterr().out


@every_case
def test_an_invalid_choice_has_probability_0_and_its_logit_no_gradient(case, register):
    envs = case.script.Envs(case.script.Args(env_id=register(case.space), num_envs=2), range(2))
    agent, nvec = case.make_agent(envs, envs.args), Guarded(case.space).nvec
    head = agent.get_submodule(case.head)
    head.weight.data *= 100
    obs = torch.randn(60, 3)
    masks = torch.rand(60, nvec.sum()) < 0.5
    masks[:, 1], masks[:, nvec.cumsum() - nvec] = False, True  # the first sub-action's second choice is never valid
    pi = policy_of(agent, obs, masks)
    chosen = pi.sample(agent.noise(60))
    for k in range(nvec[0]):
        actions = chosen.clone()
        actions[:, 0] = k
        probability = pi.log_prob(actions).exp().reshape(60, -1).amin(-1)
        assert torch.equal(probability > 0, masks[:, k])
    for i, part in enumerate(masks.split(nvec.tolist(), -1)):
        assert part.gather(1, chosen[:, i : i + 1].long()).all()
    total = pi.log_prob(chosen).sum() + pi.entropy().sum()
    (grad,) = torch.autograd.grad(total, head.bias)
    assert total.isfinite() and grad[1] == 0 and (grad[masks.any(0)] != 0).all()


@every_case
def test_a_masked_run_resumes_to_the_bit(case, register, tmp_path, monkeypatch):
    env_id = register(case.space)
    expected = run(case.script, tmp_path / "whole", env_id, "--checkpoint-every", "0")
    save, saved = case.script.save, []

    def save_and_interrupt(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(case.script, "save", save_and_interrupt)
        run(case.script, tmp_path / "interrupted", env_id, "--checkpoint-every", "0")
    folder = only(tmp_path / "interrupted")
    case.script.main(case.script.parse_args(["--resume", str(folder)]))
    assert_same_outcome(folder, expected)


@every_case
def test_a_batch_of_environments_gives_its_masks_in_the_info(case, register, tmp_path, capfd):
    BATCH_STEPS.clear()
    batched = run(case.script, tmp_path / "batched", register(case.space, batch=True))
    assert list(BATCH_STEPS.values()) == [512 / next(iter(BATCH_STEPS))]
    assert STEPS == {True: 512 + 3 * 50}
    assert capfd.readouterr().out.splitlines()[0].endswith(", masks from info")
    assert_same_outcome(batched, run(case.script, tmp_path / "single", register(case.space)))


# --- Forms and faults ---------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("form", ["flat", "padded", "tuple"])
def test_a_mask_may_be_flat_padded_rows_or_a_tuple(form, case, register):
    envs = one_step_after_another(case, register(case.space, form=form), 60)
    valid = [np.concatenate(env.unwrapped.valid) for env in envs.vector_env.envs]
    assert np.array_equal(envs.masks, valid) and STEPS == {True: 120}


@every_case
@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize(
    "fault, says", [("invalid", "without a valid choice"), ("size", "numbers|shape"), ("missing", "no action mask")]
)
def test_a_mask_that_cannot_be_is_an_error_that_names_environment_and_step(fault, says, batch, case, register):
    env_id = register(case.space, fault=fault, batch=batch)
    with pytest.raises(ValueError, match=says) as error:
        one_step_after_another(case, env_id, 30)
    text = f"{error.value} {error.value.__notes__}"
    assert "Guarded-v0, after 38 steps" in text and (batch or "environment 0" in text)
    assert set(STEPS) == {True}


@every_case
@pytest.mark.parametrize("source", ["action_mask", "action_masks()"])
def test_a_mask_that_is_none_in_mid_episode_is_an_error_too(source, case, register):
    with pytest.raises(ValueError, match="no action mask"):
        one_step_after_another(case, register(case.space, source=source, fault="missing"), 30)


def test_a_wrong_mask_at_the_start_is_one_line(register, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Guarded, "mask", lambda env: np.ones(7))
    with pytest.raises(SystemExit) as exit:
        run(vmpo, tmp_path / "runs", register(ONE))
    err = capfd.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and "7 numbers; needed are 5" in err


@every_case
def test_a_method_action_mask_with_arguments_gives_none(case, register, monkeypatch):
    monkeypatch.setattr(Guarded, "action_mask", lambda env, state: np.zeros(env.nvec.sum()), raising=False)
    envs = one_step_after_another(case, register(case.space, source="nowhere"), 30)
    assert envs.masks.all() and envs.mask_source is None


@pytest.mark.parametrize("script", [vmpo, vmpo_lstm], ids=lambda script: script.__name__)
def test_taxi_which_has_a_method_action_mask_with_arguments_and_a_mask_in_the_info(
    script, tmp_path, monkeypatch, capfd
):
    taxi, valid = gym.make("Taxi-v4").unwrapped.__class__, []
    step = taxi.step

    def watched(env, action):
        valid.append(env.action_mask(env.s)[action])
        return step(env, action)

    monkeypatch.setattr(taxi, "step", watched)
    run(script, tmp_path, "Taxi-v4", "--eval-max-steps", "50")
    assert len(valid) == 512 + 3 * 50 and all(valid)
    assert capfd.readouterr().out.splitlines()[0].endswith(", masks from info")
