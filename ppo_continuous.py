# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "filelock==4.3.1",
#     "gymnasium[mujoco]==1.4.0",
#     "moviepy==2.2.1",
#     "mujoco==3.11.0",
#     "numpy==2.4.6",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "typeguard==4.6.1",
#     "tyro==1.0.17",
# ]
# ///
"""PPO-clip with Gaussian actions (Schulman et al. 2017, arXiv:1707.06347).

For states s, actions a and advantages A gathered with the policy pi_old, maximise over theta

    E[ min(r A, clip(r, 1 - eps, 1 + eps) A) ] - c_v L_V + c_e S,      r = pi_theta(a|s) / pi_old(a|s)

    A > 0: the action did better than expected; raise its probability, but gain nothing beyond r = 1 + eps.
    A < 0: it did worse; lower its probability, but gain nothing below r = 1 - eps.
    The min keeps the gradient that undoes an overshoot and drops the one that would go further.

L_V is half the squared error of V against the GAE return, S the entropy. All else is as in "The 37 Implementation
Details of PPO" (Huang et al. 2022) for continuous control; comments mark the exceptions.

    python ppo_continuous.py --env-id HalfCheetah-v4    # then --resume or --eval with the folder that it names
"""

import copy
import functools
import gc
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import os
import pickle
import random
import shlex
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import typeguard
import tyro
from filelock import FileLock, Timeout
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

# ===== Args ===========================================================================================================


@dataclass
class Args:
    # Task
    env_id: str = "HalfCheetah-v4"  # gymnasium id; with MODULE:ID the module is imported first
    env_kwargs: str = "{}"  # keyword arguments of gymnasium.make, as JSON
    rescale_actions: bool = False  # map actions in [-1, 1] onto the bounds of the action space
    seed: int = 1  # of everything that is drawn
    num_envs: int = 8  # N, environments stepped side by side
    # Algorithm
    num_steps: int = 256  # T, steps of each environment in a batch of N x T
    update_epochs: int = 10  # passes over each batch
    num_minibatches: int = 32  # equal parts that each pass cuts the batch into
    learning_rate: float = 3e-4  # Adam's step size at the start
    anneal_lr: bool = True  # let the learning rate fall linearly, to 0 at the end
    gamma: float = 0.99  # discount, in [0, 1]
    gae_lambda: float = 0.95  # lambda of the advantage estimator, in [0, 1]
    norm_adv: bool = True  # give each minibatch's advantages mean 0 and std 1
    clip_coef: float = 0.2  # eps of the objective; 0: clip neither ratio nor value
    clip_space: Literal["ratio", "log"] = "ratio"  # clip r to 1 +- eps, or take log r in its place, clipped to +- eps
    clip_vloss: bool = True  # clip the change of the value to +- eps too
    ent_coef: float = 0.0  # c_e, weight of the entropy
    vf_coef: float = 0.5  # c_v, weight of the value loss
    max_grad_norm: float = 0.5  # largest Euclidean norm of a minibatch's gradient
    target_kl: float | None = None  # end the passes over a batch once approx_kl exceeds this, in nats
    # Network and scales
    std_type: Literal["independent", "fixed", "state"] = "independent"  # sigma: parameters, constants, or a head
    log_std_init: float = 0.0  # log sigma at the start
    norm_obs: bool = True  # give observations mean 0 and variance 1, clip to [-10, 10]
    norm_reward: bool = True  # divide rewards by the std of the discounted return, clip to [-10, 10]
    # Folder
    runs_dir: str = "runs"  # parent of the run's folder, {env_id}__{exp_name}__{seed}__{time}
    exp_name: str = Path(__file__).stem  # the experiment's name
    init_from: str | None = None  # start from the weights and statistics in this run's folder, or .pt file
    track: bool = False  # copy the metrics to Weights & Biases: pip install wandb==0.31.0
    wandb_project: str = "compound-action-rl"  # the project there
    wandb_entity: str | None = None  # the user or team there
    # Above: fixed for the life of a run. Below: may change with --resume and --eval; total_timesteps comes first.
    total_timesteps: int = 1_000_000  # environment steps in all; only whole batches are run
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks learn; auto: cuda when there is one
    compile: bool = True  # compile the update to one graph with torch.compile
    torch_threads: int = 1  # torch's threads on the CPU; small networks lose with more
    checkpoint_every: float = 10.0  # seconds between two checkpoints
    resume: str | None = None  # continue the run in this folder, up to --total-timesteps
    eval: str | None = None  # only evaluate the run in this folder, or its best.pt
    eval_episodes: int = 10  # greedy episodes of an evaluation; 0: no evaluation
    eval_every: int = 0  # evaluate every so many iterations too, keep the best model as best.pt; 0: only at the end
    eval_max_steps: int = 10_000  # end a greedy episode after so many steps
    capture_video: bool = False  # film the evaluations, videos/*/*.mp4 in the run's folder


def fail(message: str, status: int = 2) -> NoReturn:
    """Leave with one line on stderr; status 2 is a user's input, 1 a run that went wrong."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def notice(message: str):
    tqdm.write(f"notice: {message}", file=sys.stderr)


def parse_args(argv: list[str] | None = None) -> Args:
    """Args from a command line; with --resume and --eval the defaults are the run's own settings."""
    args = tyro.cli(Args, args=argv)
    flag, path = ("--resume", args.resume) if args.resume is not None else ("--eval", args.eval)
    if path is None:
        return args
    config = (Path(path).parent if path.endswith(".pt") else Path(path)) / "config.json"
    try:
        saved: dict[str, Any] = dict(json.loads(config.read_text())["args"])
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        for name, kind in get_type_hints(Args).items():
            typeguard.check_type(saved[name], kind)
            if isinstance(saved[name], bool) and kind is not bool:
                raise TypeError(f"{name} is {saved[name]}")
        default = Args(**saved)
    except FileNotFoundError:
        fail(f"{flag} {path}: there is no {config}")
    except (OSError, ValueError, LookupError, TypeError, typeguard.TypeCheckError) as error:
        fail(f"{flag} {path}: {config} is of no {Path(__file__).stem} run ({type(error).__name__}: {error})")
    if ":" in default.env_id and args.env_id != default.env_id:  # import no module just because a file names it
        fail(f"{path} needs the module in {default.env_id}: if you trust it, repeat --env-id {default.env_id}")
    args = tyro.cli(Args, args=argv, default=default)
    for name, value in asdict(args).items():
        if name == "total_timesteps":
            break
        if name == "env_kwargs" and args.eval is not None:  # a policy may be tried on a variant of its environment
            continue
        if value != saved[name]:
            fail(f"--{name.replace('_', '-')} {value}: the run in {path} has {saved[name]}; leave the flag out")
    return args


