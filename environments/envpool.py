"""EnvPool's environments (pypi.org/project/envpool), stepped by C++ threads, as gymnasium environments.

    envs = gym.make_vec("environments.envpool:EnvPool-HalfCheetah-v4", 64)  # from the folder that has environments/
    env = gym.make("environments.envpool:EnvPool-HalfCheetah-v4")

Every id of envpool.list_all_envs() is here as EnvPool-<id>, with "-" for "/": phys2d/CartPole-v1 is
EnvPool-phys2d-CartPole-v1. Spaces, observations and rewards are EnvPool's; EnvPool's own options of an environment,
such as frame_skip, are keyword arguments. Ids with several players raise ValueError.

EnvPool resets a finished environment in its next step. Here autoreset is disabled: a finished environment waits, with
its true last observation, for reset(options={"reset_mask": bool [N]}).

EnvPool takes its seeds when it is made, which is at the first reset: environment i goes on from seed i. Later seeds
change nothing for the batched ones. The single one is made anew by each reset with a seed, which takes 0.003 s for
MuJoCo and 0.2 s for Atari; reset without a seed continues.
"""

import copy
import os

import gymnasium as gym
import numpy as np

try:
    import envpool
except ImportError as error:
    raise ImportError(f"EnvPool is needed ({error}): pip install envpool==1.2.5") from None


class EnvPoolVectorEnv(gym.vector.VectorEnv):
    """N environments of EnvPool without autoreset.

    step returns observations as EnvPool gives them, float64 rewards [N], and those of EnvPool's infos that are arrays
    [N, ...]. num_threads 0 is one a core, at most N. Raises ValueError for an id with several players, a render_mode,
    any autoreset, actions of another shape, a Discrete action out of range, and a step of an environment that waits for
    its reset.
    """

    def __init__(
        self,
        task: str,
        num_envs: int = 1,
        num_threads: int = 0,
        render_mode: str | None = None,
        autoreset_mode=gym.vector.AutoresetMode.DISABLED,
        **options,
    ):
        if render_mode is not None:
            raise ValueError(f"render_mode: must be None, not {render_mode}, as these environments have no pictures")
        autoreset_mode = gym.vector.AutoresetMode(autoreset_mode)  # its name does too
        if autoreset_mode != gym.vector.AutoresetMode.DISABLED:
            raise ValueError(f"autoreset_mode: must be DISABLED, not {autoreset_mode}")
        spec = envpool.make_spec(task, **options)
        if spec.config.max_num_players > 1:
            raise ValueError(f"{task}: has {spec.config.max_num_players} players, and only one is supported")
        num_threads = num_threads or min(num_envs, os.cpu_count())
        self.arguments = {"task_id": task, "num_envs": num_envs, "num_threads": num_threads, **options}
        self.metadata = {"render_modes": [], "autoreset_mode": autoreset_mode}
        self.num_envs = num_envs
        self.single_observation_space = spec.gymnasium_observation_space
        self.single_action_space = spec.gymnasium_action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.pool = None  # made by the first reset, which knows the seeds
        self.over = np.ones(num_envs, dtype=bool)  # waits for its reset

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict | None = None):
        """Start new episodes, of all or of those in options["reset_mask"] -> observations [N, ...] of all, {}.

        A seed s alone stands for s + i. Only the first call uses seeds, and it must reset all. Raises ValueError if
        there are not N seeds or if the mask is not bool [N].
        """
        N = self.num_envs
        mask = np.asarray((options or {}).get("reset_mask", np.ones(N, dtype=bool)))
        if mask.shape != (N,) or mask.dtype != bool:
            raise ValueError(f"reset_mask must be bool [{N}], not {mask.dtype} {list(mask.shape)}")
        if self.pool is None:
            if not mask.all():
                raise ValueError("the first reset must be of all environments")
            if seed is None:
                seed = int(np.random.SeedSequence().generate_state(1)[0])
            seeds = [seed + i for i in range(N)] if np.ndim(seed) == 0 else seed
            if len(seeds) != N or None in seeds:
                raise ValueError(f"{N} environments need as many seeds, not {seeds}")
            seeds = [int(s) % 2**31 for s in seeds]  # EnvPool's are int32
            self.pool = envpool.make_gymnasium(**self.arguments, env_seed=seeds)
            self.obs, _ = self.pool.reset()
        elif mask.any():
            self.obs = copy.deepcopy(self.obs)  # the caller may still have it
            write_rows(self.obs, mask, self.pool.reset(np.flatnonzero(mask))[0])
        self.over = self.over & ~mask
        return self.obs, {}

    def step(self, actions):
        if self.over.any():
            raise ValueError(f"environments {np.flatnonzero(self.over)} have ended: reset them first")
        space = self.single_action_space
        actions = np.asarray(actions, dtype=space.dtype)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions must be {list(self.action_space.shape)}, not {list(actions.shape)}")
        if isinstance(space, gym.spaces.Discrete) and not self.action_space.contains(actions):
            raise ValueError(f"actions must be in {space}, not {actions.tolist()}")  # EnvPool does not look
        self.obs, rewards, terminated, truncated, infos = self.pool.step(actions)
        self.over = terminated | truncated
        arrays = {name: info for name, info in infos.items() if isinstance(info, np.ndarray) and name != "env_id"}
        infos = {name: info for name, info in arrays.items() if len(info) == self.num_envs}
        return self.obs, rewards.astype(np.float64), terminated, truncated, infos

    def close_extras(self, **kwargs):
        if self.pool is not None:
            self.pool.close()


def write_rows(target, mask: np.ndarray, rows):
    """Write the observations of some environments into those of all, which may be dictionaries of arrays."""
    if isinstance(target, dict):
        for name in target:
            write_rows(target[name], mask, rows[name])
    else:
        target[mask] = rows


def first(batch):
    """The first environment's part of observations, which may be dictionaries of arrays."""
    return {name: first(part) for name, part in batch.items()} if isinstance(batch, dict) else batch[0]


class EnvPoolEnv(gym.Env):
    """One environment of EnvPool. Raises ValueError as EnvPoolVectorEnv does."""

    metadata = {"render_modes": []}

    def __init__(self, task: str, render_mode: str | None = None, **options):
        self.make = lambda: EnvPoolVectorEnv(task, 1, render_mode=render_mode, **options)
        self.envs = self.make()
        self.observation_space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.envs = self.make()
        return first(self.envs.reset(seed=seed)[0]), {}

    def step(self, action):
        obs, rewards, terminated, truncated, infos = self.envs.step(np.asarray(action)[None])
        infos = {name: info[0] for name, info in infos.items()}
        return first(obs), float(rewards[0]), bool(terminated[0]), bool(truncated[0]), infos

    def close(self):
        self.envs.close()


for task in envpool.list_all_envs():
    name = "EnvPool-" + task.replace("/", "-")
    entry_points = {"entry_point": EnvPoolEnv, "vector_entry_point": EnvPoolVectorEnv}
    gym.register(name, **entry_points, kwargs={"task": task})
