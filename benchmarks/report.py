"""From finished runs to what is committed and read: results, figures and the tables of README.md and docs/*.md.

    python benchmarks/report.py ppo_table1

takes the finished runs under runs/ppo_table1 (those that are there: rows of earlier ones stay) into

    results/ppo_table1.csv              one row a run
    results/ppo_table1_curves.csv.gz    its learning curve, 200 points

and from these two files alone draws figures/ppo_table1_*.png and writes the block between the comments
`<!-- begin ppo_table1 -->` and `<!-- end ppo_table1 -->` of whatever document has one. The same inputs give the same
bytes. `readme` and `readme_speed` make the README's overview from the committed results. A sweep of your own, under a
name that is none of the reports at the end of this file, gets what plot.py makes, as report.* in its runs folder.

A run's score is the mean return of its last 100 training episodes; its seconds and sps are those of the training
alone, on whatever machine, with whatever beside it. Statistics over runs follow Agarwal et al. 2021 (arXiv:2108.13264):
the interquartile mean, and 95 % percentile bootstrap intervals that resample the seeds of each environment separately
(2,000 resamples). With few seeds mind what they are: of 3 the interquartile mean is the mean, and the interval their
range, which holds the true mean in 3 cases of 4 (7 environments x 3 seeds together: in 6 of 7).
"""

import gzip
import json
import os
import re
import shlex
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plot
import tyro
from plot import BLUE, GREEN, GREY, GRID, ORANGE, RED, fail, interval, iqm, mean, natural, replace_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass
class Args:
    name: tyro.conf.Positional[str]
    """one of the reports at the end of this file, or a sweep of your own"""
    runs: Path = HERE / "runs"
    """parent folder of the sweeps' runs"""


# --- From runs to results ---------------------------------------------------------------------------------------------


def read_run(folder: Path) -> tuple[dict, dict]:
    """A finished run's row, and its curve."""
    config, result = (json.loads((folder / name).read_text()) for name in ("config.json", "result.json"))
    episodes = pd.read_csv(folder / "episodes.csv")
    steps, returns = episodes["global_step"].to_numpy(), episodes["return"].to_numpy()
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
    points = plot.curve(steps, returns, result["global_step"])
    return row, key | {f"{at:.3f}": "" if np.isnan(value) else f"{value:.2f}" for at, value in zip(GRID, points)}


def read_csv(path: Path) -> list[dict]:
    """Rows of text, to be written back as they are; none without the file."""
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records") if path.exists() else []


