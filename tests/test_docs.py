"""What README.md and docs/*.md say can be done.

Commands are the ```bash blocks; and, outside of fenced blocks, the indented lines and the `code` that start with one of
PROGRAMS or with a benchmarks/*.sh. bash reads them, in a folder with all that a checkout has, where each of PROGRAMS
only notes how it was called. Any other program is an error, as is a command that calls none. Then

- a script's parse_args and check must accept its flags, and its --env-id must be registered. Where the id's module
  needs a package that is not installed, its name is not looked up;
- a benchmark's own Args must accept its flags, also those that benchmarks/*.sh pass on, and each line that a page sends
  to the runner is a command like the others;
- pip's requirements files must be there, and its pins exact and those of the requirements files;
- the other programs' flags are not looked at.

Pages name runs by the two folders CHEETAH and CARTPOLE, which are real.

Python blocks run, those of a section in one namespace; one that starts with a file's name in a comment is a file. So do
the trainings and evaluations of recipes.md, in the page's order, but for those with MUJOCO_GL (OpenGL) or --track (an
account) and those of a package that is not installed. All are cut short: a million steps to 2,048, other numbers in
proportion but to a batch at least; one episode an evaluation; uncompiled; n_trials=2. All diffs of recipes.md are
applied to ppo_continuous.py, which then trains.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import gymnasium as gym
import numpy as np
import optuna
import pytest
import torch
import tyro
from conftest import LIMIT, ROOT
from packaging.requirements import Requirement

import ppo_continuous
import vmpo

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = ROOT / "docs" / "recipes.md"
SCRIPTS = {path.name for path in ROOT.glob("*.py")}
PROGRAMS = (
    "python pip uv pytest tensorboard mkdocs pre-commit git ray sbatch srun torchrun nvidia-smi flock".split()
)  # only noted
REAL = "bash cat cp dirname env mkdir mktemp nice rm sed seq tail tee timeout".split()  # run as they are
CHEETAH, CARTPOLE = "runs/HalfCheetah-v4__ppo_continuous__1__1795806287", "runs/CartPole-v1__vmpo__1__1795806287"
SHORT = "--no-compile --eval-episodes 1 --device cpu".split()
COMMAND = re.compile(rf"(\$ )?((?:{'|'.join(PROGRAMS)}) .*|benchmarks/\w+\.sh\b.*)")
NOTE = f"""#!{sys.executable} -IS
import json, os, sys
stdin = sys.stdin.read() if "benchmarks/runner.py" in sys.argv else ""
call = {{"words": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "stdin": stdin, "opengl": "MUJOCO_GL" in os.environ}}
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(call) + "\\n")
"""


def blocks(page: Path) -> list[tuple[int, str, str, str]]:
    """(line, section, language, text) of a page's fenced blocks, in order."""
    found, section, opened = [], "", None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if opened is None and line.startswith("## "):
            section = line[3:]
        if line.lstrip().startswith("```"):  # indented in a list
            if opened is None:
                opened, language, text = number, line.strip("` "), []
            else:
                found.append((opened, section, language, textwrap.dedent("\n".join(text) + "\n")))
                opened = None
        elif opened is not None:
            text.append(line)
    assert opened is None, f"{page.name}:{opened}: a block without an end"
    return found


def outside_fences(page: Path) -> list[tuple[int, str]]:
    """(line's number, line) of what no fenced block holds."""
    lines, fenced = [], False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        if not fenced and not fence:
            lines.append((number, line))
    return lines


def commands(page: Path) -> list[tuple[int, str]]:
    """(line, what bash is to run)."""
    found = [(number, text) for number, _, language, text in blocks(page) if language == "bash"]
    for number, line in outside_fences(page):
        candidates = [line.strip()] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)
        found += [(number, match[2]) for match in map(COMMAND.fullmatch, candidates) if match]
    return sorted(found)


