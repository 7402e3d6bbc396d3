"""Environments whose actions are a choice and its parameters, single and batched: they need gymnasium and numpy alone.

    env = gym.make("environments.hybrid:HybridMoving-v0")  # from the folder that has environments/
    envs = gym.make_vec("environments.hybrid:HybridMoving-v0", 1024, autoreset_mode=gym.vector.AutoresetMode.DISABLED)

| id                          | task                            | K   | P | O  | source                |
|-----------------------------|---------------------------------|-----|---|----|-----------------------|
| HybridMoving-v0             | drive to a target and stop      | 3   | 2 | 10 | gym-hybrid's Moving   |
| HybridSliding-v0            | the same, with inertia          | 3   | 2 | 10 | gym-hybrid's Sliding  |
| HybridCatchPoint-v0         | fly to a target and catch it    | 2   | 1 | 10 | Fan et al. 2019       |
| HybridHardMove-v0 (n=4)     | pull to a target by n actuators | 2^n | n | 8  | HyAR (Li et al. 2021) |
| HybridHardMove{4,6,8,10}-v0 | the same                        | 2^n | n | 8  |                       |
| HybridPlatform-v0           | run and jump over two gaps      | 3   | 3 | 10 | Masson et al. 2016    |

An action is Tuple(Discrete(K), Box [P]), for N environments (int [N], float [N, P]); observations are Box [O], float32.
`parameter_mask`, bool [K, P], tells which parameters a choice uses; the others do not act. info["is_success"] tells
whether the step reached the goal. The classes below have the rules and the rewards.

A choice outside [0, K), a wrong shape, a nan or an inf raises ValueError. Parameters outside their bounds are clipped
by Platform only. The others take them as they are, and then observations can leave their space.

An episode is a function of its seed and its actions alone, to the bit: environment i of N, seeded with s, is the single
one after reset(seed=s). The batched ones take reset(seed=[s_0, ..., s_N-1], options={"reset_mask": bool [N]}), which
starts new episodes where the mask is true; seeds may be None, which continues the generator. A seed s alone stands for
s + i. They have gymnasium's default autoreset, in the next step, or AutoresetMode.DISABLED.

Fan et al. 2019: arXiv:1903.01344. gym-hybrid: github.com/thomashirtz/gym-hybrid. Li et al. 2021: arXiv:2109.05490.
Masson et al. 2016: arXiv:1509.01644.
"""

import functools

import gymnasium as gym
import numpy as np


