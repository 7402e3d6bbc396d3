"""mjlab's tasks (mujocolab.github.io/mjlab), simulated by MuJoCo Warp, as gymnasium environments.

    envs = gym.make_vec("environments.mjlab:Mjlab-Velocity-Flat-Unitree-G1", 2048)  # from the folder of environments/
    env = gym.make("environments.mjlab:Mjlab-Velocity-Flat-Unitree-G1", episode_length_s=5)

Every task of mjlab is here under its own name. Keyword arguments are fields of its ManagerBasedRlEnvCfg; play=True
takes mjlab's variant for watching; device is "cuda:0" where torch finds a GPU, else "cpu". Warp compiles the kernels of
a new task, for half a minute or more, and keeps them in ~/.cache/warp.

Observations are the group "actor" ("critic" has what only a simulator knows). Actions have no bounds, as in mjlab, and
suit a policy that starts around N(0, 1). A time limit truncates, or terminates where the config has is_finite_horizon.
An info tells for each of the task's terminations, as Episode_Termination/<name>, whether it holds.

mjlab draws the random numbers of all environments at once, so the batch has one generator. A reset of all environments
with seeds starts it from all of them together; a reset of some goes on with it, whatever their seeds. What mjlab draws
when it builds a batch, such as friction and terrain, follows from the keyword seed. The process's own generators are
left as they were. A curriculum begins with the batch, so a resumed run begins it again.
"""

import contextlib
import dataclasses
import io
import os
import random

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

os.environ.setdefault("MJLAB_WARP_QUIET", "1")
try:
    import mjlab.tasks  # noqa: F401  registers them
    from mjlab.envs import ManagerBasedRlEnv
    from mjlab.tasks.registry import list_tasks, load_env_cfg
except ImportError as error:
    install = "pip install -r environments/requirements-robots.txt; pip install --no-deps mjlab==1.6.0 mjviser==0.0.14"
    raise ImportError(f"mjlab is needed ({error}): {install}") from None


@contextlib.contextmanager
def kept_generators():
    """The process's random numbers afterwards are as if nothing had been drawn, or seeded, within."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


class MjlabVectorEnv(gym.vector.VectorEnv):
    """N environments of mjlab without autoreset.

    step returns float32 observations [N, O] and float64 rewards [N]; a finished environment waits, with its true last
    observation, for reset(options={"reset_mask": bool [N]}). render gives one picture, of mjlab's camera. Raises
    TypeError for a field that the config does not have; ValueError for any autoreset, a wrong number of seeds and a
    mask that is not bool [N]; mjlab's own errors for the rest, RuntimeError for a step of a finished environment.
    """

    metadata = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.DISABLED}

    def __init__(
        self,
        task: str,
        num_envs: int = 1,
        device: str | None = None,
        play: bool = False,
        seed: int = 0,
        render_mode: str | None = None,
        autoreset_mode=AutoresetMode.DISABLED,
        **config,
    ):
        if AutoresetMode(autoreset_mode) != AutoresetMode.DISABLED:
            raise ValueError(f"autoreset_mode: must be DISABLED, not {autoreset_mode}")
        device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        self.generators = None  # states of torch's generators on the CPU and the GPUs, for this batch
        config = dataclasses.replace(load_env_cfg(task, play), seed=seed, auto_reset=False, **config)
        config.scene.num_envs = num_envs
        with kept_generators(), contextlib.redirect_stdout(io.StringIO()):  # it prints ten tables
            self.simulator = ManagerBasedRlEnv(config, device, render_mode)
        self.metadata = {**self.metadata, "render_fps": round(1 / self.simulator.step_dt)}
        self.render_mode, self.render, self.close_extras = render_mode, self.simulator.render, self.simulator.close
        self.num_envs = num_envs
        obs_shape = self.simulator.single_observation_space.spaces["actor"].shape
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, obs_shape)
        self.single_action_space = gym.spaces.Box(-np.inf, np.inf, self.simulator.single_action_space.shape)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.obs = np.zeros(self.observation_space.shape, dtype=np.float32)

    @contextlib.contextmanager
    def own_generators(self, seed: int | None = None):
        """Lend mjlab, which draws from torch's global generators, this batch's own."""
        with kept_generators():
            if seed is not None:
                torch.manual_seed(seed)
            else:
                torch.set_rng_state(self.generators[0])
                torch.cuda.set_rng_state_all(self.generators[1])
            yield
            self.generators = torch.get_rng_state(), torch.cuda.get_rng_state_all()

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict | None = None):
        """Start new episodes, of all or of those in options["reset_mask"] -> observations [N, O] of all, {}."""
        N = self.num_envs
        mask = np.asarray((options or {}).get("reset_mask", np.ones(N, dtype=bool)))
        if mask.shape != (N,) or mask.dtype != bool or np.ndim(seed) == 1 and len(seed) != N:
            raise ValueError(f"{N} environments need as many seeds, and a reset_mask of as many bools")
        if self.generators is None or (seed is not None and mask.all()):
            seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        else:
            seed = None
        with self.own_generators(seed):
            obs, _ = self.simulator.reset(env_ids=torch.from_numpy(np.flatnonzero(mask)).to(self.simulator.device))
        self.obs = np.where(mask[:, None], obs["actor"].cpu().numpy(), self.obs)
        return self.obs, {}

    def step(self, actions):
        with self.own_generators():
            results = self.simulator.step(torch.from_numpy(np.array(actions, dtype=np.float32)))
        obs, rewards, terminated, truncated = (
            np.array(result.cpu()) for result in (results[0]["actor"], *results[1:4])
        )
        if self.simulator.cfg.is_finite_horizon:
            terminated, truncated = terminated | truncated, np.zeros_like(truncated)
        ends = self.simulator.termination_manager
        infos = {f"Episode_Termination/{name}": np.array(ends.get_term(name).cpu()) for name in ends.active_terms}
        self.obs = obs
        return obs, rewards.astype(np.float64), terminated, truncated, infos


class MjlabEnv(gym.Env):
    """One environment of mjlab, as a batch of one."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, task: str, **options):
        self.envs = MjlabVectorEnv(task, 1, **options)
        self.metadata, self.render_mode = self.envs.metadata, self.envs.render_mode
        self.render, self.close = self.envs.render, self.envs.close
        self.observation_space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return self.envs.reset(seed=seed)[0][0], {}

    def step(self, action):
        obs, rewards, terminated, truncated, infos = self.envs.step(np.asarray(action)[None])
        infos = {name: values[0] for name, values in infos.items()}
        return obs[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), infos


for task in list_tasks():
    entry_points = {"entry_point": MjlabEnv, "vector_entry_point": MjlabVectorEnv}
    gym.register(task, **entry_points, kwargs={"task": task})