def write_csv(path: Path, rows: list[dict]):
    data = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n").encode()
    replace_file(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def key_of(row: dict) -> tuple[str, str, str]:
    return row["setting"], row["env_id"], row["seed"]


def collect(name: str, runs: Path):
    """Join the finished runs to the committed results, and write both back."""
    paths = HERE / f"results/{name}.csv", HERE / f"results/{name}_curves.csv.gz"
    written = sorted((runs / name).glob("*/[!.]*/result.json"))  # at the training's end, and after the evaluation
    found = [read_run(path.parent) for path in written if "eval_returns" in path.read_text()]
    for key, same in groupby(sorted(found, key=lambda run: key_of(run[0])), lambda run: key_of(run[0])):
        commands = sorted({row["command"] for row, _ in same})
        if len(commands) > 1:
            fail(f"{name}: {' '.join(key)} was run in different ways, {' and '.join(commands)}; keep one of them")
    rows, curves = (
        {key_of(r): r for r in [*read_csv(path), *new]} for path, new in zip(paths, list(zip(*found)) or [(), ()])
    )
    if not rows:
        fail(f"{name}: no results yet, and no finished run under {runs / name}")
    keys = sorted(rows, key=lambda key: (natural(key[0]), key[1], int(key[2])))
    for (setting, env_id), same in groupby(keys, lambda key: key[:2]):
        commands = sorted({re.sub(r"--seed \d+", "--seed N", rows[key]["command"]) for key in same})
        if len(commands) > 1:  # a committed row is from before the sweep's flags were changed
            plot.notice(f"the seeds of {setting}, {env_id} differ in their flags: {commands}")
    paths[0].parent.mkdir(exist_ok=True)
    write_csv(paths[0], [rows[key] for key in keys])
    write_csv(paths[1], [curves[key] for key in keys if key in curves])


def results(name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The committed rows and curves of a sweep."""
    return tuple(pd.read_csv(HERE / f"results/{name}{end}") for end in (".csv", "_curves.csv.gz"))


# --- Tables -----------------------------------------------------------------------------------------------------------


def values_of(rows: pd.DataFrame, setting: str, env_id: str, column: str = "score") -> np.ndarray:
    """One number for each of a setting's seeds in an environment, [seeds]."""
    return rows.loc[(rows.setting == setting) & (rows.env_id == env_id), column].dropna().to_numpy(float)


def with_interval(strata: list[np.ndarray], statistic, decimals: int) -> str:
    """ "value [low, high]", without the interval where single runs have none, "-" without runs."""
    if not all(values.size for values in strata):
        return "-"
    low, high = interval(strata, statistic)
    value = f"{statistic(*strata):.{decimals}f}"
    return value if np.isnan(low) else f"{value} [{low:.{decimals}f}, {high:.{decimals}f}]"


def cells(rows: pd.DataFrame, by, column: str = "score", scale: float = 1, decimals: int = 0):
    """The mean over the seeds with its interval, as text, for each value of `by`."""
    groups = rows.groupby(by, sort=False)[column]
    return groups.apply(lambda values: with_interval([scale * values.dropna().to_numpy(float)], mean, decimals))


def summary(rows: pd.DataFrame, by: str, columns: dict) -> pd.DataFrame:
    """A table with cells() of these {head: (column, scale, decimals)} and the number of seeds for each `by`."""
    table = pd.DataFrame({head: cells(rows, by, *column) for head, column in columns.items()})
    return table.assign(seeds=rows.groupby(by).size())


def grid(rows: pd.DataFrame, settings, env_ids) -> pd.DataFrame:
    """The scores of settings x environments."""
    return cells(rows, ["setting", "env_id"]).unstack().reindex(index=list(settings), columns=env_ids)


def spread(values: np.ndarray, decimals: int = 0) -> str:
    """ "mean ± standard deviation", the latter for more than one."""
    deviation = f" ± {values.std():.{decimals}f}" if values.size > 1 else ""
    return f"{values.mean():.{decimals}f}{deviation}" if values.size else "-"


def ratio(*strata, axis=-1):
    """What a setting gains over another: the mean over the environments of (mean of its runs) / (mean of the other's).
    `strata` are its runs, one environment each, then the other's."""
    half = len(strata) // 2
    return np.mean([runs.mean(axis) / base.mean(axis) for runs, base in zip(strata[:half], strata[half:])], axis=0)


def gain(rows: pd.DataFrame, setting: str, base: str, env_ids) -> str:
    """ratio with its interval; "-" until each environment has runs of both."""
    if setting == base:
        return "1"
    return with_interval([values_of(rows, s, env_id) for s in (setting, base) for env_id in env_ids], ratio, 2)


def side_by_side(index, columns: list[tuple[str, pd.Series]]) -> pd.DataFrame:
    """A table of columns with these heads, which may repeat."""
    heads, values = zip(*columns)
    return pd.concat([column.reindex(list(index)) for column in values], axis=1).set_axis(heads, axis=1)


def markdown(corner: str, table: pd.DataFrame) -> str:
    """A table in Markdown, its index as the first column, headed `corner`."""
    head = [corner, *table.columns]
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *table.fillna("-").reset_index().to_numpy())]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def pictures(names: dict[str, str]) -> str:
    """Figures in Markdown, {text: name}, one a line; their paths are from the repository's root, as all in a block."""
    return "\n".join(f"![{text}](benchmarks/figures/{name}.png)" for text, name in names.items())


# --- Figures ----------------------------------------------------------------------------------------------------------


def series_of(rows: pd.DataFrame, curves: pd.DataFrame, setting: str, env_id: str) -> plot.Series:
    chosen = curves[(curves.setting == setting) & (curves.env_id == env_id)]
    return plot.Series(GRID * values_of(rows, setting, env_id, "steps")[0], chosen.iloc[:, 3:].to_numpy(float))


def curves_figure(rows: pd.DataFrame, curves: pd.DataFrame, colours: dict, name: str, peers: dict | None = None):
    """One panel an environment, of the settings in `colours` {setting: colour}; `peers` {env_id: (mean, std)} as a
    band."""
    curves = curves[curves.setting.isin(list(colours))]
    env_ids = sorted(curves.env_id.unique(), key=natural)
    fig, axes = plot.panels(len(env_ids))
    for axis, env_id in zip(axes, env_ids):
        here, group, styles = curves[curves.env_id == env_id], {}, {}
        for setting in (s for s in colours if s in set(here.setting)):
            label = setting if len(colours) > 1 else "IQM, 95 %"
            group[label], styles[label] = series_of(rows, curves, setting, env_id), {"color": colours[setting]}
        plot.draw(axis, f"{env_id}, {plot.seeds_in_words(here.seed.nunique())}", group, styles)
        if peers and env_id in peers:
            centre, std = peers[env_id]
            axis.axhline(centre, color=RED, ls="--", lw=1.2, label="CleanRL at the end")
            axis.axhspan(centre - std, centre + std, color=RED, alpha=0.12, lw=0)
    plot.save_panels(fig, axes, HERE / f"figures/{name}.png")


# --- ppo_continuous: the defaults beside CleanRL ----------------------------------------------------------------------

# Mean and standard deviation over 3 seeds of the last 100 episodes at 1M steps, ppo_continuous_action.py on the v4
# environments: the table in CleanRL's documentation, docs.cleanrl.dev/rl-algorithms/ppo.
CLEANRL = {"HalfCheetah-v4": (1442.6, 46.0), "Hopper-v4": (2382.9, 272.0), "Walker2d-v4": (2288.0, 572.0)}


