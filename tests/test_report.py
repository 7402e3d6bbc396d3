"""From runs to the tables of README.md and docs: the numbers, and the same bytes each time."""

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tyro
from matplotlib.image import imread
from moviepy import ImageSequenceClip

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
sys.path.insert(0, str(ROOT / "benchmarks"))
import report  # noqa: E402
from conftest import snapshot  # noqa: E402


def write_run(folder: Path, setting: str, env_id: str, seed: int, steps, returns, total: int):
    """A finished run's folder, as a script leaves it, without weights and events."""
    folder.mkdir(parents=True)
    flags = ["--env-id", env_id, "--seed", str(seed), "--exp-name", setting, "--runs-dir", str(folder.parent)]
    config = {
        "args": {"exp_name": setting, "env_id": env_id, "seed": seed, "backend": "gymnasium", "total_timesteps": total},
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
    """The repository's benchmarks and documents, to write in."""
    for name in ("README.md", "benchmarks/report.py", "benchmarks/plot.py", *(f"docs/{p.name}" for p in DOCS)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("results", "figures"):
        shutil.copytree(ROOT / "benchmarks" / name, tmp_path / "benchmarks" / name)
    return tmp_path


def run_report(copy: Path, *argv) -> SimpleNamespace:
    """As a process of its own, without the seconds that its imports take."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(report, "HERE", copy / "benchmarks")
        patch.setattr(report, "ROOT", copy)
        try:
            report.main(tyro.cli(report.Args, args=list(map(str, argv))))
        except SystemExit as stop:
            status = stop.code
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def test_a_row_and_its_curve_are_those_of_the_episodes(tmp_path):
    steps = np.arange(10, 20_001, 10)  # 2,000 episodes
    write_run(tmp_path / "run", "a", "Hopper-v4", 3, steps, steps / 10.0, 20_000)
    row, curve = report.read_run(tmp_path / "run")
    assert row["score"] == f"{np.arange(1901, 2001).mean():.2f}"
    assert (row["seed"], row["sps"], row["eval_return"]) == ("3", "1000", "1.500")
    assert row["command"] == "python ppo_continuous.py --env-id Hopper-v4 --seed 3 --exp-name a"
    points = list(curve.values())[3:]
    assert len(points) == report.plot.POINTS
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
    command = [sys.executable, "-B", copy / "benchmarks/report.py", "ppo_table1", "--runs", copy / "runs"]
    assert subprocess.run(command).returncode == 0  # in another process
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == first

    shutil.rmtree(copy / "runs")  # as on another machine: the committed rows stay
    add("clip-0.1", "Walker2d-v4", 1)
    add("clip-0.1", "Walker2d-v4", 2)
    (copy / "runs/ppo_table1/clip-0.1Walker2d-v42/folder/result.json").write_text('{"global_step": 1}')  # evaluates yet
    done = run_report(copy, "ppo_table1", "--runs", copy / "runs")
    assert done.stdout == "ppo_table1: 9 runs\n"
    rows = (results / "ppo_table1.csv").read_text().splitlines()
    assert len(rows) == 10 and len(gzip.open(results / "ppo_table1_curves.csv.gz").readlines()) == 10
    text = "".join(path.read_text() for path in (copy / "README.md", *copy.glob("docs/*.md")))
    assert "| clip-0.1 | 0.76 |" in text and "| 1 of 21 |" in text


def test_a_block_goes_into_every_document_that_has_one_with_its_own_relative_links(copy):
    shutil.rmtree(copy / "docs", ignore_errors=True)
    (copy / "docs").mkdir()
    (copy / "README.md").write_text("before\n<!-- begin vmpo_paper -->\n<!-- end vmpo_paper -->\nafter\n")
    (copy / "docs/a.md").write_text(
        "<!-- begin vmpo_paper: told -->\nold\n<!-- end vmpo_paper -->\n<!-- begin vmpo -->\n"
    )
    (copy / "docs/b.md").write_text("nothing\n")
    done = run_report(copy, "vmpo_paper", "--runs", copy / "none")
    assert done.returncode == 0, done.stderr
    readme, page = (copy / "README.md").read_text(), (copy / "docs/a.md").read_text()
    assert readme.startswith("before\n<!-- begin vmpo_paper -->\n| the paper's settings |")
    assert readme.endswith("(benchmarks/figures/vmpo_paper.png)\n<!-- end vmpo_paper -->\nafter\n")
    assert "(../benchmarks/figures/vmpo_paper.png)\n<!-- end vmpo_paper -->\n<!-- begin vmpo -->\n" in page
    assert page.startswith("<!-- begin vmpo_paper: told -->\n| the paper's") and "old" not in page.partition("\n")[2]
    assert (copy / "docs/b.md").read_text() == "nothing\n"

    for name, says in (("hppo", f"{copy}/docs/a.md: needs "), ("vmpo", "has <!-- begin vmpo -->")):
        (copy / "docs/a.md").write_text("<!-- begin hppo -->\n")
        before = snapshot(copy)
        done = run_report(copy, name, "--runs", copy / "none")
        assert (done.returncode, done.stderr.count("\n"), snapshot(copy) == before) == (2, 1, True)
        assert done.stderr.startswith("error: ") and says in done.stderr


def test_each_sweep_has_a_report():
    for function in report.SWEEPS:
        name = function.__name__
        assert f"runner.py --name {name} --report " in (ROOT / f"benchmarks/{name}.sh").read_text()


def test_table_1_s_scores_are_those_worked_out_by_hand(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/random_policy.csv").write_text("env_id,episodes,mean,std\nA,300,10.0,1\nB,300,-50.0,1\n")
    monkeypatch.setattr(report, "HERE", tmp_path)
    rows, curves = [], []
    for setting, env_id, seed, score in [
        *(("none", "A", 1, 10), ("none", "A", 2, 5), ("none", "B", 1, -45), ("none", "B", 2, -55)),
        *(("clip-0.2", "A", 1, 20), ("clip-0.2", "A", 2, 30), ("clip-0.2", "B", 1, -40), ("clip-0.2", "B", 2, -42.5)),
    ]:
        key = {"setting": setting, "env_id": env_id, "seed": str(seed)}
        rows.append({**key, "score": score, "steps": 1000})
        curves.append({**key, **dict.fromkeys(map(str, report.GRID), score)})
    text = report.ppo_table1(pd.DataFrame(rows), pd.DataFrame(curves))
    # A: random 10, best 30; B: random -50, best -40. So none has 0, -.25, .5, -.5, and clip-0.2 has .5, 1, 1, .75; the
    # middle half of four is two; an interval of two runs is between both being the worse and both the better.
    assert "| none | -0.39 | -0.06 [-0.38, 0.25] | -0.12 [-0.38, 0.25] | 4 of 21 |" in text
    assert "| clip-0.2 | 0.82 | 0.81 [0.62, 1.00] | 0.88 [0.62, 1.00] | 4 of 21 |" in text
    assert "| none | 7.5 ± 2.5 | -50.0 ± 5.0 |" in text


def test_the_changes_to_table_1_stand_below_its_own_results(tmp_path, monkeypatch):
    def row(setting, env_id, score):
        return {"setting": setting, "env_id": env_id, "seed": 1, "score": score}

    (tmp_path / "results").mkdir()
    (tmp_path / "results/random_policy.csv").write_text("env_id,mean\nA,0.0\nB,-10.0\n")
    monkeypatch.setattr(report, "HERE", tmp_path)
    table1 = [row("clip-0.2", "A", 2), row("clip-0.2", "A", 6), row("none", "A", 9), row("fixed-3", "A", 20)]
    table1 += [row("clip-0.2", "B", -5), row("clip-0.2", "B", -5), row("fixed-3", "B", 0)]
    for end in (".csv", "_curves.csv.gz"):
        report.write_csv(tmp_path / f"results/ppo_table1{end}", table1)
    rows = [row("clip-0.2-annealed", "A", 16), row("clip-0.2-annealed", "A", 16), row("fixed-3-annealed", "A", 8)]
    # A from 0 to 20, B from -10 to 0: clip-0.2 has .1, .3 and .5, .5; annealed .8, .8 and the same .5, .5
    assert report.ppo_table1_order(pd.DataFrame(rows), None).splitlines() == [
        "| changed | objective | A | score of Table 1 with these |",
        "|---|---|---|---|",
        "| nothing | clip-0.2 | 4 ± 2 | 0.35 [0.30, 0.40] |",
        "| nothing | adaptive-0.01 | - | - |",
        "| nothing | fixed-3 | 20 | 1.00 |",
        "| annealed | clip-0.2 | 16 ± 0 | 0.65 [0.65, 0.65] |",
        "| annealed | adaptive-0.01 | - | - |",
        "| annealed | fixed-3 | 8 | 0.70 |",
    ]


def test_a_real_run_of_another_script_has_a_row_and_a_table(tmp_path, monkeypatch):
    """hppo_hybrid.py has no --backend, and its evaluation has a rate of success."""
    import hppo_hybrid

    flags = "--num-envs 4 --num-steps 64 --num-minibatches 2 --total-timesteps 2048 --eval-episodes 2 --no-compile"
    flags = f"{flags} --env-id environments.hybrid:HybridMoving-v0 --exp-name separate-chosen --runs-dir {tmp_path}"
    hppo_hybrid.main(hppo_hybrid.parse_args(flags.split()))
    monkeypatch.setattr(report, "HERE", tmp_path)
    row, curve = report.read_run(next(tmp_path.iterdir()))
    assert row["eval_success"] in ("0.0000", "0.5000", "1.0000")
    both = []
    for name, one in (("rows", row), ("curves", curve)):  # as from a file; 10M has a line and a panel of its own
        report.write_csv(tmp_path / f"{name}.csv", [one, {**one, "setting": "separate-chosen-10M"}])
        both.append(pd.read_csv(tmp_path / f"{name}.csv"))
    text = report.hppo(*both)
    assert "| HybridMoving-v0 | 0.0M |" in text and "| HybridMoving-v0, 10M | 0.0M |" in text
    assert (tmp_path / "figures/hppo_curves.png").exists()


def test_the_search_s_table_has_the_best_settings_by_what_they_change(tmp_path, monkeypatch):
    default = {"num_envs": 8, "norm_adv": True, "learning_rate": 0.0003}
    tasks = [
        f"{task}-v4 seed {seed}" for seed in (101, 102, 103) for task in ("HalfCheetah", "Hopper", "Walker2d", "Ant")
    ]
    trials = [
        {
            "state": "complete",
            "value": 0.9,
            "start": "",
            "params": default | {"norm_adv": False, "learning_rate": 0.00123456},
        },
        {"state": "complete", "value": 0.5, "start": "default", "params": default},
        {"state": "pruned", "value": 0.7, "start": "", "params": default | {"num_envs": 32}},
    ]
    for trial, count, score in zip(trials, (12, 12, 4), (3000.0, 1000.0, 2000.0)):
        trial |= {"params": json.dumps(trial["params"])} | {task: score for task in tasks[:count]}
    (tmp_path / "results").mkdir()
    pd.DataFrame(trials).to_csv(tmp_path / "results/tune_ppo.csv", index=False)
    monkeypatch.setattr(report, "HERE", tmp_path)
    assert report.tune_ppo().splitlines()[0] == "3 settings, 28 runs; 1 settings ended early."
    assert report.tune_ppo().splitlines()[4:] == [
        "| norm adv off, learning rate 0.00123 | 0.900 | 3000 | 3000 | 3000 | 3000 |",
        "| the default | 0.500 | 1000 | 1000 | 1000 | 1000 |",
    ]


def test_nine_tasks_are_scored_between_the_random_policy_and_tianshou(tmp_path, monkeypatch):
    random = pd.read_csv(ROOT / "benchmarks/results/random_policy.csv", index_col="env_id")["mean"]
    (tmp_path / "results").mkdir()
    random.to_csv(tmp_path / "results/random_policy.csv")
    rows = pd.DataFrame(
        [
            {"setting": setting, "env_id": env_id, "seed": seed, "score": score, "steps": 1e6}
            for env_id, peer in report.TIANSHOU.items()
            for on_four in [peer if env_id in report.SEARCHED else random[env_id]]
            for setting, score in (("default", random[env_id]), ("tuned-1", peer), ("tuned-2", on_four))
            for seed in (1, 2)
        ]
    )
    monkeypatch.setattr(report, "HERE", tmp_path)
    curves = pd.concat([rows.iloc[:, :3], pd.DataFrame(np.ones((len(rows), 200)))], axis=1)
    text = report.tune_ppo_nine(rows, curves)
    zero, one = "0.00 [0.00, 0.00]", "1.00 [1.00, 1.00]"
    assert f"| default | {zero} | {zero} | {zero} | {zero} | 18 of 45 |" in text
    assert f"| tuned-1 | {one} | {one} | {one} | {one} | 18 of 45 |" in text
    assert f" | {one} | {zero} | 0.44 [0.44, 0.44] | 18 of 45 |" in text  # 4 of 9 tasks
    assert "| Reacher-v4 | -42.9 [-42.9, -42.9] | -4.1 [-4.1, -4.1] | -42.9 [-42.9, -42.9] | -4.1 |" in text
    assert (tmp_path / "figures/tune_ppo_nine.png").exists()


def test_the_tournament_has_a_column_for_each_bot_and_the_mean_over_the_seeds(tmp_path, monkeypatch):
    matches = [
        {"setting": "joint-0.2", "env_id": "M", "seed": seed, "opponent": bot, "win_rate": rate}
        for seed, bot, rate in [(1, "coacAI", 0.9), (2, "coacAI", 1), (1, "passiveAI", 0.5), (3, "coacAI", 0)]
    ]
    (tmp_path / "results").mkdir()
    report.write_csv(tmp_path / "results/microrts_tournament.csv", matches)
    monkeypatch.setattr(report, "HERE", tmp_path)
    (table,) = report.tournament(pd.DataFrame(matches[:2])[["setting", "env_id", "seed"]])  # seed 3 is not among them
    head, _, line = table.splitlines()
    assert head == "| M: wins, %, against | coacAI | passiveAI |"
    assert line == "| joint-0.2 | 95 [90, 100] | 50 |"


def test_a_loss_stands_beside_joint_by_the_ratio_of_their_means_in_each_environment():
    scores = {("joint", "A"): (100, 300), ("joint", "B"): (10, 10), ("mix-loss", "A"): (300, 500)}
    scores[("mix-loss", "B")] = (5, 15)
    rows = pd.DataFrame([{"setting": s, "env_id": e, "score": v} for (s, e), values in scores.items() for v in values])
    assert report.gain(rows, "joint", "joint", "AB") == "1"
    assert report.gain(rows, "separate", "joint", "AB") == "-"
    # A: 400 / 200, B: 10 / 10. Both are resampled: at the ends 300 / 300 and 5 / 10, 500 / 100 and 15 / 10.
    value, low, high = map(float, re.findall(r"[\d.]+", report.gain(rows, "mix-loss", "joint", "AB")))
    assert value == 1.5 and 0.75 <= low < 1.5 < high <= 3.25
    assert report.gain(rows[rows.score != 300], "mix-loss", "joint", "AB") == "3.00"  # single runs


def test_microrts_has_a_panel_for_each_clip_range_and_the_area_under_the_curves(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "curves_figure", lambda rows, curves, *_: drawn.update(curves=curves))
    keys = [{"setting": s, "env_id": "M-basesWorkers", "seed": 1} for s in ("joint-0", "joint-0.2", "mix-loss-0.2")]
    rows = [{**k, "score": 30, "win_rate": 0.25, "eval_success": 0.5} for k in keys]
    curves = [{**k, "0.500": None, "1.000": 20} for k in keys[:2]] + [{**keys[2], "0.500": 1, "1.000": 2}]
    text = report.joint_loss_microrts(pd.DataFrame(rows), pd.DataFrame(curves)).splitlines()
    assert "| joint-0.2 | 20.0 | 30.0 | 25 | 50 | 1 |" in text and "| mix-loss-0.2 | 1.5 | 30.0 | 25 | 50 | 1 |" in text
    panels = set(zip(drawn["curves"].env_id, drawn["curves"].setting))
    assert panels == {("M, clip 0.2", "joint"), ("M, clip 0.2", "mix-loss"), ("M, no clip", "joint")}


def test_vmpo_has_a_table_of_the_long_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path)
    keys = [{"setting": f"{script}-20M", "env_id": "Ant-v4", "seed": 1} for script in ("vmpo", "ppo_continuous")]
    rows = [{**keys[0], "score": 7000, "eval_return": 7500, "steps": 20_000_000}]
    rows.append({**keys[1], "score": 3000, "eval_return": 3100, "steps": 20_000_000})
    curves = [{**key, **dict.fromkeys(map(str, report.GRID), 1)} for key in keys]
    text = report.vmpo(pd.DataFrame(rows), pd.DataFrame(curves)).splitlines()
    assert "| 20M steps, one seed | Ant-v4 | greedy |" in text
    assert "| vmpo | 7000 | 7500 |" in text and "| ppo_continuous | 3000 | 3100 |" in text
    assert (tmp_path / "figures/vmpo_20M.png").exists()


def test_vmpo_s_ablations_are_read_against_the_default():
    scores = {"coupled": (50, 600), "default": (100, 400)}
    rows = [
        {"setting": f"{setting}-1M", "env_id": env_id, "seed": 1, "score": score}
        for setting, both in scores.items()
        for env_id, score in zip(["HalfCheetah-v4", "Hopper-v4"], both)
    ]
    table = report.vmpo(pd.DataFrame(rows), None)
    assert table.startswith("| 1M steps | HalfCheetah-v4 | Hopper-v4 | over default |\n|---|---|---|---|\n")
    assert "\n| default | 100 | 400 | 1 |\n| coupled | 50 | 600 | 1.00 |" in table  # (1/2 + 3/2) / 2


def test_two_runs_of_one_row_are_refused_unless_they_are_the_same(copy):
    for k, extra in enumerate(["", "", "--clip-coef 0.5"]):
        folder = copy / f"runs/vmpo_paper/{k}/run"
        write_run(folder, "vmpo", "Hopper-v4", 1, [1000], [1.0], 1000)
        config = json.loads((folder / "config.json").read_text())
        config["command"] += extra.split()
        config["command"].remove("--runs-dir"), config["command"].remove(str(folder.parent))
        (folder / "config.json").write_text(json.dumps(config))
        done = run_report(copy, "vmpo_paper", "--runs", copy / "runs")
        assert done.returncode == (2 if extra else 0), done.stderr
    assert done.stderr.startswith("error: ") and "--clip-coef 0.5" in done.stderr and done.stderr.count("\n") == 1


def test_a_setting_whose_seeds_had_other_flags_is_pointed_out(copy):
    """As when a sweep's flags change while rows of the old ones are committed."""
    path = copy / "benchmarks/results/vmpo_paper.csv"
    text = path.read_text()
    assert "notice" not in run_report(copy, "vmpo_paper", "--runs", copy / "none").stderr
    path.write_text(text.replace("HalfCheetah-v4 --seed 1 ", "HalfCheetah-v4 --gamma 0.9 --seed 1 "))
    assert "notice: the seeds of vmpo, HalfCheetah-v4" in run_report(copy, "vmpo_paper", "--runs", copy / "none").stderr


def test_a_deleted_row_takes_its_curve_with_it(copy):
    path, curves = (copy / f"benchmarks/results/vmpo_paper{name}" for name in (".csv", "_curves.csv.gz"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("vmpo,HalfCheetah-v4,1,")))
    done = run_report(copy, "vmpo_paper", "--runs", copy / "none")
    assert done.returncode == 0, done.stderr
    assert len(path.read_text().splitlines()) == len(lines) - 1 == len(gzip.open(curves).readlines())


def test_the_documents_show_what_the_committed_results_say(copy):
    documents = [path for path in (copy / "README.md", *(copy / "docs").glob("*.md"))]
    text, written = "".join(path.read_text() for path in documents), set()
    for name in report.REPORTS:
        if f"<!-- begin {name}" in text:
            done = run_report(copy, name, "--runs", copy / "none")
            assert done.returncode == 0, done.stderr
            written.add(name)
    assert written >= {function.__name__ for function in report.SWEEPS}
    for path in documents:
        assert path.read_text() == (ROOT / path.relative_to(copy)).read_text()
    for path in (ROOT / "benchmarks/figures").iterdir():  # to the byte, by the pinned matplotlib
        assert (copy / "benchmarks/figures" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_readme_s_overview_and_speeds_are_the_committed_numbers(copy):
    (copy / "README.md").write_text(
        "".join(f"<!-- begin {n} -->\n<!-- end {n} -->\n" for n in ("readme", "readme_speed"))
    )
    for name in ("readme", "readme_speed"):
        done = run_report(copy, name)
        assert done.returncode == 0, done.stderr
    text = (copy / "README.md").read_text()
    overview, figure, speeds = (part.splitlines() for part in re.split("\n\n|<!-- end readme -->", text)[:3])
    rows = pd.read_csv(ROOT / "benchmarks/results/ppo_continuous.csv").groupby("env_id").score
    score, count = (f(rows.get_group("HalfCheetah-v4")) for f in (np.mean, len))
    assert f"| {score:.0f} [" in overview[3] and f"], {count} seeds | CleanRL: 1443 ± 46" in overview[3]
    assert len(overview) == 3 + 6 and figure == ["![Learning curves](benchmarks/figures/readme_curves.png)"]
    assert all(re.search(r"\| \[docs/\w+\.md\]\(docs/\w+\.md\) \|$", line) for line in overview[3:])
    measured = json.loads((ROOT / "benchmarks/results/speed.json").read_text())["measurements"]
    full = sorted(m["full"] for m in measured if m["env_id"] == "Humanoid-v4")
    assert f"| {full[1]:,} ({full[0]:,}-{full[2]:,}) |" in "\n".join(speeds)
    assert (copy / "benchmarks/figures/readme_curves.png").read_bytes() == (
        ROOT / "benchmarks/figures/readme_curves.png"
    ).read_bytes()


def test_a_sweep_of_one_s_own_gets_curves_and_scores_in_its_folder(copy):
    for seed in (1, 2):
        write_run(copy / f"runs/own/a{seed}/run", "a", "Hopper-v4", seed, [500, 1000], [1.0, seed], 1000)
    done = run_report(copy, "own", "--runs", copy / "runs")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in copy.glob("runs/own/report.*")} == {"report.png", "report.csv", "report.html"}
    assert pd.read_csv(copy / "runs/own/report.csv").IQM.tolist() == [1.25]
    assert (copy / "README.md").read_text() == (ROOT / "README.md").read_text()


@pytest.mark.parametrize("argv", [["nonsense"], ["ppo_table1", "--runs", "nowhere"]])
def test_wrong_input_is_one_line_and_writes_nothing(copy, argv):
    for path in copy.glob("benchmarks/results/ppo_table1*"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    done = run_report(copy, *argv)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_a_strip_has_a_video_s_frames_from_the_first_to_the_last(tmp_path):
    script, video, picture = ROOT / "benchmarks/frame_strip.py", tmp_path / "a.mp4", tmp_path / "a.png"

    def strip():
        return subprocess.run([sys.executable, script, video, picture, "--frames", "3"], capture_output=True, text=True)

    done = strip()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith(f"error: {video}: ")
    frames = [np.full((400, 400, 3), 10 * k, dtype=np.uint8) for k in range(21)]
    ImageSequenceClip(frames, fps=20).write_videofile(str(video), logger=None)
    assert strip().returncode == 0
    pixels = 255 * imread(picture)[:, :, 0]
    assert pixels.shape == (200, 600)
    np.testing.assert_allclose(pixels[100, [100, 300, 500]], [0, 100, 200], atol=4)


def test_phases_of_a_training(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "phases.py", "ppo_continuous.py", "--env-id", "Hopper-v4"]
    flags = f"--no-compile --total-timesteps 512 --num-envs 2 --num-steps 64 --eval-episodes 1 --runs-dir {tmp_path}"
    run = subprocess.run([*command, *flags.split()], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    head, _, row = (line.strip("| ").split(" | ") for line in run.stdout.splitlines()[-3:])
    ms = {name: float(cell.removesuffix(" ms").replace(",", "")) for name, cell in zip(head, row)}
    assert list(ms) == ["rollout", "batch", "update", "compiling", "steps/s"] and ms["compiling"] < 1 < ms["rollout"]
    assert ms["steps/s"] == pytest.approx(128_000 / (ms["rollout"] + ms["batch"] + ms["update"]), rel=0.02)
    wrong = subprocess.run([*command[:2], "ppo.py"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1) and "ppo.py" in wrong.stderr
