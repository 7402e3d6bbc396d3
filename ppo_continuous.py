# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "gymnasium[mujoco]==1.4.0",
#     "moviepy==2.2.1",
#     "mujoco==3.11.0",
#     "numpy==2.4.6",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""PPO-clip with Gaussian actions (Schulman et al. 2017, arXiv:1707.06347).

For states s, actions a and advantages A gathered with the policy pi_old, maximise over theta

    E[ min(r A, clip(r, 1 - eps, 1 + eps) A) ] - c_v L_V + c_e S,      r = pi_theta(a|s) / pi_old(a|s)

    A > 0: the action did better than expected; raise its probability, but gain nothing beyond r = 1 + eps.
    A < 0: it did worse; lower its probability, but gain nothing below r = 1 - eps.
    The min keeps the gradient that undoes an overshoot and drops the one that would go further.

L_V is half the squared error of V against the GAE return, S the entropy. The rest follows "The 37
Implementation Details of PPO" (Huang et al. 2022), continuous control, except where a comment says why not.
This file is the base: every other script of the project is read as a diff against it.

    python ppo_continuous.py --env-id HalfCheetah-v4
    python ppo_continuous.py --eval runs/HalfCheetah-v4__ppo_continuous__1__1735689600
"""

import contextlib
import dataclasses
import difflib
import functools
import gc
import importlib.metadata
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ======================================================================================================
# Args
# ======================================================================================================


@dataclass
class Args:
    # Task
    env_id: str = "HalfCheetah-v4"
    """gymnasium id, with flat Box observations and actions"""
    seed: int = 1
    """seed of torch, numpy and random; environment i starts from seed + i"""
    total_timesteps: int = 1_000_000
    """environment steps in all; only whole batches are run"""
    num_envs: int = 8
    """N, environments stepped side by side"""
    backend: Literal["gymnasium", "envpool"] = "gymnasium"
    """what steps the environments; envpool is installed apart"""
    env_threads: int = 0
    """threads that EnvPool steps with; 0: one a core, at most N"""

    # Algorithm
    num_steps: int = 256
    """T, steps of each environment in a batch of N x T"""
    update_epochs: int = 10
    """passes over each batch"""
    num_minibatches: int = 32
    """equal parts that each pass cuts the batch into"""
    learning_rate: float = 3e-4
    """Adam's step size at the start"""
    anneal_lr: bool = True
    """let the learning rate fall linearly, to 0 at the end"""
    gamma: float = 0.99
    """discount, in [0, 1]"""
    gae_lambda: float = 0.95
    """lambda of the advantage estimator, in [0, 1]"""
    norm_adv: bool = True
    """give each minibatch's advantages mean 0 and std 1"""
    clip_coef: float = 0.2
    """eps of the objective, 0: no clipping of ratio or value"""
    clip_space: Literal["ratio", "log"] = "ratio"
    """clip r to 1 +- eps, or put log r for r and clip it to +- eps"""
    clip_vloss: bool = True
    """clip the change of the value to +- eps too"""
    ent_coef: float = 0.0
    """c_e, weight of the entropy"""
    vf_coef: float = 0.5
    """c_v, weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest Euclidean norm of a minibatch's gradient"""
    target_kl: float | None = None
    """end the passes over a batch once approx_kl exceeds this, in nats"""

    # Network and scales
    std_type: Literal["independent", "fixed", "state"] = "independent"
    """sigma: free parameters, constants, or a head of the network"""
    log_std_init: float = 0.0
    """log sigma at the start"""
    norm_obs: bool = True
    """give observations mean 0 and variance 1, clip to [-10, 10]"""
    norm_reward: bool = True
    """divide rewards by the std of the discounted return, clip to [-10, 10]"""

    # Machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks run; auto: cuda when there is one"""
    compile: bool = True
    """compile the update to one graph with torch.compile"""
    torch_threads: int = 1
    """torch's threads on the CPU; small networks lose with more"""

    # Run folder
    runs_dir: str = "runs"
    """parent of the folder {env_id}__{exp_name}__{seed}__{time}"""
    exp_name: str = Path(__file__).stem
    """the experiment's name"""
    checkpoint_every: int = 10
    """iterations between two checkpoints"""
    resume: str | None = None
    """continue the run in this folder, with its own settings"""
    track: bool = False
    """copy the metrics to Weights & Biases, which is installed apart"""

    # Evaluation
    eval: str | None = None
    """only evaluate the run in this folder"""
    eval_episodes: int = 10
    """greedy episodes, after training or for --eval"""
    capture_video: bool = False
    """film the evaluation, videos/*/*.mp4 in the run's folder"""


# What a flag may change when a run is resumed or evaluated: all that does not change its course or its model.
MAY_CHANGE = {
    "resume": "resume device torch_threads env_threads checkpoint_every eval_episodes capture_video".split(),
    "eval": "eval device torch_threads eval_episodes capture_video seed runs_dir".split(),
}


def fail(message: str, status: int = 2):
    """Leave with one line on stderr; status 2 is a user's input, 1 a run that went wrong."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def help_page() -> str:
    """Args as a page: one line a flag, under the comments that group the fields in its source."""
    lines = [f"usage: python {Path(__file__).name} [--flag value ...]", "", __doc__.split("\n")[0]]
    pattern = r'^    (?:# (.+)|(\w+): (.+) = .+\n    """(.+)""")$'
    for group, name, kind, text in re.findall(pattern, inspect.getsource(Args), re.MULTILINE):
        default = getattr(Args, name, None)
        if group:
            lines += ["", f"{group}:"]
            continue
        if kind == "bool":
            invocation, default = f"{flag(name)}, {flag('no_' + name)}", "on" if default else "off"
        elif kind.startswith("Literal"):
            invocation = f"{flag(name)} {{{','.join(Args.__annotations__[name].__args__)}}}"
        else:
            kind = kind.removesuffix(" | None").replace("tuple[", "").replace(", ...]", " ...")
            invocation = f"{flag(name)} {kind.upper()}"
        lines.append(f"  {invocation:<37} {text} [{default}]")
    return "\n".join(lines)


def command_line(argv: list[str], **tyro_options) -> Args:
    """tyro's reading of a command line; its box for a wrong one is put into one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Args, args=argv, add_help=False, **tyro_options)
    except SystemExit:
        said = re.split("─{9,}", box.getvalue().partition("╮")[2])[0]
        fail(re.sub("[│╰╯]", " ", said) + " (--help lists the flags)")


