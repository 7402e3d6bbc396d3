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
"""V-MPO for discrete and continuous actions (Song et al. 2019, arXiv:1909.12238).

For states s, actions a and advantages A gathered with the policy pi_old of the target network, minimise over theta

    L_pi    = -sum_D~ psi log pi_theta(a|s) + C,    psi = rho exp(A / eta) / sum_D~ rho exp(A / eta)
    L_eta   = eta eps_eta + eta log mean_D~ rho exp(A / eta)
    L_alpha = E[ alpha (eps_alpha - sg KL[pi_old || pi_theta]) + sg(alpha) KL[pi_old || pi_theta] ]

    D~ is the half of the batch with the largest A. psi, the E-step, is a better policy than pi_old, known at D~ only;
    the temperature eta keeps it within KL eps_eta of equal weights. L_pi, the M-step, is a weighted maximum
    likelihood: no ratio, no clip. alpha grows while the KL exceeds eps_alpha.

    C = E[ log pi_theta(a|s) - log pi_b(a|s) + KL[pi_b || pi_theta] ], pi_b the policy that acted, is not the paper's: a
    control variate, of mean 0 for any fixed theta since a came from pi_b. It takes variance from the gradient of L_pi:
    psi alone pulls towards all of D~, also where that is no better than pi_b.

sg stops the gradient. A Gaussian's mean and covariance have a KL and an alpha each. rho = min(1, pi_old / pi_b) for
samples older than the target network. All else is as in ppo_continuous.py; PopArt and an LSTM come on request.

    python vmpo.py --env-id CartPole-v1
    python vmpo.py --eval runs/CartPole-v1__vmpo__1__1735689600
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
    """gymnasium id, with Box, Discrete or MultiDiscrete actions"""
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
    update_epochs: int = 4
    """passes over each batch"""
    num_minibatches: int = 8
    """equal parts that each pass cuts the batch into"""
    learning_rate: float = 1e-3
    """Adam's step size at the start"""
    anneal_lr: bool = True
    """let the learning rate fall linearly, to 0 at the end"""
    gamma: float = 0.99
    """discount, in [0, 1]"""
    gae_lambda: float = 0.95
    """lambda of the advantage estimator, in [0, 1]"""
    advantage: Literal["gae", "nstep"] = "gae"
    """GAE, or the paper's: the return to the end of the rollout, less V"""
    norm_adv: bool = True
    """give the batch's advantages mean 0 and std 1"""
    popart: bool = False
    """V in units of the returns' mean and std (PopArt), rewards as they are"""
    top_half: bool = True
    """D~ is the better half of the batch, else all of it"""
    control_variate: bool = True
    """add C, of mean 0, to the policy loss, which takes from its variance"""
    eps_eta: float = 0.1
    """bound on the E-step's KL, in nats"""
    eps_alpha: float = 0.01
    """bound on the policy's KL, of Gaussians the mean's"""
    eps_alpha_cov: float = 1e-4
    """bound on the KL of a Gaussian's covariance, for 1M steps; for n times as many take 1 / n^2 of it"""
    kl: Literal["decoupled", "coupled"] = "decoupled"
    """of Gaussians mean and covariance apart, or the whole with one alpha"""
    kl_per_dimension: bool = False
    """a bound and an alpha for each dimension of the action"""
    dual_learning_rate: float = 1e-2
    """Adam's step size for eta and the alphas, not annealed"""
    dual_parameterisation: Literal["projection", "softplus"] = "projection"
    """keep them positive by a clamp at 1e-8, or as softplus of parameters"""
    target_period: int = 0
    """gradient steps from one target network to the next, 0: an iteration's"""
    importance_weights: bool = True
    """rho for samples older than the target network, else 1"""
    clip_coef: float = 0.2
    """how far a batch may change a value, with clip_vloss"""
    clip_vloss: bool = False
    """clip the change of the value, as PPO does; here V then lags behind"""
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
    recurrent: bool = False
    """an LSTM first, fed with last action and reward; compiled up to 32 steps"""
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
    at_least_0 = {"seed", "env_threads", "clip_coef", "vf_coef", "ent_coef", "target_period"}
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
    if args.recurrent and (args.backend != "gymnasium" or args.num_envs % args.num_minibatches):
        fail("--recurrent: needs --backend gymnasium, and --num-minibatches that divides --num-envs")
    if args.popart and args.clip_vloss:
        fail("--popart: moves the unit in which --clip-vloss would clip; use one of them")
    args.gae_lambda = args.gae_lambda if args.advantage == "gae" else 1.0
    args.target_period = args.target_period or args.update_epochs * args.num_minibatches
    if args.target_period > (steps := args.total_timesteps // batch_size * args.update_epochs * args.num_minibatches):
        fail(f"--target-period {args.target_period}: must be at most the {steps} gradient steps of the run")
    args.compile &= not args.recurrent or args.num_steps <= 32  # a core of 32 steps compiles for 2 minutes
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
    if isinstance(action_space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        return Memory(env) if args.recurrent else env
    if not isinstance(action_space, gym.spaces.Box):
        fail(f"--env-id {args.env_id}: actions are {action_space}; hppo_hybrid.py may serve this space")
    if len(action_space.shape) != 1 or not action_space.is_bounded():
        fail(f"--env-id {args.env_id}: actions are {action_space}; needed is a flat Box with finite bounds")
    return Memory(env) if args.recurrent else env


MEMORY = 128  # size of the LSTM's state, hidden and cell


class Memory(gym.Wrapper):
    """For the recurrent core: observations end with the last action (one-hot if discrete), the last reward and the
    core's state, all 0 at first; actions end with the new state."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.start = np.zeros(gym.spaces.flatdim(env.action_space) + 1 + MEMORY)
        sizes = env.observation_space.shape[0] + len(self.start), math.prod(env.action_space.shape) + MEMORY
        self.observation_space, self.action_space = (gym.spaces.Box(-np.inf, np.inf, (size,)) for size in sizes)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return np.concatenate([obs, self.start]), info

    def step(self, action):
        taken = to_env(action[:-MEMORY], self.env.action_space)
        obs, reward, *rest = self.env.step(taken)
        taken = gym.spaces.flatten(self.env.action_space, taken)
        return np.concatenate([obs, taken, [reward], action[-MEMORY:]]), reward, *rest


def to_env(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """Actions [..., A] as the policy draws them -> as the environment takes them: clipped, or whole numbers."""
    if isinstance(space, gym.spaces.Box):
        return np.clip(actions, space.low, space.high)
    return actions.astype(np.int64).reshape(actions.shape[:-1] + space.shape) + space.start


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
    """A policy of A independent Gaussian or softmax factors, and a value V(s). A policy is one tensor: [B, A, 2], mean
    and log sigma, or [B, A, n], log-probabilities, -1e8 where a factor has fewer than n choices."""

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        space, self.recurrent = env.env.action_space if args.recurrent else env.action_space, args.recurrent
        [obs_dim], self.discrete = env.observation_space.shape, not isinstance(space, gym.spaces.Box)
        choices = getattr(space, "nvec", getattr(space, "n", np.ones(space.shape))).reshape(-1, 1)
        absent = torch.from_numpy(np.arange(choices.max()) >= choices)  # [A, n]
        self.register_buffer("absent", absent, persistent=False)
        action_dim, terms = self.absent.numel(), 1 if self.discrete or args.kl == "coupled" else 2
        duals = torch.ones(1 + terms * (len(choices) if args.kl_per_dimension else 1))  # eta and the alphas
        duals[1:] = 5.0 if self.discrete else 1.0
        self.duals = nn.Parameter(duals.expm1().log() if args.dual_parameterisation == "softplus" else duals)
        self.value_rms = RunningMeanStd()  # V's unit, with PopArt
        self.norm_obs = args.norm_obs
        self.obs_rms = RunningMeanStd(obs_dim)
        if args.recurrent:
            self.encoder, self.core = hidden_layers(obs_dim - MEMORY, 64), nn.LSTMCell(64, MEMORY // 2)
        sizes = (64 if args.recurrent else obs_dim, 64, 64)
        self.critic = nn.Sequential(*hidden_layers(*sizes), layer_init(nn.Linear(sizes[-1], 1), std=1.0))
        self.actor = hidden_layers(*sizes)
        self.actor_mean = layer_init(nn.Linear(sizes[-1], action_dim), std=0.01)
        if self.discrete:
            return
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
        scaled = ((obs - self.obs_rms.shift) * self.obs_rms.scale).clamp(-10, 10)
        return torch.cat([scaled[..., :-MEMORY], obs[..., -MEMORY:]], -1) if self.recurrent else scaled

    def remember(self, obs: torch.Tensor, done: torch.Tensor | None = None):
        """Normalised obs [B, O] -> what the networks read, and the core's new state. The core goes on from the state in
        each row; with done [B, T] it runs over obs [B, T, O] from the first row's, and from 0 after each done."""
        if not self.recurrent:
            return obs, None
        steps, memory = 1 if done is None else done.shape[1], obs[..., -MEMORY:]
        state, states = memory.reshape(-1, steps, MEMORY)[:, 0], []
        for t, encoded in enumerate(self.encoder(obs[..., :-MEMORY]).reshape(-1, steps, 64).unbind(1)):
            state = state * ~done[:, t - 1 : t] if t > 0 else state
            state = torch.cat(self.core(encoded, state.chunk(2, -1)), -1)
            states.append(state)
        memory = torch.stack(states, 1).view(memory.shape)
        return memory.chunk(2, -1)[0], memory

    def policy(self, obs: torch.Tensor):
        """Normalised obs [B, O], or what remember makes of them -> policy."""
        hidden = self.actor(obs)
        mean = self.actor_mean(hidden)
        if self.discrete:
            return mean.unflatten(-1, self.absent.shape).masked_fill(self.absent, -1e8).log_softmax(-1)
        if isinstance(self.actor_logstd, nn.Linear):
            return torch.stack([mean, self.actor_logstd(hidden)], -1)
        return torch.stack([mean, self.actor_logstd.expand_as(mean)], -1)

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """Normalised obs [B, O] -> V [B]."""
        return self.critic(obs).squeeze(-1) / self.value_rms.scale + self.value_rms.shift

    def forward(self, obs: torch.Tensor, done: torch.Tensor | None = None):
        inputs, _ = self.remember(obs, done)
        return self.policy(inputs), self.value(inputs)


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
    """Actions [N, A] for raw obs [N, O] and draw_noise [N, ...], at noise 0 the likeliest, then the core's new state.
    Left uncompiled: at this size a compiled call saves nothing."""
    inputs, memory = agent.remember(agent.normalize(obs))
    policy = agent.policy(inputs)
    actions = (policy + noise).argmax(-1) if agent.discrete else policy[..., 0] + policy[..., 1].exp() * noise
    return torch.cat([actions, memory], -1) if agent.recurrent else actions


def draw_noise(agent: Agent, *shape: int) -> torch.Tensor:
    """What act turns into actions: standard normal, or Gumbel noise, whose argmax draws from a softmax."""
    if agent.discrete:
        return -torch.empty(*shape, *agent.absent.shape).exponential_().log()
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


def popart(agent: Agent, theta: torch.Tensor, returns: np.ndarray, args: Args):
    """Take the returns into V's unit, forgetting old ones at 1e-4 a gradient step, and change the last layer, online
    and target, so that V stays what it was (van Hasselt et al. 2016, arXiv:1602.07714)."""
    rms, shift, scale = agent.value_rms, agent.value_rms.shift.clone(), agent.value_rms.scale.clone()
    rms.update(torch.from_numpy(returns))
    rms.count.clamp_(max=returns.size / (1e-4 * args.update_epochs * args.num_minibatches))
    rms.scale.clamp_(1e-6, 1e2)
    for params in (unflatten(theta, agent), dict(agent.named_parameters())):
        params["critic.4.weight"] *= rms.scale / scale
        params["critic.4.bias"].copy_((params["critic.4.bias"] / scale + shift - rms.shift) * rms.scale)


@torch.no_grad()
def make_batch(rows: dict, agent: Agent, theta, running: dict, reward_rms: RunningMeanStd, args: Args):
    """Rows [T, N, ...] to the batch that the update reads, tensors [T * N, ...] on the agent's device, or for a core
    [N, T, ...]. The policy is the target network's, V is theta's. Also returns the value's explained variance."""
    device = agent.obs_rms.shift.device
    online = functools.partial(torch.func.functional_call, agent, unflatten(theta, agent))
    obs = agent.normalize(rows["obs"].to(device))
    actions = rows["actions"].to(device)[..., : len(agent.absent)]
    (target, _), (_, values) = agent(obs), online((obs,))
    _, next_values = online((agent.normalize(rows["next_obs"].to(device)),))
    rewards, done, terminated = rows["rewards"].numpy(), rows["done"].numpy(), rows["terminated"].numpy()
    if args.norm_reward and not args.popart:
        rewards = scale_rewards(rewards, done, running, reward_rms, args.gamma)
    V, next_V = values.cpu().numpy(), next_values.cpu().numpy()
    advantages = gae(rewards.astype(np.float32), V, next_V, terminated, done, args.gamma, args.gae_lambda)
    returns = advantages + V
    explained_variance = 1 - np.var(returns - V) / max(np.var(returns), 1e-12)
    if args.popart:
        popart(agent, theta, returns, args)
    least = np.sort(advantages, axis=None)[advantages.size // 2 if args.top_half else 0]  # its equals are in D~ too
    batch = {
        "obs": obs,
        "done": rows["done"].to(device),
        "actions": actions,
        "behaviour": target,
        "target": target,
        "logprobs": describe(target, actions, agent.discrete)[0],
        "log_rho": torch.zeros_like(values),
        "advantages": torch.from_numpy(advantages).to(device) * agent.value_rms.scale,
        "selected": torch.from_numpy(advantages >= least).to(device),
        "returns": torch.from_numpy(returns).to(device),
        "values": values,
    }
    if args.recurrent:
        return {name: tensor.transpose(0, 1) for name, tensor in batch.items()}, float(explained_variance)
    return {name: tensor.flatten(0, 1) for name, tensor in batch.items()}, float(explained_variance)


# ======================================================================================================
# Loss
# ======================================================================================================

# kl_mean and alpha_mean are the whole KL's where it is not decoupled; then there is none of the covariance's
METRICS = "policy_loss value_loss entropy approx_kl eta_loss eta alpha_loss kl_mean alpha_mean kl_cov alpha_cov".split()


def gaussian_logprob(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log N(x; mean, diag exp(log_std)^2), summed over the last dimension."""
    return (-0.5 * ((x - mean) * torch.exp(-log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, summed over the last dimension."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def describe(policy: torch.Tensor, actions: torch.Tensor, discrete: bool):
    """log pi(a|s) [B] of actions [B, A], and the policy's entropy in nats [B]."""
    if discrete:
        return policy.gather(-1, actions.long().unsqueeze(-1)).sum((-2, -1)), -(policy.exp() * policy).sum((-2, -1))
    return gaussian_logprob(actions, *policy.unbind(-1)), gaussian_entropy(policy[..., 1])


def kl_terms(old: torch.Tensor, new: torch.Tensor, discrete: bool, coupled: bool) -> torch.Tensor:
    """KL[old || new] of policies [B, A, ...] in nats, [1, B, A]; of Gaussians, unless coupled, [2, B, A]: what it is if
    the mean alone changes, and if the covariance alone does."""
    if discrete:
        return (old.exp() * (old - new)).sum(-1).unsqueeze(0)
    (old_mean, old_log_std), (mean, log_std) = old.unbind(-1), new.unbind(-1)
    variance_ratio = torch.exp(2 * (old_log_std - log_std))
    of_mean = 0.5 * ((mean - old_mean) * torch.exp(-old_log_std)) ** 2
    of_cov = 0.5 * (variance_ratio - 1) + log_std - old_log_std
    return (of_mean * variance_ratio + of_cov).unsqueeze(0) if coupled else torch.stack([of_mean, of_cov])


def e_step(eta: torch.Tensor, advantages: torch.Tensor, selected: torch.Tensor, log_rho: torch.Tensor, eps_eta: float):
    """psi, without gradient, and L_eta of a whole batch [B], of which D~ is selected. The largest advantage goes first,
    so that for no eta anything overflows, nor the gradient of L_eta cancels."""
    scores = (advantages - advantages.amax()) / eta + log_rho
    scores = scores.masked_fill(~selected, -math.inf).flatten()
    log_mean = scores.logsumexp(0) - selected.to(scores).sum().log()
    return scores.softmax(0).view_as(advantages).detach(), eta * (eps_eta + log_mean) + advantages.amax()


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


def loss(params: dict, agent: Agent, whole: dict, rows: torch.Tensor, coefs: dict, args: Args):
    """The objective above over the rows [M] of a whole batch: a scalar, and METRICS as a vector without gradient. psi
    and L_eta are the whole's; the mean over the minibatches is the paper's loss, whose L_pi is a sum."""
    batch = {name: tensor.index_select(0, rows) for name, tensor in whole.items()}
    policy, values = torch.func.functional_call(agent, params, (batch["obs"], batch["done"]))
    logprobs, entropies = describe(policy, batch["actions"], agent.discrete)
    logratio = logprobs - batch["logprobs"]
    duals = params["duals"]
    duals = nn.functional.softplus(duals) + 1e-8 if args.dual_parameterisation == "softplus" else duals
    advantages = normalize_advantages(whole["advantages"]) if args.norm_adv else whole["advantages"]
    psi, eta_loss = e_step(duals[0], advantages, whole["selected"], whole["log_rho"], args.eps_eta)
    pg_loss = -(psi[rows] * logprobs).sum() * (len(psi) / len(rows))
    if args.control_variate:
        kl = kl_terms(batch["behaviour"], policy, agent.discrete, coupled=True)
        pg_loss = pg_loss + logratio.mean() + kl.sum(-1).mean()
    kl = kl_terms(batch["target"], policy, agent.discrete, args.kl == "coupled").flatten(1, -2).mean(1)
    kl = kl if args.kl_per_dimension else kl.sum(-1, keepdim=True)
    alphas, bounds = duals[1:].view_as(kl), duals.new_tensor([[args.eps_alpha], [args.eps_alpha_cov]])[: len(kl)]
    alpha_loss = (alphas * (bounds - kl.detach()) + alphas.detach() * kl).sum()
    v_loss = value_loss(values, batch["values"], batch["returns"], args.clip_coef if args.clip_vloss else 0)
    v_loss = v_loss * agent.value_rms.scale**2
    entropy = entropies.mean()
    # KL[pi_old || pi] by the estimator with low variance, http://joschu.net/blog/kl-approx.html
    approx_kl = (logratio.exp() - 1 - logratio).mean()
    total = pg_loss + eta_loss + alpha_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    metrics = torch.stack([pg_loss, v_loss, entropy, approx_kl, eta_loss, duals[0], alpha_loss])
    return total, torch.cat([metrics, torch.stack([kl.sum(-1), alphas.mean(-1)], -1).flatten()]).detach()


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
        gradient = torch.func.grad_and_value(loss, has_aux=True)
        grads, (_, values) = gradient(unflatten(optimizer["theta"], agent), agent, batch, rows, coefs, args)
        duals, grad = grads.pop("duals"), clip_grad_norm(flatten(grads), args.max_grad_norm)  # duals lead theta
        rates = [torch.full_like(duals, args.dual_learning_rate), coefs["learning_rate"].expand_as(grad)]
        optimizer = adam(optimizer, torch.cat([duals, grad]), torch.cat(rates))
        if args.dual_parameterisation == "projection":
            optimizer["theta"][: len(duals)].clamp_(min=1e-8)
        metrics.append(values)
    return optimizer, torch.stack(metrics).mean(0)


def minibatches_per_call(args: Args) -> int:
    """Two steps a call halve what entering the graph costs; more would take longer to compile than they save."""
    return 2 if args.num_minibatches % 2 == args.target_period % 2 == 0 else 1


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


@torch.no_grad()
def refresh_target(agent: Agent, theta: torch.Tensor, batch: dict, args: Args):
    """Theta becomes the target network, for the rest of the batch too."""
    write_parameters(theta, agent)
    batch["target"], _ = agent(batch["obs"], batch["done"])
    if args.importance_weights:
        logprobs, _ = describe(batch["target"], batch["actions"], agent.discrete)
        batch["log_rho"] = (logprobs - batch["logprobs"]).clamp(max=0)


def update(step, agent: Agent, optimizer: dict, batch: dict, coefs: dict, args: Args):
    """The epochs of one iteration, each a new random cut of the batch into minibatches. Returns the new optimizer and
    {metric: mean over all minibatches}."""
    metrics, steps = [], int(optimizer["step"])
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch["obs"])).view(args.num_minibatches, -1).to(optimizer["theta"].device)
        for indices in order.split(minibatches_per_call(args)):
            optimizer, values = step(optimizer, batch, indices, coefs)
            metrics.append(values)
            steps += len(indices)
            if steps % args.target_period == 0:
                refresh_target(agent, optimizer["theta"], batch, args)
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
            batch, explained_variance = make_batch(rows, agent, optimizer["theta"], running, reward_rms, args)
            if step_fn is None:
                bar.set_description_str("compiling the update" if args.compile else "first update")
                compile_started = time.perf_counter()
                step_fn = compile_update(agent, optimizer, coefs, batch, args)
                compile_seconds = time.perf_counter() - compile_started
            optimizer, metrics = update(step_fn, agent, optimizer, batch, coefs, args)
            global_step = progress["global_step"] + batch_size
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
