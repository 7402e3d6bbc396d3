"""From runs to the README's tables: the numbers, and the same bytes each time."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from moviepy import ImageSequenceClip

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


def test_the_readme_has_a_block_for_each_report_and_a_sweep_writes_it():
    readme = (ROOT / "README.md").read_text()
    for name in report.REPORTS:
        assert report.replace_block(readme, name, "new").count("new\n<!-- end") == 1
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
        rows.append({**key, "score": str(score), "steps": "1000"})
        curves.append({**key, **{str(k): str(score) for k in range(report.POINTS)}})
    text = report.ppo_table1(rows, curves, tmp_path)
    # A: random 10, best 30; B: random -50, best -40. So none has 0, -.25, .5, -.5, and clip-0.2 has .5, 1, 1, .75; the
    # middle half of four is two; an interval of two runs is between both being the worse and both the better.
    assert "| none | -0.39 | -0.06 [-0.38, 0.25] | -0.12 [-0.38, 0.25] | 4 of 21 |" in text
    assert "| clip-0.2 | 0.82 | 0.81 [0.62, 1.00] | 0.88 [0.62, 1.00] | 4 of 21 |" in text
    assert "| none | 7.5 ± 2.5 | -50.0 ± 5.0 |" in text


def test_the_changes_to_table_1_stand_below_its_own_results(tmp_path, monkeypatch):
    def row(setting, env_id, score):
        return {"setting": setting, "env_id": env_id, "score": str(score)}

    (tmp_path / "results").mkdir()
    (tmp_path / "results/random_policy.csv").write_text("env_id,mean\nA,0.0\nB,-10.0\n")
    monkeypatch.setattr(report, "HERE", tmp_path)
    table1 = [row("clip-0.2", "A", 2), row("clip-0.2", "A", 6), row("none", "A", 9), row("fixed-3", "A", 20)]
    table1 += [row("clip-0.2", "B", -5), row("clip-0.2", "B", -5), row("fixed-3", "B", 0)]
    report.write_csv(tmp_path / "results/ppo_table1.csv", table1)
    rows = [row("clip-0.2-annealed", "A", 16), row("clip-0.2-annealed", "A", 16), row("fixed-3-annealed", "A", 8)]
    # A from 0 to 20, B from -10 to 0: clip-0.2 has .1, .3 and .5, .5; annealed .8, .8 and the same .5, .5
    assert report.ppo_table1_order(rows, [], tmp_path).splitlines() == [
        "| changed | objective | A | score of Table 1 with these |",
        "|---|---|---|---|",
        "| nothing | clip-0.2 | 4 ± 2 | 0.35 [0.30, 0.40] |",
        "| nothing | adaptive-0.01 | - | - |",
        "| nothing | fixed-3 | 20 ± 0 | 1.00 |",
        "| annealed | clip-0.2 | 16 ± 0 | 0.65 [0.65, 0.65] |",
        "| annealed | adaptive-0.01 | - | - |",
        "| annealed | fixed-3 | 8 ± 0 | 0.70 |",
    ]


def test_a_real_run_of_another_script_has_a_row_and_a_table(tmp_path):
    """hppo_hybrid.py has no --backend, and its evaluation has a rate of success."""
    import hppo_hybrid

    flags = "--num-envs 4 --num-steps 64 --num-minibatches 2 --total-timesteps 2048 --eval-episodes 2 --no-compile"
    flags = f"{flags} --env-id environments.hybrid:HybridMoving-v0 --exp-name separate-chosen --runs-dir {tmp_path}"
    hppo_hybrid.main(hppo_hybrid.parse_args(flags.split()))
    row, curve = report.read_run(next(tmp_path.iterdir()))
    assert row["eval_success"] in ("0.0000", "0.5000", "1.0000")
    longer = [{**x, "setting": "separate-chosen-10M"} for x in (row, curve)]  # has a line and an axis of its own
    text = report.hppo([row, longer[0]], [curve, longer[1]], tmp_path / "figures")
    assert "| HybridMoving-v0 | 0.0M |" in text and "| HybridMoving-v0, 10M | 0.0M |" in text
    assert (tmp_path / "figures/hppo_curves.png").exists()


def test_the_tournament_has_a_column_for_each_bot_and_the_mean_over_the_seeds():
    rows = [
        {"setting": "joint-0.2", "env_id": "M", "seed": seed, "opponent": bot, "win_rate": rate}
        for seed, bot, rate in [("1", "coacAI", "0.900"), ("2", "coacAI", "1.000"), ("1", "passiveAI", "0.500")]
    ]
    head, _, line, _ = report.tournament(rows)
    assert head == "| M: wins, %, against | coacAI | passiveAI |"
    assert line == "| joint-0.2 | 95 [90, 100] | 50 |"


def test_a_loss_stands_beside_joint_by_the_ratio_of_their_means_in_each_environment():
    scores = {("joint", "A"): (100, 300), ("joint", "B"): (10, 10), ("mix-loss", "A"): (300, 500)}
    scores[("mix-loss", "B")] = (5, 15)
    rows = [{"setting": s, "env_id": e, "score": str(v)} for (s, e), values in scores.items() for v in values]
    assert report.gain(rows, "joint", "joint", "AB") == "1"
    assert report.gain(rows, "separate", "joint", "AB") == "-"
    # A: 400 / 200, B: 10 / 10. Both are resampled: at the ends 300 / 300 and 5 / 10, 500 / 100 and 15 / 10.
    value, low, high = map(float, re.findall(r"[\d.]+", report.gain(rows, "mix-loss", "joint", "AB")))
    assert value == 1.5 and 0.75 <= low < 1.5 < high <= 3.25
    assert report.gain([r for r in rows if r["score"] != "300"], "mix-loss", "joint", "AB") == "3.00"  # single runs


def test_microrts_has_a_panel_for_each_clip_range_and_the_area_under_the_curves(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report, "curves_figure", lambda curves, *_: drawn.update(curves=curves))
    keys = [{"setting": s, "env_id": "M-basesWorkers", "seed": "1"} for s in ("joint-0", "joint-0.2", "mix-loss-0.2")]
    rows = [{**k, "score": "30", "win_rate": "0.25", "eval_success": "0.5000"} for k in keys]
    curves = [{**k, "0.500": "", "1.000": "20"} for k in keys[:2]] + [{**keys[2], "0.500": "1", "1.000": "2"}]
    text = report.joint_loss_microrts(rows, curves, tmp_path).splitlines()
    assert "| joint-0.2 | 20.0 | 30.0 | 25 | 50 | 1 |" in text and "| mix-loss-0.2 | 1.5 | 30.0 | 25 | 50 | 1 |" in text
    panels = [(curve["env_id"], curve["setting"]) for curve in drawn["curves"]]
    assert panels == [("M, clip 0.2", "joint"), ("M, clip 0.2", "mix-loss"), ("M, no clip", "joint")]


def test_vmpo_has_a_table_of_the_long_pair(tmp_path):
    keys = [{"setting": f"{script}-20M", "env_id": "Ant-v4", "seed": "1"} for script in ("vmpo", "ppo_continuous")]
    rows = [{**keys[0], "score": "7000", "eval_return": "7500", "steps": "20000000"}]
    rows.append({**keys[1], "score": "3000", "eval_return": "3100", "steps": "20000000"})
    curves = [{**key, **{f"{k}": "1" for k in range(report.POINTS)}} for key in keys]
    text = report.vmpo(rows, curves, tmp_path / "figures").splitlines()
    assert "| 20M steps, one seed | Ant-v4 | greedy |" in text
    assert "| vmpo | 7000 | 7500 |" in text and "| ppo_continuous | 3000 | 3100 |" in text
    assert (tmp_path / "figures/vmpo_20M.png").exists()


def test_vmpo_s_ablations_are_read_against_the_default(tmp_path):
    scores = {"coupled": (50, 600), "default": (100, 400)}
    rows = [
        {"setting": f"{setting}-1M", "env_id": env_id, "seed": "1", "score": str(score)}
        for setting, both in scores.items()
        for env_id, score in zip(["HalfCheetah-v4", "Hopper-v4"], both)
    ]
    table = report.vmpo(rows, [], tmp_path)
    assert table.startswith("| 1M steps | HalfCheetah-v4 | Hopper-v4 | over default |\n|---|---|---|---|\n")
    assert "\n| default | 100 | 400 | 1 |\n| coupled | 50 | 600 | 1.00 |" in table  # (1/2 + 3/2) / 2


def test_two_runs_of_one_row_are_refused_unless_they_are_the_same(copy):
    for k, extra in enumerate(["", "", "--clip-coef 0.5"]):
        folder = copy / f"runs/ppo_table1/{k}/run"
        write_run(folder, "none", "Hopper-v4", 1, [1000], [1.0], 1000)
        config = json.loads((folder / "config.json").read_text())
        config["command"] += extra.split()
        config["command"].remove("--runs-dir"), config["command"].remove(str(folder.parent))
        (folder / "config.json").write_text(json.dumps(config))
        done = run_report(copy, "ppo_table1", "--runs", copy / "runs")
        assert done.returncode == (2 if extra else 0), done.stderr
    assert done.stderr.startswith("error: ") and "--clip-coef 0.5" in done.stderr and done.stderr.count("\n") == 1


def test_a_setting_whose_seeds_had_other_flags_is_pointed_out(copy):
    """As when a sweep's flags change while rows of the old ones are committed."""
    path = copy / "benchmarks/results/ppo_table1.csv"
    text = path.read_text()
    assert "notice" not in run_report(copy, "ppo_table1", "--runs", copy / "none").stderr
    path.write_text(text.replace("Hopper-v4 --seed 1 ", "Hopper-v4 --gamma 0.9 --seed 1 "))
    assert "notice: the seeds of clip-0.2, Hopper-v4" in run_report(copy, "ppo_table1", "--runs", copy / "none").stderr


def test_a_deleted_row_takes_its_curve_with_it(copy):
    path, curves = (copy / f"benchmarks/results/ppo_table1{name}" for name in (".csv", "_curves.csv.gz"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("none,Reacher-v4,1,")))
    done = run_report(copy, "ppo_table1", "--runs", copy / "none")
    assert done.returncode == 0, done.stderr
    assert len(path.read_text().splitlines()) == len(lines) - 1 == len(gzip.open(curves).readlines())


def test_the_readme_shows_what_the_committed_results_say(copy):
    for name in report.REPORTS:
        if (copy / f"benchmarks/results/{name}.csv").exists():
            done = run_report(copy, name, "--runs", copy / "none")
            assert done.returncode == 0, done.stderr
    assert (copy / "README.md").read_text() == (ROOT / "README.md").read_text()
    for path in (ROOT / "benchmarks/figures").iterdir():  # to the byte, by the pinned matplotlib
        assert (copy / "benchmarks/figures" / path.name).read_bytes() == path.read_bytes(), path.name


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
