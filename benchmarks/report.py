"""From finished runs to what is committed and read: results, figures and the README's tables.

    python benchmarks/report.py ppo_table1

takes the finished runs under runs/ppo_table1 (those that are there: rows of earlier ones stay) into

    results/ppo_table1.csv              one row a run
    results/ppo_table1_curves.csv.gz    its learning curve, 200 points

and from these two files alone draws figures/ppo_table1_*.png and writes the block of README.md between the comments
`begin ppo_table1` and `end ppo_table1`. The same inputs give the same bytes.

A run's score is the mean return of its last 100 training episodes; its seconds and sps are those of the training
alone, on whatever machine, with whatever beside it. Statistics over runs follow Agarwal et al. 2021 (arXiv:2108.13264):
the interquartile mean, and 95 % percentile bootstrap intervals that resample the seeds of each environment separately
(2,000 resamples). They are scipy's trim_mean and bootstrap: rliable 1.2.0 asks for arch, which brings statsmodels and
pandas, for the same numbers. With few seeds mind what they are: of 3 the interquartile mean is the mean, and the
interval their range, which holds the true mean in 3 cases of 4 (7 environments x 3 seeds together: in 6 of 7).
"""

import csv
import gzip
import io
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
POINTS = 200  # of a curve; each the mean return of the episodes that ended in the last 1 / 50 of all steps
BLUE, GREEN, ORANGE, RED, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#666666"  # Okabe and Ito's palette


@dataclass
class Args:
    name: tyro.conf.Positional[str]
    """one of the reports at the end of this file"""
    runs: Path = HERE / "runs"
    """parent folder of the sweeps' runs"""


# --- From runs to results -----------------------------------------------------------------------------------------


def read_run(folder: Path) -> tuple[dict, dict]:
    """A finished run's row, and its curve."""
    config, result = (json.loads((folder / name).read_text()) for name in ("config.json", "result.json"))
    episodes = np.loadtxt(folder / "episodes.csv", delimiter=",", skiprows=1, ndmin=2)
    steps, returns = episodes[:, 0], episodes[:, 1]
    args, (script, *flags) = config["args"], config["command"]
    if "--runs-dir" in flags:
        at = flags.index("--runs-dir")
        del flags[at : at + 2]
    env_id = args["env_id"].split(":")[-1]  # a task's name, not its module's
    key = {"setting": args["exp_name"], "env_id": env_id, "seed": str(args["seed"])}
    row = {
        **key,
        "score": f"{returns[-100:].mean():.2f}",
        "eval_return": f"{np.mean(result['eval_returns']):.3f}",
        "eval_success": f"{result['eval_success']:.4f}" if "eval_success" in result else "",
        "win_rate": f"{result['win_rate']:.2f}" if "win_rate" in result else "",
        "steps": str(result["global_step"]),
        "seconds": f"{result['seconds']:.0f}",
        "sps": f"{result['global_step'] / result['seconds']:.0f}",
        "backend": args.get("backend", ""),
        "device": config["device"],
        "torch": config["versions"]["torch"],
        "git_commit": config["git_commit"] or "",
        "command": shlex.join(["python", Path(script).name, *flags]),
    }
    curve, total = dict(key), result["global_step"]
    for k in range(1, POINTS + 1):
        end = k * total / POINTS
        inside = (steps > end - total / 50) & (steps <= end)
        curve[f"{k / POINTS:.3f}"] = f"{returns[inside].mean():.2f}" if inside.any() else ""
    return row, curve


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def replace_file(path: Path, data: bytes):
    """Write a file so that at any moment either the old or the new one is there, whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_csv(path: Path, rows: list[dict]):
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    replace_file(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def read_csv(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        return list(csv.DictReader(file))


def natural(text: str) -> list:
    """Sorts clip-0.3 before clip-10."""
    return [(0, float(part)) if re.match(r"\d", part) else (1, part) for part in re.split(r"(\d+(?:\.\d+)?)", text)]


def key_of(row: dict) -> tuple[str, str, str]:
    return row["setting"], row["env_id"], row["seed"]


def collect(name: str, runs: Path) -> tuple[list[dict], list[dict]]:
    """Rows and curves of the committed results and of the finished runs, which are written back."""
    paths = HERE / f"results/{name}.csv", HERE / f"results/{name}_curves.csv.gz"
    found = [read_run(path.parent) for path in sorted((runs / name).glob("*/[!.]*/result.json"))]
    for key, same in groupby(sorted(found, key=lambda run: key_of(run[0])), lambda run: key_of(run[0])):
        commands = sorted({row["command"] for row, _ in same})
        if len(commands) > 1:
            fail(f"{name}: {' '.join(key)} was run in different ways, {' and '.join(commands)}; keep one of them")
    rows, curves = (
        {key_of(r): r for r in read_csv(path) + new}
        for path, new in zip(paths, [[row for row, _ in found], [curve for _, curve in found]])
    )
    if not rows:
        fail(f"{name}: no results yet, and no finished run under {runs / name}")
    keys = sorted(rows, key=lambda key: (natural(key[0]), key[1], int(key[2])))
    tables = [rows[key] for key in keys], [curves[key] for key in keys if key in curves]
    for (setting, env_id), same in groupby(tables[0], lambda r: (r["setting"], r["env_id"])):
        commands = {re.sub(r"--seed \d+", "--seed N", row["command"]) for row in same}
        if len(commands) > 1:  # a committed row is from before the sweep's flags were changed
            print(
                f"notice: the seeds of {setting}, {env_id} differ in their flags: {sorted(commands)}", file=sys.stderr
            )
    paths[0].parent.mkdir(exist_ok=True)
    for path, table in zip(paths, tables):
        write_csv(path, table)
    return tables


def ordered(values) -> list:
    return list(dict.fromkeys(values))


def values_of(rows: list[dict], setting: str, env_id: str, column: str = "score") -> np.ndarray:
    """One number for each of a setting's seeds in an environment, [seeds]."""
    chosen = [r.get(column) for r in rows if r["setting"] == setting and r["env_id"] == env_id]
    return np.array([float(value) for value in chosen if value])


