"""What a user meets: --help, each error, the run's folder, spaces, evaluation, films, tracking; and that what they want
to change is changed in one place."""

import dataclasses
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import types
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import FLAT, IMAGE, LIMIT, ROOT, Toy, assert_same_outcome, load, only, run, scalars, snapshot
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple
from moviepy import VideoFileClip
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import ppo_continuous
from ppo_continuous import Args, Envs, main, parse_args, to_env

SCRIPT = ROOT / "ppo_continuous.py"
SMALL = "--num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 2 --eval-episodes 2".split()
SHORT = [*SMALL, "--total-timesteps", "256", "--no-compile"]


def train(runs_dir: Path, *flags, module=ppo_continuous) -> Path:
    """A short run in this process, two iterations of 128 steps where `flags` say nothing else; its folder."""
    module.main(module.parse_args([*SHORT, "--runs-dir", str(runs_dir), *map(str, flags)]))
    return only(runs_dir)


def notices(stderr: str) -> list[str]:
    return [line for line in re.split("[\r\n]", stderr) if "notice" in line]


def model_of(run_dir: Path) -> dict:
    return load(run_dir / "model.pt")


def equal(model: dict, other: dict) -> bool:
    return list(model) == list(other) and all(torch.equal(model[name], other[name]) for name in model)


# ----------------------------------------------------------------------------------------------------------------------
# Environments of these tests
# ----------------------------------------------------------------------------------------------------------------------

OBSERVATIONS = {  # that a run takes, and the number of its inputs
    "Flat": (FLAT, 3),
    "Matrix": (Box(-1, 1, (2, 3)), 6),
    "Scalar": (Box(-1, 1, ()), 1),
    "Discrete": (Discrete(5), 5),
    "MultiDiscrete": (MultiDiscrete([2, 3]), 5),
    "Nested": (Dict(joints=FLAT, rest=Tuple([Discrete(2), Box(-1, 1, (2, 2))])), 9),
    "DictCamera": (Dict(camera=IMAGE, joints=FLAT), 195),
}
ACTIONS = {  # that a run takes
    "Matrix": Box(-1, 1, (2, 2)),
    "Scalar": Box(-1, 1, ()),
    "Wide": Box(0, 1000, (2,)),
    "Double": Box(-0.5, 0.5, (2,), np.float64),
    "Unbounded": Box(-np.inf, np.inf, (2,)),
    "HalfBounded": Box(0, np.inf, (2,)),
    "Int32": Box(-2, 2, (2,), np.int32),
}
REFUSED = {  # (observations, actions) that no run takes, and what the error says
    "Image": (IMAGE, FLAT, "images"),
    "DiscreteActions": (FLAT, Discrete(2), "Discrete(2)"),
    "MultiDiscreteActions": (FLAT, MultiDiscrete([2, 3]), "MultiDiscrete([2 3])"),
    "TupleActions": (FLAT, Tuple([Discrete(2), FLAT]), "Tuple(Discrete(2)"),
    "DictActions": (FLAT, Dict(choice=Discrete(2), parameter=FLAT), "Dict('choice'"),
}


class Recorder(Toy):
    """Keeps the actions of all its copies, and the first number of each of its episodes' streams."""

    received = []

    def reset(self, seed=None, options=None):
        answer = super().reset(seed=seed)
        self.draws = [*getattr(self, "draws", []), int(self.np_random.integers(2**63))]
        return answer

    def step(self, action):
        self.received.append(action)
        return super().step(action)


class Target(Toy):
    """One action to find, 700 of [0, 1000]."""

    def step(self, action):
        return self.observation_space.sample(), -(((action.item() - 700) / 500) ** 2), False, False, {}


class Reporter(Toy):
    """Every second episode of each copy is a success, for a reward that is an array of one element."""

    episodes = 0

    def reset(self, seed=None, options=None):
        self.episodes += 1
        return super().reset(seed=seed)

    def step(self, action):
        info = {"is_success": self.episodes % 2 == 0, "distance": np.float32(0.25), "who": "me", "where": np.ones(3)}
        return self.observation_space.sample(), np.array([1.5]), False, False, info


class Staged(Toy):
    """The copies made one after the other give each step the rewards in `scores`."""

    scores, built = (), 0

    def __init__(self, **spaces):
        super().__init__(**spaces)
        self.score = Staged.scores[Staged.built]
        Staged.built += 1

    def step(self, action):
        return self.observation_space.sample(), self.score, False, False, {}


class Unready(Toy):
    def __init__(self, **spaces):
        raise RuntimeError("no licence\nfor this simulator")


def broken(kind, text: str):
    def give(answer):
        raise kind(text)

    return give


FAULTS = {  # the call, counted over all copies, whose answer goes wrong; how; what the error says
    "raises in step": ("step", 8, broken(RuntimeError, "my gripper"), "my gripper"),
    "raises a KeyError": ("step", 8, broken(KeyError, "my joint"), "my joint"),
    "raises an OSError": ("step", 8, broken(OSError, "my socket"), "my socket"),
    "raises a BlockingIOError": ("step", 8, broken(BlockingIOError, "my lock"), "my lock"),
    "raises a FloatingPointError": ("step", 8, broken(FloatingPointError, "my division"), "my division"),
    "raises in reset": ("reset", 4, broken(RuntimeError, "my home"), "my home"),
    "raises in the first reset": ("reset", 2, broken(RuntimeError, "my start"), "my start"),
    "step of another shape": ("step", 8, lambda answer: (answer[0][:2], *answer[1:]), "expected is (3,)"),
    "step that would broadcast": ("step", 8, lambda answer: (answer[0][:1], *answer[1:]), "expected is (3,)"),
    "reset of another shape": ("reset", 4, lambda answer: (np.zeros((3, 3)), answer[1]), "expected is (3,)"),
    "reset that would broadcast": ("reset", 4, lambda answer: (answer[0][:1], answer[1]), "expected is (3,)"),
    "step of four values": ("step", 8, lambda answer: answer[:4], "unpack"),
    "step of two rewards": ("step", 7, lambda answer: (answer[0], np.ones(2), *answer[2:]), ""),
    "reset without info": ("reset", 4, lambda answer: answer[0], "unpack"),
}


