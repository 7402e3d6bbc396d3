"""A policy that learns: the one test that every mistake of sign, shape or order fails."""

import csv

import pytest
from conftest import only, run


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_inverted_pendulum_is_solved_within_100k_steps(tmp_path, seed):
    """A random policy keeps the pole up for some 6 steps, 1000 is the most there is."""
    flags = f"--env-id InvertedPendulum-v4 --total-timesteps 100000 --seed {seed} --device cpu".split()
    status, _, err = run(*flags, "--runs-dir", tmp_path)
    assert status == 0, err
    returns = [float(row["return"]) for row in csv.DictReader(open(only(tmp_path) / "episodes.csv"))]
    assert sum(returns[:100]) / 100 < 100
    assert sum(returns[-50:]) / 50 >= 900