# --- Statistics ---------------------------------------------------------------------------------------------------


def mean(*strata, axis=-1):
    return np.concatenate(strata, axis).mean(axis)


def iqm(*strata, axis=-1):
    """The interquartile mean: of the middle half of all runs."""
    return stats.trim_mean(np.concatenate(strata, axis), 0.25, axis=axis)


def interval(strata: list[np.ndarray], statistic) -> tuple:
    """The 95 % interval of statistic(*strata), each stratum [runs, ...] resampled by itself; nan for single runs."""
    if min(len(s) for s in strata) < 2:
        return np.full(strata[0].shape[1:], np.nan), np.full(strata[0].shape[1:], np.nan)
    options = {"n_resamples": 2000, "method": "percentile", "vectorized": True, "axis": 0}
    found = stats.bootstrap(strata, statistic, rng=np.random.default_rng(0), **options).confidence_interval
    return found.low, found.high


def cell(
    rows: list[dict], setting: str, env_id: str, column: str = "score", scale: float = 1, decimals: int = 0
) -> str:
    """ "mean [low, high]" over a setting's seeds, for a table."""
    values = scale * values_of(rows, setting, env_id, column)
    if not values.size:
        return "-"
    return with_interval([values], mean, decimals)


def with_interval(strata: list[np.ndarray], statistic, decimals: int) -> str:
    """ "value [low, high]", without the interval where single runs have none."""
    low, high = interval(strata, statistic)
    value = f"{statistic(*strata):.{decimals}f}"
    return value if np.isnan(low) else f"{value} [{low:.{decimals}f}, {high:.{decimals}f}]"


def ratio(*strata, axis=-1):
    """What a setting gains over another: the mean over the environments of (mean of its runs) / (mean of the other's).
    `strata` are its runs, one environment each, then the other's."""
    half = len(strata) // 2
    return np.mean([runs.mean(axis) / base.mean(axis) for runs, base in zip(strata[:half], strata[half:])], axis=0)


def gain(rows: list[dict], setting: str, base: str, env_ids) -> str:
    """ratio with its interval; "-" until each environment has runs of both."""
    strata = [values_of(rows, s, env_id) for s in (setting, base) for env_id in env_ids]
    if not all(values.size for values in strata):
        return "-"
    return "1" if setting == base else with_interval(strata, ratio, 2)


# --- Figures ------------------------------------------------------------------------------------------------------


def tidy(axis):
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def save(fig, path: Path):
    path.parent.mkdir(exist_ok=True)
    fig.tight_layout()
    picture = io.BytesIO()
    fig.savefig(picture, dpi=110, metadata={"Software": None}, bbox_inches="tight")
    replace_file(path, picture.getvalue())
    plt.close(fig)