def check(args: Args):
    """Exit with 2 and one line for what no run could use. A field of your own needs no entry here."""
    for low, high, names in [
        (1, math.inf, "num_envs num_steps update_epochs num_minibatches torch_threads eval_max_steps"),
        (0, math.inf, "eval_episodes eval_every checkpoint_every max_grad_norm"),
        (0, sys.float_info.max, "learning_rate clip_coef ent_coef vf_coef target_kl"),
        (0, 1, "gamma gae_lambda"),
        (0, 2**32 - 1, "seed"),
        (-20, 20, "log_std_init"),
    ]:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not low <= value <= high:
                fail(f"--{name.replace('_', '-')} {value}: must be in [{low:g}, {high:g}]")
    batch_size = args.num_envs * args.num_steps
    for flag, wrong, must in [
        ("--num-minibatches", batch_size % args.num_minibatches, f"must divide the batch of {batch_size} steps"),
        ("--total-timesteps", args.total_timesteps < batch_size, f"must be at least the batch of {batch_size} steps"),
        ("--num-envs", args.eval is None and args.num_envs < WORLD_SIZE, f"is less than {WORLD_SIZE} processes"),
        ("--exp-name", set(args.exp_name) & set("/\\:"), "goes into a folder's name, so it cannot have / \\ or :"),
        ("--device", args.device == "cuda" and not torch.cuda.is_available(), "needs a GPU that torch finds"),
        ("--eval", args.eval is not None and args.resume is not None, "cannot go with --resume"),
        ("--eval-every", args.eval_every and not args.eval_episodes, "evaluates nothing with --eval-episodes 0"),
        ("--eval", args.eval is not None and not args.eval_episodes, "evaluates nothing with --eval-episodes 0"),
        ("--track", args.track and importlib.util.find_spec("wandb") is None, "needs pip install wandb==0.31.0"),
    ]:
        if wrong:
            fail(f"{flag} {getattr(args, flag[2:].replace('-', '_'))}: {must}")


# ===== Environments ===================================================================================================


def make_env(args: Args, evaluation: bool = False, video_dir: Path | None = None) -> gym.Env:
    """An environment with flat observations and Box actions; exits with 2 for any other."""
    about = f"--env-id {args.env_id} --env-kwargs '{args.env_kwargs}'"
    try:
        kwargs = {**json.loads(args.env_kwargs), **({"render_mode": "rgb_array"} if video_dir else {})}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date")  # the v4 ids are chosen on purpose
            env = gym.make(args.env_id, disable_env_checker=True, **kwargs)
        space = env.observation_space
        if not isinstance(space, gym.spaces.Box) or len(space.shape) in (0, 2):
            env = gym.wrappers.FlattenObservation(env)  # of a Discrete, a Dict or a Tuple too
    except Exception as error:  # whatever a third party's constructor raises is about this id and these kwargs
        fail(f"{about}: {type(error).__name__}: {error}")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        fail(f"{about}: observations are {space}; images, Boxes of three or more dimensions, are not supported yet")
    if not isinstance(env.action_space, gym.spaces.Box):
        fail(f"{about}: actions are {env.action_space}, not a Box; the README names the script for this space")
    if args.rescale_actions and not env.action_space.is_bounded():
        fail(f"--rescale-actions: {args.env_id} has no bounds to map [-1, 1] onto: {env.action_space}")
    if evaluation:
        env = gym.wrappers.TimeLimit(env, args.eval_max_steps)
    if video_dir:
        env = gym.wrappers.RecordVideo(env, str(video_dir), lambda k: k < args.eval_episodes, disable_logger=True)
    return env


def to_env(actions: np.ndarray, space: gym.spaces.Box, args: Args) -> np.ndarray:
    """Actions [N, A] as drawn -> [N, *space.shape] as the environment takes them: within its bounds, of its dtype."""
    actions = actions.reshape(len(actions), *space.shape)
    if args.rescale_actions:
        actions = space.low + (actions + 1) / 2 * (space.high.astype(np.float64) - space.low)
    if space.dtype.kind in "iu":
        actions = np.rint(actions)
    return actions.clip(space.low, space.high).astype(space.dtype, copy=False)


class Loop:
    """Single environments in the form of gymnasium's vector environments, with autoreset disabled. A plain loop takes
    less time than its SyncVectorEnv."""

    def __init__(self, envs: list, indices: range):
        self.envs, self.indices = envs, indices
        self.single_observation_space = envs[0].observation_space
        self.single_action_space = envs[0].action_space
        self.shape = envs[0].observation_space.shape

    def checked(self, obs):
        if np.shape(obs) != self.shape:  # the assignment would broadcast some of these without a word
            raise ValueError(f"observation of shape {np.shape(obs)}, expected is {self.shape}")
        return obs

    def reset(self, seed: list, options: dict):
        obs = np.zeros((len(self.envs), *self.shape), dtype=np.float32)
        infos = [{} for _ in self.envs]
        for i in np.flatnonzero(options["reset_mask"]):
            try:
                first_obs, infos[i] = self.envs[i].reset(seed=seed[i])
                obs[i] = self.checked(first_obs)
            except Exception as error:
                error.add_note(f"in environment {self.indices[i]}")
                raise
        return obs, infos

    def step(self, actions: np.ndarray):
        N = len(self.envs)
        obs = np.empty((N, *self.shape), dtype=np.float32)
        rewards = np.empty(N)
        terminated, truncated = np.empty((2, N), dtype=bool)
        infos = [{}] * N
        try:
            for i, env in enumerate(self.envs):
                next_obs, reward, terminated[i], truncated[i], infos[i] = env.step(actions[i, ...])
                obs[i] = self.checked(next_obs)
                rewards[i] = np.asarray(reward).item()  # it may be an array of one element
        except Exception as error:
            error.add_note(f"in environment {self.indices[i]}")
            raise
        return obs, rewards, terminated, truncated, infos


class SameStep:
    """A batch with AutoresetMode.SAME_STEP in the form of one without autoreset: it has begun the next episodes by the
    time that they are asked for. Only the first ones take the seeds given."""

    def __init__(self, vector_env: Any):
        self.vector_env = vector_env
        self.single_observation_space = vector_env.single_observation_space
        self.single_action_space = vector_env.single_action_space
        self.begun = np.zeros(vector_env.num_envs, dtype=bool)

    def reset(self, seed: list, options: dict):
        if not self.begun[options["reset_mask"]].all():
            self.obs, self.infos = self.vector_env.reset(seed=seed)
        return self.obs, self.infos

    def step(self, actions: np.ndarray):
        self.obs, rewards, terminated, truncated, self.infos = self.vector_env.step(actions)
        next_obs, self.begun = np.array(self.obs), terminated | truncated
        for i in np.flatnonzero(self.begun):
            if "final_obs" not in self.infos:
                fail(f"{self.vector_env} gives no final_obs, the last observation of an episode, in its info")
            next_obs[i] = self.infos["final_obs"][i]
        return next_obs, rewards, terminated, truncated, self.infos