class HybridVectorEnv(gym.vector.VectorEnv):
    """N environments in arrays [N, ...] of float64, so that many cost little more than one.

    A subclass has the rules: make_parameter_mask, bounds, observation_bounds, start, advance, observe and render.
    step raises ValueError for a wrong action and, without autoreset, for an environment that waits for its reset.
    """

    STARTS: int  # numbers in [0, 1) that a start is made of
    LIMIT: int | None = None  # steps after which an episode is truncated

    def __init__(
        self,
        num_envs: int = 1,
        render_mode: str | None = None,
        autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
        **kwargs,
    ):
        autoreset_mode = gym.vector.AutoresetMode(autoreset_mode)  # its name does too
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 20, "autoreset_mode": autoreset_mode}
        if autoreset_mode == gym.vector.AutoresetMode.SAME_STEP:
            raise ValueError("autoreset_mode: must be NEXT_STEP or DISABLED")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode}: must be None or rgb_array")
        self.num_envs, self.render_mode = num_envs, render_mode
        self.parameter_mask = self.make_parameter_mask(**kwargs)  # bool [K, P]
        K, P = self.parameter_mask.shape
        parameters = gym.spaces.Box(*np.float32(self.bounds(P)))
        self.single_action_space = gym.spaces.Tuple([gym.spaces.Discrete(K), parameters])
        self.single_observation_space = gym.spaces.Box(*np.float32(self.observation_bounds()))
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]
        self.over = np.ones(num_envs, dtype=bool)  # waits for its reset
        start = self.start(np.zeros((num_envs, self.STARTS)))
        self.arrays = {"t": np.zeros(num_envs), **{name: value.copy() for name, value in start.items()}}

    def make_parameter_mask(self) -> np.ndarray:
        """Which parameters each choice uses, bool [K, P]. It takes the environment's own keyword arguments."""
        raise NotImplementedError

    def bounds(self, P: int) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest parameters, [P] each."""
        return -np.ones(P), np.ones(P)

    def observation_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest observations, [O] each, with parameters within their bounds."""
        raise NotImplementedError

    def start(self, u: np.ndarray) -> dict[str, np.ndarray]:
        """Uniform numbers [M, STARTS] -> the arrays [M, ...] with which M episodes start."""
        raise NotImplementedError

    def advance(self, k: np.ndarray, x: np.ndarray):
        """One step of those that are not over -> rewards [N], terminated [N], success [N]. The others' are ignored."""
        raise NotImplementedError

    def observe(self) -> np.ndarray:
        """Observations float32 [N, O], a new array."""
        raise NotImplementedError

    def table(self, columns: list[np.ndarray]) -> np.ndarray:
        """Columns [N] -> float32 [N, O], in half of np.stack's time."""
        table = np.empty((self.num_envs, len(columns)), dtype=np.float32)
        for j, column in enumerate(columns):
            table[:, j] = column
        return table

    def seed_generator(self, i: int, seed: int):
        self.rngs[i] = np.random.default_rng(seed)

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict | None = None):
        """Start new episodes, of all or of those in options["reset_mask"] -> observations [N, O] of all, {}.

        Raises ValueError if there are not N seeds or if the mask is not bool [N].
        """
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if mask.shape != (self.num_envs,) or mask.dtype.kind != "b":
            raise ValueError(f"reset_mask must be bool [{self.num_envs}], not {mask.dtype} {list(mask.shape)}")
        indices = mask.nonzero()[0]
        if seed is not None:
            seeds = [seed + i for i in range(self.num_envs)] if np.ndim(seed) == 0 else seed
            if len(seeds) != self.num_envs:
                raise ValueError(f"{self.num_envs} environments need as many seeds, not {len(seeds)}")
            for i in indices:
                if seeds[i] is not None:
                    self.seed_generator(i, seeds[i])
        self.restart(indices)
        return self.observe(), {}

    def restart(self, indices: np.ndarray):
        draws = np.array([self.rngs[i].random(self.STARTS) for i in indices]).reshape(len(indices), self.STARTS)
        for name, value in self.start(draws).items():
            self.arrays[name][indices] = value
        self.arrays["t"][indices] = 0
        self.over[indices] = False

    def checked(self, actions) -> tuple[np.ndarray, np.ndarray]:
        """Actions as int [N] and float64 [N, P]; raises ValueError for what they must not be."""
        (K, P), N = self.parameter_mask.shape, self.num_envs
        k, x = np.asarray(actions[0]), np.asarray(actions[1], dtype=np.float64)
        valid = np.count_nonzero((k >= 0) & (k < K))  # of small arrays in a tenth of the time of all()
        if k.shape != (N,) or k.dtype.kind not in "iu" or valid < N:
            raise ValueError(f"choices must be {N} integers in [0, {K}), not {k.dtype} {k.tolist()}")
        if x.shape != (N, P) or np.count_nonzero(np.isfinite(x)) < N * P:
            raise ValueError(f"parameters must be finite numbers {[N, P]}, not {list(x.shape)}: {x.tolist()}")
        return k, x

    def step(self, actions):
        k, x = self.checked(actions)
        waited, waits = self.over.copy(), np.count_nonzero(self.over)
        if waits and self.metadata["autoreset_mode"] == gym.vector.AutoresetMode.DISABLED:
            raise ValueError(f"environments {np.flatnonzero(waited)} have ended: reset them first")
        self.arrays["t"] += 1
        rewards, terminated, success = self.advance(k, x)
        truncated = np.zeros(self.num_envs, dtype=bool)
        if self.LIMIT:
            truncated = ~terminated & (self.arrays["t"] >= self.LIMIT)
        if waits:  # their step is the reset
            self.restart(np.flatnonzero(waited))
            rewards, terminated, truncated, success = (a * ~waited for a in (rewards, terminated, truncated, success))
        self.over = terminated | truncated
        return self.observe(), rewards, terminated, truncated, {"is_success": success}