ALL_COMMANDS = [(page, number, text) for page in PAGES for number, text in commands(page)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with all that a checkout has, two runs, the environments of recipes.md, and the programs that only note
    their calls."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv", "runs"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    for _, _, _, text in blocks(RECIPES):
        if is_file(text):
            (folder / text.split()[1]).write_text(text)
    tools = folder / "tools"
    tools.mkdir()
    for program in PROGRAMS:
        (tools / program).write_text(NOTE)
        (tools / program).chmod(0o755)
    for program in REAL:
        (tools / program).symlink_to(subprocess.check_output(["which", program], text=True).strip())
    with contextlib.chdir(folder):
        for module, run, env_id in [(ppo_continuous, CHEETAH, "HalfCheetah-v4"), (vmpo, CARTPOLE, "CartPole-v1")]:
            flags = ["--env-id", env_id, "--total-timesteps", "2048", "--update-epochs", "1", *SHORT]
            module.main(module.parse_args([*flags, "--runs-dir", "new"]))
            Path(run).parent.mkdir(exist_ok=True)
            next(Path("new").iterdir()).rename(run)
    return folder


@pytest.fixture
def in_checkout(checkout, monkeypatch) -> Path:
    """The checkout, as the folder in which Python was started."""
    monkeypatch.chdir(checkout)
    monkeypatch.syspath_prepend(checkout)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return checkout


def calls(text: str, checkout: Path) -> list[dict]:
    """How bash calls the PROGRAMS for this text."""
    notes = checkout / "calls"
    notes.unlink(missing_ok=True)
    env = {"PATH": str(checkout / "tools"), "CALLS": str(notes), "HOME": str(checkout)}
    env |= {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_CPUS_PER_TASK": "2"}  # as Slurm sets them
    bash = ["bash", "-eu", "-o", "pipefail", "-c", text]
    done = subprocess.run(
        bash, cwd=checkout, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def pins() -> dict[str, str]:
    """{package: ==version} of all requirements files."""
    found = {}
    for file in [*ROOT.glob("requirements.txt"), *ROOT.glob("*/requirements*.txt")]:
        for line in file.read_text().splitlines():
            line = line.partition(" #")[0].strip()
            if line and line[0] not in "#-":
                requirement = Requirement(line)
                found[requirement.name.lower()] = str(requirement.specifier)
    return found


def known(env_id: str) -> bool:
    """Whether the environment can be made here; an assertion fails for what no installation could change."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
    except ImportError:
        assert not module.startswith("environments.") or (ROOT / f"{module.replace('.', '/')}.py").exists(), module
        return False
    return gym.spec(name) is not None


def check_script(name: str, flags: list[str]):
    """The script takes these flags, and knows the environment."""
    module = importlib.import_module(Path(name).stem)
    if flags != ["--help"]:
        args = module.parse_args(flags)
        args.device, args.track = "auto", False  # a GPU and an account are not needed to read a command
        module.check(args)
        known(args.env_id)


def check_benchmark(name: str, flags: list[str]):
    if name == "phases.py":
        check_script(flags[0] if flags[0] in SCRIPTS else "ppo_continuous.py", flags[1:])  # or a copy of it
    elif name == "random_policy.py":
        assert all(gym.spec(env_id) for env_id in flags)
    elif name == "hybrid_speed.py":
        assert not flags
    else:
        tyro.cli(importlib.import_module(Path(name).stem).Args, args=flags)


def check_pip(words: list[str]):
    """Its files are there, its pins agree with those of the requirements files."""
    if words == ["check"]:
        return
    assert words[0] == "install"
    pinned, words = pins(), iter(words[1:])
    for word in words:
        if word in ("-r", "--index-url"):
            value = next(words)
            assert word != "-r" or (ROOT / value).is_file(), value
        elif word not in ("--no-deps", "--quiet", "--upgrade"):
            name, version = Requirement(word).name.lower(), str(Requirement(word).specifier)
            assert version.startswith("=="), f"{word}: no exact version"
            assert version == pinned.get(name, version), f"{word}: a requirements file has another version"


def check_call(call: dict):
    program, *words = call["words"]
    if program == "srun":
        program, *words = words
    if program == "torchrun":
        script = next(i for i, word in enumerate(words) if word in SCRIPTS)
        program, words = "python", words[script:]
    if program == "uv":
        assert words[0] == "run"
        program, words = "python", words[1:]
    if program == "pip":
        check_pip(words)
    elif program == "python" and words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif program == "python" and words[0] == "-m":
        assert words[1] in ("venv", "pip", "pytest")
    elif program == "python" and words[0] in SCRIPTS:
        check_script(words[0], words[1:])
    elif program == "python" and words[0].startswith("benchmarks/"):
        check_benchmark(words[0].removeprefix("benchmarks/"), words[1:])
        for line in call["stdin"].splitlines():
            check_call({"words": shlex.split(line), "stdin": ""})
    else:
        assert program != "python", f"{words[0]}: no script of the repository"


@pytest.mark.parametrize(
    ("page", "number", "text"), ALL_COMMANDS, ids=[f"{page.name}:{number}" for page, number, _ in ALL_COMMANDS]
)
def test_every_command_is_one_that_its_program_takes(page, number, text, in_checkout):
    found = calls(text, in_checkout)
    assert found, "no program was called"
    for call in found:
        if "echo" not in text:
            call["stdin"] = ""  # the lines of a file in benchmarks/, which test_runner.py reads
        check_call(call)


def shortened(steps: int) -> int:
    return max(2048, round(steps * 2048 / 1_000_000))


def run_training(words: list[str]):
    """A script's call, cut short; the later of two equal flags holds."""
    module = importlib.import_module(Path(words[0]).stem)
    args = module.parse_args(words[1:])
    if not known(args.env_id):
        return
    flags = [*words[1:], *SHORT]
    if args.eval is None:
        if args.resume is None or "--total-timesteps" in words:
            flags += ["--total-timesteps", str(shortened(args.total_timesteps))]
    module.main(module.parse_args(flags))


def is_file(text: str) -> bool:
    return re.match(r"# \w+\.py\n", text) is not None


def runs(page: Path, language: str) -> bool:
    return language == "python" or language == "bash" and page == RECIPES


def run_section(page: Path, section: str, checkout: Path) -> dict:
    """Run a section's blocks; the namespace of its Python."""
    namespace = {"__name__": "__main__"}
    for number, _, language, text in [block for block in blocks(page) if block[1] == section and runs(page, block[2])]:
        if language == "bash":
            for call in calls(text, checkout):
                program, *words = call["words"]
                if program == "python" and words[0] in SCRIPTS and not call["opengl"] and "--track" not in words:
                    run_training(words)
        elif not is_file(text):
            total = re.compile(r'(?<="--total-timesteps", ")\d+')
            text = total.sub(lambda match: str(shortened(int(match[0]))), text)
            text = re.sub(r"n_trials=\d+", "n_trials=2", text)
            text = text.replace("ppo.parse_args(flags)", f"ppo.parse_args([*flags, *{SHORT}])")
            exec(compile("\n" * number + text, page, "exec"), namespace)
    return namespace


ONNX, OPTUNA = (RECIPES, "Export to ONNX"), (RECIPES, "Tune with Optuna")
SECTIONS = dict.fromkeys((page, block[1]) for page in PAGES for block in blocks(page) if runs(page, block[2]))
OTHERS = [section for section in SECTIONS if section not in (ONNX, OPTUNA)]


@pytest.mark.parametrize(("page", "section"), OTHERS, ids=[f"{page.name}:{section}" for page, section in OTHERS])
def test_every_recipe_runs(page, section, in_checkout):
    run_section(page, section, in_checkout)


def test_an_exported_policy_acts_as_the_agent_does(in_checkout):
    found = run_section(*ONNX, in_checkout)
    torch.manual_seed(0)
    for batch in (1, 7):
        obs = 5 * torch.randn(batch, 17)
        (actions,) = found["session"].run(None, {"obs": obs.numpy()})
        np.testing.assert_allclose(actions, found["agent"].policy(obs).mode.detach(), atol=1e-5)
        obs, masks = torch.randn(batch, 4), torch.rand(batch, 2) < 0.5
        masks[:, 0] |= ~masks[:, 1]
        (log_probs,) = found["discrete_session"].run(None, {"obs": obs.numpy(), "masks": masks.numpy()})
        expected = found["discrete_agent"].policy(obs, masks).log_probs.detach()
        assert not masks.all()
        np.testing.assert_allclose(log_probs, expected, rtol=1e-5, atol=1e-5)


def test_a_study_s_trials_are_runs_of_their_own(in_checkout):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = run_section(*OPTUNA, in_checkout)["study"]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    configs = [json.loads(path.read_text())["args"] for path in sorted(Path("runs/study").glob("*/*/config.json"))]
    assert [config["learning_rate"] for config in configs] == [trial.params["learning_rate"] for trial in study.trials]
    assert len({config["learning_rate"] for config in configs}) == 2


def apply(diff: str, source: str) -> str:
    lines = diff.splitlines()
    old = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
    new = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
    assert source.count(old) == 1, f"ppo_continuous.py has not these lines:\n{old}"
    return source.replace(old, new)


def test_the_changes_of_the_recipes_can_be_made_and_train(in_checkout):
    source = (ROOT / "ppo_continuous.py").read_text()
    diffs = [text for _, _, language, text in blocks(RECIPES) if language == "diff"]
    for diff in diffs:
        source = apply(diff, source)
    Path("changed.py").write_text(source)
    changed = importlib.import_module("changed")
    flags = "--env-id InvertedPendulum-v4 --total-timesteps 2048 --update-epochs 1 --hidden-size 32 --runs-dir changed"
    changed.main(changed.parse_args([*flags.split(), *SHORT]))
    (model,) = Path("changed").glob("*/model.pt")
    assert torch.load(model)["critic.0.weight"].shape == (32, 4)
    events = b"".join(path.read_bytes() for path in Path("changed").glob("*/events.*"))
    assert b"losses/std" in events
    assert len(diffs) >= 5


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = set()
    for _, line in outside_fences(page):
        if re.match(r"#+ ", line):
            title = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
            found.add(title.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page):
    text = "\n".join(re.sub("`[^`]*`", "", line) for _, line in outside_fences(page))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    missing = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not re.match("(https?|mailto):", link):
            if not target.exists() or anchor and target.suffix == ".md" and anchor not in slugs(target):
                missing.append(link)
    assert not missing


def test_the_tables_of_migration_name_flags_that_are_there():
    """What they say to write here; the first two columns are of the other library."""
    rows = [row.split("|") for row in RECIPES.read_text().partition("## Come from CleanRL")[2].splitlines()]
    flags = {flag for row in rows if row[0] == "" for flag in re.findall(r"--[a-z][a-z-]+", "|".join(row[2:]))}
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit):
        ppo_continuous.parse_args(["--help"])
    here = set(re.findall(r"--[a-z][a-z-]+", help_text.getvalue()))
    assert flags <= here
    assert len(flags) > 30
