"""MuJoCo Playground's tasks (playground.mujoco.org), simulated by JAX, as gymnasium environments.

    envs = gym.make_vec("environments.playground:Playground-CheetahRun", 2048)  # from the folder that has environments/
    env = gym.make("environments.playground:Playground-CheetahRun", episode_length=500)

Every name in mujoco_playground.registry.ALL_ENVS is here as Playground-<name>. Keyword arguments are fields of the
task's config, with dots for nested ones ("noise_config.level"); impl is "jax" unless you say otherwise. JAX simulates
on the GPU if it finds one. It compiles the first reset and the first step of each batch size, which takes from seconds
to minutes; with the environment variable JAX_COMPILATION_CACHE_DIR the next process takes them from there.

Observations are the task's, or "state" where it has several ("privileged_state" is for critics); actions lie in
[-1, 1]. An episode is truncated after the config's episode_length, and terminated where the task says that it is done.
An info has the task's metrics, summed over the episode so far.

An episode is a function of its seed and actions, to the bit on the same CPU and in batches of the same size. The models
of robots, of all tasks but the DeepMind Control Suite's, come with the first use: Playground clones mujoco_menagerie.
"""

import functools
import json

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

try:
    import jax
    from brax.envs.wrappers.training import EpisodeWrapper, VmapWrapper
    from mujoco_playground import registry
except ImportError as error:
    install = "pip install -r environments/requirements-robots.txt"
    raise ImportError(f"MuJoCo Playground is needed ({error}): {install}") from None


@functools.cache
def load(task: str, config: str):
    """Playground's task with changes to its config, a JSON object -> the task, a batch of it, and two compiled
    functions: reset(state, keys [N, 2], mask [N]) -> state, keys and step(state, actions [N, A]) -> state."""
    settings = registry.get_default_config(task)
    settings.impl = "jax"
    settings.lock()  # a field that it does not have is an error
    settings.update_from_flattened_dict(json.loads(config))
    simulator = registry.load(task, settings)
    batch = EpisodeWrapper(VmapWrapper(simulator), settings.episode_length, settings.action_repeat)

    @jax.jit
    def reset(state, keys, mask):
        reset_keys, next_keys = jax.vmap(jax.random.split, out_axes=1)(keys)

        def choose(new, old):
            shared = new.shape[:1] != mask.shape  # impl "warp" keeps the contacts of all environments in one array
            return jax.numpy.where(mask.all() if shared else mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return jax.tree.map(choose, (batch.reset(reset_keys), next_keys), (state, keys))

    @jax.jit
    def step(state, actions):  # astype: with JAX's weak types the next call would be compiled again
        return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), batch.step(state, actions))

    return simulator, batch, reset, step


def vector(obs):
    """The policy's part of Playground's observations, [N, O]."""
    return obs["state"] if isinstance(obs, dict) else obs


class PlaygroundVectorEnv(gym.vector.VectorEnv):
    """N environments of Playground without autoreset.

    step returns float32 observations [N, O] and float64 rewards [N]; a finished environment waits, with its true last
    observation, for reset(options={"reset_mask": bool [N]}). A reset computes first states for all N environments and
    keeps those in the mask. Raises KeyError for a field that the config does not have; ValueError for a task of images,
    any autoreset, a wrong number of seeds, a mask that is not bool [N], actions of another shape, and a step of an
    environment that waits for its reset.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, task: str, num_envs: int = 1, autoreset_mode=AutoresetMode.DISABLED, **config):
        if AutoresetMode(autoreset_mode) != AutoresetMode.DISABLED:
            raise ValueError(f"autoreset_mode: must be DISABLED, not {autoreset_mode}")
        self.simulator, batch, self.compiled_reset, self.compiled_step = load(task, json.dumps(config))
        self.num_envs = num_envs
        self.keys = np.random.SeedSequence().generate_state(2 * num_envs).reshape(num_envs, 2)  # of JAX's generators
        shapes = jax.eval_shape(batch.reset, self.keys)
        if isinstance(shapes.obs, dict) and "state" not in shapes.obs:
            raise ValueError(f"{task}: observations are {', '.join(shapes.obs)}, and images are not supported")
        self.state = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)
        self.over = np.ones(num_envs, dtype=bool)  # waits for its reset
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, vector(shapes.obs).shape[1:])
        self.single_action_space = gym.spaces.Box(-1, 1, (self.simulator.action_size,))
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict | None = None):
        """Start new episodes, of all or of those in options["reset_mask"] -> observations [N, O] of all, {}.

        A seed s alone stands for s + i. An environment without one goes on with its own random numbers.
        """
        N = self.num_envs
        mask = np.asarray((options or {}).get("reset_mask", np.ones(N, dtype=bool)))
        seeds = [None if seed is None else seed + i for i in range(N)] if np.ndim(seed) == 0 else seed
        if len(seeds) != N or mask.shape != (N,) or mask.dtype != bool:
            raise ValueError(f"{N} environments need as many seeds, and a reset_mask of as many bools")
        keys = np.array(self.keys)
        for i in np.flatnonzero(mask):
            if seeds[i] is not None:
                keys[i] = jax.random.PRNGKey(seeds[i])
        self.state, self.keys = self.compiled_reset(self.state, keys, mask)
        self.over = self.over & ~mask
        return np.array(vector(self.state.obs), dtype=np.float32), {}

    def step(self, actions):
        if self.over.any():
            raise ValueError(f"environments {np.flatnonzero(self.over)} have ended: reset them first")
        if np.shape(actions) != self.action_space.shape:
            raise ValueError(f"actions must be {list(self.action_space.shape)}, not {list(np.shape(actions))}")
        self.state = state = self.compiled_step(self.state, np.asarray(actions, dtype=np.float32))
        sums = {name: state.info["episode_metrics"][name] for name in state.metrics}
        parts = vector(state.obs), state.reward, state.done > 0, state.info["truncation"] > 0, sums
        obs, rewards, done, truncated, infos = jax.tree.map(np.array, jax.device_get(parts))
        self.over = done
        return obs.astype(np.float32), rewards.astype(np.float64), done & ~truncated, truncated, infos


class PlaygroundEnv(gym.Env):
    """One environment of Playground, as a batch of one."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, task: str, render_mode: str | None = None, **config):
        self.envs = PlaygroundVectorEnv(task, **config)
        self.metadata = {**self.metadata, "render_fps": round(1 / self.envs.simulator.dt)}
        self.render_mode = render_mode
        self.observation_space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return self.envs.reset(seed=seed)[0][0], {}

    def step(self, action):
        obs, rewards, terminated, truncated, infos = self.envs.step(np.asarray(action)[None])
        infos = {name: values[0] for name, values in infos.items()}
        return obs[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), infos

    def render(self):
        return self.envs.simulator.render(jax.tree.map(lambda leaf: leaf[0], self.envs.state))


for task in registry.ALL_ENVS:
    entry_points = {"entry_point": PlaygroundEnv, "vector_entry_point": PlaygroundVectorEnv}
    gym.register(f"Playground-{task}", **entry_points, kwargs={"task": task})