def ppo_continuous(rows: pd.DataFrame, curves: pd.DataFrame) -> str:
    curves_figure(rows, curves, {"ppo_continuous": BLUE}, "ppo_continuous", CLEANRL)
    scores = rows.groupby("env_id").score
    table = pd.DataFrame({"seeds": scores.size()})
    table["score of each"] = scores.apply(lambda values: ", ".join(f"{value:.0f}" for value in values))
    table["mean ± std"] = scores.apply(lambda values: spread(values.to_numpy()))
    table["CleanRL"] = pd.Series({env_id: "{:.0f} ± {:.0f}".format(*peer) for env_id, peer in CLEANRL.items()})
    return f"{markdown('environment', table)}\n\n{pictures({'Learning curves': 'ppo_continuous'})}"


# --- ppo_table1: the surrogate objectives -----------------------------------------------------------------------------

TABLE1 = {  # Schulman et al. 2017, Table 1
    "none": -0.39,
    **{"clip-0.1": 0.76, "clip-0.2": 0.82, "clip-0.3": 0.70},
    **{"adaptive-0.003": 0.68, "adaptive-0.01": 0.74, "adaptive-0.03": 0.71},
    **{"fixed-0.3": 0.62, "fixed-1": 0.71, "fixed-3": 0.72, "fixed-10": 0.69},
}
BEST_OF_KIND = {"none": GREY, "clip-0.2": BLUE, "adaptive-0.01": GREEN, "fixed-3": ORANGE}  # by the paper


def random_and_best(table1: pd.DataFrame) -> pd.DataFrame:
    """The returns that are a score of 0 and of 1, for each environment."""
    random = pd.read_csv(HERE / "results/random_policy.csv", index_col="env_id")["mean"]
    return pd.DataFrame({"random": random, "best run": table1.groupby("env_id").score.max()}).dropna()


def normalised(rows: pd.DataFrame, setting: str, ends: pd.DataFrame) -> list[np.ndarray]:
    """A setting's scores in each environment."""
    return [(values_of(rows, setting, env_id) - zero) / (one - zero) for env_id, zero, one in ends.itertuples()]


def ppo_table1(rows: pd.DataFrame, curves: pd.DataFrame) -> str:
    ends = random_and_best(rows)
    strata = {
        s: [values for values in normalised(rows, s, ends) if values.size] for s in TABLE1 if s in set(rows.setting)
    }
    curves_figure(rows, curves, BEST_OF_KIND, "ppo_table1_curves")
    scores_figure(strata)
    table = pd.DataFrame(
        {
            "paper": {s: f"{TABLE1[s]:.2f}" for s in strata},
            "mean, 95 % interval": {s: with_interval(values, mean, 2) for s, values in strata.items()},
            "IQM, 95 % interval": {s: with_interval(values, iqm, 2) for s, values in strata.items()},
            "runs": {s: f"{sum(map(len, values))} of {3 * 7}" for s, values in strata.items()},
        }
    )
    raw = {}
    for env_id, random, best in ends.itertuples():
        digits = 0 if abs(best) >= 100 else 1
        raw[env_id] = {s: spread(values_of(rows, s, env_id), digits) for s in strata}
        raw[env_id] |= {"random": f"{random:.{digits}f}", "best run": f"{best:.{digits}f}"}
    caption = "Returns behind these scores, mean ± standard deviation over the seeds:"
    figures = pictures({"scores": "ppo_table1_scores", "curves": "ppo_table1_curves"})
    return "\n\n".join([markdown("objective", table), caption, markdown("objective", pd.DataFrame(raw)), figures])


def ppo_table1_none(rows: pd.DataFrame, curves: pd.DataFrame) -> str:
    table1, _ = results("ppo_table1")
    table1 = table1[table1.env_id == "HalfCheetah-v4"]
    zero, one = random_and_best(table1).loc["HalfCheetah-v4"]
    as_there = table1[table1.setting.isin(["none", "clip-0.2"])]
    both = pd.concat([as_there.assign(setting=as_there.setting + " (Table 1)"), rows])
    returns = both.groupby("setting", sort=False).score
    table = pd.DataFrame({"return of each seed": returns.apply(lambda s: ", ".join(f"{value:.0f}" for value in s))})
    table["normalised score"] = ((returns.mean() - zero) / (one - zero)).map("{:.2f}".format)
    table.index = table.index.str.replace(
        "^(none|clip-0.2)-(.*)", lambda m: f"{m[1]}, {m[2].replace('-', ' ')}", regex=True
    )
    return markdown("HalfCheetah", table)


def ppo_table1_order(rows: pd.DataFrame, curves: pd.DataFrame) -> str:
    table1, _ = results("ppo_table1")
    ends, changed = random_and_best(table1), rows.env_id.unique()
    objectives = [s for s in BEST_OF_KIND if s != "none"]
    both, lines = pd.concat([table1, rows]), []
    for change in dict.fromkeys(["", *rows.setting.str.replace("|".join(objectives), "", regex=True)]):
        for objective in objectives:
            setting = np.where(both.env_id.isin(changed), objective + change, objective)
            chosen = both[both.setting == setting].assign(setting=objective)
            lines.append(
                {"changed": change[1:].replace("-", " ") or "nothing", "objective": objective}
                | {env_id: spread(values_of(chosen, objective, env_id)) for env_id in changed}
                | {"score of Table 1 with these": with_interval(normalised(chosen, objective, ends), mean, 2)}
            )
    return markdown("changed", pd.DataFrame(lines).set_index("changed"))


