"""HalfCheetah as it met the PPO paper's policy: the cost of an action is that of the action as drawn, not clipped.

    python ppo_continuous.py --env-id benchmarks.half_cheetah_unclipped:HalfCheetahUnclipped-v4

MuJoCo itself holds the torques to [-1, 1]; the reward's -0.1 |a|^2 knows no bound, and gymnasium leaves the action as
it is. The scripts clip to the action space before the environment sees anything, so here the space is made wide.
"""

import gymnasium as gym
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv


class HalfCheetahUnclipped(HalfCheetahEnv):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-1e6, 1e6, self.action_space.shape)


gym.register("HalfCheetahUnclipped-v4", HalfCheetahUnclipped, max_episode_steps=1000)
