"""From runs to the README's tables: the numbers, and the same bytes each time."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import report  # noqa: E402


def write_run(folder: Path, setting: str, env_id: str, seed: int, steps, returns, total: int):
    """A finished run's folder, as a script leaves it, without weights and events."""
    folder.mkdir(parents=True)
    flags = ["--env-id", env_id, "--seed", str(seed), "--exp-name", setting, "--runs-dir", str(folder.parent)]
    config = {
        "args": {"exp_name": setting, "env_id": env_id, "seed": seed, "backend": "gymnasium"},
        "command": ["/somewhere/ppo_continuous.py", *flags],
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "git_commit": "abc",
    }
    result = {"global_step": total, "seconds": total / 1000, "eval_returns": [1.0, 2.0]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    lines = [f"{step},{float(value)!r},10\n" for step, value in zip(steps, returns)]
    (folder / "episodes.csv").write_text("global_step,return,length\n" + "".join(lines))


@pytest.fixture
def copy(tmp_path) -> Path:
    """The repository's benchmarks and README, to write in."""
    for name in ("README.md", "benchmarks/report.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("results", "figures"):
        shutil.copytree(ROOT / "benchmarks" / name, tmp_path / "benchmarks" / name)
    return tmp_path


def run_report(copy: Path, *argv) -> subprocess.CompletedProcess:
    command = [sys.executable, copy / "benchmarks/report.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_row_and_its_curve_are_those_of_the_episodes(tmp_path):
    steps = np.arange(10, 20_001, 10)  # 2,000 episodes
    write_run(tmp_path / "run", "a", "Hopper-v4", 3, steps, steps / 10.0, 20_000)
    row, curve = report.read_run(tmp_path / "run")
    assert row["score"] == f"{np.arange(1901, 2001).mean():.2f}"
    assert (row["seed"], row["sps"], row["eval_return"]) == ("3", "1000", "1.500")
    assert row["command"] == "python ppo_continuous.py --env-id Hopper-v4 --seed 3 --exp-name a"
    points = list(curve.values())[3:]
    assert len(points) == report.POINTS
    for k in (0, 99, 199):  # a point is the mean of the episodes in the 400 steps up to it
        end = (k + 1) * 100
        inside = [s / 10 for s in steps if end - 400 < s <= end]
        assert points[k] == f"{np.mean(inside):.2f}"


def test_a_point_without_an_episode_is_empty(tmp_path):
    write_run(tmp_path / "run", "a", "Hopper-v4", 1, [9_000, 20_000], [1.0, 2.0], 20_000)
    points = list(report.read_run(tmp_path / "run")[1].values())[3:]
    assert points[88] == "" and points[89] == "1.00" and points[93] == "" and points[199] == "2.00"


def test_iqm_is_the_mean_of_the_middle_half():
    values = np.arange(8.0) ** 2
    assert report.iqm(values[:4], values[4:]) == values[2:6].mean()
    assert report.mean(values[:4], values[4:]) == values.mean()


def test_the_interval_resamples_each_environment_by_itself():
    """Against a bootstrap written out here; strata far apart would give a wide interval if they were mixed."""
    rng = np.random.default_rng(3)
    strata = [rng.normal(centre, 1, 5) for centre in (0, 100, 200)]
    draws = [np.concatenate([rng.choice(s, len(s)) for s in strata]).mean() for _ in range(20_000)]
    low, high = report.interval(strata, report.mean)
    np.testing.assert_allclose([low, high], np.percentile(draws, [2.5, 97.5]), atol=0.05)
    assert high - low < 3
    assert np.isnan(report.interval([np.ones(1), np.ones(3)], report.mean)).all()  # one run has no interval


def test_settings_sort_by_their_numbers():
    names = ["clip-10", "clip-0.3", "none", "clip-2"]
    assert sorted(names, key=report.natural) == ["clip-0.3", "clip-2", "clip-10", "none"]


def test_new_runs_join_the_committed_ones_and_the_same_runs_give_the_same_bytes(copy):
    results = copy / "benchmarks/results"
    (results / "ppo_table1.csv").unlink(missing_ok=True)
    (results / "ppo_table1_curves.csv.gz").unlink(missing_ok=True)
    shutil.copy(ROOT / "benchmarks/results/random_policy.csv", results)
    steps, rng = np.arange(1000, 100_001, 1000), np.random.default_rng(0)

    def add(setting, env_id, seed):
        folder = copy / "runs/ppo_table1" / f"{setting}{env_id}{seed}" / "folder"
        write_run(folder, setting, env_id, seed, steps, rng.normal(100, 10, len(steps)), 100_000)

    for seed in (1, 2):
        for setting in ("none", "clip-0.2", "adaptive-0.01", "fixed-3"):
            add(setting, "Hopper-v4", seed)
    assert run_report(copy, "ppo_table1", "--runs", copy / "runs").returncode == 0
    first = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert run_report(copy, "ppo_table1", "--runs", copy / "runs").returncode == 0
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == first

    shutil.rmtree(copy / "runs")  # as on another machine: the committed rows stay
    add("clip-0.1", "Walker2d-v4", 1)
    done = run_report(copy, "ppo_table1", "--runs", copy / "runs")
    assert done.stdout == "ppo_table1: 9 runs\n"
    rows = (results / "ppo_table1.csv").read_text().splitlines()
    assert len(rows) == 10 and len(gzip.open(results / "ppo_table1_curves.csv.gz").readlines()) == 10
    readme = (copy / "README.md").read_text()
    assert "| clip-0.1 | 0.76 |" in readme and "| 1 of 21 |" in readme
    assert not {line for line in (ROOT / "README.md").read_text().split("<!--")[0].splitlines()} - {
        *readme.splitlines()
    }  # what stands outside the block is as it was


def test_the_readme_shows_what_the_committed_results_say(copy):
    for name in report.REPORTS:
        if (copy / f"benchmarks/results/{name}.csv").exists():
            done = run_report(copy, name, "--runs", copy / "none")
            assert done.returncode == 0, done.stderr
    assert (copy / "README.md").read_text() == (ROOT / "README.md").read_text()


@pytest.mark.parametrize("argv", [["nonsense"], ["ppo_table1", "--runs", "nowhere"]])
def test_wrong_input_is_one_line_and_writes_nothing(copy, argv):
    for path in copy.glob("benchmarks/results/ppo_table1*"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    done = run_report(copy, *argv)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