def curves_figure(curves: list[dict], rows: list[dict], colours: dict, path: Path, peers: dict | None = None):
    """One axis an environment: IQM over seeds and its interval of each setting in `colours` {setting: colour}; with a
    single setting the seeds too; `peers` {env_id: (mean, std)} as a band."""
    env_ids = ordered(curve["env_id"] for curve in curves)
    columns = min(len(env_ids), 4)
    height = -(-len(env_ids) // columns)
    fig, axes = plt.subplots(height, columns, figsize=(3.1 * columns, 2.9 * height), squeeze=False)
    for axis, env_id in zip(axes.flat, env_ids):
        seeds = set()
        for setting, colour in colours.items():
            chosen = [c for c in curves if c["env_id"] == env_id and c["setting"] == setting]
            if not chosen:
                continue
            seeds |= {curve["seed"] for curve in chosen}
            (row, *_) = [r for r in rows if r["env_id"] == env_id and r["setting"] == setting]
            y = np.array([[float(value or "nan") for value in list(curve.values())[3:]] for curve in chosen])
            x = np.arange(1, POINTS + 1) / POINTS * int(row["steps"]) / 1e6
            full = ~np.isnan(y).any(0)  # every seed has an episode by then
            x, y = x[full], y[:, full]
            if len(colours) == 1:
                for k, seed in enumerate(y):
                    axis.plot(x, seed, color=GREY, lw=0.6, alpha=0.6, label="a seed" if not k else None)
            low, high = interval([y], iqm)
            axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
            axis.plot(x, iqm(y, axis=0), color=colour, lw=1.5, label=setting if len(colours) > 1 else "IQM, 95 %")
        if peers and env_id in peers:
            centre, std = peers[env_id]
            axis.axhline(centre, color=RED, ls="--", lw=1.2, label="CleanRL at the end")
            axis.axhspan(centre - std, centre + std, color=RED, alpha=0.12, lw=0)
        title = f"{env_id}, {len(seeds)} seed{'s' * (len(seeds) != 1)}"
        axis.set_title(title, fontsize=min(10, 300 / len(title)))  # 30 letters of size 10 fill the width
        axis.set(xlabel="environment steps (millions)", xlim=(0, None))
        tidy(axis)
    for row_axes in axes:
        row_axes[0].set_ylabel("episodic return")
    spare = list(axes.flat)[len(env_ids) :]
    for axis in spare:
        axis.axis("off")
    entries = {name: handle for axis in axes.flat for handle, name in zip(*axis.get_legend_handles_labels())}
    options = {"frameon": False, "handles": list(entries.values()), "labels": list(entries)}
    if spare:
        spare[0].legend(loc="center", **options)
    else:  # below the panels, where no curve is
        fig.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2 * columns, **options)
    save(fig, path)


# --- ppo_continuous: the defaults beside CleanRL --------------------------------------------------------------------

# Mean and standard deviation over 3 seeds of the last 100 episodes at 1M steps, ppo_continuous_action.py on the v4
# environments: the table in CleanRL's documentation, docs.cleanrl.dev/rl-algorithms/ppo.
CLEANRL = {"HalfCheetah-v4": (1442.6, 46.0), "Hopper-v4": (2382.9, 272.0), "Walker2d-v4": (2288.0, 572.0)}


def ppo_continuous(rows: list[dict], curves: list[dict], figures: Path) -> str:
    curves_figure(curves, rows, {"ppo_continuous": BLUE}, figures / "ppo_continuous.png", CLEANRL)
    lines = ["| environment | seeds | score of each | mean ± std | CleanRL |", "|---|---|---|---|---|"]
    for env_id in ordered(r["env_id"] for r in rows):
        scores = values_of(rows, "ppo_continuous", env_id)
        peer, each = "{:.0f} ± {:.0f}".format(*CLEANRL[env_id]), ", ".join(f"{score:.0f}" for score in scores)
        lines.append(f"| {env_id} | {len(scores)} | {each} | {scores.mean():.0f} ± {scores.std():.0f} | {peer} |")
    return "\n".join([*lines, "", "![Learning curves](benchmarks/figures/ppo_continuous.png)"])


# --- ppo_table1: the surrogate objectives ---------------------------------------------------------------------------

TABLE1 = {  # Schulman et al. 2017, Table 1
    "none": -0.39,
    **{"clip-0.1": 0.76, "clip-0.2": 0.82, "clip-0.3": 0.70},
    **{"adaptive-0.003": 0.68, "adaptive-0.01": 0.74, "adaptive-0.03": 0.71},
    **{"fixed-0.3": 0.62, "fixed-1": 0.71, "fixed-3": 0.72, "fixed-10": 0.69},
}
BEST_OF_KIND = {"none": GREY, "clip-0.2": BLUE, "adaptive-0.01": GREEN, "fixed-3": ORANGE}  # by the paper


