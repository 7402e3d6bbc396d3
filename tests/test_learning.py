"""A policy that learns: the one test that every mistake of sign, shape or order fails."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "ppo_continuous.py"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_inverted_pendulum_is_solved_within_100k_steps(tmp_path, seed):
    """A random policy keeps the pole up for some 6 steps, 1000 is the most there is."""
    argv = ["--env-id", "InvertedPendulum-v4", "--total-timesteps", "100000", "--seed", str(seed), "--device", "cpu"]
    subprocess.run([sys.executable, SCRIPT, *argv, "--runs-dir", tmp_path], check=True, capture_output=True)
    (folder,) = tmp_path.iterdir()
    returns = [float(row["return"]) for row in csv.DictReader(open(folder / "episodes.csv"))]
    assert sum(returns[:100]) / 100 < 100
    assert sum(returns[-50:]) / 50 >= 900