def parse_args(argv: list[str]) -> Args:
    """Args from a command line. --resume and --eval start from the run's own settings, so a flag that contradicts
    them is seen even where it names a default."""
    if "-h" in argv or "--help" in argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pager that is left, head: no traceback
        print(help_page())
        raise SystemExit(0)
    args = command_line(argv)
    given = {name: getattr(args, name) for name in ("resume", "eval") if getattr(args, name) is not None}
    if not given:
        return args
    if len(given) == 2:
        fail(f"--resume {args.resume} and --eval {args.eval}: give one of them")
    [(mode, folder)] = given.items()
    saved = saved_args(mode, folder)
    saved.device = "auto"  # a run may move to another machine
    args = command_line(argv, default=saved)
    for name, value in dataclasses.asdict(args).items():
        if value != getattr(saved, name) and name not in MAY_CHANGE[mode]:
            fail(f"{flag(name)} {value}: the run in {folder} has {getattr(saved, name)}; leave the flag out")
    return args


def check_args(args: Args):
    """Leave with one line for a value that no run could use."""
    unit_interval = {"gamma", "gae_lambda"}
    at_least_0 = {"seed", "env_threads", "clip_coef", "vf_coef", "ent_coef"}
    for name, value in dataclasses.asdict(args).items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if name == "log_std_init" and not abs(value) <= 20:
            fail(f"{flag(name)} {value}: must be in [-20, 20]")
        if name in unit_interval and not 0 <= value <= 1:
            fail(f"{flag(name)} {value}: must be in [0, 1]")
        if name in at_least_0 and not 0 <= value < 2**31:
            fail(f"{flag(name)} {value}: must be 0 or more, and below 2**31")
        if name not in {*unit_interval, *at_least_0, "log_std_init"} and not 0 < value < math.inf:
            fail(f"{flag(name)} {value}: must be above 0")
    batch_size = args.num_envs * args.num_steps
    batch = f"the batch, {args.num_envs} x {args.num_steps} = {batch_size} steps"
    if batch_size % args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches}: must divide {batch}")
    if args.total_timesteps < batch_size:
        fail(f"--total-timesteps {args.total_timesteps}: must be at least {batch}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail(f"--device cuda: torch {torch.__version__} finds no CUDA device here; use --device cpu or auto")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track: Weights & Biases is not installed; pip install wandb==0.31.0")
    if "/" in args.exp_name:
        fail(f"--exp-name {args.exp_name}: must do as part of a folder's name, without /")


# ======================================================================================================
# Environments
#
# Autoreset stays off. Since gymnasium 1.0 a vector environment by default answers the step after an
# episode's end with a reset, so that one stored row per episode joins two episodes. Here the finished
# environments, and only those, are reset at once: every row of a rollout is a real transition, and
# next_obs is the true successor also where the episode ends.
# ======================================================================================================


def make_env(args: Args, **kwargs) -> gym.Env:
    """One gymnasium environment with a flat float observation and a bounded flat action, else exit 2."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date")  # the v4 ids are meant
        try:
            env = gym.make(args.env_id, disable_env_checker=True, **kwargs)
        except gym.error.UnregisteredEnv as error:
            close = difflib.get_close_matches(args.env_id, gym.registry, n=3)
            fail(f"--env-id {args.env_id}: {error}" + (f" Close matches: {', '.join(close)}" if close else ""))
        except Exception as error:  # whatever a third party's constructor raises is about this id
            renderer = f" (MUJOCO_GL={os.environ['MUJOCO_GL']})" if "MUJOCO_GL" in os.environ else ""
            fail(f"--env-id {args.env_id}: cannot be made: {error}{renderer}")
    obs_space, action_space = env.observation_space, env.action_space
    boxes = obs_space.values() if isinstance(obs_space, gym.spaces.Dict) else [obs_space]
    if not all(isinstance(box, gym.spaces.Box) and len(box.shape) == 1 for box in boxes):
        fail(f"--env-id {args.env_id}: observations are {obs_space}; supported are a flat Box and a Dict of flat Boxes")
    if isinstance(obs_space, gym.spaces.Dict):
        env = gym.wrappers.FlattenObservation(env)
    if not isinstance(action_space, gym.spaces.Box):
        others = {"Discrete": "vmpo.py", "MultiDiscrete": "ppo_multidiscrete_joint_loss.py"}
        serves = others.get(type(action_space).__name__, "hppo_hybrid.py")
        fail(f"--env-id {args.env_id}: actions are {action_space}; needed is a flat Box, {serves} serves this space")
    if len(action_space.shape) != 1 or not action_space.is_bounded():
        fail(f"--env-id {args.env_id}: actions are {action_space}; needed is a flat Box with finite bounds")
    return env


def to_env(actions: np.ndarray, space: gym.spaces.Box) -> np.ndarray:
    """Actions [..., A] as the policy draws them -> as the environment takes them: clipped to its bounds."""
    return np.clip(actions, space.low, space.high)


class GymnasiumEnvs:
    """N environments stepped in a plain loop, which takes a tenth less time than gymnasium's SyncVectorEnv."""

    def __init__(self, args: Args):
        self.envs = [make_env(args) for _ in range(args.num_envs)]

    def reset(self, indices, seed: int | None = None) -> np.ndarray:
        """Start new episodes in these environments; their first observations, float32 [len(indices), O]."""
        seeds = [None if seed is None else seed + int(i) for i in indices]
        return np.array([self.envs[i].reset(seed=s)[0] for i, s in zip(indices, seeds)], dtype=np.float32)

    def step(self, actions: np.ndarray):
        """actions [N, A] -> next_obs float32 [N, O], rewards float64 [N], terminated and truncated bool [N]."""
        n = len(self.envs)
        obs = np.empty((n, *self.envs[0].observation_space.shape), dtype=np.float32)
        rewards, terminated, truncated = np.empty(n), np.empty(n, dtype=bool), np.empty(n, dtype=bool)
        for i, env in enumerate(self.envs):
            obs[i], rewards[i], terminated[i], truncated[i], _ = env.step(actions[i])
        return obs, rewards, terminated, truncated

    def state(self) -> list[dict] | None:
        """Everything that a continued episode depends on, or None where that cannot be captured."""
        states = [mujoco_state(env) for env in self.envs]
        return None if None in states else states

    def load_state(self, states: list[dict]):
        for env, state in zip(self.envs, states):
            load_mujoco_state(env, state)