class PlaneVectorEnv(HybridVectorEnv):
    """N agents in the plane, each with a target within [-1, 1]^2. The time is observed, so its end is a termination."""

    STEPS: int  # of an episode, at most
    RADIUS = 0.1  # of the target

    def distance(self) -> np.ndarray:
        x, y = (self.arrays["target"] - self.arrays["pos"]).T
        return np.sqrt(x * x + y * y)

    def outside(self) -> np.ndarray:
        """Whether agents have left the field, bool [N]."""
        x, y = abs(self.arrays["pos"]).T
        return (x > 1) | (y > 1)

    def heading(self) -> np.ndarray:
        """What the picture shows as the agent's direction, [N, 2]."""
        raise NotImplementedError

    def render(self) -> tuple[np.ndarray, ...]:
        """A picture of each: the field, the target in green, the agent in blue with its heading in black."""
        x, y = np.meshgrid(np.linspace(-1.2, 1.2, 240), np.linspace(1.2, -1.2, 240))
        pictures = []
        for pos, target, heading in zip(self.arrays["pos"], self.arrays["target"], self.heading()):
            picture = np.full((240, 240, 3), 255, dtype=np.uint8)
            picture[np.maximum(abs(x), abs(y)) > 1] = 210
            spots = [(target, self.RADIUS, (0, 158, 115)), (pos, 0.05, (0, 114, 178))]
            spots += [(pos + s * heading, 0.015, (0, 0, 0)) for s in np.linspace(0, 0.12, 12)]
            for centre, radius, colour in spots:
                picture[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = colour
            pictures.append(picture)
        return tuple(pictures)


class MovingVectorEnv(PlaneVectorEnv):
    """Drive to the target and stop within it: gym-hybrid's Moving, and with slide=True its Sliding.

    k 0 ACCELERATE(p in [0, 1]): speed += 0.5 p. k 1 TURN(p in [-1, 1]): heading += p pi / 2. k 2 BRAKE: speed -= 0.1,
    not below 0. Then the position moves by 0.005 speed along the heading. Sliding keeps the speed's direction apart
    from the heading: thrust adds to it as a vector. Reward: how much nearer, less 0.001, and +1 for standing within the
    target, which ends the episode; so does leaving the field, or t > 200, with a reward of -1.
    Observation: x, y, speed, cos, sin of the heading, target x, y, distance, inside, t / 200.
    """

    STARTS, STEPS = 5, 200

    def make_parameter_mask(self, slide: bool = False) -> np.ndarray:
        self.slide = slide
        return np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)

    def bounds(self, P: int):
        return np.array([0.0, -1.0]), np.array([1.0, 1.0])

    def observation_bounds(self):
        high = np.array([1.6, 1.6, 101, 1, 1, 1, 1, 4, 1, 1.01])  # full thrust in 201 steps: a speed of 100.5
        return -high, high

    def start(self, u: np.ndarray):
        heading = 2 * np.pi * u[:, 4]
        places = {"pos": 2 * u[:, :2] - 1, "target": 0.9 * (2 * u[:, 2:4] - 1)}
        return {**places, "heading": heading, "speed": np.zeros(len(u)), "phi": heading}

    def advance(self, k: np.ndarray, x: np.ndarray):
        s, before = self.arrays, self.distance()
        thrust = np.where(k == 0, 0.5 * x[:, 0], 0.0)
        s["heading"] = s["heading"] + np.where(k == 1, x[:, 1] * np.pi / 2, 0.0)
        if self.slide:
            vx = s["speed"] * np.cos(s["phi"]) + thrust * np.cos(s["heading"])
            vy = s["speed"] * np.sin(s["phi"]) + thrust * np.sin(s["heading"])
            s["speed"] = np.where(k == 0, np.sqrt(vx**2 + vy**2), s["speed"])
            s["phi"] = np.where(k == 0, np.arctan2(vy, vx), s["phi"])
        else:
            s["speed"], s["phi"] = s["speed"] + thrust, s["heading"]
        s["speed"] = np.where(k == 2, np.maximum(s["speed"] - 0.1, 0.0), s["speed"])
        s["pos"] = s["pos"] + (0.005 * s["speed"] * np.array([np.cos(s["phi"]), np.sin(s["phi"])])).T
        after = self.distance()
        success = (after < self.RADIUS) & (s["speed"] == 0)
        failure = ~success & (self.outside() | (s["t"] > self.STEPS))
        return np.where(failure, -1.0, before - after - 0.001 + success), success | failure, success

    def observe(self) -> np.ndarray:
        s, distance = self.arrays, self.distance()
        columns = [s["pos"][:, 0], s["pos"][:, 1], s["speed"], np.cos(s["heading"]), np.sin(s["heading"])]
        columns += [s["target"][:, 0], s["target"][:, 1], distance, distance < self.RADIUS, s["t"] / self.STEPS]
        return self.table(columns)

    def heading(self) -> np.ndarray:
        return np.stack([np.cos(self.arrays["heading"]), np.sin(self.arrays["heading"])], -1)