def scores_figure(strata: dict):
    """Left the mean score of each setting with its interval, beside the paper's; right the performance profiles."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for k, (setting, scores) in enumerate(strata.items()):
        colour = next(c for best, c in BEST_OF_KIND.items() if best.split("-")[0] == setting.split("-")[0])
        low, high = interval(scores, mean)
        label = None if k else "ours" if np.isnan(low) else "ours, 95 % interval"
        left.plot([low, high], [k, k], color=colour, lw=5, alpha=0.4, solid_capstyle="butt")
        left.plot(mean(*scores), k, "o", color=colour, label=label)
        left.plot(TABLE1[setting], k, "D", mfc="none", color="black", ms=5, label=None if k else "paper")
    left.set_yticks(range(len(strata)), strata)
    left.invert_yaxis()
    left.set_xlabel("normalised score, mean over all runs (random policy 0, best run 1)")
    left.legend(frameon=False, loc="lower left")
    lowest = min(0, *(values.min() for scores in strata.values() for values in scores))
    threshold = np.linspace(lowest, 1, 241)
    for setting in (s for s in BEST_OF_KIND if s in strata):
        scores, colour = strata[setting], BEST_OF_KIND[setting]
        above = [(values[:, None] >= threshold).astype(float) for values in scores]
        right.fill_between(threshold, *interval(above, mean), color=colour, alpha=0.15, lw=0, step="post")
        label = f"{setting}, {sum(map(len, scores))} runs"
        right.step(threshold, mean(*above, axis=0), color=colour, where="post", label=label)
    right.set(xlabel="normalised score τ", ylabel="fraction of runs with a score of at least τ", ylim=(0, 1.02))
    right.legend(frameon=False, loc="center")
    for axis in (left, right):
        plot.tidy(axis)
    plot.save(fig, HERE / "figures/ppo_table1_scores.png")


# --- tune_ppo: one setting for MuJoCo ---------------------------------------------------------------------------------

# Tianshou's PPO at 1M steps, the best evaluation on the way, 10 seeds: examples/mujoco/README.md of thu-ml/tianshou
TIANSHOU = {
    **{"Ant-v4": 3258.4, "HalfCheetah-v4": 5783.9, "Hopper-v4": 2609.3, "Walker2d-v4": 3588.5, "Swimmer-v4": 66.7},
    **{"Humanoid-v4": 787.1, "Reacher-v4": -4.1, "InvertedPendulum-v4": 1000.0, "InvertedDoublePendulum-v4": 9231.3},
}
SEARCHED = ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4"]  # those that tune_ppo.py trains on


def tune_ppo() -> str:
    """The ten best settings of the search, by what they change in the first, the default."""
    trials = pd.read_csv(HERE / "results/tune_ppo.csv")
    settings = [json.loads(params) for params in trials.params]
    for params in settings:
        params["learning_rate"] = float(f"{params['learning_rate']:.3g}")  # as the runs have it
    (default,) = (params for params, start in zip(settings, trials.start) if start == "default")
    trials["setting"] = [
        ", ".join(plot.words(name, value) for name, value in params.items() if value != default[name]) or "the default"
        for params in settings
    ]
    complete = trials[trials.state == "complete"].head(10)
    table = pd.DataFrame({"value": complete.value.map("{:.3f}".format)}).set_index(complete.setting)
    for task in SEARCHED:
        table[task.removesuffix("-v4")] = complete.filter(like=task).mean(axis=1).round().astype(int).to_numpy()
    runs = int(trials.filter(like=" seed ").notna().sum().sum())
    ended = int((trials.state == "pruned").sum())
    return f"{len(trials)} settings, {runs} runs; {ended} settings ended early.\n\n{markdown('setting', table)}"


def tune_ppo_nine(rows: pd.DataFrame, curves: pd.DataFrame) -> str:
    random = pd.read_csv(HERE / "results/random_policy.csv", index_col="env_id")["mean"]
    ends = pd.DataFrame({"random": random, "Tianshou": pd.Series(TIANSHOU)}).loc[list(TIANSHOU)]
    settings = sorted(rows.setting.unique(), key=natural)
    curves_figure(rows, curves, dict(zip(settings, (GREY, BLUE, ORANGE, GREEN))), "tune_ppo_nine")
    scores = {}
    for env_id, _, peer in ends.itertuples():
        digits = 0 if abs(peer) >= 100 else 1
        of_task = {s: with_interval([values_of(rows, s, env_id)], mean, digits) for s in settings}
        scores[env_id] = of_task | {"Tianshou": f"{peer:.{digits}f}"}
    searched = ends.index.isin(SEARCHED)
    parts = {"IQM, 95 % interval": ends, "of the search's four": ends[searched], "of the other five": ends[~searched]}
    total = pd.DataFrame(
        {head: {s: with_interval(normalised(rows, s, part), iqm, 2) for s in settings} for head, part in parts.items()}
    )
    total["mean of all nine"] = {s: with_interval(normalised(rows, s, ends), mean, 2) for s in settings}
    total["runs"] = rows.groupby("setting").size().map(f"{{}} of {5 * len(TIANSHOU)}".format)
    tables = markdown("environment", pd.DataFrame(scores).T), markdown("setting", total)
    return "\n\n".join([tables[1], tables[0], pictures({"Learning curves": "tune_ppo_nine"})])


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


def millions(rows: pd.DataFrame) -> pd.Series:
    """How long each environment's runs are."""
    return rows.groupby("env_id").steps.first().map(lambda steps: f"{steps / 1e6:.1f}M")