def make_vector_env(args: Args, indices: range, **env_options):
    """The id's own batch, where it has one that shows an episode's last observation, or a Loop."""
    env, kwargs, Mode = make_env(args, **env_options), json.loads(args.env_kwargs), gym.vector.AutoresetMode
    own = env.spec.vector_entry_point is not None and not env_options
    for wish in [{"autoreset_mode": Mode.DISABLED}, {"autoreset_mode": Mode.SAME_STEP}, {}] if own else []:
        try:
            vector_env = gym.make_vec(args.env_id, len(indices), **wish, **kwargs)
        except Exception as error:  # perhaps it takes no autoreset_mode, or not this one
            if not wish:
                fail(f"--env-id {args.env_id} --env-kwargs '{args.env_kwargs}': {type(error).__name__}: {error}")
            continue
        mode = vector_env.metadata.get("autoreset_mode")
        same_obs = vector_env.single_observation_space == env.observation_space
        if mode in (Mode.DISABLED, Mode.SAME_STEP) and same_obs:
            return vector_env if mode == Mode.DISABLED else SameStep(vector_env)
        vector_env.close()
    return Loop([env, *(make_env(args, **env_options) for _ in indices[1:])], indices)


def info_of(infos, i) -> dict:
    """Environment i's own: of a Loop's list, or of gymnasium's arrays [N], where _name tells who has a value."""
    if isinstance(infos, list):
        return infos[i]
    own, infos = {}, infos.get("final_info", infos)  # final_info: SAME_STEP's, of the episodes that have ended
    for name, values in infos.items():
        if isinstance(values, np.ndarray) and name[0] != "_" and (f"_{name}" not in infos or infos[f"_{name}"][i]):
            own[name] = values[i]
    return own


class Envs:
    """N environments, their running episodes, and those that have ended.

    Since gymnasium 1.0 a vector environment by default answers the step after an episode's end with a reset, so that a
    stored row joins two episodes. Here exactly the finished environments are reset, at once: every row is a real
    transition, and next_obs is the true successor also where the episode ends. An episode's seed is a function of the
    run's seed, the environment's index (-1 for evaluation) and the episode's number; with that and its actions, which
    are kept, another process can repeat a running episode.
    """

    def __init__(self, args: Args, indices: range, **env_options):
        N = len(indices)
        self.args = args
        self.indices = indices
        self.own = slice(indices.start, indices.stop)  # of the run's environments, those of this process
        self.vector_env: Any = make_vector_env(args, indices, **env_options)
        self.observation_space = self.vector_env.single_observation_space
        self.action_space = self.vector_env.single_action_space
        self.global_step = 0
        self.obs = np.zeros((N, *self.observation_space.shape), dtype=np.float32)  # what to act on
        self.episode = np.zeros(N, dtype=np.int64)  # the running episode's number, sums and length
        self.returns = np.zeros(N)
        self.discounted = np.zeros(N)
        self.lengths = np.zeros(N, dtype=np.int64)
        self.history = []  # the last actions [N, A], as drawn, as far back as the longest running episode
        self.finished = []  # (global_step, return, length, numbers in the last info) of the episodes that have ended
        self.reset(np.ones(N, dtype=bool))

    def add_note(self, error: Exception):
        error.add_note(f"{self.args.env_id}, after {self.global_step:,} steps in all")

    def reset(self, starting: np.ndarray):
        """Begin the next episode where starting, bool [N]."""
        self.episode += starting
        self.returns[starting] = self.discounted[starting] = self.lengths[starting] = 0
        seeds: list[int | None] = [None] * len(starting)
        for i in np.flatnonzero(starting):
            key = [self.args.seed, self.indices[i] + 1, self.episode[i]]
            seeds[i] = int(np.random.SeedSequence(key).generate_state(1)[0])
        try:
            obs, _ = self.vector_env.reset(seed=seeds, options={"reset_mask": starting})
        except Exception as error:
            self.add_note(error)
            raise
        self.obs[starting] = obs[starting]

    def step(self, actions: np.ndarray) -> dict:
        """Actions [N, A] as drawn -> what came of them, arrays [N, ...]; where an episode ends, the next one begins."""
        env_actions = to_env(actions, self.action_space, self.args)
        try:
            next_obs, rewards, terminated, truncated, infos = self.vector_env.step(env_actions)
        except Exception as error:
            self.add_note(error)
            raise
        next_obs, rewards = np.array(next_obs, dtype=np.float32), np.array(rewards, dtype=np.float64)
        terminated, done = np.array(terminated), terminated | truncated
        self.global_step += self.args.num_envs
        self.obs = next_obs
        self.returns += rewards
        self.discounted = discounted = rewards + self.args.gamma * self.discounted
        self.lengths += 1
        self.history.append(actions)
        if done.any():
            number = (bool, int, float, np.bool_, np.number)
            for i in np.flatnonzero(done):
                info = {name: float(value) for name, value in info_of(infos, i).items() if isinstance(value, number)}
                self.finished.append((self.global_step, float(self.returns[i]), int(self.lengths[i]), info))
            self.obs, self.discounted = next_obs.copy(), discounted.copy()
            self.reset(done)
            del self.history[: len(self.history) - self.lengths.max()]
        return dict(next_obs=next_obs, rewards=rewards, discounted=discounted, terminated=terminated, done=done)

    def state_dict(self) -> dict:
        """Tensors [N, ...]; but for history, [lengths.sum(), A], the actions of one running episode after another."""
        state = {name: torch.tensor(getattr(self, name)) for name in ("obs", "episode", "returns", "lengths")}
        history = np.array(self.history or [np.zeros(len(self.obs))])  # where no episode is running, none
        running = [history[len(history) - length :, i] for i, length in enumerate(self.lengths)]
        state["history"] = torch.from_numpy(np.concatenate(running))
        return {**state, "global_step": torch.full([len(running)], self.global_step)}

    def depends_on_more(self) -> bool:
        """Whether an episode depends on more than its seed and actions: used environments and new ones differ within
        200 random steps, or draw from the process's own generators."""

        def generators():
            return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()))

        before, space = generators(), copy.deepcopy(self.action_space)
        for seed in range(2):  # the first time those at hand may be new too
            space.seed(seed)
            new = Envs(self.args, self.indices)
            self.episode[:] = 0
            self.reset(np.ones(len(self.obs), dtype=bool))
            try:
                for _ in range(200):
                    actions = np.stack([space.sample() for _ in self.obs])
                    row, expected = self.step(actions), new.step(actions)
                    row["obs"], expected["obs"] = self.obs, new.obs
                    if not all(np.array_equal(row[name], expected[name], equal_nan=True) for name in row):
                        return True
            except Exception:  # some environments do not take random actions
                continue
        return generators() != before

    def load_state_dict(self, state: dict) -> np.ndarray:
        """Repeat the running episodes. bool [N]: where one does not come out as it was, in observation and return, or
        where the environment depends on more than seed and actions; there it starts anew."""
        names, N = ("obs", "episode", "returns", "lengths"), len(self.obs)
        obs, episode, returns, lengths = (state[name].numpy()[self.own] for name in names)
        sizes = {len(state[name]) for name in (*names, "global_step")}
        if sizes != {self.args.num_envs} or obs.shape != self.obs.shape:
            raise ValueError("another number of environments, or another shape of observations")
        history = nn.utils.rnn.pad_sequence(state["history"].split(state["lengths"].tolist())[self.own]).numpy()
        L = len(history)
        different = np.full(N, isinstance(self.vector_env, SameStep) or self.depends_on_more())
        self.history.clear()  # of the trial's actions

        def start(again: np.ndarray):
            self.episode[again] = episode[again] - 1
            if again.any():
                self.reset(again)

        try:
            for t in range(L if not different.all() else 0):
                # All step together. Where an episode is shorter than L, its beginning fills the time until it starts.
                idle = L - lengths
                phase = (t - np.where(t < idle, 0, idle)) % np.maximum(lengths, 1)
                start(phase == 0)
                self.step(history[phase, np.arange(N)])
            start(lengths == 0)
        except Exception:  # of an episode that went another way
            different[:] = True
        different |= (self.obs != obs).reshape(N, -1).any(1) | (self.returns != returns) | (self.episode != episode)
        self.global_step = int(state["global_step"][0])
        self.finished.clear()
        self.episode[different] = episode[different]
        if different.any():
            self.reset(different)
        return different