class HardMoveVectorEnv(PlaneVectorEnv):
    """Reach the target with n actuators, of which every choice switches on a subset (after HyAR's Hard Move).

    Choice k switches on the actuators i whose bit i of k is set; the position moves by 0.1 times the sum of their p_i
    in [-1, 1] along the angles 2 pi i / n. The reward is that of Moving, but the target need only be reached, within 25
    steps. Observation: x, y, target x, y, target - position, distance, t / 25.
    """

    STARTS, STEPS, FORCE = 4, 25, 0.1

    def make_parameter_mask(self, n: int = 4) -> np.ndarray:
        self.directions = np.stack([np.cos(2 * np.pi * np.arange(n) / n), np.sin(2 * np.pi * np.arange(n) / n)], -1)
        return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)

    def observation_bounds(self):
        far = 1 + self.FORCE * len(self.directions)  # from the edge, in the step that leaves the field
        high = np.array([far, far, 1, 1, far + 1, far + 1, 2 * far + 2, 1])
        return -high, high

    def start(self, u: np.ndarray):
        return {"pos": 2 * u[:, :2] - 1, "target": 0.9 * (2 * u[:, 2:] - 1), "move": np.zeros((len(u), 2))}

    def advance(self, k: np.ndarray, x: np.ndarray):
        s, before = self.arrays, self.distance()
        switched = x * self.parameter_mask[k]
        s["move"] = np.zeros((self.num_envs, 2))
        for i, direction in enumerate(self.directions):  # a matrix product's order of summation can vary with N
            s["move"] += switched[:, i, None] * direction
        s["pos"] = s["pos"] + self.FORCE * s["move"]
        after = self.distance()
        success = after < self.RADIUS
        failure = ~success & (self.outside() | (s["t"] >= self.STEPS))
        return np.where(failure, -1.0, before - after - 0.001 + success), success | failure, success

    def observe(self) -> np.ndarray:
        s = self.arrays
        columns = [
            s["pos"],
            s["target"],
            s["target"] - s["pos"],
            self.distance()[:, None],
            s["t"][:, None] / self.STEPS,
        ]
        return np.concatenate(columns, -1, dtype=np.float32, casting="same_kind")

    def heading(self) -> np.ndarray:
        return self.arrays["move"] / np.maximum(np.sqrt((self.arrays["move"] ** 2).sum(-1, keepdims=True)), 1e-9)