def colour_of(setting: str) -> str:
    return next(c for name, c in BEST_OF_KIND.items() if name.split("-")[0] == setting.split("-")[0])


def random_and_best(table1: list[dict]) -> dict[str, tuple[float, float]]:
    """The returns that are a score of 0 and of 1, for each environment."""
    random = {r["env_id"]: float(r["mean"]) for r in read_csv(HERE / "results/random_policy.csv")}
    env_ids = sorted({r["env_id"] for r in table1})
    return {e: (random[e], max(float(r["score"]) for r in table1 if r["env_id"] == e)) for e in env_ids}


def normalise(returns: np.ndarray, random: float, best: float) -> np.ndarray:
    return (returns - random) / (best - random)


def ppo_table1(rows: list[dict], curves: list[dict], figures: Path) -> str:
    ends = random_and_best(rows)
    env_ids, settings = list(ends), [s for s in TABLE1 if any(r["setting"] == s for r in rows)]
    normalised = {
        s: [normalise(values_of(rows, s, e), *ends[e]) for e in env_ids if values_of(rows, s, e).size] for s in settings
    }
    curves_figure(curves, rows, BEST_OF_KIND, figures / "ppo_table1_curves.png")
    scores_figure(normalised, figures / "ppo_table1_scores.png")

    lines = ["| objective | paper | mean, 95 % interval | IQM, 95 % interval | runs |", "|---|---|---|---|---|"]
    for setting in settings:
        strata = normalised[setting]
        cells = [with_interval(strata, statistic, 2) for statistic in (mean, iqm)]
        runs = sum(map(len, strata))
        lines.append(f"| {setting} | {TABLE1[setting]:.2f} | {' | '.join(cells)} | {runs} of {3 * 7} |")
    raw = [f"| objective | {' | '.join(env_ids)} |", "|---" * (len(env_ids) + 1) + "|"]
    for setting in settings:
        cells = []
        for env_id in env_ids:
            values, decimals = values_of(rows, setting, env_id), precision(ends[env_id][1])
            spread = f" ± {values.std():.{decimals}f}" if values.size > 1 else ""
            cells.append(f"{values.mean():.{decimals}f}{spread}" if values.size else "-")
        raw.append(f"| {setting} | {' | '.join(cells)} |")
    for k, name in enumerate(("random", "best run")):
        raw.append(f"| {name} | {' | '.join(f'{ends[e][k]:.{precision(ends[e][1])}f}' for e in env_ids)} |")
    figures_md = [f"![{n}](benchmarks/figures/ppo_table1_{n}.png)" for n in ("scores", "curves")]
    total = 3 * 7 * len(TABLE1)
    partial = [f"So far {len(rows)} of the {total} runs are done.", ""] if len(rows) < total else []
    caption = "Returns behind these scores, mean ± standard deviation over the seeds:"
    return "\n".join([*partial, *lines, "", caption, "", *raw, "", *figures_md])


def ppo_table1_none(rows: list[dict], curves: list[dict], figures: Path) -> str:
    table1 = [r for r in read_csv(HERE / "results/ppo_table1.csv") if r["env_id"] == "HalfCheetah-v4"]
    ends = random_and_best(table1)["HalfCheetah-v4"]
    as_there = [{**r, "setting": f"{r['setting']} (Table 1)"} for r in table1 if r["setting"] in ("none", "clip-0.2")]
    lines = ["| HalfCheetah | return of each seed | normalised score |", "|---|---|---|"]
    for setting in ordered(r["setting"] for r in as_there + rows):
        returns = np.array([float(r["score"]) for r in as_there + rows if r["setting"] == setting])
        each, score = ", ".join(f"{value:.0f}" for value in returns), normalise(returns, *ends).mean()
        objective, changed = re.fullmatch(r"(none|clip-0.2)(.*)", setting).groups()
        lines.append(f"| {objective}{changed.replace('-', ', ', 1).replace('-', ' ')} | {each} | {score:.2f} |")
    return "\n".join(lines)