# ===== Agent ==========================================================================================================


class RunningMeanStd(nn.Module):
    """Mean and variance of everything seen, in float64, merged batch by batch (Chan et al. 1979)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(shape, dtype=torch.float64))
        self.var = nn.Buffer(torch.ones(shape, dtype=torch.float64))
        self.count = nn.Buffer(torch.zeros((), dtype=torch.float64))
        self.shift = nn.Buffer(torch.zeros(shape))  # mean and 1 / std in the networks' float32
        self.scale = nn.Buffer(torch.ones(shape))

    @torch.no_grad()
    def update(self, x: torch.Tensor):
        """x [..., *shape]: all leading dimensions are samples."""
        x = x.to(self.mean).reshape(-1, *self.mean.shape)
        total = self.count + len(x)
        delta = x.mean(0) - self.mean
        squares = self.var * self.count + x.var(0, correction=0) * len(x) + delta**2 * self.count * len(x) / total
        self.mean += delta * len(x) / total
        self.var.copy_(squares / total)
        self.count.copy_(total)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + 1e-8).rsqrt())


class Gaussian:
    """Actions [..., A] from N(mean, diag exp(log_std)^2)."""

    def __init__(self, mean: torch.Tensor, log_std: torch.Tensor):
        self.mean, self.log_std = mean, log_std

    @property
    def mode(self) -> torch.Tensor:
        return self.mean

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.mean, self.log_std.exp(), noise)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        z = (actions - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> torch.Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def layer_init(inputs: int, outputs: int, std: float = math.sqrt(2), bias: float = 0.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias)
    return layer


class Agent(nn.Module):
    """A Gaussian policy and a value V(s), two separate networks, and the statistics that scale what they see."""

    def __init__(self, envs: Envs, args: Args):
        super().__init__()
        obs_dim, action_dim = envs.observation_space.shape[0], math.prod(envs.action_space.shape)
        self.norm_obs = args.norm_obs
        self.obs_rms = RunningMeanStd(obs_dim)
        self.return_rms = RunningMeanStd()
        self.critic = nn.Sequential(
            layer_init(obs_dim, 64), nn.Tanh(), layer_init(64, 64), nn.Tanh(), layer_init(64, 1, std=1.0)
        )
        self.actor = nn.Sequential(layer_init(obs_dim, 64), nn.Tanh(), layer_init(64, 64), nn.Tanh())
        self.actor_mean = layer_init(64, action_dim, std=0.01)
        if args.std_type == "state":
            self.actor_logstd = layer_init(64, action_dim, std=0.01, bias=args.log_std_init)
        else:
            log_std = torch.full((action_dim,), args.log_std_init)
            self.actor_logstd = nn.Parameter(log_std, requires_grad=args.std_type == "independent")

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:
        """Raw observations to network inputs. The statistics move between iterations only (and once before the
        first update), so that acting, evaluation and every epoch of an iteration see the same inputs."""
        if not self.norm_obs:
            return obs
        return ((obs - self.obs_rms.shift) * self.obs_rms.scale).clamp(-10, 10)

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """V [...] for raw obs [..., O]."""
        return self.critic(self.normalize(obs)).squeeze(-1)

    def forward(self, function, *args):
        """function(agent, *args): so torch.func.functional_call can evaluate it at other parameters."""
        return function(self, *args)

    def policy(self, obs: torch.Tensor) -> Gaussian:
        """The distribution of actions [..., A] for raw obs [..., O]."""
        hidden = self.actor(self.normalize(obs))
        log_std = self.actor_logstd(hidden) if isinstance(self.actor_logstd, nn.Linear) else self.actor_logstd
        return Gaussian(self.actor_mean(hidden), log_std)

    def noise(self, *shape: int) -> torch.Tensor:
        """What the policy's sample() takes: standard normal [*shape, A]."""
        return torch.randn(*shape, self.actor_mean.out_features)


# ===== Rollout ========================================================================================================


@torch.inference_mode()
def rollout(envs: Envs, agent: Agent, args: Args) -> dict:
    """T steps of N environments, acting on the CPU: rows [T, N, ...], each one real transition. Actions are stored as
    drawn; only the environment sees them clipped. FloatingPointError names the earliest nan or inf."""
    first_step = envs.global_step + args.num_envs
    steps, rows = [], {}
    try:
        for noise in agent.noise(args.num_steps, args.num_envs)[:, envs.own]:  # drawn for all steps at once
            actions = agent.policy(torch.from_numpy(envs.obs)).sample(noise).numpy()
            steps.append({"obs": envs.obs, "actions": actions})
            steps[-1] |= envs.step(actions)
        rows = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
    finally:  # also where the environment raises, which it may do for a nan that it gave before
        if not rows or not all(np.isfinite(array).all() for array in rows.values()):
            for t, step in enumerate(steps):
                for name in step:
                    if not np.isfinite(step[name]).all():
                        raise FloatingPointError(f"{name} is nan or inf at step {first_step + t * args.num_envs:,}")
    return {name: torch.from_numpy(array) for name, array in rows.items()}


# ===== Advantages =====================================================================================================