class CatchPointVectorEnv(PlaneVectorEnv):
    """Get near the target and catch it (after Fan et al. 2019's Catching Point).

    k 0 MOVE(p in [-1, 1]): a force of 2 along the angle p pi. k 1 CATCH: no force; a target within 0.2 is caught, which
    ends the episode with +20; 10 attempts. In steps of 0.1, velocity *= 1 - 0.25, then + force 0.1. Each step costs the
    squared distance. 30 steps. Observation: x, y, velocity, target x, y, target - position, attempts left / 10, t / 30.
    """

    STARTS, STEPS, RADIUS = 4, 30, 0.2

    def make_parameter_mask(self) -> np.ndarray:
        return np.array([[1], [0]], dtype=bool)

    def observation_bounds(self):
        high = np.array(
            [3.5, 3.5, 0.9, 0.9, 1, 1, 4.5, 4.5, 1, 1]
        )  # the speed nears 0.8: no further than 2.4 in 30 steps
        return -high, high

    def start(self, u: np.ndarray):
        zero, attempts = np.zeros((len(u), 2)), np.full(len(u), 10.0)
        return {"pos": 2 * u[:, :2] - 1, "target": 2 * u[:, 2:] - 1, "velocity": zero, "attempts": attempts}

    def advance(self, k: np.ndarray, x: np.ndarray):
        s, angle = self.arrays, x[:, 0] * np.pi
        force = np.where((k == 0)[:, None], 2.0 * np.array([np.cos(angle), np.sin(angle)]).T, 0.0)
        success = (k == 1) & (self.distance() < self.RADIUS)
        s["attempts"] = s["attempts"] - (k == 1)
        s["velocity"] = s["velocity"] * (1 - 0.25) + force * 0.1
        s["pos"] = s["pos"] + s["velocity"] * 0.1
        over = success | (s["attempts"] <= 0) | (s["t"] >= self.STEPS)
        return 20.0 * success - self.distance() ** 2, over, success

    def observe(self) -> np.ndarray:
        s = self.arrays
        columns = [s["pos"], s["velocity"], s["target"], s["target"] - s["pos"]]
        columns += [s["attempts"][:, None] / 10, s["t"][:, None] / self.STEPS]
        return np.concatenate(columns, -1, dtype=np.float32, casting="same_kind")

    def heading(self) -> np.ndarray:
        return self.arrays["velocity"]