def ppo_table1_order(rows: list[dict], curves: list[dict], figures: Path) -> str:
    table1, changed = read_csv(HERE / "results/ppo_table1.csv"), ordered(r["env_id"] for r in rows)
    ends, objectives = random_and_best(table1), [s for s in BEST_OF_KIND if s != "none"]
    lines = [f"| changed | objective | {' | '.join(changed)} | score of Table 1 with these |"]
    lines.append("|---" * (3 + len(changed)) + "|")
    for change in ordered(["", *(re.sub("|".join(objectives), "", r["setting"]) for r in rows)]):
        for objective in objectives:
            returns = {e: values_of(table1, objective, e) for e in ends}
            returns |= {e: values_of(table1 + rows, objective + change, e) for e in changed}
            cells = [f"{returns[e].mean():.0f} ± {returns[e].std():.0f}" if returns[e].size else "-" for e in changed]
            whole = all(values.size for values in returns.values())
            score = with_interval([normalise(returns[e], *ends[e]) for e in ends], mean, 2) if whole else "-"
            name = change[1:].replace("-", " ") or "nothing"
            lines.append(f"| {name} | {objective} | {' | '.join(cells)} | {score} |")
    return "\n".join(lines)


def precision(value: float) -> int:
    """Decimals that a return of this size deserves."""
    return 0 if abs(value) >= 100 else 1