class Faulty(Toy):
    calls = {}

    def __init__(self, fault, **spaces):
        super().__init__(**spaces)
        self.function, self.when, self.spoil, _ = FAULTS[fault]

    def count(self, function, answer):
        self.calls[function] = self.calls.get(function, 0) + 1
        return self.spoil(answer) if (function, self.calls[function]) == (self.function, self.when) else answer

    def reset(self, seed=None, options=None):
        return self.count("reset", super().reset(seed=seed))

    def step(self, action):
        return self.count("step", super().step(action))


TOYS = {
    **{f"Obs{name}": (Toy, space, FLAT) for name, (space, _) in OBSERVATIONS.items()},
    **{f"Act{name}": (Recorder, FLAT, space) for name, space in ACTIONS.items()},
    **{name: (Toy, space, actions) for name, (space, actions, _) in REFUSED.items()},
    **{env.__name__: (env, FLAT, FLAT) for env in (Reporter, Staged, Unready, Faulty)},
    "Target": (Target, FLAT, Box(0, 1000, (1,))),
    "Endless": (Toy, FLAT, FLAT),
}
for name, (env, observations, actions) in TOYS.items():
    spaces = {"observation_space": observations, "action_space": actions}  # of which each copy gets its own
    gym.register(f"{name}-v0", env, kwargs=spaces, max_episode_steps=None if name == "Endless" else 10)


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def error_of(capfd, tmp_path):
    """A function that runs the script in this process, for speed, and returns what it prints as it ends with 2."""

    def expect_error(*flags) -> str:
        runs_dir = tmp_path / "runs"
        of_a_run = {"--resume", "--eval"} & set(flags)
        with pytest.raises(SystemExit) as exit, warnings.catch_warnings():
            warnings.simplefilter("error")  # pytest would hide what a user would see
            warnings.simplefilter("ignore", DeprecationWarning)
            more = [] if of_a_run else [*SHORT, "--runs-dir", str(runs_dir)]
            main(parse_args([*more, *map(str, flags)]))
        assert exit.value.code == 2 and not runs_dir.exists()
        return capfd.readouterr().err

    return expect_error


@pytest.fixture
def error_line(error_of):
    """The same for the script's own errors, one line each."""

    def expect_line(*flags) -> str:
        (line,) = error_of(*flags).splitlines()
        assert line.startswith("error: ")
        return line

    return expect_line


def test_an_error_is_one_line_and_status_2_in_a_real_process_too(tmp_path):
    status, out, err = run("--env-id", "HalfCheeta-v4", "--runs-dir", tmp_path / "runs")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: --env-id HalfCheeta-v4 ") and "HalfCheetah" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "env_id, says",
    [
        ("HalfCheetah-v99", "v5"),
        ("no_such_module:Hopper-v4", "no_such_module"),
        ("", ""),
        ("Unready-v0", "no licence for this simulator"),
        *((f"{name}-v0", says) for name, (_, _, says) in REFUSED.items()),
    ],
)
def test_an_environment_that_cannot_be_used(env_id, says, error_line):
    line = error_line("--env-id", env_id)
    assert line.startswith(f"error: --env-id {env_id}") and says in line


@pytest.mark.parametrize("kwargs", ["", "{", "[1]", "3", "null", '"x"', '{"nonsense": 1}', '{"xml_file": "none.xml"}'])
def test_env_kwargs_that_the_environment_does_not_take(kwargs, error_line):
    line = error_line("--env-id", "HalfCheetah-v5", f"--env-kwargs={kwargs}")
    assert "HalfCheetah-v5" in line and f"--env-kwargs '{kwargs}'" in line


def test_actions_without_bounds_are_not_rescaled(error_line):
    assert error_line("--env-id", "ActUnbounded-v0", "--rescale-actions").startswith("error: --rescale-actions: ")


WRONG = {
    "num-envs num-steps num-minibatches update-epochs total-timesteps torch-threads eval-max-steps": "0 -4",
    "eval-episodes eval-every": "-1",
    "checkpoint-every max-grad-norm": "-0.1 nan",
    "learning-rate clip-coef ent-coef vf-coef target-kl": "-0.1 nan inf",
    "gamma gae-lambda": "-0.1 1.01 nan inf",
    "log-std-init": "-21.0 21.0 nan inf",
    "seed": f"-1 {2**32}",
    "exp-name": r"a/b a\b a:b",
}


@pytest.mark.parametrize("names, values", WRONG.items())
def test_a_value_that_no_run_could_use_is_named(names, values, error_line):
    for name in names.split():
        for value in values.split():
            assert error_line(f"--{name}", value).startswith(f"error: --{name} {value}: ")


@pytest.mark.parametrize(
    "flags",
    [
        "--num-minibatches 7 --num-envs 8 --num-steps 256",
        "--total-timesteps 2047 --num-envs 8 --num-steps 256",
        pytest.param(
            "--device cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
        ),
    ],
)
def test_settings_that_do_not_go_together_are_named(flags, error_line):
    assert error_line(*flags.split()).startswith(f"error: {' '.join(flags.split()[:2])}: ")