class EnvPoolEnvs:
    """N environments stepped by EnvPool's C++ threads. Their state cannot be captured."""

    def __init__(self, env_id: str, num_envs: int, seed: int, threads: int):
        try:
            import envpool
        except ImportError:
            fail("--backend envpool: not installed; pip install envpool==1.2.5, or use --backend gymnasium")
        if env_id not in envpool.list_all_envs():
            fail(f"--backend envpool: EnvPool {envpool.__version__} has no {env_id}; use --backend gymnasium")
        threads = threads or min(num_envs, os.cpu_count())
        self.pool = envpool.make_gymnasium(env_id, num_envs=num_envs, num_threads=threads, seed=seed)
        self.action_dtype = self.pool.action_space.dtype

    def reset(self, indices, seed: int | None = None) -> np.ndarray:
        return self.pool.reset(np.asarray(indices))[0].astype(np.float32)

    def step(self, actions: np.ndarray):
        obs, rewards, terminated, truncated, _ = self.pool.step(actions.astype(self.action_dtype))
        return obs.astype(np.float32), rewards.astype(np.float64), terminated, truncated

    def state(self) -> None:
        return None


def mujoco_state(env: gym.Env) -> dict | None:
    """The physics, the random generator and the step counter of a MuJoCo environment; None for any other."""
    base = env.unwrapped
    mujoco_env = sys.modules.get("gymnasium.envs.mujoco.mujoco_env")  # the script itself can do without MuJoCo
    if mujoco_env is None or not isinstance(base, mujoco_env.MujocoEnv):
        return None
    import mujoco

    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    physics = np.empty(mujoco.mj_stateSize(base.model, spec))
    mujoco.mj_getState(base.model, base.data, physics, spec)
    # Some environments read derived arrays (Ant xpos, Humanoid xipos) before the next step recomputes them.
    arrays = {name: getattr(base.data, name) for name in dir(base.data) if not name.startswith("_")}
    arrays = {name: a for name, a in arrays.items() if isinstance(a, np.ndarray) and a.size and a.dtype.kind in "fi"}
    return {
        "physics": torch.from_numpy(physics),
        "derived": {name: torch.from_numpy(array.copy()) for name, array in arrays.items()},
        "rng": base.np_random.bit_generator.state,
        "elapsed_steps": env.get_wrapper_attr("_elapsed_steps") if env.has_wrapper_attr("_elapsed_steps") else None,
    }


def load_mujoco_state(env: gym.Env, state: dict):
    """Continue the episode that mujoco_state captured, bit for bit."""
    import mujoco

    base = env.unwrapped
    env.reset()
    mujoco.mj_setState(base.model, base.data, state["physics"].numpy(), mujoco.mjtState.mjSTATE_INTEGRATION)
    for name, array in state["derived"].items():
        if getattr(base.data, name).shape == tuple(array.shape):  # those of the contacts are made anew in each step
            getattr(base.data, name)[...] = array.numpy()
    base.np_random.bit_generator.state = state["rng"]
    if state["elapsed_steps"] is not None:  # gymnasium's TimeLimit
        env.set_wrapper_attr("_elapsed_steps", state["elapsed_steps"])


def make_envs(args: Args, seed: int):
    if args.backend == "envpool":
        return EnvPoolEnvs(args.env_id, args.num_envs, seed, args.env_threads)
    return GymnasiumEnvs(args)


# ======================================================================================================
# Agent
# ======================================================================================================


class RunningMeanStd(nn.Module):
    """Mean and variance of everything seen, in float64, merged batch by batch (Chan et al. 1979)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(shape))  # mean and 1 / std in the networks' float32
        self.register_buffer("scale", torch.ones(shape))

    @torch.no_grad()
    def update(self, x: torch.Tensor):
        """x [..., *shape]: all leading dimensions are samples."""
        x = x.to(self.mean).reshape(-1, *self.mean.shape)
        mean, var, count = x.mean(0), x.var(0, correction=0), len(x)
        total = self.count + count
        delta = mean - self.mean
        self.var.copy_((self.var * self.count + var * count + delta**2 * self.count * count / total) / total)
        self.mean += delta * count / total
        self.count.copy_(total)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + 1e-8).rsqrt())


def layer_init(layer: nn.Linear, std: float = math.sqrt(2), bias: float = 0.0) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias)
    return layer


def hidden_layers(*sizes: int) -> nn.Sequential:
    """Tanh layers from sizes[0] inputs to sizes[-1] outputs."""
    layers = [(layer_init(nn.Linear(i, o)), nn.Tanh()) for i, o in zip(sizes, sizes[1:])]
    return nn.Sequential(*(part for layer in layers for part in layer))


class Agent(nn.Module):
    """A Gaussian policy N(mean(s), diag sigma^2) and a value V(s), two separate networks."""

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        [obs_dim], [action_dim] = env.observation_space.shape, env.action_space.shape
        self.norm_obs = args.norm_obs
        self.obs_rms = RunningMeanStd(obs_dim)
        sizes = (obs_dim, 64, 64)
        self.critic = nn.Sequential(*hidden_layers(*sizes), layer_init(nn.Linear(sizes[-1], 1), std=1.0))
        self.actor = hidden_layers(*sizes)
        self.actor_mean = layer_init(nn.Linear(sizes[-1], action_dim), std=0.01)
        if args.std_type == "state":
            self.actor_logstd = layer_init(nn.Linear(sizes[-1], action_dim), std=0.01, bias=args.log_std_init)
        else:
            log_std = torch.full((action_dim,), args.log_std_init)
            self.actor_logstd = nn.Parameter(log_std, requires_grad=args.std_type == "independent")

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:
        """Raw observations to network inputs. The statistics move between iterations only (and after the first
        rollout), so that acting, evaluation and every epoch of an iteration see the same inputs."""
        if not self.norm_obs:
            return obs
        return ((obs - self.obs_rms.shift) * self.obs_rms.scale).clamp(-10, 10)

    def policy(self, obs: torch.Tensor):
        """Normalised obs [B, O] -> mean [B, A], log_std [B, A]."""
        hidden = self.actor(obs)
        mean = self.actor_mean(hidden)
        if isinstance(self.actor_logstd, nn.Linear):
            return mean, self.actor_logstd(hidden)
        return mean, self.actor_logstd.expand_as(mean)

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """Normalised obs [B, O] -> V [B]."""
        return self.critic(obs).squeeze(-1)

    def forward(self, obs: torch.Tensor):
        return *self.policy(obs), self.value(obs)


# ======================================================================================================
# Rollout
# ======================================================================================================


def check_finite(values: dict, global_step: int):
    """Raise FloatingPointError for the first of these numbers or arrays that has a nan or an inf."""
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise FloatingPointError(f"{name} is nan or inf at step {global_step:,}")


@torch.inference_mode()
def act(agent: Agent, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """mean + sigma * noise for raw obs [N, O] and draw_noise [N, A]. Left uncompiled: at this size a compiled call
    saves nothing."""
    mean, log_std = agent.policy(agent.normalize(obs))
    return torch.addcmul(mean, log_std.exp(), noise)


def draw_noise(agent: Agent, *shape: int) -> torch.Tensor:
    """What act turns into actions: standard normal [*shape, A]."""
    return torch.randn(*shape, agent.actor_mean.out_features)


@functools.lru_cache(maxsize=1)  # all rollouts share one
def capture_act(agent: Agent, obs_shape: tuple, obs_dtype: torch.dtype):
    """act; on a GPU as a CUDA graph: its kernels, launched one by one, take longer than an environment's step. The
    graph reads the agent's tensors where they lie at the capture, and each call overwrites what the last returned."""
    device = agent.obs_rms.shift.device
    if device.type == "cpu":
        return act
    obs = torch.zeros(obs_shape, dtype=obs_dtype, device=device)
    with torch.random.fork_rng(devices=[]):  # a run draws the same noise on a GPU and without
        noise = draw_noise(agent, obs_shape[0]).to(device)
    act(agent, obs, noise)  # what libraries set up in their first call cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actions = act(agent, obs, noise)

    def replay(agent, new_obs, new_noise):
        obs.copy_(new_obs)
        noise.copy_(new_noise)
        graph.replay()
        return actions

    return replay