def scores_figure(normalised: dict, path: Path):
    """Left the mean score of each setting with its interval, beside the paper's; right the performance profiles."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for k, (setting, strata) in enumerate(normalised.items()):
        low, high = interval(strata, mean)
        left.plot([low, high], [k, k], color=colour_of(setting), lw=5, alpha=0.4, solid_capstyle="butt")
        left.plot(
            mean(*strata),
            k,
            "o",
            color=colour_of(setting),
            label=None if k else "ours" if np.isnan(low) else "ours, 95 % interval",
        )
        left.plot(TABLE1[setting], k, "D", mfc="none", color="black", ms=5, label=None if k else "paper")
    left.set_yticks(range(len(normalised)), normalised)
    left.invert_yaxis()
    left.set_xlabel("normalised score, mean over all runs (random policy 0, best run 1)")
    left.legend(frameon=False, loc="lower left")
    lowest = min(0, *(s.min() for strata in normalised.values() for s in strata))
    threshold = np.linspace(lowest, 1, 241)
    for setting in (s for s in BEST_OF_KIND if s in normalised):
        strata, colour = normalised[setting], BEST_OF_KIND[setting]
        label = f"{setting}, {sum(map(len, strata))} runs"
        above = [(s[:, None] >= threshold).astype(float) for s in strata]
        low, high = interval(above, mean)
        right.fill_between(threshold, low, high, color=colour, alpha=0.15, lw=0, step="post")
        right.step(threshold, mean(*above, axis=0), color=colour, where="post", label=label)
    right.set(xlabel="normalised score τ", ylabel="fraction of runs with a score of at least τ", ylim=(0, 1.02))
    right.legend(frameon=False, loc="center")
    for axis in (left, right):
        tidy(axis)
    save(fig, path)


# --- hppo: discrete choices with continuous parameters ----------------------------------------------------------------

# Success rates of H-PPO in percent: Fan et al. 2019 (Moving, Catching Point), HyAR (Li et al. 2022: Hard Move), whose
# environments are not these. Platform: the return in HyAR.
HPPO = {
    "HybridMoving-v0": "90.5 ± 6.8",
    "HybridCatchPoint-v0": "96.3 ± 4.8 (HyAR: 69)",
    **{"HybridHardMove4-v0": "9", "HybridHardMove6-v0": "5", "HybridHardMove8-v0": "4", "HybridHardMove10-v0": "5"},
    "gym_platform:Platform-v0": "return 0.80",  # PyPI's, to which HybridPlatform-v0 is equal
    "HybridPlatform-v0": "return 0.80",
}
LOSSES = {"separate-chosen": BLUE, "separate-all": GREEN, "joint-chosen": ORANGE, "joint-all": RED}


def longer(row: dict) -> dict:
    """A row or curve of separate-chosen-10M as one of separate-chosen in an environment of its own."""
    setting, _, steps = row["setting"].partition("chosen-")
    return {**row, "setting": f"{setting}chosen", "env_id": f"{row['env_id']}, {steps}"} if steps else row


def hppo(rows: list[dict], curves: list[dict], figures: Path) -> str:
    rows = list(map(longer, rows))
    curves = sorted(map(longer, curves), key=lambda c: natural(c["env_id"]))
    main = [r for r in rows if r["setting"] == "separate-chosen"]
    env_ids = sorted(ordered(r["env_id"] for r in main), key=natural)
    lines = ["| environment | steps | success, % | return | seeds | published H-PPO |", "|---|---|---|---|---|---|"]
    for env_id in env_ids:
        steps = next(int(r["steps"]) for r in main if r["env_id"] == env_id)
        success = cell(rows, "separate-chosen", env_id, "eval_success", 100, 1)
        score = cell(rows, "separate-chosen", env_id, "eval_return", 1, 3)
        seeds = len(values_of(main, "separate-chosen", env_id))
        lines.append(f"| {env_id} | {steps / 1e6:.1f}M | {success} | {score} | {seeds} | {HPPO.get(env_id, '-')} |")
    compared = [e for e in env_ids if any(r["env_id"] == e and r["setting"] != "separate-chosen" for r in rows)]
    header = " | ".join(f"{e}: success, % | return" for e in compared)
    ablation = [f"| loss and parameters | {header} |", "|---" * (1 + 2 * len(compared)) + "|"]
    for setting in LOSSES:
        cells = [
            (cell(rows, setting, e, "eval_success", 100, 1), cell(rows, setting, e, "eval_return", 1, 3))
            for e in compared
        ]
        ablation.append(f"| {setting} | {' | '.join(part for pair in cells for part in pair)} |")
    curves_figure(
        [c for c in curves if c["setting"] == "separate-chosen"],
        main,
        {"separate-chosen": BLUE},
        figures / "hppo_curves.png",
    )
    chosen = [c for c in curves if c["env_id"] in compared]
    if chosen:
        curves_figure(chosen, rows, LOSSES, figures / "hppo_losses.png")
    pictures = [f"![{n}](benchmarks/figures/hppo_{n}.png)" for n in ("curves", "losses")[: 1 + bool(chosen)]]
    return "\n".join([*lines, "", *(ablation if compared else []), "", *pictures])


# --- joint_loss: joint, separate and mixed losses ---------------------------------------------------------------------

# Song et al. 2023, on the v3 environments. Table 3: 8 hours of asynchronous training, the number of steps not told, one
# seed, one model's 100 episodes. The serial runs, 3M steps, are read off a figure by eye.
TABLE3 = {
    "Ant-v4": {"joint": 2955, "separate": 2495, "mix-ratio": 4585, "mix-loss": 4099},
    "HalfCheetah-v4": {"joint": 5166, "separate": 5734, "mix-ratio": 8065, "mix-loss": 7931},
    "Swimmer-v4": {"joint": 109, "separate": 108, "mix-ratio": 108, "mix-loss": 105},
    "Hopper-v4": {"joint": 3290, "separate": 3166, "mix-ratio": 3071, "mix-loss": 3480},
    "Walker2d-v4": {"joint": 2846, "separate": 3608, "mix-ratio": 4415, "mix-loss": 3583},
}
SERIAL = {
    "HalfCheetah-v4": {"joint": "4.5k", "separate": "-0.5k", "mix-ratio": "7.8k", "mix-loss": "5.5k"},
    "Walker2d-v4": {"joint": "4.9k", "separate": "0.35k", "mix-ratio": "5.3k", "mix-loss": "5.7k"},
}
MIXES = {"joint": BLUE, "joint-0.3": GREY, "separate": GREEN, "mix-ratio": ORANGE, "mix-loss": RED}


def joint_loss_mujoco(rows: list[dict], curves: list[dict], figures: Path) -> str:
    env_ids = sorted(ordered(r["env_id"] for r in rows))
    lines = [f"| 1M steps | {' | '.join(env_ids)} | over joint |", "|---" * (2 + len(env_ids)) + "|"]
    for s in MIXES:
        cells = [cell(rows, s, env_id) for env_id in env_ids]
        lines.append(f"| {s} | {' | '.join(cells)} | {gain(rows, s, 'joint', env_ids)} |")
    for s in (s for s in MIXES if s in TABLE3["Ant-v4"]):
        paper = [np.array([TABLE3[e][name]]) for name in (s, "joint") for e in env_ids]
        cells = [str(TABLE3[env_id][s]) for env_id in env_ids]
        lines.append(f"| the paper's Table 3, {s} | {' | '.join(cells)} | {ratio(*paper):.2f} |")
    curves_figure([c for c in curves if not c["setting"].endswith("-3M")], rows, MIXES, figures / "joint_loss_1M.png")
    lines += ["", "![1M](benchmarks/figures/joint_loss_1M.png)"]
    longer = [c for c in curves if c["setting"].endswith("-3M")]
    if longer:
        heads = " | ".join(f"{e} | the paper, serial" for e in SERIAL)
        lines += ["", f"| 3M steps | {heads} | over joint |", "|---" * 6 + "|"]
        for s in MIXES:
            cells = [f"{cell(rows, s + '-3M', env_id)} | {SERIAL[env_id].get(s, '-')}" for env_id in SERIAL]
            lines.append(f"| {s} | {' | '.join(cells)} | {gain(rows, s + '-3M', 'joint-3M', SERIAL)} |")
        curves_figure(longer, rows, {f"{s}-3M": c for s, c in MIXES.items()}, figures / "joint_loss_3M.png")
        lines += ["", "![3M](benchmarks/figures/joint_loss_3M.png)"]
    return "\n".join(lines)


def matches_of(rows: list[dict]) -> list[dict]:
    """The rows of what microrts_tournament.py has played with these runs."""
    runs = set(map(key_of, rows))
    return [r for r in read_csv(HERE / "results/microrts_tournament.csv") if key_of(r) in runs]


def tournament(rows: list[dict]) -> list[str]:
    """The table of these matches, one for each map."""
    lines = []
    for env_id in ordered(r["env_id"] for r in rows):
        here = [r for r in rows if r["env_id"] == env_id]
        bots = ordered(r["opponent"] for r in here)
        lines += [f"| {env_id}: wins, %, against | {' | '.join(bots)} |", "|---" * (1 + len(bots)) + "|"]
        for s in ordered(r["setting"] for r in here):
            cells = [cell([r for r in here if r["opponent"] == bot], s, env_id, "win_rate", 100) for bot in bots]
            lines.append(f"| {s} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def by_clip(curve: dict) -> dict:
    """A curve of joint-0.2 as one of joint in a panel of its own for that map and clip range."""
    loss, _, eps = curve["setting"].rpartition("-")
    clip = f"clip {eps}" if float(eps) else "no clip"
    return {**curve, "setting": loss, "env_id": f"{curve['env_id'].removesuffix('-basesWorkers')}, {clip}"}


def joint_loss_microrts(rows: list[dict], curves: list[dict], figures: Path) -> str:
    # How fast it learns: the area under its learning curve.
    area = {key_of(c): np.mean([float(value) for value in list(c.values())[3:] if value]) for c in curves}
    rows = [{**r, "area": area[key_of(r)]} for r in rows]
    parts = []
    for env_id in ordered(r["env_id"] for r in rows):
        here = [r for r in rows if r["env_id"] == env_id]
        titles = "return over the whole training | of its last 100 games | wins of these, % | of 100 at the end, %"
        lines = [f"| {env_id}: loss, clip | {titles} | seeds |", "|---" * 6 + "|"]
        for s in ordered(r["setting"] for r in here):
            cells = [cell(here, s, env_id, "area", 1, 1), cell(here, s, env_id, "score", 1, 1)]
            cells += [cell(here, s, env_id, column, 100) for column in ("win_rate", "eval_success")]
            lines.append(f"| {s} | {' | '.join(cells)} | {len(values_of(here, s, env_id))} |")
        parts += [*lines, ""]
    parts += tournament(matches_of(rows))
    panels = sorted(map(by_clip, curves), key=lambda c: natural(c["env_id"]))
    curves_figure(panels, list(map(by_clip, rows)), MIXES, figures / "joint_loss_microrts.png")
    return "\n".join([*parts, "![MicroRTS](benchmarks/figures/joint_loss_microrts.png)"])


def microrts_demo(rows: list[dict], curves: list[dict], figures: Path) -> str:
    return "\n".join([*tournament(matches_of(rows)), "![a game](benchmarks/figures/microrts_demo.png)"])


# --- vmpo: beside PPO, and which of its parts matter ------------------------------------------------------------------

BESIDE = {"vmpo": BLUE, "ppo_continuous": ORANGE, "ppo_continuous-0.37": GREY}


def vmpo(rows: list[dict], curves: list[dict], figures: Path) -> str:
    both = sorted({r["env_id"] for r in rows if r["setting"] == "ppo_continuous"})
    alone = sorted({r["env_id"] for r in rows} & {"CartPole-v1", "Acrobot-v1", "LunarLander-v3"})
    parts, pictures = [], []
    if alone:
        lines = ["| softmax policy, 0.5M steps, LunarLander 1M | score | greedy return | seeds |", "|---|---|---|---|"]
        for env_id in alone:
            cells = [cell(rows, "vmpo", env_id, column) for column in ("score", "eval_return")]
            lines.append(f"| {env_id} | {' | '.join(cells)} | {len(values_of(rows, 'vmpo', env_id))} |")
        parts.append(lines)
        chosen = [c for c in curves if c["setting"] == "vmpo" and c["env_id"] in alone]
        curves_figure(chosen, rows, {"vmpo": BLUE}, figures / "vmpo_softmax.png")
        pictures.append("softmax")
    if both:
        titles = "vmpo.py, sigma from 0.37 | greedy | ppo_continuous.py, from 1 | greedy | from 0.37 | greedy"
        lines = [f"| Gaussian policy, 3M steps | {titles} | seeds |", "|---" * 8 + "|"]
        for env_id in both:
            cells = [cell(rows, setting, env_id, column) for setting in BESIDE for column in ("score", "eval_return")]
            seeds = ", ".join(str(len(values_of(rows, setting, env_id))) for setting in BESIDE)
            lines.append(f"| {env_id} | {' | '.join(cells)} | {seeds} |")
        parts.append(lines)
        chosen = [c for c in curves if c["setting"] in BESIDE and c["env_id"] in both]
        curves_figure(chosen, rows, BESIDE, figures / "vmpo_gaussian.png")
        pictures.append("gaussian")
    ablated = ordered(["default-1M"] + [r["setting"] for r in rows if r["setting"].endswith("-1M")])
    env_ids = sorted({r["env_id"] for r in rows if r["setting"] in ablated})
    if env_ids:
        lines = [f"| 1M steps | {' | '.join(env_ids)} | over default |", "|---" * (2 + len(env_ids)) + "|"]
        for s in ablated:
            cells = [cell(rows, s, env_id) for env_id in env_ids] + [gain(rows, s, "default-1M", env_ids)]
            lines.append(f"| {s.removesuffix('-1M')} | {' | '.join(cells)} |")
        parts.append(lines)
    longest = [c for c in curves if c["setting"].endswith("-20M")]
    if longest:
        colours = {f"{setting}-20M": colour for setting, colour in BESIDE.items()}
        curves_figure(longest, rows, colours, figures / "vmpo_20M.png")
        env_ids = ordered(curve["env_id"] for curve in longest)
        lines = [f"| 20M steps, one seed | {' | '.join(f'{e} | greedy' for e in env_ids)} |"]
        lines.append("|---" * (1 + 2 * len(env_ids)) + "|")
        for setting in ordered(curve["setting"] for curve in longest):
            cells = [cell(rows, setting, env_id, column) for env_id in env_ids for column in ("score", "eval_return")]
            lines.append(f"| {setting.removesuffix('-20M')} | {' | '.join(cells)} |")
        parts.append(lines)
        pictures.append("20M")
    parts.append([f"![{name}](benchmarks/figures/vmpo_{name}.png)" for name in pictures])
    return "\n\n".join("\n".join(lines) for lines in parts)


def vmpo_paper(rows: list[dict], curves: list[dict], figures: Path) -> str:
    lines = ["| the paper's settings | steps | score | greedy return | seeds |", "|---|---|---|---|---|"]
    for env_id in ordered(r["env_id"] for r in rows):
        steps = next(int(r["steps"]) for r in rows if r["env_id"] == env_id)
        cells = [cell(rows, "vmpo", env_id, column) for column in ("score", "eval_return")]
        seeds = len(values_of(rows, "vmpo", env_id))
        lines.append(f"| {env_id} | {steps / 1e6:.1f}M | {' | '.join(cells)} | {seeds} |")
    curves_figure(curves, rows, {"vmpo": BLUE}, figures / "vmpo_paper.png")
    return "\n".join([*lines, "", "![the paper's settings](benchmarks/figures/vmpo_paper.png)"])


# ------------------------------------------------------------------------------------------------------------------

SWEEPS = (
    *(ppo_continuous, ppo_table1, ppo_table1_none, ppo_table1_order),
    *(hppo, joint_loss_mujoco, joint_loss_microrts, microrts_demo, vmpo, vmpo_paper),
)
REPORTS = {report.__name__: report for report in SWEEPS}


def replace_block(text: str, name: str, block: str) -> str:
    """README text with what stands between the comments `begin NAME` and `end NAME` replaced."""
    begin, end = f"<!-- begin {name}: benchmarks/report.py {name} -->\n", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        fail(f"README.md has no {begin.strip()} ... {end}")
    return text[: text.index(begin) + len(begin)] + block + "\n" + text[text.index(end) :]


def main(args: Args):
    if args.name not in REPORTS:
        fail(f"{args.name}: must be one of {', '.join(REPORTS)}")
    rows, curves = collect(args.name, args.runs)
    readme = HERE.parent / "README.md"
    text = readme.read_text()
    replace_file(readme, replace_block(text, args.name, REPORTS[args.name](rows, curves, HERE / "figures")).encode())
    print(f"{args.name}: {len(rows)} runs")


if __name__ == "__main__":
    main(tyro.cli(Args))