@pytest.mark.parametrize("flags", ["--num-envs many", "--num-envs 2.5", "--gamma high", "--std-type x", "--gama 0.9"])
def test_a_wrong_flag_or_type_is_named_by_tyro(flags, error_of):
    message = error_of(*flags.split())
    assert flags.split()[0] in message and flags.split()[1] in message
    assert ("--gamma" in message) == ("--gam" in flags)  # and what was meant


@pytest.mark.parametrize("flag", ["--resume", "--eval"])
def test_a_folder_that_is_no_run(flag, error_line):
    assert flag in error_line(flag, "")  # --resume "$RUN" with RUN unset starts no new run
    assert error_line(flag, "no/such").strip() == f"error: {flag} no/such: there is no no/such/config.json"
    assert str(ROOT / "benchmarks") in error_line(flag, ROOT / "benchmarks")


def test_a_runs_dir_that_cannot_be_written(tmp_path, error_line):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in error_line("--runs-dir", tmp_path / "file" / "runs")
    assert (tmp_path / "file").read_text() == ""


# ----------------------------------------------------------------------------------------------------------------------
# Help, and changes in one place
# ----------------------------------------------------------------------------------------------------------------------


def help_of(module, columns: int, monkeypatch, capsys) -> str:
    """What --help prints, without the blanks and frames that depend on the terminal's width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as exit:
        module.parse_args(["--help"])
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    return re.sub(r"[\s│]", "", out)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_help_lists_every_field_with_its_comment_and_default(columns, monkeypatch, capsys):
    text = help_of(ppo_continuous, columns, monkeypatch, capsys)
    source = SCRIPT.read_text()
    for field in dataclasses.fields(Args):
        (comment,) = re.findall(rf"^    {field.name}: .* = .*?  # (.+)$", source, re.MULTILINE)
        default = "'{}'" if field.default == "{}" else field.default
        entry = f"--{field.name.replace('_', '-')}.*?{re.escape(f'{comment} (default: {default})'.replace(' ', ''))}"
        assert re.search(entry, text), (field.name, text)


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """A function that imports a copy of the script with each (old, new) replaced."""

    def change(*edits):
        text = SCRIPT.read_text()
        for old, new in edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / "mine.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("mine", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "mine", module)
        spec.loader.exec_module(module)
        return module

    return change


def function(name: str) -> str:
    """The script's text of a function."""
    (text,) = re.findall(rf"^def {name}\(.*?(?=^[^\s)])", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    return text


@pytest.mark.parametrize(
    "field, default, flags, value",
    [
        ("int = 0", 0, ["--mine", "7"], 7),
        ("float = -1.5", -1.5, ["--mine", "-2.5"], -2.5),
        ("float = 0", 0, ["--mine", "0.5"], 0.5),
        ('str = ""', "", ["--mine", "x"], "x"),
        ("str | None = None", None, ["--mine", "x"], "x"),
        ("bool = False", False, ["--mine"], True),
    ],
)
def test_a_field_of_the_users_own_is_one_line(field, default, flags, value, changed, tmp_path, monkeypatch, capsys):
    mine = changed(("    num_envs: int", f"    mine: {field}  # what I am for\n    num_envs: int"))
    shown = "''" if default == "" else default
    assert re.search(rf"--mine.{{0,20}}whatIamfor\(default:{shown}\)", help_of(mine, 80, monkeypatch, capsys))
    for name, given, expected in [("default", [], default), ("set", flags, value)]:
        run_dir = train(tmp_path / name, *given, module=mine)
        assert json.loads((run_dir / "config.json").read_text())["args"]["mine"] == expected
        assert mine.parse_args(["--resume", str(run_dir)]).mine == expected


def test_a_metric_of_the_users_own_is_one_line_and_changes_nothing_else(changed, tmp_path):
    line = '        "entropy": entropy,\n'
    mine = changed((line, line + '        "mine": (advantages**2).mean(),\n'))
    plain, run_dir = train(tmp_path / "plain"), train(tmp_path / "mine", module=mine)
    more = scalars(run_dir) - scalars(plain)
    assert sorted((tag, step) for tag, step, _ in more) == [("losses/mine", 128), ("losses/mine", 256)]
    assert all(value == pytest.approx(63 / 64) for _, _, value in more)  # of 64 with a std of 1, without bias
    assert not scalars(plain) - scalars(run_dir) and equal(model_of(plain), model_of(run_dir))


SGD = {
    "init_optimizer": """
def init_optimizer(agent):
    theta = torch.cat([p.detach().flatten() for p in agent.parameters() if p.requires_grad])
    return {"theta": theta, "momentum": torch.zeros_like(theta)}
""",
    "update_step": """
def update_step(optimizer, learning_rate, batch, indices, agent, args):
    all_metrics = []
    for rows in indices.unbind(0):
        minibatch = {name: tensor[rows] for name, tensor in batch.items()}

        def loss_at(theta, minibatch=minibatch):
            return torch.func.functional_call(agent, unflatten(theta, agent), (loss, minibatch, args))

        grad, metrics = torch.func.grad(loss_at, has_aux=True)(optimizer["theta"])
        momentum = 0.9 * optimizer["momentum"] + grad
        optimizer = {"theta": optimizer["theta"] - learning_rate * momentum, "momentum": momentum}
        all_metrics.append(torch.stack(list(metrics.values())))
    return optimizer, list(metrics), torch.stack(all_metrics).mean(0)
""",
}


def test_another_optimiser_is_a_change_of_the_step_and_its_state(changed, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)  # what is around the compiler sees it too
    mine = changed(*((function(name), text) for name, text in SGD.items()))
    flags = ["--compile", "--no-anneal-lr", "--eval-episodes", 0]
    straight = train(tmp_path / "straight", *flags, "--total-timesteps", 512, module=mine)
    resumed = train(tmp_path / "resumed", *flags, module=mine)
    assert set(load(resumed / "checkpoint.pt")["optimizer"]) == {"theta", "momentum"}
    assert not notices(capfd.readouterr().err)
    before = model_of(resumed)
    mine.main(mine.parse_args(["--resume", str(resumed), "--total-timesteps", "512"]))
    assert_same_outcome(resumed, straight)
    assert not equal(before, model_of(resumed))


@pytest.mark.parametrize("compiled", ["--no-compile", "--compile"])
def test_another_network_is_a_change_of_the_agent(compiled, changed, tmp_path, capfd):
    end = "    def normalize(self"
    networks = """        def relu_layers(*sizes):
            pairs = [(nn.Linear(i, o), nn.ReLU()) for i, o in zip(sizes, sizes[1:])]
            return [part for pair in pairs for part in pair]

        self.critic = nn.Sequential(*relu_layers(obs_dim, 32, 32, 32), nn.Linear(32, 1))
        self.actor = nn.Sequential(*relu_layers(obs_dim, 32, 32, 32))
        self.actor_mean = nn.Linear(32, action_dim)

"""
    mine = changed((end, networks + end))
    run_dir = train(tmp_path / "runs", compiled, "--num-minibatches", 1, module=mine)
    model = model_of(run_dir)
    assert [model[f"critic.{i}.weight"].shape for i in (0, 2, 4, 6)] == [(32, 17), (32, 32), (32, 32), (1, 32)]
    assert not notices(capfd.readouterr().err)
    assert len(json.loads((run_dir / "result.json").read_text())["eval_returns"]) == 2


# ----------------------------------------------------------------------------------------------------------------------
# A run and its folder
# ----------------------------------------------------------------------------------------------------------------------


def test_importing_the_script_runs_nothing_and_prints_nothing(tmp_path):
    command = [sys.executable, "-c", "import ppo_continuous"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LIMIT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def assert_only_progress(stderr: str):
    parts = [part.strip() for part in re.split("[\r\n]", stderr) if part.strip()]
    assert parts and all(re.match(r"\d+% ?\|.*\| *\S+/\S+ ", part) for part in parts), stderr


V4 = ["--env-id", "HalfCheetah-v4", *SMALL, "--total-timesteps", "300", "--seed", "5"]  # two batches of 128 and a rest


@pytest.fixture(scope="module")
def v4_run(tmp_path_factory) -> tuple[str, str, Path]:
    """A compiled run: what it printed, and its folder."""
    runs_dir = tmp_path_factory.mktemp("v4")
    status, out, err = run(*V4, "--runs-dir", runs_dir)
    assert status == 0, err
    return out, err, only(runs_dir)


@pytest.fixture
def finished(v4_run, tmp_path) -> Path:
    """A copy of that run's folder."""
    return Path(shutil.copytree(v4_run[2], tmp_path / "finished"))


def test_a_run_prints_its_steps_its_evaluation_its_folder_and_no_warning(v4_run, tmp_path):
    v5 = ["--env-id", "HalfCheetah-v5", *SHORT, "--runs-dir", tmp_path]
    for out, err, run_dir in (v4_run, (*run(*v5)[1:], only(tmp_path))):
        assert_only_progress(err)
        assert "256 steps" in out  # the whole batches that fit into 300
        saved = json.loads((run_dir / "result.json").read_text())
        returns = saved["eval_returns"]
        text = f"{np.mean(returns):.2f} .*{np.std(returns):.2f}\n.*{returns[0]:.2f} {returns[1]:.2f}\n"
        assert re.search(text, out), out
        assert out.splitlines()[-1].endswith(str(run_dir))


def test_the_folder_holds_configuration_weights_and_logs(v4_run):
    run_dir = v4_run[2]
    assert re.fullmatch(r"HalfCheetah-v4__ppo_continuous__5__\d{10}", run_dir.name)
    files = sorted(re.sub(r"tfevents.*", "tfevents", path.name) for path in run_dir.iterdir())
    names = "checkpoint.pt config.json episodes.csv events.out.tfevents lock model.pt result.json"
    assert files == names.split()
    assert (run_dir / "episodes.csv").read_text().startswith("global_step,return,length\n")
    result = json.loads((run_dir / "result.json").read_text())
    assert set(result) == {"iteration", "global_step", "seconds", "sps", "compile_seconds", "eval_returns"}
    assert (result["iteration"], result["global_step"], len(result["eval_returns"])) == (2, 256, 2)
    tags = {tag for tag, _, _ in scalars(run_dir)}
    assert {"charts/learning_rate", "charts/SPS", "losses/policy_loss", "eval/episodic_return"} <= tags


def test_config_json_says_what_ran_where(v4_run):
    run_dir = v4_run[2]
    config = json.loads((run_dir / "config.json").read_text())
    flags = [*V4, "--runs-dir", str(run_dir.parent)]
    assert config["args"] == dataclasses.asdict(parse_args(flags))
    assert config["command"][1:] == flags and Path(config["command"][0]) == SCRIPT
    for package in ("torch", "gymnasium", "mujoco", "numpy"):
        assert config["versions"][package] == importlib.metadata.version(package)
    assert config["python"] == ".".join(map(str, sys.version_info[:3]))
    assert config["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    in_git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    if in_git.returncode == 0:
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", config["git_commit"])


def test_tensorboard_shows_the_settings_as_hparams(v4_run):
    content = EventAccumulator(str(v4_run[2])).Reload().PluginTagToContent("hparams")
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(content)
    shown = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    config = json.loads((v4_run[2] / "config.json").read_text())
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in shown.items()}
    assert shown == {name: "None" if value is None else value for name, value in config["args"].items()}


def test_without_a_compiler_a_notice_and_the_run_goes_on(tmp_path):
    env = {"PATH": "/nonexistent", "CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = ["--env-id", "Hopper-v4", *SMALL, "--total-timesteps", 256, "--runs-dir", tmp_path / "runs"]
    status, _, err = run(*flags, **env)
    assert status == 0, err
    (notice,) = notices(err)
    assert notice.startswith("notice: ") and "uncompiled" in notice
    assert_only_progress(err.replace(notice, ""))


def test_a_compiled_update_that_loses_a_gradient_is_not_used(tmp_path, monkeypatch, capfd):
    def lossy(step, **options):
        def compiled(optimizer, *inputs):
            new, names, values = step(optimizer, *inputs)
            lost = {name: new[name].clone() for name in ("theta", "exp_avg", "exp_avg_sq")}
            for name, tensor in lost.items():
                tensor[:500] = optimizer[name][:500]
            return {**new, **lost}, names, values

        return compiled

    plain = train(tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", lossy)
    noticed = train(tmp_path / "lossy", "--compile")
    (notice,) = notices(capfd.readouterr().err)
    assert "uncompiled" in notice and "% off" in notice
    assert equal(model_of(plain), model_of(noticed))


def test_twenty_settings_in_one_process_are_all_compiled_each_to_its_own_graph(tmp_path, monkeypatch, capfd):
    compiler, graphs = torch.compile, []

    def without_inductor(step, *, options, **more):  # the limit on graphs is that of the compiler's first half
        graph = compiler(step, backend="eager", options={"guard_filter_fn": options["guard_filter_fn"]}, **more)
        return lambda *inputs: graphs.append(1) or graph(*inputs)

    monkeypatch.setattr(torch, "compile", without_inductor)
    sizes = {"num_envs": 1, "num_steps": 8, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 16}
    for k in range(20):
        moments = []
        for compiled in (True, False):
            runs_dir = tmp_path / f"{k} {compiled}"
            settings = {**sizes, "ent_coef": k / 10, "eval_episodes": 0, "compile": compiled, "runs_dir": str(runs_dir)}
            main(Args(env_id="InvertedPendulum-v4", **settings))
            moments.append(load(only(runs_dir) / "checkpoint.pt")["optimizer"]["exp_avg"])
        torch.testing.assert_close(*moments)
    assert len(graphs) >= 20 * 2
    assert not notices(capfd.readouterr().err)


@pytest.mark.parametrize("place", ["thread", "cell"])
def test_a_run_compiled_in_a_thread_or_a_notebooks_cell(place, tmp_path, v4_run, capfd):
    fields = {**json.loads((v4_run[2] / "config.json").read_text())["args"], "runs_dir": str(tmp_path)}
    if place == "thread":
        thread = threading.Thread(target=main, args=[Args(**fields)])
        thread.start()
        thread.join()
    else:
        exec(f"import ppo_continuous\nppo_continuous.main(ppo_continuous.Args(**{fields}))", {"__name__": "__main__"})
    assert_only_progress(capfd.readouterr().err)
    assert equal(model_of(only(tmp_path)), model_of(v4_run[2]))


# ----------------------------------------------------------------------------------------------------------------------
# Environments: spaces, seeds, faults
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observations_reach_the_networks_flat(name, tmp_path):
    space, size = OBSERVATIONS[name]
    envs = Envs(Args(env_id=f"Obs{name}-v0", num_envs=4), range(3, 4))
    space.seed(int(np.random.SeedSequence([1, 4, 1]).generate_state(1)[0]))
    np.testing.assert_array_equal(envs.obs[0], gym.spaces.flatten(space, space.sample()))
    next_obs = envs.step(np.zeros((1, 3), np.float32))["next_obs"]
    np.testing.assert_array_equal(next_obs[0], gym.spaces.flatten(space, space.sample()))

    run_dir = train(tmp_path, "--env-id", f"Obs{name}-v0")
    assert model_of(run_dir)["obs_rms.mean"].shape == (size,)
    rows = (run_dir / "episodes.csv").read_text().splitlines()[1:]
    assert len(rows) == 2 * (128 // 10) and all(row.endswith(",10.0,10") for row in rows)


@pytest.mark.parametrize(
    "name, mapped",
    [(name, mapped) for name in ACTIONS for mapped in (False, True) if not mapped or "unded" not in name],
)
def test_actions_reach_the_environment_in_its_space(name, mapped, tmp_path, monkeypatch, capfd):
    space = ACTIONS[name]
    monkeypatch.setattr(Recorder, "received", [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # gymnasium warns of what is no array
        warnings.simplefilter("ignore", DeprecationWarning)
        train(tmp_path, "--env-id", f"Act{name}-v0", *["--rescale-actions"] * mapped)
    received = Recorder.received
    assert len(received) == 256 + 2 * 10
    assert all((action.dtype, action.shape) == (space.dtype, space.shape) for action in received)
    assert all(space.contains(action) for action in received) and len(np.unique(received)) >= 5
    assert (np.max(received) > 500) == (name == "Wide" and mapped)
    assert len(notices(capfd.readouterr().err)) == (name == "Wide" and not mapped)  # without bounds nothing is mapped


@pytest.mark.parametrize(
    "space, rescale, pairs",
    [
        (Box(-1, 1, (1,)), False, {-3: -1, -1: -1, 0.5: 0.5, 1: 1, 7: 1}),
        (Box(-np.inf, np.inf, (1,)), False, {-1e6: -1e6, 0.5: 0.5, 1e6: 1e6}),
        (Box(0, 1000, (1,)), False, {-3: 0, 0.5: 0.5, 7: 7, 2000: 1000}),
        (Box(0, 1000, (1,), np.float64), True, {-3: 0, -1: 0, 0: 500, 0.5: 750, 1: 1000, 7: 1000}),
        (Box(-2, 6, (1,)), True, {-3: -2, -1: -2, 0: 2, 0.5: 4, 1: 6, 7: 6}),
        (Box(-3, 3, (1,), np.int32), False, {-9: -3, -2.6: -3, -0.4: 0, 0.6: 1, 2.4: 2, 9: 3}),
        (Box(0, 255, (1,), np.uint8), False, {-9: 0, 0.6: 1, 254.6: 255, 300: 255}),
        (Box(-100, 100, (1,), np.int8), True, {-3: -100, -1: -100, 0: 0, 0.504: 50, 1: 100, 7: 100}),
        (Box(0, 255, (1,), np.uint8), True, {-1: 0, 1: 255, 7: 255}),
        (Box(-(2**31), 2**31 - 1, (1,), np.int32), True, {-1: -(2**31), 1: 2**31 - 1, 7: 2**31 - 1}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_action_as_drawn_and_as_the_environment_takes_it(space, rescale, pairs):
    actions = to_env(np.array([*pairs], np.float32)[:, None], space, Args(rescale_actions=rescale))
    assert actions.dtype == space.dtype and actions.shape == (len(pairs), 1)
    assert actions[:, 0].tolist() == [*pairs.values()]


def test_each_dimension_of_a_matrix_of_actions_has_its_own_bounds():
    space = Box(np.array([[-1, 0], [0, 0]]), np.array([[1, 2], [4, 8]]), dtype=np.float32)
    drawn = np.array([[0, 0, 0, 0], [1, -1, 0.5, 3]], np.float32)
    assert to_env(drawn, space, Args(rescale_actions=True)).tolist() == [[[0, 1], [2, 4]], [[1, 0], [3, 8]]]
    assert to_env(drawn, space, Args()).tolist() == [[[0, 0], [0, 0]], [[1, 0], [0.5, 3]]]


@pytest.mark.parametrize("rescale", ["--no-rescale-actions", "--rescale-actions"])
def test_a_wide_box_is_learned_where_actions_are_rescaled(rescale, tmp_path):
    flags = "--total-timesteps 2560 --num-minibatches 4 --update-epochs 10 --learning-rate 3e-3".split()
    run_dir = train(tmp_path, "--env-id", "Target-v0", rescale, *flags)
    returns = json.loads((run_dir / "result.json").read_text())["eval_returns"]  # of 10 steps; -19.6 where action is 0
    assert min(returns) > -1 if rescale == "--rescale-actions" else max(returns) < -15


def test_streams_of_two_seeds_share_nothing_nor_does_evaluation():
    draws = []
    for seed in (1, 2):
        envs = Envs(Args(env_id="ActMatrix-v0", seed=seed), range(-1, 8))
        for _ in range(199):
            envs.reset(np.ones(9, dtype=bool))
        for env in envs.vector_env.envs:
            draws += env.unwrapped.draws
    assert len(draws) == len(set(draws)) == 2 * 9 * 200


def test_the_number_of_environments_changes_no_stream():
    def streams(num_envs):
        envs = Envs(Args(env_id="ActMatrix-v0"), range(num_envs))
        for _ in range(25):
            envs.step(np.zeros((num_envs, 4), np.float32))
        return [env.unwrapped.draws for env in envs.vector_env.envs]

    assert streams(2) == streams(8)[:2] and len(streams(2)[0]) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_an_environments_own_error_keeps_its_traceback_with_a_note(fault, tmp_path, monkeypatch):
    function, when, _, says = FAULTS[fault]
    monkeypatch.setattr(Faulty, "calls", {})
    with pytest.raises(Exception) as error:
        train(tmp_path, "--env-id", "Faulty-v0", "--env-kwargs", json.dumps({"fault": fault}))
    assert says in str(error.value)
    note = ", ".join(error.value.__notes__)
    index, steps = (when - 1) % 2, 20 * (when > 2) if function == "reset" else (when - 1) // 2 * 2
    assert re.search(rf"\benvironment {index}\b.*\bFaulty-v0\b.*\b{steps} steps", note), note


def test_an_environments_author_sees_the_line_that_raised(tmp_path):
    flags = ["--env-id", "test_cli:Faulty-v0", "--env-kwargs", '{"fault": "raises in step"}', "--runs-dir", tmp_path]
    status, _, err = run(*SHORT, *flags, PYTHONPATH=str(Path(__file__).parent))
    assert status == 1 and "error:" not in err
    assert f'File "{__file__}"' in err and "    raise kind(text)" in err
    *_, error, where, when = err.splitlines()
    assert error == "RuntimeError: my gripper" and "environment 1" in where and "6 steps" in when


def test_env_kwargs_reach_the_environment_and_stay(tmp_path):
    kwargs = {"ctrl_cost_weight": 0.0, "exclude_current_positions_from_observation": False}
    flags = ["--env-id", "HalfCheetah-v5", "--env-kwargs", json.dumps(kwargs)]
    run_dir = train(tmp_path, *flags)
    assert model_of(run_dir)["obs_rms.mean"].shape == (18,)
    assert json.loads(json.loads((run_dir / "config.json").read_text())["args"]["env_kwargs"]) == kwargs
    main(parse_args(["--resume", str(run_dir), "--total-timesteps", "384"]))
    assert json.loads((run_dir / "result.json").read_text())["global_step"] == 384
    assert json.loads(json.loads((run_dir / "config.json").read_text())["args"]["env_kwargs"]) == kwargs


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation and films
# ----------------------------------------------------------------------------------------------------------------------


def test_evaluation_repeats_itself_and_changes_no_file(finished, capfd):
    before, outputs = snapshot(finished), []
    for _ in range(2):
        main(parse_args(["--eval", str(finished)]))
        outputs.append(capfd.readouterr())
    assert outputs[0] == outputs[1] and outputs[0].err == ""
    assert snapshot(finished) == before
    returns = json.loads((finished / "result.json").read_text())["eval_returns"]  # as measured after the training
    assert f"\n  {returns[0]:.2f} {returns[1]:.2f}\n" in outputs[0].out


def test_evaluation_of_the_best_model(finished, capfd):
    model = model_of(finished)
    model["actor_mean.bias"] += 1
    torch.save(model, finished / "best.pt")
    outputs = []
    for path in (finished, finished / "best.pt"):
        main(parse_args(["--eval", str(path)]))
        outputs.append(capfd.readouterr().out)
    (finished / "best.pt").replace(finished / "model.pt")
    main(parse_args(["--eval", str(finished)]))
    assert outputs[0] != outputs[1] == capfd.readouterr().out


@pytest.mark.parametrize("of_a_run", ["--eval", "--resume"])
@pytest.mark.parametrize(
    "flags", ["--env-id Hopper-v4", "--std-type state", "--seed 6", "--no-norm-obs", "--gamma 0.9", "--exp-name x"]
)
def test_what_made_a_run_cannot_change(of_a_run, flags, finished, error_line):
    before = snapshot(finished)
    assert flags.split()[0].removeprefix("--no-") in error_line(of_a_run, finished, *flags.split())
    assert snapshot(finished) == before


def test_a_policy_can_be_evaluated_on_a_variant_of_its_environment(tmp_path, capfd):
    run_dir = train(tmp_path, "--env-id", "HalfCheetah-v4")
    results = []
    for kwargs in ({}, {"forward_reward_weight": 0.0, "ctrl_cost_weight": 0.0}):
        main(parse_args(["--eval", str(run_dir), "--env-kwargs", json.dumps(kwargs)]))
        results.append(capfd.readouterr().out)
    assert results[0] != results[1] and "return 0.00 +- 0.00" in results[1]


def test_resume_and_eval_exclude_each_other(finished, error_line):
    line = error_line("--resume", finished, "--eval", finished)
    assert "--resume" in line and "--eval" in line


@pytest.mark.parametrize("name", ["model.pt", "best.pt"])
def test_evaluation_of_a_damaged_model(name, finished, error_line):
    (finished / name).write_bytes((finished / "model.pt").read_bytes()[:1000])
    assert f"{finished / name}: " in error_line("--eval", finished if name == "model.pt" else finished / name)


def test_evaluation_of_a_run_from_a_machine_with_cuda(finished, capfd):
    config = json.loads((finished / "config.json").read_text())
    config["args"]["device"] = "cuda"
    (finished / "config.json").write_text(json.dumps(config))
    main(parse_args(["--eval", str(finished), "--device", "cpu", "--eval-episodes", "1"]))
    assert "evaluation: 1 " in capfd.readouterr().out


def test_evaluation_ends_where_an_episode_does_not(tmp_path, capfd):
    run_dir = train(tmp_path, "--env-id", "Endless-v0", "--eval-max-steps", 50)
    assert json.loads((run_dir / "result.json").read_text())["eval_returns"] == [50, 50]
    (notice,) = notices(capfd.readouterr().err)
    assert "--eval-max-steps 50" in notice


def test_a_run_without_an_evaluation(tmp_path, capfd):
    run_dir = train(tmp_path, "--eval-episodes", 0)
    assert json.loads((run_dir / "result.json").read_text())["eval_returns"] == []
    assert "evaluation" not in capfd.readouterr().out
    assert not any(tag.startswith("eval/") for tag, _, _ in scalars(run_dir))


def test_numbers_in_an_episodes_last_info_are_charts_and_success_is_a_result(tmp_path):
    run_dir = train(tmp_path, "--env-id", "Reporter-v0")
    shown = scalars(run_dir)
    steps = {"charts": [128, 256], "eval": [256]}
    for place in steps:
        for name, value in {"distance": 0.25, "is_success": 0.5, "episodic_return": 15, "episodic_length": 10}.items():
            assert all((f"{place}/{name}", step, value) in shown for step in steps[place]), (place, name)
    assert not any(tag.endswith(("/who", "/where")) for tag, _, _ in shown)
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["eval_returns"], result["eval_success"]) == ([15, 15], 0.5)


def test_the_best_model_on_the_way_is_kept(tmp_path, monkeypatch):
    def staged(scores, do, *arguments):
        monkeypatch.setattr(Staged, "built", 0)
        monkeypatch.setattr(Staged, "scores", scores)
        return do(*arguments)

    flags = ["--env-id", "Staged-v0", "--num-envs", 1, "--no-anneal-lr"]  # so that the first copy is the training's
    at_the_second = staged([0, 0], train, tmp_path / "stopped", *flags, "--total-timesteps", 128)
    more = ["--eval-every", 1, "--total-timesteps", 256]
    run_dir = staged([0, 1, 3, 2, 2], train, tmp_path / "whole", *flags, *more)
    means = {step: value for tag, step, value in scalars(run_dir) if tag == "eval/episodic_return"}
    assert means == {64: 10, 128: 30, 192: 20, 256: 20}
    assert equal(load(run_dir / "best.pt"), model_of(at_the_second))
    assert json.loads((run_dir / "result.json").read_text())["eval_returns"] == [20, 20]

    resume = ["--resume", str(run_dir), "--total-timesteps"]
    tried = [0] * 2  # copies that show whether an episode can be repeated
    staged([0, *tried, 2], main, parse_args([*resume, "320"]))  # which is less than before it stopped
    assert equal(load(run_dir / "best.pt"), model_of(at_the_second))
    staged([0, *tried, 4], main, parse_args([*resume, "384"]))
    assert equal(load(run_dir / "best.pt"), model_of(run_dir))


def test_evaluations_on_the_way_change_nothing_in_the_training(tmp_path):
    flags = ["--env-id", "InvertedPendulum-v4", "--total-timesteps", 512]
    plain, evaluated = train(tmp_path / "plain", *flags), train(tmp_path / "evaluated", *flags, "--eval-every", 1)
    assert equal(model_of(plain), model_of(evaluated))
    assert (plain / "episodes.csv").read_bytes() == (evaluated / "episodes.csv").read_bytes()
    more = {tag for tag, _, _ in scalars(evaluated) - scalars(plain)}
    assert more == {"eval/episodic_return", "eval/episodic_length"}
    assert not (plain / "best.pt").exists()


def renders(env_id: str, **env) -> bool:
    """Whether an environment can be filmed here without a display."""
    code = f"import gymnasium; e = gymnasium.make('{env_id}', render_mode='rgb_array'); e.reset(); e.render()"
    env = {**os.environ, "DISPLAY": "", **env}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=LIMIT).returncode == 0


def test_capture_video_writes_films_that_play(tmp_path):
    ways = [("Reacher-v5", {"MUJOCO_GL": "egl"}), ("Reacher-v5", {"MUJOCO_GL": "osmesa"}), ("Pendulum-v1", {})]
    env_id, env = next((way for way in ways if renders(way[0], **way[1])), (None, {}))
    if env_id is None:
        pytest.skip("no renderer works here without a display")
    status, _, err = run("--env-id", env_id, *SHORT, "--capture-video", "--runs-dir", tmp_path, DISPLAY="", **env)
    assert status == 0, err
    films = sorted(only(tmp_path).glob("videos/*/*.mp4"))
    assert len(films) == 2  # of --eval-episodes 2
    for path in films:
        with VideoFileClip(str(path)) as clip:
            assert clip.n_frames >= 50  # steps of a Reacher episode; Pendulum's has 200
            assert clip.get_frame(0).std() > 0  # not one plain colour


# ----------------------------------------------------------------------------------------------------------------------
# Tracking
# ----------------------------------------------------------------------------------------------------------------------


def test_tracking_without_wandb_is_an_error_before_the_run(monkeypatch, error_line):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = error_line("--track")
    assert line.startswith("error: --track ") and "pip install wandb" in line


@pytest.fixture
def wandb(monkeypatch):
    """A stub in its place, and what it is called with."""
    stub, calls = types.ModuleType("wandb"), []
    stub.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    stub.init = lambda **options: calls.append(options)
    stub.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub, calls


def test_tracking_hands_wandb_the_name_and_the_arguments(tmp_path, wandb):
    run_dir = train(tmp_path, "--track", "--wandb-project", "p", "--wandb-entity", "e")
    call, finish = wandb[1]
    assert call["config"] == json.loads((run_dir / "config.json").read_text())["args"]
    assert (call["name"], call["project"], call["entity"]) == (run_dir.name, "p", "e")
    assert call["sync_tensorboard"] and finish == "finish"
    assert not Path(call.get("dir") or ".").resolve().is_relative_to(tmp_path)  # TensorBoard would show more runs


def test_what_wandb_refuses_is_an_error_before_the_run(tmp_path, wandb, capfd):
    def refuse(**options):
        raise ValueError("invalid name")

    wandb[0].init = refuse
    with pytest.raises(SystemExit) as exit:
        train(tmp_path, "--track")
    (line,) = capfd.readouterr().err.splitlines()
    assert exit.value.code == 2 and line.startswith("error: ") and "invalid name" in line
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Pins
# ----------------------------------------------------------------------------------------------------------------------


def header_of(script: Path) -> dict:
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", script.read_text(), re.MULTILINE)
    return tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))


def test_the_scripts_headers_pin_what_requirements_txt_pins():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    headers = {script: header_of(script) for script in ROOT.glob("*.py")}
    pins = {script: set(map(Requirement, header["dependencies"])) for script, header in headers.items()}
    assert set.union(*pins.values()) == {Requirement(line) for line in lines if line}
    assert all(str(requirement.specifier).startswith("==") for each in pins.values() for requirement in each)
    for script, each in pins.items():
        assert each == pins[SCRIPT]
        versions = SpecifierSet(headers[script]["requires-python"])
        assert [v for v in range(8, 16) if f"3.{v}.1" in versions] == [11, 12, 13]