def longer(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows or curves of separate-chosen-10M as separate-chosen's in an environment of its own, in their order."""
    parts = frame.setting.str.extract("(.*chosen)-(.*)")
    env_id = frame.env_id + (", " + parts[1]).fillna("")
    frame = frame.assign(setting=parts[0].fillna(frame.setting), env_id=env_id)
    return frame.sort_values("env_id", key=lambda ids: ids.map(natural), kind="stable")


def hppo(rows: pd.DataFrame, curves: pd.DataFrame) -> str:
    rows, curves = longer(rows), longer(curves)
    main = rows[rows.setting == "separate-chosen"]
    table = summary(main, "env_id", {"success, %": ("eval_success", 100, 1), "return": ("eval_return", 1, 3)})
    table.insert(0, "steps", millions(main))
    table["published H-PPO"] = pd.Series(HPPO)
    curves_figure(main, curves, {"separate-chosen": BLUE}, "hppo_curves")
    parts, figures = [markdown("environment", table)], {"curves": "hppo_curves"}
    compared = rows.env_id[rows.setting != "separate-chosen"].unique()
    columns = []
    for env_id in compared:
        here = rows[rows.env_id == env_id]
        columns += [(f"{env_id}: success, %", cells(here, "setting", "eval_success", 100, 1))]
        columns += [("return", cells(here, "setting", "eval_return", 1, 3))]
    if columns:
        parts.append(markdown("loss and parameters", side_by_side(LOSSES, columns)))
        curves_figure(rows, curves[curves.env_id.isin(compared)], LOSSES, "hppo_losses")
        figures["losses"] = "hppo_losses"
    return "\n\n".join([*parts, pictures(figures)])


# --- joint_loss: joint, separate and mixed losses ---------------------------------------------------------------------

# Song et al. 2023, on the v3 environments. Table 3: 8 hours of asynchronous training, the number of steps not told, one
# seed, one model's 100 episodes. The serial runs, 3M steps, are read off a figure by eye.
TABLE3 = {
    "Ant-v4": {"joint": 2955, "separate": 2495, "mix-ratio": 4585, "mix-loss": 4099},
    "HalfCheetah-v4": {"joint": 5166, "separate": 5734, "mix-ratio": 8065, "mix-loss": 7931},
    "Hopper-v4": {"joint": 3290, "separate": 3166, "mix-ratio": 3071, "mix-loss": 3480},
    "Swimmer-v4": {"joint": 109, "separate": 108, "mix-ratio": 108, "mix-loss": 105},
    "Walker2d-v4": {"joint": 2846, "separate": 3608, "mix-ratio": 4415, "mix-loss": 3583},
}
SERIAL = {
    "HalfCheetah-v4": {"joint": "4.5k", "separate": "-0.5k", "mix-ratio": "7.8k", "mix-loss": "5.5k"},
    "Walker2d-v4": {"joint": "4.9k", "separate": "0.35k", "mix-ratio": "5.3k", "mix-loss": "5.7k"},
}
MIXES = {"joint": BLUE, "joint-0.3": GREY, "separate": GREEN, "mix-ratio": ORANGE, "mix-loss": RED}


def joint_loss_mujoco(rows: pd.DataFrame, curves: pd.DataFrame) -> str:
    env_ids = sorted(rows.env_id.unique())
    table = grid(rows, MIXES, env_ids)
    table["over joint"] = [gain(rows, s, "joint", env_ids) for s in MIXES]
    paper = pd.DataFrame(TABLE3)[env_ids]
    over_joint = (paper / paper.loc["joint"]).mean(axis=1).map("{:.2f}".format)
    paper = paper.assign(**{"over joint": over_joint}).rename("the paper's Table 3, {}".format)
    curves_figure(rows, curves, MIXES, "joint_loss_1M")
    parts = [markdown("1M steps", pd.concat([table, paper])), pictures({"1M": "joint_loss_1M"})]
    if rows.setting.str.endswith("-3M").any():
        rows, curves = (
            frame[frame.setting.str.endswith("-3M")].assign(setting=frame.setting.str.removesuffix("-3M"))
            for frame in (rows, curves)
        )
        columns = []
        for env_id, published in SERIAL.items():
            columns += [(env_id, cells(rows[rows.env_id == env_id], "setting"))]
            columns += [("the paper, serial", pd.Series(published))]
        table = side_by_side(MIXES, columns)
        table["over joint"] = [gain(rows, s, "joint", SERIAL) for s in MIXES]
        curves_figure(rows, curves, MIXES, "joint_loss_3M")
        parts += [markdown("3M steps", table), pictures({"3M": "joint_loss_3M"})]
    return "\n\n".join(parts)


def tournament(rows: pd.DataFrame) -> list[str]:
    """The table of what microrts_tournament.py has played with these runs, one for each map."""
    key, path = ["setting", "env_id", "seed"], HERE / "results/microrts_tournament.csv"
    matches = pd.read_csv(path).merge(rows[key]) if path.exists() else rows.head(0)
    return [
        markdown(
            f"{env_id}: wins, %, against",
            cells(same, ["setting", "opponent"], "win_rate", 100).unstack().reindex(index=same.setting.unique()),
        )
        for env_id, same in matches.groupby("env_id", sort=False)
    ]


def by_clip(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows or curves of joint-0.2 as those of joint in a panel of its own for that map and clip range."""
    parts = frame.setting.str.extract("(.*)-(.*)")
    clip = parts[1].map(lambda eps: f", clip {eps}" if float(eps) else ", no clip")
    env_id = frame.env_id.str.removesuffix("-basesWorkers") + clip
    return frame.assign(setting=parts[0], env_id=env_id)


def joint_loss_microrts(rows: pd.DataFrame, curves: pd.DataFrame) -> str:
    # How fast it learns: the area under its learning curve.
    key = ["setting", "env_id", "seed"]
    rows = rows.merge(curves[key].assign(area=curves.iloc[:, 3:].mean(axis=1)), on=key)
    parts = []
    for env_id, here in rows.groupby("env_id", sort=False):
        columns = {"return over the whole training": ("area", 1, 1), "of its last 100 games": ("score", 1, 1)}
        columns |= {"wins of these, %": ("win_rate", 100), "of 100 at the end, %": ("eval_success", 100)}
        table = summary(here, "setting", columns)
        parts.append(markdown(f"{env_id}: loss, clip", table))
    curves_figure(by_clip(rows), by_clip(curves), MIXES, "joint_loss_microrts")
    return "\n\n".join([*parts, *tournament(rows), pictures({"MicroRTS": "joint_loss_microrts"})])


def microrts_demo(rows: pd.DataFrame, curves: pd.DataFrame) -> str:
    return "\n\n".join([*tournament(rows), pictures({"a game": "microrts_demo"})])


# --- vmpo: beside PPO, and which of its parts matter ------------------------------------------------------------------

BESIDE = {"vmpo": BLUE, "ppo_continuous": ORANGE, "ppo_continuous-0.37": GREY}
SOFTMAX = ["Acrobot-v1", "CartPole-v1", "LunarLander-v3"]


def vmpo(rows: pd.DataFrame, curves: pd.DataFrame) -> str:
    parts, figures = [], {}
    alone = rows[(rows.setting == "vmpo") & rows.env_id.isin(SOFTMAX)]
    if len(alone):
        table = summary(alone, "env_id", {"score": (), "greedy return": ("eval_return",)})
        parts.append(markdown("softmax policy, 0.5M steps, LunarLander 1M", table))
        curves_figure(alone, curves[curves.env_id.isin(SOFTMAX)], {"vmpo": BLUE}, "vmpo_softmax")
        figures["softmax"] = "vmpo_softmax"
    both = sorted(rows.env_id[rows.setting == "ppo_continuous"].unique())
    if both:
        titles = ("vmpo.py, sigma from 0.37", "ppo_continuous.py, from 1", "from 0.37")
        columns = []
        for setting, title in zip(BESIDE, titles):
            same = rows[rows.setting == setting]
            columns += [(title, cells(same, "env_id")), ("greedy", cells(same, "env_id", "eval_return"))]
        table = side_by_side(both, columns)
        table["seeds"] = [", ".join(str(values_of(rows, s, env_id).size) for s in BESIDE) for env_id in both]
        parts.append(markdown("Gaussian policy, 3M steps", table))
        curves_figure(rows, curves[curves.env_id.isin(both)], BESIDE, "vmpo_gaussian")
        figures["gaussian"] = "vmpo_gaussian"
    ablated = rows[rows.setting.str.endswith("-1M")]
    if len(ablated):
        settings, env_ids = dict.fromkeys(["default-1M", *ablated.setting]), sorted(ablated.env_id.unique())
        table = grid(ablated, settings, env_ids)
        table["over default"] = [gain(rows, s, "default-1M", env_ids) for s in settings]
        parts.append(markdown("1M steps", table.rename(lambda s: s.removesuffix("-1M"))))
    longest = rows[rows.setting.str.endswith("-20M")]
    if len(longest):
        columns = []
        for env_id, same in longest.groupby("env_id"):
            columns += [(env_id, cells(same, "setting")), ("greedy", cells(same, "setting", "eval_return"))]
        table = side_by_side(longest.setting.unique(), columns)
        parts.append(markdown("20M steps, one seed", table.rename(lambda s: s.removesuffix("-20M"))))
        curves_figure(rows, curves, {f"{setting}-20M": colour for setting, colour in BESIDE.items()}, "vmpo_20M")
        figures["20M"] = "vmpo_20M"
    return "\n\n".join([*parts, pictures(figures)])


def vmpo_paper(rows: pd.DataFrame, curves: pd.DataFrame) -> str:
    table = summary(rows, "env_id", {"score": (), "greedy return": ("eval_return",)})
    table.insert(0, "steps", millions(rows))
    curves_figure(rows, curves, {"vmpo": BLUE}, "vmpo_paper")
    return "\n\n".join([markdown("the paper's settings", table), pictures({"the paper's settings": "vmpo_paper"})])


# --- readme: the overview ---------------------------------------------------------------------------------------------

PANELS = {  # of its figure, {script: (sweep, setting, task)}
    "ppo_continuous.py": ("ppo_continuous", "ppo_continuous", "HalfCheetah-v4"),
    "ppo_klpen.py": ("ppo_table1", "adaptive-0.01", "Walker2d-v4"),
    "ppo_multidiscrete_joint_loss.py": ("joint_loss_mujoco", "mix-loss-3M", "Walker2d-v4"),
    "vmpo.py": ("vmpo", "vmpo", "Humanoid-v4"),
    "hppo_hybrid.py": ("hppo", "separate-chosen", "HybridMoving-v0"),
}


def readme() -> str:
    fig, axes = plot.panels(len(PANELS), columns=3)
    for axis, (script, (sweep, setting, env_id)) in zip(axes, PANELS.items()):
        series = series_of(*results(sweep), setting, env_id)
        title = f"{script}\n{env_id}, {plot.seeds_in_words(len(series.seeds))}"
        plot.draw(axis, title, {"IQM, 95 %": series}, {"IQM, 95 %": {"color": BLUE}})
    plot.save_panels(fig, axes, HERE / "figures/readme_curves.png")

    def ours(sweep: str, setting: str, env_id: str, column: str = "score", scale: float = 1, decimals: int = 0) -> str:
        values = scale * values_of(results(sweep)[0], setting, env_id, column)
        return f"{with_interval([values], mean, decimals)}, {plot.seeds_in_words(len(values))}"

    table1, joint = results("ppo_table1")[0], results("joint_loss_mujoco")[0]
    normal = normalised(table1, "adaptive-0.01", random_and_best(table1))
    gained = gain(joint, "mix-ratio", "joint", list(TABLE3))
    mixed, paper = pd.DataFrame(TABLE3).loc["mix-ratio"], pd.DataFrame(TABLE3).loc["joint"]
    games = pd.read_csv(HERE / "results/microrts_tournament.csv").set_index(["setting", "opponent"]).win_rate
    coac = ours("joint_loss_microrts", "mix-loss-0.2", "MicroRTS-10x10-basesWorkers", "eval_success", 100)
    tasks = {
        "PPO, clipped": "HalfCheetah-v4, 1M steps: return",
        "PPO, adaptive KL penalty": "Table 1 of the paper, 7 MuJoCo tasks, target 0.01: normalised score",
        "joint and separate losses": "5 MuJoCo tasks, 1M steps: mixed ratios over joint ones",
        "the same on MicroRTS": "games won against WorkerRush, 8x8, 20M steps; against CoacAI, 10x10, 3M; %",
        "V-MPO": "Humanoid-v4, 3M steps: return",
        "H-PPO": "HybridMoving-v0, 2M steps: success, %",
    }
    table = pd.DataFrame({"task": tasks})
    table["here"] = [
        ours("ppo_continuous", "ppo_continuous", "HalfCheetah-v4"),
        f"{with_interval(normal, mean, 2)}, {sum(map(len, normal))} runs",
        f"{gained}, {joint.env_id[joint.setting == 'mix-ratio'].size} runs",
        f"{100 * games['demo', 'workerRushAI']:.0f}, 1 seed; {coac}",
        ours("vmpo", "vmpo", "Humanoid-v4"),
        ours("hppo", "separate-chosen", "HybridMoving-v0", "eval_success", 100, 1),
    ]
    table["published"] = [
        "CleanRL: {:.0f} ± {:.0f}, 3 seeds".format(*CLEANRL["HalfCheetah-v4"]),
        f"{TABLE1['adaptive-0.01']:.2f}",
        f"{(mixed / paper).mean():.2f}",
        "CoacAI, 16x16: 95, read off a figure",
        f"curves alone; PPO here: {ours('vmpo', 'ppo_continuous', 'Humanoid-v4')}",
        HPPO["HybridMoving-v0"],
    ]
    pages = ("ppo_continuous", "ppo_klpen", "joint_loss", "joint_loss", "vmpo", "hppo")
    table["more"] = [f"[docs/{page}.md](docs/{page}.md)" for page in pages]
    return "\n\n".join([markdown("algorithm", table), pictures({"Learning curves": "readme_curves"})])


def readme_speed() -> str:
    """The table of speed.py, from its measurements."""
    measured = pd.DataFrame(json.loads((HERE / "results/speed.json").read_text())["measurements"])
    columns = {
        "environment only": ("environment", 0),
        "full training": ("full", 0),
        "compile cold, s": ("cold_compile", 1),
        "compile warm, s": ("warm_compile", 1),
    }

    def text(column: str, digits: int) -> pd.Series:
        ends = measured.groupby("env_id")[column].agg(["median", "min", "max"])
        return ends.apply(lambda row: "{:,.{d}f} ({:,.{d}f}-{:,.{d}f})".format(*row, d=digits), axis=1)

    table = pd.DataFrame({head: text(*column) for head, column in columns.items()})
    return markdown("environment", table)


def scale() -> str:
    """Steps a second against processes, a table, and against environments, a figure, from scale.py's measurements."""
    measured = pd.read_csv(HERE / "results/scale.csv")
    measured["task"] = measured.env_id.str.split(":").str[-1]
    compared = measured[measured.rank_0_cpu_ms.notna()]
    shape = compared.task + ", " + compared.N.astype(str) + " x " + compared["T"].astype(str)
    groups = compared.groupby([shape.rename("shape"), "processes"], sort=False)
    ends = groups.sps.agg(["median", "min", "max"])
    table = pd.DataFrame(
        {
            "steps/s": ends.apply(
                lambda row: "{:,.0f} ({:,.0f}-{:,.0f})".format(row["median"], row["min"], row["max"]), axis=1
            )
        }
    )
    alone = ends["median"].xs(1, level="processes").reindex(ends.index, level=0)
    table["over one process"] = (ends["median"] / alone).map("{:.2f}".format)
    table["rank 0's CPU, ms an iteration"] = groups.rank_0_cpu_ms.median().map("{:.0f}".format)
    table = table.reset_index("processes")

    figure, axis = plt.subplots(figsize=(6, 3.2))
    for (task, rows), colour in zip(measured[measured.rank_0_cpu_ms.isna()].groupby("task"), (BLUE, ORANGE)):
        ends = rows.groupby("N").sps.agg(["median", "min", "max"])
        axis.plot(ends.index, ends["median"], "o-", color=colour, label=task, markersize=4)
        axis.fill_between(ends.index, ends["min"], ends["max"], color=colour, alpha=0.2, linewidth=0)
    axis.set(xscale="log", yscale="log", xlabel="environments, one process", ylabel="steps a second")
    axis.set_xticks(ends.index, [f"{N:,}" for N in ends.index])
    axis.minorticks_off()
    axis.set_yticks([3000, 10000, 30000], ["3,000", "10,000", "30,000"])
    axis.legend(frameon=False)
    plot.tidy(axis)
    plot.save(figure, HERE / "figures/scale.png")

    steps = measured[measured.rank_0_cpu_ms.isna()].groupby(["task", "N"])
    wide = steps.sps.median().unstack("task").map("{:,.0f}".format).add_suffix(", steps/s")
    wide = wide.join(steps.peak_mb.median().unstack("task").map("{:,.0f}".format).add_suffix(", peak MB"))
    return "\n\n".join(
        [markdown("environment, N x T", table), pictures({"Steps a second": "scale"}), markdown("N", wide)]
    )


# ----------------------------------------------------------------------------------------------------------------------

SWEEPS = (
    *(ppo_continuous, ppo_table1, ppo_table1_none, ppo_table1_order, tune_ppo_nine),
    *(hppo, joint_loss_mujoco, joint_loss_microrts, microrts_demo, vmpo, vmpo_paper),
)
REPORTS = {report.__name__: report for report in (*SWEEPS, readme, readme_speed, scale, tune_ppo)}


def block_of(name: str) -> re.Pattern:
    """What may follow the name in its first comment is for readers."""
    return re.compile(rf"(<!-- begin {name}\b[^\n]*-->\n).*?(<!-- end {name} -->)", re.DOTALL)


def documents(name: str) -> list[Path]:
    """Those with such a block; exits with 2 if there is none, or one that does not begin or end."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        comments, blocks = re.findall(rf"<!-- (?:begin|end) {name}\b", text), block_of(name).findall(text)
        if len(comments) != 2 * len(blocks):
            fail(f"{path}: needs <!-- begin {name} --> on a line of its own, and <!-- end {name} -->")
        found += [path] * bool(blocks)
    if not found:
        fail(f"{name}: neither README.md nor a page in docs has <!-- begin {name} --> and <!-- end {name} -->")
    return found


def write_block(path: Path, name: str, block: str):
    """Put it between the comments, with links that are relative to the document."""

    def relative(link: re.Match) -> str:
        return f"]({os.path.relpath(ROOT / link[1], path.parent)})"

    block = re.sub(r"\]\(([^:)]+)\)", relative, block)
    text = block_of(name).sub(lambda comments: f"{comments[1]}{block}\n{comments[2]}", path.read_text())
    replace_file(path, text.encode())


def check(name: str):
    """Exit with 2 where `name` is a report that has no document to go to."""
    if name in REPORTS:
        documents(name)


def main(args: Args):
    if args.name not in REPORTS:
        folder = args.runs / args.name
        if not folder.is_dir():
            fail(f"{args.name}: must be one of {', '.join(REPORTS)}, or a folder in {args.runs}")
        plot.main(plot.Args(runs=(folder,), output=folder / "report.png", html=True))
        return
    paths, report = documents(args.name), REPORTS[args.name]
    if report in SWEEPS:
        collect(args.name, args.runs)
        rows, curves = results(args.name)
        block = report(rows, curves)
        print(f"{args.name}: {len(rows)} runs")
    else:
        block = report()
    for path in paths:
        write_block(path, args.name, block)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
