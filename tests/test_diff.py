"""The scripts are read as diffs against ppo_continuous.py, so what is meant to be equal is equal to the byte."""

import ast
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "benchmarks" / "diff.py"
BASE = ROOT / "ppo_continuous.py"
# Of the base's functions and classes, those that each script changes; all others it has to the byte.
CHANGES = {
    "ppo_klpen.py": "Args check Gaussian Agent make_batch loss train main",
    "vmpo.py": """Args check make_env to_env Loop make_vector_env Envs Gaussian Agent rollout make_batch loss
        update_step steps_per_call update save load evaluate train main""",
    "hppo_hybrid.py": """Args check make_env to_env make_vector_env Envs Gaussian Agent rollout make_batch loss evaluate
        train main""",
    "ppo_multidiscrete_joint_loss.py": """Args check make_env to_env Loop make_vector_env Envs Gaussian Agent rollout
        make_batch loss evaluate train main""",
}
# The same for those whose base is vmpo.py: for vmpo_lstm.py all, for the others what has to do with choices and masks.
CHANGES_OF_VMPO = {
    "vmpo_lstm.py": """Args check Agent GaussianAgent CategoricalAgent rollout make_batch loss refresh evaluate train
        main"""
}
WITH_MASKS = {
    "ppo_multidiscrete_joint_loss.py": "nvec_of ActionMask Loop make_vector_env to_env hidden_layers",
    "hppo_hybrid.py": "ActionMask hidden_layers",
}
BUDGET = {"ppo_klpen.py": 65}  # lines that a script may change in all
SECTIONS = "Header, Args, Environments, Agent, Rollout, Advantages, Loss, Update, Processes, main".split(", ")


def split(path: Path) -> dict[str, str]:
    """{section: its bytes as text}, by reading line after line; not the tool's own way."""
    found, name = {"Header": ""}, "Header"
    for line in path.read_text().splitlines(keepends=True):
        words = line.split()
        if words[:2] == ["#", "====="]:
            name = words[2]
            found[name] = ""
        found[name] += line
    return found


def definitions(path: Path) -> dict[str, str]:
    """{name: source}, decorators included, of the functions and classes of a script."""
    text = path.read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return found


def differences(script: Path, base: Path) -> dict[str, str]:
    """{a function or class of the base: the first line where the script's differs}."""
    ours, found = definitions(script), {}
    for name, text in definitions(base).items():
        if ours.get(name) != text:
            pairs = zip([*ours.get(name, "").splitlines(), "(its end)"], [*text.splitlines(), "(its end)"])
            line, expected = next((a, b) for a, b in pairs if a != b)
            found[name] = f"{script.name}, {name}: {line!r} where {base.name} has {expected!r}"
    return found


@pytest.mark.parametrize("script", [*CHANGES, *CHANGES_OF_VMPO])
def test_what_a_script_need_not_change_is_equal_to_the_byte(script):
    changes, base = (CHANGES[script], BASE) if script in CHANGES else (CHANGES_OF_VMPO[script], ROOT / "vmpo.py")
    found = differences(ROOT / script, base)
    drifted = [line for name, line in found.items() if name not in changes.split()]
    assert not drifted and set(found) == set(changes.split())


def methods(script: str) -> dict[str, str]:
    """{name: source} of the methods of a script's Envs."""
    (node,) = ast.parse(definitions(ROOT / script)["Envs"]).body
    lines = definitions(ROOT / script)["Envs"].splitlines()
    return {method.name: "\n".join(lines[method.lineno - 1 : method.end_lineno]) for method in node.body[1:]}


@pytest.mark.parametrize("script", ["vmpo.py", *WITH_MASKS])
def test_of_envs_only_what_has_to_do_with_masks_and_holds_differs(script):
    ours, base = methods(script), methods("ppo_continuous.py")
    assert len(base) >= 7 and {name for name in base if ours[name] != base[name]} <= {"__init__", "reset", "step"}
    with_masks = methods("vmpo.py")
    assert ours["set_masks"] == with_masks["set_masks"] and ours["reset"] == with_masks["reset"]


@pytest.mark.parametrize("script", WITH_MASKS)
def test_masks_are_the_same_code_in_all_scripts_with_choices(script):
    found = differences(ROOT / script, ROOT / "vmpo.py")
    assert not [line for name, line in found.items() if name in WITH_MASKS[script].split()]