def gae(rewards, values, next_values, terminated, done, gamma: float, gae_lambda: float) -> np.ndarray:
    """Generalised advantage estimates, arrays [T, N] throughout (Schulman et al. 2016, arXiv:1506.02438).

    delta_t = r_t + gamma (1 - terminated_t) V(next_obs_t) - V(obs_t)
    A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1}

    A terminal state is worth nothing; a time limit only cuts the sum, so its successor's value still counts.
    """
    deltas = rewards + gamma * np.where(terminated, 0, next_values) - values
    decay = gamma * gae_lambda * ~done
    advantages = np.empty_like(deltas)
    following = np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = following = deltas[t] + decay[t] * following
    return advantages


@torch.no_grad()
def make_batch(rows: dict, agent: Agent, device: torch.device, args: Args) -> dict:
    """Rows [T, N, ...] -> what the update reads, tensors [T * N, ...] on the device. The values and the old policy's
    log-probabilities are computed here, once."""
    obs, actions, next_obs = (rows[name].to(device) for name in ("obs", "actions", "next_obs"))
    rewards, terminated, done = (rows[name].numpy() for name in ("rewards", "terminated", "done"))
    if args.norm_reward:  # one scale for the whole rollout
        agent.return_rms.update(rows["discounted"])
        rewards = np.clip(rewards * agent.return_rms.scale.item(), -10, 10)
    values, next_values = agent.value(obs), agent.value(next_obs)
    V, next_V = values.cpu().numpy(), next_values.cpu().numpy()
    advantages = gae(rewards.astype(np.float32), V, next_V, terminated, done, args.gamma, args.gae_lambda)
    advantages = torch.from_numpy(advantages).to(device)
    pi_old = agent.policy(obs)
    batch = {
        "obs": obs,
        "actions": actions,
        "logprobs": pi_old.log_prob(actions),
        "advantages": advantages,
        "returns": advantages + values,
        "values": values,
    }
    return {name: tensor.flatten(0, 1) for name, tensor in batch.items()}


# ===== Loss ===========================================================================================================


def loss(agent: Agent, batch: dict, args: Args):
    """The file's objective, negated, over a minibatch [M, ...]: a scalar, and {metric: scalar} for the log."""
    pi, values = agent.policy(batch["obs"]), agent.value(batch["obs"])
    logratio = pi.log_prob(batch["actions"]) - batch["logprobs"]
    eps = args.clip_coef
    advantages = batch["advantages"]
    if args.norm_adv and len(advantages) > 1:  # a single one, less its mean, would be 0
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    # Eq. 7; with clip_space "log" (Section 6.1) log r stands for r and 0 for 1, with eps = 0 nothing is clipped (Eq. 6)
    ratio, center = (logratio.exp(), 1.0) if args.clip_space == "ratio" else (logratio, 0.0)
    objective = ratio * advantages
    if eps > 0:
        objective = torch.minimum(objective, ratio.clamp(center - eps, center + eps) * advantages)
    pg_loss = -objective.mean()

    v_error = (values - batch["returns"]) ** 2
    if eps > 0 and args.clip_vloss:
        clipped = batch["values"] + (values - batch["values"]).clamp(-eps, eps)
        v_error = torch.maximum(v_error, (clipped - batch["returns"]) ** 2)
    v_loss = 0.5 * v_error.mean()

    entropy = pi.entropy().mean()
    metrics = {
        "policy_loss": pg_loss,
        "value_loss": v_loss,
        "entropy": entropy,
        # KL[pi_old || pi] by the estimator with low variance, http://joschu.net/blog/kl-approx.html
        "approx_kl": (logratio.exp() - 1 - logratio).mean(),
        "clipfrac": ((ratio - center).abs() > eps).float().mean() * (eps > 0),
    }
    return pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss, metrics


# ===== Update =========================================================================================================
#
# Dispatch, not arithmetic, takes the time of networks this small. So gradient, clipping and Adam are one function that
# torch.compile turns into one graph; theta is the vector of all trainable parameters. --no-compile runs the same code.