def start_episodes(envs, num_envs: int, seed: int) -> dict:
    """What a rollout carries on from: the current observations, and each running episode's sums."""
    obs = envs.reset(np.arange(num_envs), seed)
    zeros = np.zeros(num_envs)
    return {"obs": obs, "episode_return": zeros, "episode_length": zeros.copy(), "discounted_return": zeros.copy()}


def rollout(envs, agent: Agent, running: dict, action_space: gym.Space, args: Args, global_step: int):
    """T steps of N environments; `running` is carried forward in place.

    Returns rows, CPU tensors [T, N, ...], each row one real transition, and the episodes that finished as
    tuples (global_step, return, length). Raises FloatingPointError on a nan or inf from an environment.
    """
    T, N, O, A = args.num_steps, args.num_envs, running["obs"].shape[1], math.prod(action_space.shape)
    device = agent.obs_rms.shift.device
    rows = {
        "obs": torch.empty(T, N, O),
        "actions": torch.empty(T, N, A),  # as drawn; only the environment sees them clipped
        "rewards": torch.empty(T, N, dtype=torch.float64),
        "next_obs": torch.empty(T, N, O),
        "terminated": torch.empty(T, N, dtype=torch.bool),
        "done": torch.empty(T, N, dtype=torch.bool),
    }
    views = {name: tensor.numpy() for name, tensor in rows.items()}
    noise = draw_noise(agent, T, N).to(device)
    episodes = []
    policy = capture_act(agent, (N, O), rows["obs"].dtype) if args.compile else act
    check_finite({"first observation": running["obs"]}, global_step)
    for t, obs in enumerate(rows["obs"]):
        views["obs"][t] = running["obs"]
        actions = policy(agent, obs.to(device), noise[t]).cpu().numpy()
        next_obs, rewards, terminated, truncated = envs.step(to_env(actions, action_space))
        global_step += N
        check_finite({"observation": next_obs, "reward": rewards}, global_step)
        done = terminated | truncated
        views["actions"][t], views["rewards"][t], views["next_obs"][t] = actions, rewards, next_obs
        views["terminated"][t], views["done"][t] = terminated, done
        running["obs"] = next_obs
        running["episode_return"] += rewards
        running["episode_length"] += 1
        if done.any():
            for i in np.flatnonzero(done):
                episodes.append((global_step, float(running["episode_return"][i]), int(running["episode_length"][i])))
            running["obs"][done] = envs.reset(np.flatnonzero(done))
            check_finite({"first observation": running["obs"]}, global_step)
            running["episode_return"][done] = running["episode_length"][done] = 0
    return rows, episodes


# ======================================================================================================
# Advantages
# ======================================================================================================


def scale_rewards(rewards, done, running: dict, rms: RunningMeanStd, gamma) -> np.ndarray:
    """Rewards [T, N] over the standard deviation of the discounted return, which starts again at `done`; one
    scale for the whole rollout."""
    discounted = np.empty_like(rewards)
    carry = running["discounted_return"]
    for t in range(len(rewards)):
        discounted[t] = carry + rewards[t]
        carry = gamma * discounted[t] * ~done[t]
    running["discounted_return"] = carry
    rms.update(torch.from_numpy(discounted))
    return np.clip(rewards * rms.scale.item(), -10, 10)


