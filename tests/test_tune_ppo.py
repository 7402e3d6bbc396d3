"""benchmarks/tune_ppo.py: a search that is killed goes on, whether its study or only its table is left."""

import json
import sys

import optuna
import pandas as pd
import pytest
from conftest import ROOT

import ppo_continuous

sys.path.insert(0, str(ROOT / "benchmarks"))
import tune_ppo  # noqa: E402


@pytest.fixture
def runs(tmp_path, monkeypatch) -> list[tuple[dict, str, int]]:
    """The runs that a search in an empty folder asks for; they score the better the smaller sigma is, and rate."""
    asked = []

    def train(params: dict, env_id: str, seed: int) -> float:
        asked.append((params, env_id, seed))
        return tune_ppo.TIANSHOU[env_id] * (
            0.5 - 0.1 * params["log_std_init"] - 20 * params["learning_rate"] + seed / 1e4
        )

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    monkeypatch.setattr(tune_ppo, "train", train)
    monkeypatch.setattr(tune_ppo, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr(tune_ppo, "TABLE", tmp_path / "tune_ppo.csv")
    return asked


def search(trials: int) -> pd.DataFrame:
    tune_ppo.main(tune_ppo.Args(trials=trials, jobs=1))
    return pd.read_csv(tune_ppo.TABLE, keep_default_na=False, na_values={"value": [""]})


def test_the_search_starts_from_known_settings_and_ends_the_hopeless(runs):
    table = search(12)
    assert [params for params, env_id, seed in runs if (env_id, seed) == tune_ppo.RUNS[0]][:3] == list(
        tune_ppo.STARTS.values()
    )
    assert len(table) == 12 and set(table.start) == {*tune_ppo.STARTS, ""}
    best = table.iloc[0]
    assert best.value == table[table.state == "complete"].value.max() >= table[table.start == "default"].value.item()
    columns = [f"{env_id} seed {seed}" for env_id, seed in tune_ppo.RUNS]
    done = (table[columns] != "").sum(axis=1)
    assert (done[table.state == "complete"] == 12).all() and (table.state == "pruned").any()
    assert (done[table.state == "pruned"] < 12).all() and (done >= 3).all() and done.sum() == len(runs)


def test_a_killed_search_goes_on_with_the_settings_that_ran(runs, monkeypatch):
    train, killed = tune_ppo.train, []

    def killed_in_the_fifth_setting(params, *run):
        if len({json.dumps(params) for params, *_ in runs} | {json.dumps(params)}) == 5 and not killed:
            killed.append(params)
            raise KeyboardInterrupt
        return train(params, *run)

    monkeypatch.setattr(tune_ppo, "train", killed_in_the_fifth_setting)
    with pytest.raises(KeyboardInterrupt):
        search(8)
    before = len(runs)
    table = search(8)
    assert runs[before][0] == killed[0] and len(table) == 8
    assert len({json.dumps(params) for params, *_ in runs}) == 8


def test_a_search_without_its_study_begins_with_the_table(runs):
    first = search(6)
    (tune_ppo.FOLDER / "study.db").unlink()
    runs.clear()
    second = search(6)
    assert not runs
    pd.testing.assert_frame_equal(first, second)
    assert len(search(7)) == 7 and len({json.dumps(params) for params, *_ in runs}) == 1


def test_the_best_settings_are_command_lines_of_nine_tasks(runs, capsys):
    with pytest.raises(SystemExit, match="run the search first"):
        tune_ppo.print_best(3)
    best = json.loads(search(8).params[0])
    capsys.readouterr()
    tune_ppo.print_best(1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 2 * 9 * 5
    args = [ppo_continuous.parse_args(line.split()[2:]) for line in lines]
    default, tuned = (next(a for a in args if a.exp_name == name) for name in ("default", "tuned-1"))
    assert {a.env_id for a in args} == set(tune_ppo.TIANSHOU) and {a.seed for a in args} == {1, 2, 3, 4, 5}
    assert all(getattr(default, name) == value for name, value in tune_ppo.DEFAULT.items() if name != "minibatch_size")
    assert tuned.num_envs * tuned.num_steps == best.pop("minibatch_size") * tuned.num_minibatches
    assert tuned.learning_rate == pytest.approx(best.pop("learning_rate"), rel=5e-3)
    assert all(getattr(tuned, name) == value for name, value in best.items())