@pytest.mark.parametrize("script", [*CHANGES, *CHANGES_OF_VMPO])
def test_the_sections_and_imports_are_the_base_s(script):
    assert list(split(ROOT / script)) == list(split(BASE)) == SECTIONS
    ours, base = (split(path)["Header"] for path in (ROOT / script, BASE))
    for part in (0, 2):  # the pins, then the imports; between them stands the docstring
        missing = set(base.split('"""')[part].splitlines()) - set(ours.split('"""')[part].splitlines())
        assert not missing


def test_a_banner_ends_where_a_line_does():
    banners = [line for line in BASE.read_text().splitlines() if line.startswith("# =====")]
    assert len(banners) == len(SECTIONS) - 1 and {len(line) for line in banners} == {120}


def test_a_byte_that_drifts_is_found_and_named(tmp_path):
    drifted = tmp_path / "ppo_klpen.py"
    text = (ROOT / "ppo_klpen.py").read_text()
    drifted.write_text(text.replace("0.9, 0.999, 1e-5", "0.9, 0.99, 1e-5"))
    found = differences(drifted, BASE)
    assert set(found) == {*CHANGES["ppo_klpen.py"].split(), "update_step"}
    assert "ppo_klpen.py, update_step: '" in found["update_step"] and "0.9, 0.99, 1e-5" in found["update_step"]


def diff(*argv) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *argv], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("script", BUDGET)
def test_the_diff_stays_within_its_budget(script, tmp_path):
    changed = 0
    for section in SECTIONS:
        (tmp_path / "a").write_text(split(BASE)[section])
        (tmp_path / "b").write_text(split(ROOT / script)[section])
        out = subprocess.run(["diff", tmp_path / "a", tmp_path / "b"], capture_output=True, text=True).stdout
        changed += sum(line[0] in "<>" for line in out.splitlines())
    assert 0 < changed <= BUDGET[script]


def test_the_tool_counts_each_section_and_shows_every_changed_line():
    out = diff("ppo_continuous.py", "ppo_klpen.py").stdout
    assert "# Update: same" in out and "\033" not in out
    base, other = BASE.read_text().splitlines(), (ROOT / "ppo_klpen.py").read_text().splitlines()
    removed = [line[2:] for line in out.splitlines() if line.startswith("- ")]
    added = [line[2:] for line in out.splitlines() if line.startswith("+ ")]
    for line in set(base) - set(other):
        assert line in removed
    for line in set(other) - set(base):
        assert line in added
    counts = [int(n) for n in re.findall(r"^# \w+: (\d+) lines differ$", out, re.MULTILINE)]
    assert sum(counts) == len(removed) + len(added)
    assert out.endswith(f"{sum(counts)} lines differ (removed plus added)\n")


def test_a_script_does_not_differ_from_itself():
    assert diff(BASE, BASE).stdout.endswith("\n0 lines differ (removed plus added)\n")


def test_on_a_terminal_the_diff_is_coloured():
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, TOOL, BASE, ROOT / "ppo_klpen.py"], stdout=follower)
    os.close(follower)
    out = b""
    try:
        while chunk := os.read(leader, 65536):
            out += chunk
    except OSError:  # Linux says so at the end
        pass
    assert process.wait() == 0 and b"\033[31m- " in out and b"\033[32m+ " in out


@pytest.mark.parametrize("argv", [[], ["ppo_continuous.py"], ["ppo_continuous.py", "missing.py"]])
def test_wrong_arguments_are_one_line(argv):
    result = diff(*argv)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_reader_who_has_seen_enough_gets_no_traceback():
    process = subprocess.Popen(
        [sys.executable, TOOL, ROOT / "hppo_hybrid.py", ROOT / "ppo_multidiscrete_joint_loss.py"],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    assert process.stdout.readline().startswith("# Header: ")
    process.stdout.close()  # the rest, 90 kB in all, is more than a pipe and a buffer hold
    assert process.stderr.read() == "" and process.wait() != 0


def test_the_diff_of_the_loss_with_a_penalty_is_the_tool_s():
    block = (ROOT / "docs/ppo_klpen.md").read_text().split("```diff\n")[1].split("```")[0]
    command = [sys.executable, TOOL, BASE, ROOT / "ppo_klpen.py"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert block in re.sub(r", line \d+$", "", shown, flags=re.MULTILINE)  # a page without numbers that would drift
    assert block.startswith("# Loss: ") and "\n+ def adapt_beta" in block


def test_the_readme_s_table_is_the_truth():
    table = diff("--table").stdout
    assert table.count("\n") == len(SECTIONS) + 3
    assert table in (ROOT / "README.md").read_text(), "python benchmarks/diff.py --table prints the one to copy"