def gae(rewards, values, next_values, terminated, done, gamma, gae_lambda: float) -> np.ndarray:
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
def make_batch(rows: dict, agent: Agent, running: dict, reward_rms: RunningMeanStd, args: Args):
    """Rows [T, N, ...] to the batch that the update reads, tensors [T * N, ...] on the agent's device. The old
    policy and the values are computed here, once. Also returns the value's explained variance."""
    device = agent.obs_rms.shift.device
    obs = agent.normalize(rows["obs"].to(device))
    actions = rows["actions"].to(device)
    mean, log_std, values = agent(obs)
    next_values = agent.value(agent.normalize(rows["next_obs"].to(device)))
    rewards, done, terminated = rows["rewards"].numpy(), rows["done"].numpy(), rows["terminated"].numpy()
    if args.norm_reward:
        rewards = scale_rewards(rewards, done, running, reward_rms, args.gamma)
    V, next_V = values.cpu().numpy(), next_values.cpu().numpy()
    advantages = gae(rewards.astype(np.float32), V, next_V, terminated, done, args.gamma, args.gae_lambda)
    returns = advantages + V
    explained_variance = 1 - np.var(returns - V) / max(np.var(returns), 1e-12)
    batch = {
        "obs": obs,
        "actions": actions,
        "logprobs": gaussian_logprob(actions, mean, log_std),
        "advantages": torch.from_numpy(advantages).to(device),
        "returns": torch.from_numpy(returns).to(device),
        "values": values,
    }
    return {name: tensor.flatten(0, 1) for name, tensor in batch.items()}, float(explained_variance)


# ======================================================================================================
# Loss
# ======================================================================================================

METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")