class PlatformVectorEnv(HybridVectorEnv):
    """Get from left to right over three platforms with a patrolling enemy each on the first two (Masson et al. 2016).

    k 0 RUN(p in [0, 30]): p is the push in each of 20 small steps of 0.05 s. k 1 HOP(p in [0, 720]), high, and k 2
    LEAP(p in [0, 430]), flat: a jump that aims p far, whose small steps go on until the player stands on a platform
    again. A choice reads its own parameter and clips it to its bounds. Reward: the way gone to the right as a share of
    the whole, so that a return of 1 is the end of the third platform, which is success. An episode also ends where the
    player falls or touches an enemy, and is truncated after 200 actions.

    The same to the bit as PyPI's hybrid-platform (gym_platform:Platform-v0) where the seeds are the same, with these
    spaces: its parameters Tuple(Box [1], Box [1], Box [1]) are one Box [3], and its observation's second element, the
    number of small steps that the action took, is the last number here, divided by 200.
    Observation, each scaled to [0, 1]: the player's x and speed, x and velocity of the enemy on the player's platform,
    width of that platform, of the next, the gap between them, the platform's x, the difference in height, 0, and steps.
    """

    STARTS, LIMIT = 0, 200
    MOST = np.array([30.0, 720.0, 430.0])  # the highest parameters
    DT, GRAVITY, DECAY = 0.05, 9.8, 0.99  # of a small step
    RUN_STEPS, FLIGHT_STEPS = 20, 150  # small steps of a run, and more than any jump takes
    GROUND, END = 40.0, 1035.0  # height of the platforms' upper side, right end of the third
    LEFT, WIDTH, GAP = np.array([0.0, 475.0, 985.0]), np.array([250.0, 275.0, 50.0]), np.array([225.0, 235.0, 0.0])
    SIZE_X, SIZE_Y = 20.0, 30.0  # of player and enemies; a position is the lower left corner
    RISE = np.array([0.0, 35.0, 25.0])  # speed upwards that a choice gives
    RUN, AIR, PATROL = 70.0, 100.0, 30.0  # highest speeds of the player on the ground and in the air, and of an enemy
    SHAKE = 0.025  # standard deviation of what a small step adds to a speed at random
    AHEAD = 1024  # normal numbers drawn ahead of need

    def __init__(self, num_envs: int = 1, **kwargs):
        super().__init__(num_envs, **kwargs)
        self.noise = np.zeros((num_envs, self.AHEAD))
        self.used = np.full(num_envs, self.AHEAD)  # so many numbers of each row
        self.paths = [[] for _ in range(num_envs)]  # the player's places in its last action, for the picture

    def make_parameter_mask(self) -> np.ndarray:
        return np.eye(3, dtype=bool)

    def bounds(self, P: int):
        return np.zeros(3), self.MOST

    def observation_bounds(self):
        return np.zeros(10), np.ones(10)

    def seed_generator(self, i: int, seed: int):
        super().seed_generator(i, seed)
        self.used[i] = self.AHEAD

    def start(self, u: np.ndarray):
        """Positions of the player, x and y, and of both enemies, x; their velocities; the last action's small steps."""
        rows = np.ones((len(u), 1))
        pos = rows * [0.0, self.GROUND, *(self.LEFT + self.WIDTH - self.SIZE_X)[:2]]
        return {"pos": pos, "vel": rows * [0.0, 0.0, -self.PATROL, -self.PATROL], "steps": np.zeros(len(u))}

    def restart(self, indices: np.ndarray):
        super().restart(indices)
        for i in indices:
            self.paths[i] = []

    def draw_ahead(self):
        """Fill up the normal numbers that the next action could use up, each row in the order of its own generator, so
        that they are those which one environment draws one by one."""
        for i in np.flatnonzero(~self.over & (self.used > self.AHEAD - 2 - 2 * self.FLIGHT_STEPS)):
            left = self.AHEAD - self.used[i]
            self.noise[i, :left] = self.noise[i, self.used[i] :].copy()
            self.rngs[i].standard_normal(out=self.noise[i, left:])
            self.used[i] = 0

    def advance(self, k: np.ndarray, x: np.ndarray):
        s = self.arrays
        rewards, terminated, success = np.zeros(self.num_envs), *np.zeros((2, self.num_envs), dtype=bool)
        self.draw_ahead()
        if self.render_mode:
            self.paths = [[] for _ in range(self.num_envs)]

        # Those whose action still goes on, M of them: the arrays from here on are [M], those of the enemies [2, M]. The
        # order of the arithmetic is the original's, also where it looks roundabout.
        i = np.flatnonzero(~self.over)
        k, p, before = k[i], x[i, k[i]].clip(0, self.MOST[k[i]]), s["pos"][:, 0].copy()
        (x, y, *enemy), (vx, vy, *speed) = s["pos"][i].T.copy(), s["vel"][i].T.copy()
        enemy, speed, on, rise = np.array(enemy), np.array(speed), self.standing(x, y), self.RISE[k]
        noise, draw = self.noise.ravel(), i * self.AHEAD + self.used[i]  # draw: index of the next number

        # What the action adds to the velocity while the player stands: in each small step of a run, once in a jump. An
        # acceleration is at most 600, a vertical speed 200.
        jump = (p / (2 * rise / self.GRAVITY + 1) - vx).clip(-600, 200 - rise) - abs(noise[draw])
        push = (np.where(k == 0, p, jump) / self.DT).clip(-600, 600) * self.DT
        lift = np.where(k == 0, 0, rise - abs(noise[draw + 1])) / self.DT * self.DT
        draw += 2 * (on & (k > 0))

        left, right = self.LEFT[:2, None], (self.LEFT + self.WIDTH - self.SIZE_X)[:2, None]  # where enemies turn
        second = np.array([[False], [True]])
        t = 0
        while len(i):
            t += 1
            moves = (x > self.LEFT[1]) == second  # only the enemy on the player's platform
            vx = vx + on * push - abs(noise[draw] * self.SHAKE)
            vx = np.minimum(np.maximum(vx, 0), np.where(on, self.RUN, self.AIR))
            vy = vy + np.where(on, lift, -self.GRAVITY * self.DT)
            x, y = np.minimum(x + vx * self.DT, self.END), y + vy * self.DT
            vx = vx * self.DECAY

            turns = moves & ((enemy <= left) | (enemy >= right))
            speed = np.where(turns, -speed, speed) + moves * (noise[draw + 1] * self.SHAKE)
            speed = np.minimum(np.maximum(speed, -self.PATROL), self.PATROL)
            enemy = np.minimum(np.maximum(enemy + moves * (speed * self.DT), left), right)
            draw += 2
            if self.render_mode:
                for j, place in zip(i, zip(x, y)):
                    self.paths[j].append(place)

            beside = (enemy - self.SIZE_X < x) & (x < enemy + self.SIZE_X)
            touches = (beside[0] | beside[1]) & (y < self.GROUND + self.SIZE_Y)
            on = y <= self.GROUND
            if not (on | touches | (x >= self.END)).any():  # all are in the air
                continue
            if (y < self.GROUND).any():
                x, y, vx, vy = self.land(x, y, vx, vy)
            on, arrived = self.standing(x, y), x >= self.END
            over = arrived | touches | (y < self.GROUND)
            done = over | np.where(k == 0, t == self.RUN_STEPS, on)
            if done.any():
                j = i[done]
                rewards[j] = (x[done] - before[j]) / self.END
                terminated[j], success[j] = over[done], arrived[done]
                s["pos"][j] = np.array([x, y, *enemy])[:, done].T
                s["vel"][j] = np.array([vx, vy, *speed])[:, done].T
                s["steps"][j], self.used[j] = t, draw[done] - j * self.AHEAD
                left_over = (i, k, on, draw, push, lift, x, y, vx, vy, enemy, speed)
                i, k, on, draw, push, lift, x, y, vx, vy, enemy, speed = (a[..., ~done] for a in left_over)
        return rewards, terminated, success

    def standing(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Whether players stand on a platform, bool [M]."""
        left, right = self.LEFT[:, None] - self.SIZE_X, (self.LEFT + self.WIDTH)[:, None]
        return (y == self.GROUND) & ((left <= x) & (x <= right)).any(0)

    def land(self, x: np.ndarray, y: np.ndarray, vx: np.ndarray, vy: np.ndarray):
        """Move players who are in a platform out of it, upwards or to the side, whichever is nearer; it stops them."""
        for left, right in zip(self.LEFT - self.SIZE_X, self.LEFT + self.WIDTH):
            inside = (left < x) & (x < right) & (y < self.GROUND)
            side = np.where(x < left + self.SIZE_X, left, np.where(x > right - self.SIZE_X, right, np.inf))
            beside = inside & (abs(side - x) < self.GROUND - y)
            above = inside & ~beside
            x, vx = np.where(beside, side, x), np.where(inside, 0, vx)
            y, vy = np.where(above, self.GROUND, y), np.where(above, 0, vy)
        return x, y, vx, vy

    def observe(self) -> np.ndarray:
        s, rows = self.arrays, np.arange(self.num_envs)
        x, enemy = s["pos"][:, 0], 2 + (s["pos"][:, 0] > self.LEFT[1])
        here = (x >= self.LEFT[1]).astype(int) + (x >= self.LEFT[2])
        columns = [
            (x + self.SIZE_X) / (self.END + self.SIZE_X),
            s["vel"][:, 0] / self.AIR,
            s["pos"][rows, enemy] / self.END,
            (s["vel"][rows, enemy] + self.PATROL) / (2 * self.PATROL),
            self.WIDTH[here] / 275,
            np.append(self.WIDTH[1:], 0)[here] / 275,
            self.GAP[here] / 235,
            self.LEFT[here] / self.END,
            np.zeros(self.num_envs),
            s["steps"] / 200,
        ]
        return self.table(columns)

    def render(self) -> tuple[np.ndarray, ...]:
        """A picture of each: the platforms in grey, the enemies in orange, the player in blue. With render_mode
        "rgb_array" dots show the path of its last action."""
        pictures = []
        for (x, y, *enemies), path in zip(self.arrays["pos"], self.paths):
            picture = np.full((160, 540, 3), 255, dtype=np.uint8)

            def fill(left, bottom, width, height, colour, picture=picture):
                """A rectangle in the environment's units, of which two are a pixel; row 20 from below is height 0."""
                left, right = (round((edge + 20) / 2) for edge in (left, left + width))
                top, bottom = (140 - round(edge / 2) for edge in (bottom + height, bottom))
                picture[max(top, 0) : max(bottom, 0), left:right] = colour

            for left, width in zip(self.LEFT, self.WIDTH):
                fill(left, 0, width, self.GROUND, (130, 130, 130))
            for enemy in enemies:
                fill(enemy, self.GROUND, self.SIZE_X, self.SIZE_Y, (213, 94, 0))
            for place in path:
                fill(place[0] + self.SIZE_X / 2 - 2, place[1] + self.SIZE_Y / 2 - 2, 4, 4, (120, 190, 230))
            fill(x, y, self.SIZE_X, self.SIZE_Y, (0, 114, 178))
            pictures.append(picture)
        return tuple(pictures)


class HybridEnv(gym.Env):
    """One environment of a HybridVectorEnv class: the same rules, with actions (k, x [P])."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, world: type, render_mode: str | None = None, **kwargs):
        self.world = world(1, render_mode=render_mode, autoreset_mode=gym.vector.AutoresetMode.DISABLED, **kwargs)
        self.action_space, self.observation_space = self.world.single_action_space, self.world.single_observation_space
        self.render_mode, self.parameter_mask = render_mode, self.world.parameter_mask

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return self.world.reset(seed=seed)[0][0], {}

    def step(self, action):
        k, x = action
        obs, rewards, terminated, truncated, info = self.world.step((np.asarray(k)[None], np.asarray(x)[None]))
        info = {"is_success": bool(info["is_success"][0])}
        return obs[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> np.ndarray:
        return self.world.render()[0]


for name, world, options in [
    ("HybridMoving-v0", MovingVectorEnv, {}),
    ("HybridSliding-v0", MovingVectorEnv, {"slide": True}),
    ("HybridCatchPoint-v0", CatchPointVectorEnv, {}),
    ("HybridHardMove-v0", HardMoveVectorEnv, {}),  # gymnasium.make("environments.hybrid:HybridHardMove-v0", n=6)
    *((f"HybridHardMove{n}-v0", HardMoveVectorEnv, {"n": n}) for n in (4, 6, 8, 10)),
    ("HybridPlatform-v0", PlatformVectorEnv, {}),
]:
    gym.register(name, functools.partial(HybridEnv, world), vector_entry_point=world, kwargs=options)
