"""benchmarks/plot.py: runs found, grouped by what differs, drawn, and counted."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, snapshot
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmarks"))
import plot  # noqa: E402


def write_run(parent: Path, seed: int = 1, returns=range(200), total: int = 20_000, end: int | None = None, **settings):
    """The folder of a run with an episode every 100 steps; without `end` it is still training."""
    args = {"env_id": "Hopper-v4", "seed": seed, "learning_rate": 3e-4, "norm_adv": True, "runs_dir": str(parent)}
    args |= {"exp_name": "ppo_continuous", "total_timesteps": total, "device": "cpu"} | settings
    script, later = args.pop("script", "ppo_continuous"), ("total_timesteps", "device")
    args = {name: args[name] for name in args if name not in later} | {name: args[name] for name in later}
    folder = parent / f"run{len(list(parent.glob('*'))) if parent.exists() else 0}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"args": args, "command": [f"/x/{script}.py"]}))
    lines = [f"{100 * k},{float(value)!r},10\n" for k, value in enumerate(returns, 1)]
    (folder / "episodes.csv").write_text("global_step,return,length\n" + "".join(lines))
    if end is not None:
        (folder / "result.json").write_text(json.dumps({"global_step": end}))
    return folder


def groups(folder: Path, *by: str) -> list[str]:
    """The group of each run, in the order in which they were written."""
    return plot.name_groups(plot.read_runs([folder], "charts/episodic_return"), by)


def draw(folder: Path, output: Path, **options):
    plot.main(plot.Args((folder,), output=output, **options))


def test_groups_are_named_after_what_differs_in_words(tmp_path):
    write_run(tmp_path, 1, encoder_sizes=[64, 64])
    write_run(tmp_path, 2, encoder_sizes=[64, 64], device="cuda")
    write_run(tmp_path, 1, learning_rate=1e-5, encoder_sizes=[128])
    write_run(tmp_path, 1, norm_adv=False, total=1_000_000, target_kl=None)
    assert groups(tmp_path) == [
        "learning rate 0.0003, norm adv on, encoder sizes 64 64, 20 thousand steps",
        "learning rate 0.0003, norm adv on, encoder sizes 64 64, 20 thousand steps",
        "learning rate 1e-05, norm adv on, encoder sizes 128, 20 thousand steps",
        "learning rate 0.0003, norm adv off, 1 million steps",
    ]
    assert sorted(["learning rate 0.001", "learning rate 1e-05"], key=plot.natural)[0] == "learning rate 1e-05"


def test_seeds_alone_are_one_group_named_after_the_experiment(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path, seed)
    assert groups(tmp_path) == 3 * ["ppo_continuous"]


def test_scripts_differ_by_their_names_and_not_by_all_their_settings(tmp_path):
    for rate in (1e-3, 3e-4):
        write_run(tmp_path, learning_rate=rate)
    write_run(tmp_path, script="vmpo", exp_name="vmpo", learning_rate=1e-3, norm_adv=False, eps_eta=0.1)
    write_run(tmp_path, env_id="Ant-v4", norm_adv=False)  # other settings for another task are no difference
    assert [name.removeprefix("ppo_continuous, ") for name in groups(tmp_path)] == [
        *("learning rate 0.001", "learning rate 0.0003", "vmpo"),
        "learning rate 0.0003",
    ]


def test_names_of_many_settings_are_kept_to_those_of_the_runs_that_differ(tmp_path, capsys):
    many = {f"coef_{n}": n for n in range(plot.MANY)}
    for value in (0, 1):
        write_run(
            tmp_path, script="vmpo", exp_name="vmpo", **{name: value + n for name, n in many.items()}, gamma=value
        )
    write_run(tmp_path)
    first, second, other = groups(tmp_path)
    assert first.count(",") == second.count(",") == plot.MANY + 1 and first != second and other == "ppo_continuous"
    assert "notice: some runs differ in many settings: --by exp_name" in capsys.readouterr().err
    assert groups(tmp_path, "gamma") == ["gamma 0", "gamma 1", "the others"]
    assert "many settings" not in capsys.readouterr().err


def test_panels_with_unlike_groups_name_their_own_curves_alone(tmp_path, capsys):
    for env_id, name in (("Hopper-v4", "a"), ("Ant-v4", "b"), ("Ant-v4", "c")):
        write_run(tmp_path / "runs", env_id=env_id, exp_name=name, end=20_000)
    draw(tmp_path / "runs", tmp_path / "a.svg", html=True)
    page = (tmp_path / "a.html").read_text()
    assert [page.count(f">{name} (1 seed)<") for name in "abc"] == [1, 1, 1]
    ant, hopper = page.split("</figure>")[:2]
    assert "Ant-v4" in ant and "a (1 seed)" not in ant and "Hopper-v4" in hopper and "b (1 seed)" not in hopper
    assert "3 of 3 runs the last 100 episodes, the score, are more than a fifth of the run" in capsys.readouterr().err


def test_a_run_of_the_first_version_joins_one_of_the_second(tmp_path):
    write_run(tmp_path, 1, backend="gymnasium")
    write_run(tmp_path, 2)
    assert groups(tmp_path) == 2 * ["ppo_continuous"]


def test_by_puts_runs_together_and_says_what_else_differs(tmp_path, capsys):
    for rate, adv in ((1e-3, True), (1e-3, False), (1e-4, True)):
        write_run(tmp_path, learning_rate=rate, norm_adv=adv)
    assert groups(tmp_path, "learning-rate") == ["learning rate 0.001", "learning rate 0.001", "learning rate 0.0001"]
    assert "notice: runs of one group differ in norm_adv\n" in capsys.readouterr().err
    assert groups(tmp_path, "seed") == 3 * ["seed 1"]
    with pytest.raises(SystemExit):
        groups(tmp_path, "gama")
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --by gama: no run has such a setting; they differ in learning_rate, norm_adv"
    )


def test_the_table_and_its_file_have_the_scores_worked_out_by_hand(tmp_path, capsys):
    for seed in range(1, 6):  # the last 100 of 200 episodes: 10 seed
        write_run(tmp_path / "runs/deep/er", seed, [0] * 100 + [9 * seed, 11 * seed] * 50, end=20_000)
    write_run(tmp_path / "runs", 1, [7] * 150, learning_rate=1e-3)
    plot.main(plot.Args((tmp_path / "runs", tmp_path / "runs/deep"), output=tmp_path / "a.png"))  # each run once
    out, err = capsys.readouterr()
    assert err == (
        "notice: 1 of 6 runs are not finished and are drawn as far as they are\n"
        "notice: in 6 of 6 runs the last 100 episodes, the score, are more than a fifth of the run\n"
    )
    table = pd.read_csv(tmp_path / "a.csv", dtype=str).set_index("setting")
    five, one = (table.loc[f"learning rate {rate}"] for rate in ("0.0003", "0.001"))
    assert [five[name] for name in ("environment", "seeds", "runs", "steps", "mean", "IQM", "each")] == [
        *("Hopper-v4", "5", "5", "20000", "30", "30", "10 20 30 40 50")
    ]
    rng = np.random.default_rng(1)
    draws = plot.iqm(10 * rng.integers(1, 6, (20_000, 5)))
    np.testing.assert_allclose(
        [float(five["IQM low"]), float(five["IQM high"])], np.percentile(draws, [2.5, 97.5]), atol=4
    )
    assert (one["steps"], one["IQM"]) == ("15000", "7") and one[["IQM low", "IQM high"]].isna().all()
    assert "learning rate 0.0003" in out and out.endswith(f"wrote {tmp_path}/a.png, {tmp_path}/a.csv\n")


def test_a_curve_ends_where_its_run_is_and_the_group_s_where_its_shortest_is(tmp_path):
    write_run(tmp_path, 1, [1] * 200, end=20_000)
    write_run(tmp_path, 2, [3] * 100)
    runs = plot.read_runs([tmp_path], "charts/episodic_return")
    assert [run.end for run in runs] == [20_000, 10_000]
    seeds = np.array([plot.curve(run.steps, run.values, 20_000) for run in runs])
    seeds[1, 100:] = np.nan
    seeds[0, 50] = np.nan  # a hole is bridged
    series = plot.Series(plot.GRID * 20_000, seeds)
    assert series.middle[:100].tolist() == 100 * [2.0] and np.isnan(series.middle[100:]).all()
    assert (series.low[:100] == 1).all() and (series.high[:100] == 3).all()


def test_each_environment_has_a_panel_and_the_same_runs_give_the_same_bytes(tmp_path):
    for env_id in ("Hopper-v4", "environments.hybrid:HybridMoving-v0"):
        for seed in (1, 2):
            write_run(tmp_path / "runs", seed, env_id=env_id, end=20_000)
    for kind in ("png", "svg"):
        draw(tmp_path / "runs", tmp_path / f"0.{kind}", html=kind == "png")
    command = [sys.executable, ROOT / "benchmarks/plot.py", tmp_path / "runs", "--html", "--output", tmp_path / "1.svg"]
    subprocess.run(command, check=True)
    for kind in ("svg", "csv", "html"):
        assert (tmp_path / f"0.{kind}").read_bytes() == (tmp_path / f"1.{kind}").read_bytes()
    height, width = imread(tmp_path / "0.png").shape[:2]
    assert width > 1.5 * height
    page = (tmp_path / "0.html").read_text()
    assert page.count("<svg ") == 2 and "HybridMoving-v0, 20 thousand steps" in page
    assert "ppo_continuous (2 seeds)" in page and "<script src" not in page and "<link" not in page


def test_other_metrics_come_from_the_event_files(tmp_path, capsys):
    for seed in (1, 2):
        folder = write_run(tmp_path / "runs", seed, end=20_000)
        with SummaryWriter(str(folder)) as writer:
            for step in range(1000, 20_001, 1000):
                writer.add_scalar("losses/entropy", seed * step, step)
    write_run(tmp_path / "runs", 3, end=20_000)
    draw(tmp_path / "runs", tmp_path / "a.png", metric="losses/entropy")
    assert capsys.readouterr().err == "notice: 1 runs have no losses/entropy and are left out: run2\n"
    assert pd.read_csv(tmp_path / "a.csv")["each"][0] == "15500 31000"  # the last 10 of 20 values
    with pytest.raises(SystemExit):
        draw(tmp_path / "runs", tmp_path / "a.png", metric="losses/nothing")
    assert re.search("error: .* losses/nothing .* has losses/entropy\n", capsys.readouterr().err)


def damage(folder: Path, name: str, text: str | None):
    (folder / name).write_text(text) if text is not None else (folder / name).unlink()


@pytest.mark.parametrize(
    "name, text",
    [
        *(("config.json", "{"), ("config.json", '{"model_type": "bert"}'), ("config.json", "[]")),
        ("config.json", '{"args": {"env_id": "Hopper-v4"}, "command": ["a.py"]}'),
        *(("episodes.csv", "global_step,return,length\n100,abc,1\n"), ("episodes.csv", ""), ("episodes.csv", None)),
        ("result.json", "{}"),
    ],
)
def test_a_damaged_or_foreign_folder_is_named_in_one_line(tmp_path, capsys, name, text):
    write_run(tmp_path / "runs", 1, end=20_000)
    damage(write_run(tmp_path / "runs", 2, end=20_000), name, text)
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as stop:
        draw(tmp_path / "runs", tmp_path / "a.png")
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1) and f"{tmp_path}/runs/run1 (" in err
    assert err.startswith("error: ") and "run0" not in err and snapshot(tmp_path) == before


def test_wrong_input_is_one_line_and_status_2(tmp_path, capsys):
    write_run(tmp_path / "runs")
    (tmp_path / "runs/run0/episodes.csv").unlink()  # has just begun
    (tmp_path / "empty").mkdir()
    for runs, output, says in [
        ("empty", "a.png", "empty: no run is in there"),
        ("nowhere", "a.png", "nowhere: there is no such folder"),
        ("runs", "a.png", "no run has a value of charts/episodic_return yet"),
        ("runs", "a.jpg", "must end in .png or .svg"),
        ("runs", "nowhere/a.png", "there is no folder"),
        ("runs", "runs/run0/episodes.png", "is a run's folder"),
        (None, "a.png", "at least one folder"),
    ]:
        with pytest.raises(SystemExit) as stop:
            plot.main(plot.Args((tmp_path / runs,) if runs else (), output=tmp_path / output))
        err = capsys.readouterr().err
        assert (stop.value.code, err.count("\n")) == (2, 1) and err.startswith("error: ") and says in err
    assert not list(tmp_path.glob("a.*"))


def test_real_runs_are_plotted(tmp_path, capsys):
    import ppo_continuous

    flags = "--env-id InvertedPendulum-v4 --num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 1"
    flags += f" --total-timesteps 512 --eval-episodes 0 --no-compile --device cpu --runs-dir {tmp_path}/runs"
    for gamma in ("0.9", "0.99"):
        ppo_continuous.main(ppo_continuous.parse_args([*flags.split(), "--gamma", gamma]))
    for metric, says in (("charts/episodic_return", "in 2 of 2 runs the last 100 episodes"), ("losses/value_loss", "")):
        capsys.readouterr()
        draw(tmp_path / "runs", tmp_path / "a.svg", metric=metric)
        err = capsys.readouterr().err
        assert err.count("\n") == bool(says) and says in err
        assert pd.read_csv(tmp_path / "a.csv").setting.tolist() == ["gamma 0.9", "gamma 0.99"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_shows_the_values_under_the_pointer(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / "runs", seed, [10 * seed] * 200, end=20_000)
    draw(tmp_path / "runs", tmp_path / "a.png", html=True)
    point = """<script>
        const figure = document.querySelector("figure"), box = figure.getBoundingClientRect();
        const event = { clientX: box.left + box.width / 2, clientY: box.top + 50 };
        figure.dispatchEvent(new PointerEvent("pointermove", event));
    </script>"""
    page = (tmp_path / "a.html").read_text()
    (tmp_path / "b.html").write_text(page.replace("</html>", point + "</html>"))
    offline = "--disable-gpu --disable-quic --disable-background-networking --disable-component-update --disable-sync"
    command = ["chromium", "--headless", "--no-sandbox", "--no-first-run", *offline.split(), "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/profile", f"file://{tmp_path}/b.html"]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values = dom.partition('class="values"')[2].partition("</figure>")[0]
    assert "ppo_continuous (3 seeds): 20 [10, 30]" in values and "step " in values
    assert 'hidden=""' not in dom.partition("<figure>")[2].partition("<script")[0].partition('class="line"')[2]