def gaussian_logprob(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log N(x; mean, diag exp(log_std)^2), summed over the last dimension."""
    return (-0.5 * ((x - mean) * torch.exp(-log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, summed over the last dimension."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def policy_loss(logratio: torch.Tensor, advantages: torch.Tensor, clip_coef: float, clip_space: str) -> torch.Tensor:
    """-E[min(r A, clip(r, 1 - eps, 1 + eps) A)] for logratio = log r and A [B] (Schulman et al. 2017, Eq. 7). With
    clip_space "log" log r stands for r and 0 for 1, the variant that their Section 6.1 mentions; with clip_coef 0
    nothing is clipped (Eq. 6)."""
    ratio, center = (logratio.exp(), 1.0) if clip_space == "ratio" else (logratio, 0.0)
    if clip_coef == 0:
        return -(ratio * advantages).mean()
    clipped = ratio.clamp(center - clip_coef, center + clip_coef)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_coef: float) -> torch.Tensor:
    """1/2 E[(V - R)^2], or with clip_coef > 0 the larger of that and the error of V clipped to V_old +- clip_coef."""
    error = (values - returns) ** 2
    if clip_coef > 0:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error.mean()


def normalize_advantages(advantages: torch.Tensor) -> torch.Tensor:
    """Mean 0, standard deviation 1; a single advantage stays as it is, since less its mean it would be 0."""
    if advantages.numel() == 1:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def loss(params: dict, agent: Agent, batch: dict, coefs: dict, args: Args):
    """The objective above, negated, over a minibatch [M, ...]: a scalar, and METRICS as a vector without gradient."""
    mean, log_std, values = torch.func.functional_call(agent, params, (batch["obs"],))
    logratio = gaussian_logprob(batch["actions"], mean, log_std) - batch["logprobs"]
    advantages = normalize_advantages(batch["advantages"]) if args.norm_adv else batch["advantages"]
    pg_loss = policy_loss(logratio, advantages, args.clip_coef, args.clip_space)
    v_loss = value_loss(values, batch["values"], batch["returns"], args.clip_coef if args.clip_vloss else 0)
    entropy = gaussian_entropy(log_std).mean()
    # KL[pi_old || pi] by the estimator with low variance, http://joschu.net/blog/kl-approx.html
    approx_kl = (logratio.exp() - 1 - logratio).mean()
    distance = (logratio.exp() - 1 if args.clip_space == "ratio" else logratio).abs()
    clipfrac = (distance > args.clip_coef).float().mean() * (args.clip_coef > 0)
    total = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    return total, torch.stack([pg_loss, v_loss, entropy, approx_kl, clipfrac]).detach()


# ======================================================================================================
# Update
#
# The networks are so small that PyTorch's dispatch, not arithmetic, takes the time. So gradient, clipping
# and Adam are one function of plain tensors that torch.compile turns into one graph; the parameters are a
# single vector, theta, so that clipping and Adam are a few operations. --no-compile runs the same code.
# ======================================================================================================


def flatten(tensors: dict) -> torch.Tensor:
    """{name: tensor} -> one vector, in the dict's order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def unflatten(theta: torch.Tensor, agent: Agent) -> dict:
    """The inverse of flatten, for the agent's trainable parameters."""
    params = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    parts = theta.split([p.numel() for p in params.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(params.items(), parts)}


def init_optimizer(agent: Agent) -> dict:
    """theta, and Adam's moments and step count (float64: 1 - 0.999^t is small at first)."""
    theta = flatten({name: p.detach() for name, p in agent.named_parameters() if p.requires_grad})
    step = torch.zeros((), dtype=torch.float64, device=theta.device)
    return {"theta": theta, "exp_avg": torch.zeros_like(theta), "exp_avg_sq": torch.zeros_like(theta), "step": step}


def clip_grad_norm(grad: torch.Tensor, max_norm: float) -> torch.Tensor:
    """As torch.nn.utils.clip_grad_norm_."""
    return grad * (max_norm / (grad.norm() + 1e-6)).clamp(max=1.0)


def adam(optimizer: dict, grad: torch.Tensor, learning_rate, beta1=0.9, beta2=0.999, eps=1e-5) -> dict:
    """One step of torch.optim.Adam (Kingma and Ba 2015); eps as in the 37 details."""
    step = optimizer["step"] + 1
    exp_avg = beta1 * optimizer["exp_avg"] + (1 - beta1) * grad
    exp_avg_sq = beta2 * optimizer["exp_avg_sq"] + (1 - beta2) * grad**2
    step_size = (learning_rate / (1 - beta1**step)).float()
    denominator = exp_avg_sq.sqrt() / (1 - beta2**step).sqrt().float() + eps
    theta = optimizer["theta"] - step_size * exp_avg / denominator
    return {"theta": theta, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}


def update_step(optimizer: dict, batch: dict, indices: torch.Tensor, coefs: dict, agent: Agent, args: Args):
    """One gradient step for each row of indices [K, M] into the batch. Returns the new optimizer and mean METRICS."""
    metrics = []
    for rows in indices.unbind(0):
        minibatch = {name: tensor.index_select(0, rows) for name, tensor in batch.items()}
        gradient = torch.func.grad_and_value(loss, has_aux=True)
        grads, (_, values) = gradient(unflatten(optimizer["theta"], agent), agent, minibatch, coefs, args)
        optimizer = adam(optimizer, clip_grad_norm(flatten(grads), args.max_grad_norm), coefs["learning_rate"])
        metrics.append(values)
    return optimizer, torch.stack(metrics).mean(0)


def minibatches_per_call(args: Args) -> int:
    """Two steps a call halve what entering the graph costs; more would take longer to compile than they save."""
    return 2 if args.num_minibatches % 2 == 0 else 1


def compile_update(agent: Agent, optimizer: dict, coefs: dict, batch: dict, args: Args):
    """update_step bound to agent and args, and compiled, by running it once on `batch`. Where that fails, for want of a
    C++ compiler say, or gives another gradient, one line tells why and the plain function is returned."""
    step = functools.partial(update_step, agent=agent, args=args)
    if not args.compile:
        return step
    cuda = optimizer["theta"].is_cuda
    if cuda:
        options = {"triton.cudagraphs": True}
    else:  # a C++ wrapper has the least overhead; without the header (4 s) and the probes (6 s) a cold start takes half
        options = {"cpp_wrapper": True, "cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": True}
    options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe  # the agent does not change shape
    graph = torch.compile(step, fullgraph=True, dynamic=False, options=options)

    def compiled(optimizer, batch, indices, coefs):
        if not cuda:
            return graph(optimizer, batch, indices, coefs)
        torch.compiler.cudagraph_mark_step_begin()
        optimizer, metrics = graph(optimizer, batch, indices, coefs)
        optimizer = {name: tensor.clone() for name, tensor in optimizer.items()}  # the next replay overwrites it
        return optimizer, metrics.clone()

    logging.getLogger("torch._inductor.scheduler").disabled = True  # of a failure it logs pages; a line will do
    gc.disable()  # the compiler's many small objects cost the collector 2 s
    try:
        indices = torch.arange(len(batch["obs"])).view(args.num_minibatches, -1)[: minibatches_per_call(args)]
        indices = indices.to(optimizer["theta"].device)
        (new, _), (plain, _) = (run(optimizer, batch, indices, coefs) for run in (compiled, step))
        change = (plain["exp_avg"] - optimizer["exp_avg"]).norm()
        error = ((new["exp_avg"] - plain["exp_avg"]).norm() / change.clamp(min=1e-6)).item()
        if not error < 0.01:  # compilers have lost gradients without a word (github.com/pytorch/pytorch/issues/189895)
            raise ArithmeticError(f"the compiled gradient is {error:.0%} off")
    except Exception as error:  # a mistake in the loss will show again, with its traceback, in the plain function
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
        tqdm.write(f"notice: the update runs uncompiled, several times slower ({reason})", file=sys.stderr)
        return step
    finally:
        gc.freeze()  # half a million objects stay; no later collection need look at them, 0.2 s each
        gc.enable()
    return compiled


def update(step, optimizer: dict, batch: dict, coefs: dict, args: Args):
    """The epochs of one iteration, each a new random cut of the batch into minibatches. Returns the new optimizer and
    {metric: mean over all minibatches}."""
    metrics = []
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch["obs"])).view(args.num_minibatches, -1).to(optimizer["theta"].device)
        for indices in order.split(minibatches_per_call(args)):
            optimizer, values = step(optimizer, batch, indices, coefs)
            metrics.append(values)
        if args.target_kl is not None:
            epoch = torch.stack(metrics[-args.num_minibatches // minibatches_per_call(args) :]).mean(0)
            if epoch[METRICS.index("approx_kl")] > args.target_kl:
                break
    return optimizer, dict(zip(METRICS, torch.stack(metrics).mean(0).tolist()))


@torch.no_grad()
def write_parameters(theta: torch.Tensor, agent: Agent):
    for name, value in unflatten(theta, agent).items():
        agent.get_parameter(name).copy_(value)


# ======================================================================================================
# Checkpoint
#
# checkpoint.pt holds all that the rest of the run depends on, and how long each log was when it was
# written. To resume is to load it and to cut the logs to those lengths, so that the run continues as if it
# had not stopped: to the bit on the CPU, for environments whose state can be captured.
# ======================================================================================================


def replace_file(path: Path, content: bytes):
    """Write a file so that at any moment either the old or the new one is there, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def torch_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def torch_load(path: Path, flag: str, key: str) -> dict:
    """A dict that torch.save wrote, on the CPU; no code in it is run. Exits with 2 if it is damaged or has no `key`."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved[key]
        return saved
    except FileNotFoundError:
        fail(f"--{flag} {path.parent}: has no {path.name}")
    except Exception as error:
        fail(f"--{flag} {path.parent}: {path} is corrupt, truncated or no checkpoint ({type(error).__name__})")


def saved_args(flag: str, folder: str) -> Args:
    """The settings in a run's folder; exits with 2 if it is none."""
    try:
        saved = json.loads((Path(folder) / "config.json").read_text())["args"]
        return Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--{flag} {folder}: not the folder of a {Path(__file__).stem} run, config.json cannot be read ({error})")


def rng_state() -> dict:
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy_state = [name, torch.from_numpy(keys.astype(np.int64)), *rest]
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy_state, "python": random.getstate()}


def load_rng_state(state: dict):
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


def save_run(run_dir: Path, agent: Agent, optimizer, coefs, reward_rms, running, envs, progress: dict, logs: dict):
    """Write model.pt, what --eval needs, and checkpoint.pt, what --resume needs."""
    model = {name: tensor.cpu() for name, tensor in agent.state_dict().items()}
    checkpoint = {
        "agent": model,
        "optimizer": {name: tensor.cpu() for name, tensor in optimizer.items()},
        "coefs": {name: tensor.cpu() for name, tensor in coefs.items()},
        "reward_rms": reward_rms.state_dict(),
        "running": {name: torch.from_numpy(array) for name, array in running.items()},
        "envs": envs.state(),
        "rng": rng_state(),
        "progress": progress,
        "logs": logs,
    }
    replace_file(run_dir / "model.pt", torch_bytes(model))
    replace_file(run_dir / "checkpoint.pt", torch_bytes(checkpoint))


def create_run(args: Args, device: torch.device, *state) -> Path:
    """A new run folder that holds config.json and a first checkpoint from the moment it appears."""
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.runs_dir) / name
    while run_dir.exists():  # the same run started twice within a second
        run_dir = run_dir.with_name(run_dir.name + "_")
    commit = None
    with contextlib.suppress(OSError):
        git = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    packages = filter(importlib.util.find_spec, ["torch", "gymnasium", "mujoco", "numpy", "envpool"])
    versions = {name: importlib.metadata.version(name) for name in packages}
    config = {
        "args": dataclasses.asdict(args),
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **versions},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "git_commit": commit,
    }
    temporary = run_dir.with_name(f".{run_dir.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        replace_file(temporary / "config.json", json.dumps(config, indent=2).encode())
        save_run(temporary, *state, logs={})
        temporary.rename(run_dir)
    except OSError as error:
        fail(f"--runs-dir {args.runs_dir}: cannot be written: {error}")
    return run_dir


def open_logs(run_dir: Path, sizes: dict):
    """episodes.csv and a TensorBoard writer, after cutting what earlier starts of the run logged to `sizes`."""
    for name, size in sizes.items():
        if not (run_dir / name).exists() or (run_dir / name).stat().st_size < size:
            fail(f"--resume {run_dir}: {name} is missing, or shorter than it was at the checkpoint")
    for path in [run_dir / "episodes.csv", *run_dir.glob("events.out.tfevents.*")]:
        if path.name in sizes:
            os.truncate(path, sizes[path.name])
        else:
            path.unlink(missing_ok=True)
    episodes = open(run_dir / "episodes.csv", "a")
    if episodes.tell() == 0:
        episodes.write("global_step,return,length\n")
    return episodes, SummaryWriter(str(run_dir))


def log_sizes(run_dir: Path, episodes, writer: SummaryWriter) -> dict:
    """{file name: bytes} of the logs, all of it handed to the system."""
    episodes.flush()
    os.fsync(episodes.fileno())
    writer.flush()
    paths = [run_dir / "episodes.csv", *run_dir.glob("events.out.tfevents.*")]
    return {path.name: path.stat().st_size for path in paths}


# ======================================================================================================
# main
# ======================================================================================================


def choose_renderer(args: Args):
    """Render one frame, in a process of its own since MuJoCo binds to one renderer for good; without a display set
    MUJOCO_GL to egl or osmesa, whichever works. Exits with 2 where nothing does."""
    names = [os.environ.get("MUJOCO_GL")] if {"MUJOCO_GL", "DISPLAY"} & os.environ.keys() else ["egl", "osmesa"]
    frame = "import json, runpy, sys; script = runpy.run_path(sys.argv[1]); args = json.loads(sys.argv[2])"
    frame += "; env = script['make_env'](script['Args'](**args), render_mode='rgb_array')"
    frame += "; env.reset(); assert env.render().ndim == 3"
    command = [sys.executable, "-c", frame, __file__, json.dumps(dataclasses.asdict(args))]
    for name in names:
        environ = os.environ | ({"MUJOCO_GL": name} if name else {})
        tried = subprocess.run(command, env=environ, capture_output=True, text=True)
        if tried.returncode == 0:
            os.environ.update(environ)
            return
    how = f"MUJOCO_GL={' or '.join(names)}" if names[0] else "this display"
    reason = (tried.stderr.strip().splitlines() or ["no frame"])[-1]
    fail(f"--capture-video: {args.env_id} cannot be rendered with {how} ({reason}); Debian has libegl1 and libosmesa6")


@contextlib.contextmanager
def catch_signals():
    """Within, Ctrl-C and SIGTERM only leave a note; yields the function that tells whether there is one."""
    notes = []
    before = {number: signal.signal(number, lambda *_: notes.append(_)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(notes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_tracking(args: Args, run_dir: Path):
    """Mirror the TensorBoard metrics to Weights & Biases; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE as usual."""
    import wandb

    settings = {"config": dataclasses.asdict(args), "dir": str(run_dir), "sync_tensorboard": True, "resume": "allow"}
    wandb.init(id=run_dir.name, name=run_dir.name, **settings)


def evaluate(agent: Agent, args: Args, run_dir: Path, stop) -> dict:
    """Undiscounted returns of greedy episodes, on gymnasium, all statistics frozen; the rate of success
    too, where the info tells is_success."""
    env = make_env(args, **({"render_mode": "rgb_array"} if args.capture_video else {}))
    if args.capture_video:
        folder = str(run_dir / "videos" / str(int(time.time())))
        env = gym.wrappers.RecordVideo(env, folder, episode_trigger=lambda _: True, disable_logger=True)
    device, noise = agent.obs_rms.shift.device, torch.zeros_like(draw_noise(agent, 1))
    policy = capture_act(agent, (1, *env.observation_space.shape), torch.float32) if args.compile else act
    returns, successes = [], []
    for episode in range(args.eval_episodes):
        obs, done, total = env.reset(seed=args.seed + args.num_envs + episode)[0], False, 0.0
        while not done and not stop():
            obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
            action = policy(agent, obs[None], noise.to(device))[0].cpu().numpy()
            obs, reward, terminated, truncated, info = env.step(to_env(action, env.action_space))
            done, total = terminated or truncated, total + float(reward)
        returns.append(total)
        successes += [bool(info["is_success"])] if "is_success" in info else []
    env.close()
    if stop():
        return {}
    result = {"eval_returns": returns, **({"eval_success": float(np.mean(successes))} if successes else {})}
    success = f", success {result['eval_success']:.1%}" if successes else ""
    print(f"evaluation: {len(returns)} episodes, return {np.mean(returns):.2f} +- {np.std(returns):.2f}{success}")
    print("  " + " ".join(f"{value:.2f}" for value in returns))
    if args.capture_video:
        print(f"  videos in {folder}")
    return result


def main(args: Args):
    check_args(args)
    torch.set_num_threads(args.torch_threads)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if args.resume and (Path(args.resume) / "result.json").exists():
        print(f"{args.resume} is finished: there is nothing to resume")
        return
    env = make_env(args)
    if args.capture_video:
        choose_renderer(args)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    agent = Agent(env, args).to(device)
    if args.eval:
        agent.load_state_dict(torch_load(Path(args.eval) / "model.pt", "eval", "obs_rms.mean"))
        with catch_signals() as stop_requested:
            evaluate(agent, args, Path(args.eval), stop_requested)
        if stop_requested():
            raise SystemExit(130)
        return
    with catch_signals() as stop_requested:
        run_dir, result = train(args, agent, env, device, stop_requested)
        if not stop_requested():
            result |= evaluate(agent, args, run_dir, stop_requested)
        if stop_requested():
            print(f"interrupted; continue with: {shlex.join(['python', sys.argv[0], '--resume', str(run_dir)])}")
            raise SystemExit(130)
    replace_file(run_dir / "result.json", json.dumps(result, indent=2).encode())
    print(f"wrote {run_dir}")


def train(args: Args, agent: Agent, env: gym.Env, device: torch.device, stop_requested):
    """Start or resume a run, until its end or until stop_requested(). Returns its folder and what came of it."""
    checkpoint = torch_load(Path(args.resume) / "checkpoint.pt", "resume", "progress") if args.resume else None
    progress = checkpoint["progress"] if checkpoint else {"iteration": 0, "global_step": 0, "seconds": 0.0}
    seed = (args.seed + progress["global_step"]) % 2**31
    envs = make_envs(args, seed)
    running = start_episodes(envs, args.num_envs, seed)
    optimizer, reward_rms = init_optimizer(agent), RunningMeanStd()
    coefs = {"learning_rate": torch.tensor(args.learning_rate, device=device)}
    if checkpoint:
        run_dir = Path(args.resume)
        agent.load_state_dict(checkpoint["agent"])
        optimizer = {name: tensor.to(device) for name, tensor in checkpoint["optimizer"].items()}
        coefs = {name: tensor.to(device) for name, tensor in checkpoint["coefs"].items()}
        reward_rms.load_state_dict(checkpoint["reward_rms"])
        if checkpoint["envs"] is not None:
            envs.load_state(checkpoint["envs"])
            running = {name: tensor.numpy() for name, tensor in checkpoint["running"].items()}
        else:
            print("notice: the state of these environments cannot be captured; their running episodes start again")
        load_rng_state(checkpoint["rng"])
    else:
        run_dir = create_run(args, device, agent, optimizer, coefs, reward_rms, running, envs, progress)
    if args.track:
        start_tracking(args, run_dir)
    episodes_csv, writer = open_logs(run_dir, checkpoint["logs"] if checkpoint else {})

    if progress["iteration"] == 0:
        writer.add_text("args", "\n".join(f"    {name}: {value}" for name, value in dataclasses.asdict(args).items()))

    batch_size = args.num_envs * args.num_steps
    iterations = args.total_timesteps // batch_size
    total = iterations * batch_size
    shape = f"{iterations} x {args.num_envs} x {args.num_steps}"
    print(f"{run_dir}: {total:,} steps, {shape}, {args.backend}, {device}", flush=True)
    step_fn, last_return, compile_seconds, started = None, math.nan, 0.0, time.perf_counter()
    seconds_before = progress["seconds"]
    bar_format = "{percentage:3.0f}% |{bar:20}| {n:,}/{total:,} steps, {desc}, ETA {remaining}"
    every = 0.2 if sys.stderr.isatty() else 10  # seconds
    bar = tqdm(None, "first rollout", total, initial=progress["global_step"], bar_format=bar_format, mininterval=every)
    try:
        for iteration in range(progress["iteration"] + 1, iterations + 1):
            if args.anneal_lr:
                coefs["learning_rate"].fill_(args.learning_rate * (1 - (iteration - 1) / iterations))
            rows, episodes = rollout(envs, agent, running, env.action_space, args, progress["global_step"])
            if agent.norm_obs and iteration == 1:  # else the first update would learn on inputs of another scale
                agent.obs_rms.update(rows["obs"])
            batch, explained_variance = make_batch(rows, agent, running, reward_rms, args)
            if step_fn is None:
                bar.set_description_str("compiling the update" if args.compile else "first update")
                compile_started = time.perf_counter()
                step_fn = compile_update(agent, optimizer, coefs, batch, args)
                compile_seconds = time.perf_counter() - compile_started
            optimizer, metrics = update(step_fn, optimizer, batch, coefs, args)
            global_step = progress["global_step"] + batch_size
            write_parameters(optimizer["theta"], agent)
            check_finite({**metrics, "parameter": optimizer["theta"].cpu().numpy()}, global_step)
            if agent.norm_obs and iteration > 1:
                agent.obs_rms.update(rows["obs"])

            seconds = seconds_before + time.perf_counter() - started - compile_seconds
            progress = {"iteration": iteration, "global_step": global_step, "seconds": seconds}
            for step, episodic_return, length in episodes:
                episodes_csv.write(f"{step},{episodic_return!r},{length}\n")
                last_return = episodic_return
            if episodes:  # their mean: an event for each can take a quarter of the time where episodes are short
                writer.add_scalar("charts/episodic_return", np.mean([e[1] for e in episodes]), global_step)
                writer.add_scalar("charts/episodic_length", np.mean([e[2] for e in episodes]), global_step)
            sps = int(global_step / seconds)
            writer.add_scalar("charts/learning_rate", coefs["learning_rate"].item(), global_step)
            writer.add_scalar("charts/SPS", sps, global_step)
            for name, value in {**metrics, "explained_variance": explained_variance}.items():
                writer.add_scalar(f"losses/{name}", value, global_step)
            last = "no episode yet" if math.isnan(last_return) else f"last return {last_return:.2f}"
            bar.set_description_str(f"{sps:,} SPS, {last}", refresh=False)
            bar.update(batch_size)
            if iteration % args.checkpoint_every == 0 or iteration == iterations or stop_requested():
                logs = log_sizes(run_dir, episodes_csv, writer)
                save_run(run_dir, agent, optimizer, coefs, reward_rms, running, envs, progress, logs)
            if stop_requested():
                break
        error = None
    except FloatingPointError as raised:
        error = f"{raised}; the last good checkpoint is {run_dir / 'checkpoint.pt'}"
    finally:
        bar.close()
        episodes_csv.close()
        writer.close()
    if error:
        fail(error, status=1)
    sps = int(progress["global_step"] / progress["seconds"])
    return run_dir, {**progress, "sps": sps, "compile_seconds": compile_seconds}


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