def unflatten(theta: torch.Tensor, agent: Agent) -> dict:
    """{name: trainable parameter}, views of theta."""
    params = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    parts = theta.split([p.numel() for p in params.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(params.items(), parts)}


def init_optimizer(agent: Agent) -> dict:
    """theta, Adam's moments, and its step count (float64: 1 - 0.999^t is small at first)."""
    theta = torch.cat([p.detach().flatten() for p in agent.parameters() if p.requires_grad])
    step = torch.zeros((), dtype=torch.float64, device=theta.device)
    return {"theta": theta, "exp_avg": torch.zeros_like(theta), "exp_avg_sq": torch.zeros_like(theta), "step": step}


def update_step(optimizer: dict, learning_rate, batch: dict, indices: torch.Tensor, agent: Agent, args: Args):
    """A gradient step for each row of indices [K, M] into the batch: the new optimizer, metrics' names, their means."""

    def loss_at(theta, minibatch):
        return torch.func.functional_call(agent, unflatten(theta, agent), (loss, minibatch, args))

    beta1, beta2, adam_eps = 0.9, 0.999, 1e-5  # as in the 37 details
    all_metrics = []
    for rows in indices.unbind(0):
        minibatch = {name: tensor.index_select(0, rows) for name, tensor in batch.items()}
        grad, metrics = torch.func.grad(loss_at, has_aux=True)(optimizer["theta"], minibatch)
        all_metrics.append(torch.stack(list(metrics.values())))
        grad = grad * (args.max_grad_norm / (grad.norm() + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        step = optimizer["step"] + 1  # Adam (Kingma and Ba 2015)
        exp_avg = beta1 * optimizer["exp_avg"] + (1 - beta1) * grad
        exp_avg_sq = beta2 * optimizer["exp_avg_sq"] + (1 - beta2) * grad**2
        step_size = (learning_rate / (1 - beta1**step)).float()
        denominator = exp_avg_sq.sqrt() / (1 - beta2**step).sqrt().float() + adam_eps
        theta = optimizer["theta"] - step_size * exp_avg / denominator
        optimizer = {"theta": theta, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}
    return optimizer, list(metrics), torch.stack(all_metrics).mean(0)


def steps_per_call(args: Args) -> int:
    """Two gradient steps a call halve what entering the graph costs; more take longer to compile than they save."""
    return 2 if args.num_minibatches % 2 == 0 else 1


def compile_update(agent: Agent, optimizer: dict, learning_rate, batch: dict, args: Args):
    """update_step for this agent and these args, compiled by a first call. Where that fails, for want of a C++ compiler
    say, or gives another gradient, a notice says why, and it stays uncompiled."""
    plain = functools.partial(update_step, agent=agent, args=args)
    if not args.compile:
        return plain
    if learning_rate.is_cuda:
        options: dict[str, Any] = {"triton.cudagraphs": True}
    else:  # the least overhead a call; no precompiled header (4 s), no probes of the CPU (6 s): half the cold start
        options = {"cpp_wrapper": True, "cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": True}
    options["guard_filter_fn"] = torch.compiler.keep_tensor_guards_unsafe  # agent and args stay as they are
    torch.compiler.reset()  # the graphs of earlier runs in this process would count against a limit
    graph = torch.compile(plain, fullgraph=True, dynamic=False, options=options)

    def cuda_graph(*inputs):
        torch.compiler.cudagraph_mark_step_begin()
        new, names, values = graph(*inputs)
        return {name: t.clone() for name, t in new.items()}, names, values.clone()  # the next call overwrites them

    compiled = cuda_graph if learning_rate.is_cuda else graph
    logging.getLogger("torch._inductor.scheduler").disabled = True  # of a failure it logs pages; a line will do
    gc.disable()  # the compiler's many small objects cost the collector 2 s
    try:
        indices = torch.arange(len(batch["obs"]), device=learning_rate.device).view(args.num_minibatches, -1)
        inputs = optimizer, learning_rate, batch, indices[: steps_per_call(args)]
        theta, found, expected = optimizer["theta"], compiled(*inputs)[0]["theta"], plain(*inputs)[0]["theta"]
        typical = (expected - theta).square().mean().sqrt()
        moved = unflatten(found - theta, agent)
        for name, move in unflatten(expected - theta, agent).items():
            size = move.norm() + 0.1 * typical * math.sqrt(move.numel()) + 1e-12
            error = (moved[name] - move).norm() / size
            if not error < 0.01:  # compilers have lost gradients silently (github.com/pytorch/pytorch/issues/189895)
                raise ArithmeticError(f"the compiled step of {name} is {error:.0%} off")
        return compiled
    except Exception as error:  # a mistake in the loss will show again, with its traceback, in the plain function
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        notice(f"the update runs uncompiled, several times slower ({reason})")
        return plain
    finally:
        gc.freeze()  # half a million objects that no later collection need look at
        gc.enable()


def update(run_steps, agent: Agent, optimizer: dict, learning_rate, batch: dict, args: Args) -> dict:
    """The epochs of an iteration, each a new random cut of the batch into minibatches. Moves agent and optimizer;
    returns {metric: mean over all minibatches}."""
    optimizer["theta"] = init_optimizer(agent)["theta"]  # whatever has changed the agent since the last update
    means = []
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch["obs"])).view(args.num_minibatches, -1).to(learning_rate.device)
        calls = order.split(steps_per_call(args))
        for indices in calls:
            new, names, values = run_steps(optimizer, learning_rate, batch, indices)
            optimizer.update(new)
            means.append(values)
        if args.target_kl is not None:
            epoch = dict(zip(names, torch.stack(means[-len(calls) :]).mean(0)))
            if epoch["approx_kl"] > args.target_kl:
                break
    with torch.no_grad():
        for name, value in unflatten(optimizer["theta"], agent).items():
            agent.get_parameter(name).copy_(value)
    return dict(zip(names, torch.stack(means).mean(0).tolist()))


# ===== Processes ======================================================================================================
#
# torchrun --nproc-per-node 4 SCRIPT: rank 0 runs main(); the others run work(), which only steps their share of the
# environments, with a copy of the agent. Seeds and noise belong to an environment, whichever process has it, so the
# number of processes is a setting of the machine, not of the run. With four environments or more in each, so that the
# CPU's libraries take the same path, the run ends with the same bits.

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # which torchrun sets


def share(args: Args) -> range:
    """The indices of this process's environments."""
    return range(RANK * args.num_envs // WORLD_SIZE, (RANK + 1) * args.num_envs // WORLD_SIZE)


def exchange(transfer, box: list, rank: int):
    """Send or receive what is in the box; ConnectionError where the other process has ended."""
    try:
        transfer(box, rank)
        return box[0]
    except RuntimeError as error:
        if "peer" not in str(error) and "Broken pipe" not in str(error):
            raise
        raise ConnectionError(f"rank {rank} of {WORLD_SIZE} was lost") from None


def everywhere(function, envs, *inputs) -> list:
    """What function(envs, *inputs) returns in each process, by rank; each has its own environments."""
    others = range(1, WORLD_SIZE)
    for rank in others:
        exchange(dist.send_object_list, [(function, envs.args, inputs)], rank)
    return [function(envs, *inputs), *(exchange(dist.recv_object_list, [None], rank) for rank in others)]


def work():
    """Do what rank 0 asks for, until it ends."""
    envs = None
    try:
        while True:
            function, args, inputs = exchange(dist.recv_object_list, [None], 0)
            if envs is None:
                torch.set_num_threads(args.torch_threads)
                np.random.seed([args.seed, RANK])  # for environments that draw from the process's own generators
                random.seed(f"{args.seed} {RANK}")
                envs = Envs(args, share(args))
            exchange(dist.send_object_list, [function(envs, *inputs)], 0)
    except ConnectionError as error:
        if hasattr(error, "__notes__"):  # an environment's own
            raise
    except FloatingPointError as error:
        fail(str(error), status=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def sample(envs: Envs, rng: torch.Tensor, *inputs):
    """A process's share of rows, as arrays, which travel faster, and the episodes that ended in them."""
    torch.set_rng_state(rng)
    rows = {name: tensor.numpy() for name, tensor in rollout(envs, *inputs).items()}
    finished, envs.finished = envs.finished, []
    return rows, finished


def rollout_everywhere(envs: Envs, *inputs) -> dict:
    """rollout(envs, *inputs) by all processes: rows [T, N, ...] of all environments."""
    if WORLD_SIZE == 1:
        return rollout(envs, *inputs)
    shares = everywhere(sample, envs, torch.get_rng_state(), *inputs)
    envs.finished = sorted((episode for _, finished in shares for episode in finished), key=lambda episode: episode[0])
    return {name: torch.from_numpy(np.concatenate([rows[name] for rows, _ in shares], 1)) for name in shares[0][0]}


# ===== main ===========================================================================================================
#
# checkpoint.pt holds all that the rest of a run depends on. To resume is to load it and to repeat the running episodes;
# on the CPU the run then ends, to the bit, as if it had not stopped.


def replace_file(path: Path, content):
    """Save an object in a .pt file, or a text in another: at any moment the old or the new file is there, whole."""
    buffer = io.BytesIO()
    if path.suffix == ".pt":
        torch.save(content, buffer)  # to the file itself, it would make a RuntimeError of a full disk
    else:
        buffer.write(content.encode())
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(run_dir: Path, agent: Agent, optimizer: dict, envs: Envs, progress: dict):
    """Write episodes.csv, checkpoint.pt, what --resume needs, and model.pt, what --eval needs."""
    model, rng = agent.state_dict(), torch.get_rng_state()
    states = everywhere(Envs.state_dict, envs)
    envs_state = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    checkpoint = {"agent": model, "optimizer": optimizer, "envs": envs_state, "rng": rng, "progress": progress}
    replace_file(run_dir / "episodes.csv", progress["episodes"])
    replace_file(run_dir / "checkpoint.pt", checkpoint)
    replace_file(run_dir / "model.pt", model)


def load(path: Path, agent: Agent, optimizer=None, envs=None, progress=None):
    """Set the agent from a model.pt, or all of these from a checkpoint.pt. No code in the file is run; exits with 2
    where it is damaged or does not fit."""
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # torch.load does not look at the checksums
            raise ValueError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        agent.load_state_dict(saved if optimizer is None else saved["agent"])
        if optimizer is not None:
            for name, tensor in optimizer.items():
                tensor.copy_(saved["optimizer"][name].view_as(tensor))
            if saved["progress"].keys() != progress.keys():
                raise ValueError(f"another script's progress, {', '.join(saved['progress'])}")
            progress.update(saved["progress"])
            again = np.concatenate(everywhere(Envs.load_state_dict, envs, saved["envs"]))
            if again.any():
                which = f"the episodes of environments {np.flatnonzero(again).tolist()} start again: {envs.args.env_id}"
                notice(f"{which} does not repeat them exactly, so the run differs from one never stopped")
            torch.set_rng_state(saved["rng"])
    except Exception as error:
        if hasattr(error, "__notes__") or isinstance(error, ConnectionError):  # an environment's own; a lost process
            raise
        fail(f"{path}: missing, damaged, or not of such a run ({type(error).__name__}: {str(error)[:200]})")


def create_run(args: Args) -> Path:
    """The folder of a new run, with its config.json."""
    git = "git describe --always --dirty --abbrev=40"  # through a shell, a missing git is no exception
    here = Path(__file__).resolve().parent
    config = {
        "args": asdict(args),
        "command": sys.argv,
        "python": sys.version.split()[0],
        "versions": {package.name: package.version for package in importlib.metadata.distributions()},
        "device": torch.cuda.get_device_name() if args.device != "cpu" and torch.cuda.is_available() else "cpu",
        "processes": WORLD_SIZE,
        "git_commit": subprocess.run(git, shell=True, cwd=here, capture_output=True, text=True).stdout.strip(),
    }
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    run_dir = Path(args.runs_dir) / name
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            run_dir.mkdir()
            break
        except FileExistsError:  # of an equal run that started within the same second
            run_dir = run_dir.with_name(run_dir.name + "_")
    try:
        if args.track:
            start_tracking(args, run_dir)
        replace_file(run_dir / "config.json", json.dumps(config, indent=2))
    except Exception as error:  # of the disk, or of Weights & Biases
        run_dir.rmdir()
        fail(f"{run_dir}: {error}")
    return run_dir


def start_tracking(args: Args, run_dir: Path):
    """Copy what TensorBoard gets to Weights & Biases. Its own files go to ./wandb: TensorBoard, which looks into every
    folder of a run, would show them as more runs."""
    import wandb

    where = {"project": args.wandb_project, "entity": args.wandb_entity, "id": run_dir.name, "name": run_dir.name}
    wandb.init(**where, config=asdict(args), sync_tensorboard=True, resume="allow")


def episode_means(finished: list) -> dict:
    """{name: mean} of returns, lengths, and the numbers in the last infos."""
    columns = {}
    for _, episodic_return, length, info in finished:
        for name, value in {**info, "episodic_return": episodic_return, "episodic_length": length}.items():
            columns.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in columns.items()}


@torch.inference_mode()
def evaluate(agent: Agent, args: Args, run_dir: Path) -> list:
    """Greedy episodes, as in Envs.finished; the statistics stand still. Films, if any, go to the run's folder."""
    video_dir = run_dir / "videos" / str(int(time.time())) if args.capture_video else None
    envs = Envs(replace(args, num_envs=1), range(-1, 0), evaluation=True, video_dir=video_dir)
    for number in tqdm(range(args.eval_episodes), "evaluation", leave=False, disable=None):  # None: on a terminal only
        while len(envs.finished) == number:
            envs.step(agent.policy(torch.from_numpy(envs.obs)).mode.numpy())
    envs.vector_env.envs[0].close()
    if any(length == args.eval_max_steps for _, _, length, _ in envs.finished):
        notice(f"the evaluation has cut episodes after --eval-max-steps {args.eval_max_steps}")
    returns = [episodic_return for _, episodic_return, _, _ in envs.finished]
    success = [info["is_success"] for _, _, _, info in envs.finished if "is_success" in info]
    rate = f", success {np.mean(success):.1%}" if success else ""
    tqdm.write(f"evaluation: {len(returns)} episodes, return {np.mean(returns):.2f} +- {np.std(returns):.2f}{rate}")
    tqdm.write("  " + " ".join(f"{value:.2f}" for value in returns))
    return envs.finished


def train(run_dir: Path, args: Args, agent: Agent, optimizer: dict, envs: Envs, progress: dict):
    """PPO, from the run's last checkpoint to its end, and the evaluation."""
    device = optimizer["theta"].device
    batch_size = args.num_envs * args.num_steps
    iterations = args.total_timesteps // batch_size
    learning_rate = torch.tensor(args.learning_rate, device=device)
    result_json = run_dir / "result.json"
    if (run_dir / "checkpoint.pt").exists() or (run_dir / "model.pt").exists():  # else it stopped before the first one
        load(run_dir / "checkpoint.pt", agent, optimizer, envs, progress)
    if progress["iteration"] >= iterations and result_json.exists() and "eval_returns" in result_json.read_text():
        print(f"{run_dir} is finished; with --total-timesteps N it goes on to N")
        return
    result_json.unlink(missing_ok=True)  # a shorter run's
    if progress["iteration"] > 0:  # a kill may have come between the checkpoint and its model
        replace_file(run_dir / "model.pt", agent.state_dict())
        replace_file(run_dir / "episodes.csv", progress["episodes"])
    config = json.loads((run_dir / "config.json").read_text())
    if args.total_timesteps != config["args"]["total_timesteps"]:
        notice(f"the run goes on to step {args.total_timesteps:,}; a learning rate that falls reaches 0 there")
        config["args"]["total_timesteps"] = args.total_timesteps
        replace_file(run_dir / "config.json", json.dumps(config, indent=2))
    if args.track and args.resume is not None:
        start_tracking(args, run_dir)

    cpu_agent = agent if device.type == "cpu" else copy.deepcopy(agent).cpu()  # for a few rows a GPU takes longer
    run_steps = None
    compile_seconds = 0.0
    saved_at = time.monotonic()
    size = f"{iterations * batch_size:,} steps, {iterations} x {args.num_envs} x {args.num_steps}"
    processes = f", {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
    print(f"{run_dir}: {size}, {device}{processes}", flush=True)
    options = {"unit": " steps", "mininterval": 0.2 if sys.stderr.isatty() else 10}
    start = progress["iteration"]
    bar = tqdm(total=iterations * batch_size, initial=start * batch_size, **options)
    newest = max((float(path.name.split(".")[3]) for path in run_dir.glob("events.out.*")), default=0.0)
    if time.time() - newest < 1:  # TensorBoard reads these files in the order of their names, which have whole seconds
        time.sleep(1)
    writer = SummaryWriter(str(run_dir), purge_step=envs.global_step + 1)  # hides what a killed process logged after it
    with bar, writer:
        settings = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in asdict(args).items()}
        for summary in hparams(settings, {"charts/episodic_return": 0, "eval/episodic_return": 0}):
            writer.file_writer.add_summary(summary)

        def keep_best(finished: list):
            score = episode_means(finished).get("episodic_return", -math.inf)
            if args.eval_every and score > progress["best_return"]:
                progress["best_return"] = score
                replace_file(run_dir / "best.pt", cpu_agent.state_dict())
                save(run_dir, cpu_agent, optimizer, envs, progress)

        def log(prefix: str, scalars: dict):
            for name, value in scalars.items():
                writer.add_scalar(f"{prefix}/{name}", value, envs.global_step)

        for iteration in range(start + 1, iterations + 1):
            started = time.perf_counter()
            if args.anneal_lr:
                learning_rate.fill_(args.learning_rate * (1 - (iteration - 1) / iterations))
            rows = rollout_everywhere(envs, cpu_agent, args)
            no_statistics = agent.obs_rms.count == 0
            if no_statistics:  # else the first update would learn on inputs of another scale
                agent.obs_rms.update(rows["obs"])
            batch = make_batch(rows, agent, device, args)
            if run_steps is None:
                bar.set_postfix_str("first update, to be compiled" if args.compile else "first update")
                compile_started = time.perf_counter()
                run_steps = compile_update(agent, optimizer, learning_rate, batch, args)
                compile_seconds = time.perf_counter() - compile_started
                started += compile_seconds  # it is no training time
                bar.set_postfix_str("no episode yet")
            metrics = update(run_steps, agent, optimizer, learning_rate, batch, args)
            for name, value in {**metrics, "a parameter": optimizer["theta"].abs().max().item()}.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name} is nan or inf at step {envs.global_step:,}")
            if not no_statistics:
                agent.obs_rms.update(rows["obs"])
            cpu_agent.load_state_dict(agent.state_dict())
            progress["iteration"] = iteration
            progress["seconds"] += time.perf_counter() - started

            explained_variance = 1 - (batch["returns"] - batch["values"]).var() / batch["returns"].var()
            log("losses", {**metrics, "explained_variance": explained_variance.item()})
            sps = int(envs.global_step / progress["seconds"])
            log("charts", {**episode_means(envs.finished), "learning_rate": learning_rate.item(), "SPS": sps})
            for global_step, episodic_return, length, _ in envs.finished:
                progress["episodes"] += f"{global_step},{episodic_return!r},{length}\n"
                bar.set_postfix_str(f"last return {episodic_return:.2f}", refresh=False)
            envs.finished.clear()
            if args.eval_every and iteration % args.eval_every == 0 and iteration < iterations:
                finished = evaluate(cpu_agent, args, run_dir)
                keep_best(finished)
                log("eval", episode_means(finished))
            if time.monotonic() - saved_at >= args.checkpoint_every or iteration == iterations:
                writer.flush()
                save(run_dir, cpu_agent, optimizer, envs, progress)
                saved_at = time.monotonic()
            bar.update(batch_size)

        result = {"iteration": progress["iteration"], "global_step": envs.global_step, "seconds": progress["seconds"]}
        result |= {"sps": int(envs.global_step / progress["seconds"]), "compile_seconds": compile_seconds}
        replace_file(result_json, json.dumps(result, indent=2))
        finished = evaluate(cpu_agent, args, run_dir) if args.eval_episodes else []
        keep_best(finished)
        result["eval_returns"] = [episode[1] for episode in finished]
        if "is_success" in episode_means(finished):
            result["eval_success"] = episode_means(finished)["is_success"]
        replace_file(result_json, json.dumps(result, indent=2))
        log("eval", episode_means(finished))  # after result.json: a run that is resumed before it evaluates again
    if args.track:
        sys.modules["wandb"].finish()  # else another run in this process would be taken for this one
    print(f"wrote {run_dir}")


def main(args: Args):
    check(args)
    torch.set_num_threads(args.torch_threads)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(args.seed)
    envs = Envs(args, share(args) if args.eval is None else range(1))
    loop = isinstance(envs.vector_env, Loop) and args.eval is None
    if loop and envs.vector_env.envs[0].spec.vector_entry_point is not None:
        notice(f"the environments run one by one: {args.env_id}'s own batch hides last observations, or differs")
    low, high = envs.action_space.low, envs.action_space.high
    usual = ((-10 <= low) & (low <= -0.1) & (0.1 <= high) & (high <= 10)).all()
    if envs.action_space.is_bounded() and not usual and not args.rescale_actions:
        notice(f"the policy starts around [-1, 1], actions lie in {envs.action_space}: see --rescale-actions")
    agent = Agent(envs, args).to(device)
    progress = {"iteration": 0, "seconds": 0.0, "episodes": "global_step,return,length\n", "best_return": -math.inf}
    model: Any = args.eval if args.eval is not None else args.init_from
    resumed = args.resume is not None and (Path(args.resume) / "checkpoint.pt").exists()
    if model is not None and not resumed:
        model = Path(model) if model.endswith(".pt") else Path(model) / "model.pt"
        load(model, agent)
    optimizer = init_optimizer(agent)
    run_dir = None
    hook = threading.excepthook

    def hook_but_for_disks(died):  # TensorBoard's thread leaves an OSError to the next call in this one
        if not issubclass(died.exc_type, OSError):
            hook(died)

    threading.excepthook = hook_but_for_disks
    try:
        if args.eval is not None:
            evaluate(agent.cpu(), args, model.parent)
            return
        run_dir = Path(args.resume) if args.resume is not None else create_run(args)
        if any(path.is_symlink() for path in run_dir.iterdir()):
            fail(f"{run_dir}: has a symbolic link in it, through which the run would write")
        with FileLock(run_dir / "lock", timeout=0):  # which a process that dies does not leave behind
            train(run_dir, args, agent, optimizer, envs, progress)
    except Timeout:
        fail(f"{run_dir}: another process trains this run")
    except KeyboardInterrupt:
        command = ["python", sys.argv[0], "--resume", str(run_dir), "--env-id", args.env_id]
        print(f"interrupted; continue with: {shlex.join(command)}" if run_dir else "interrupted")
        raise SystemExit(130) from None
    except (FloatingPointError, OSError) as error:
        if hasattr(error, "__notes__"):  # an environment's own
            raise
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            fail(f"{run_dir or args.runs_dir}: {error}")
        fail(f"{error}; a checkpoint in {run_dir} is from before", status=1)
    finally:
        threading.excepthook = hook


if __name__ == "__main__":
    if WORLD_SIZE > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=365))  # rank 0 may evaluate for long
    main(parse_args()) if RANK == 0 else work()
