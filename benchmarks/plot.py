"""Learning curves of any runs: a figure, a table of scores, and a page that shows values under the pointer.

    python benchmarks/plot.py runs
    python benchmarks/plot.py runs/Hopper-v4__* --by learning_rate --output rates.svg --html
    python benchmarks/plot.py runs --metric losses/approx_kl

Runs are found in the given folders and below them. Those that agree in all settings but the seed are a group: one curve
in the panel of their environment, named after the settings in which the groups differ. --by groups by other ones.

A curve is the interquartile mean over the seeds, its band the 95 % bootstrap interval of that (Agarwal et al. 2021,
arXiv:2108.13264; 2,000 resamples of the seeds), drawn where every seed has a value; where some have none, a thin line
shows each that has; a dot is where a seed ends. A point is the mean of the episodes in the last 1/50 of all steps. With
few seeds mind what an interval is: of 3 it is their range, which holds the true mean in 3 cases of 4.

The table, printed and written to NAME.csv beside NAME.png, is of scores: a run's is the mean return of its last 100
training episodes (of another metric, the mean of its last 10 values). With --html there is also a page, NAME.html,
which needs no network. Returns and lengths come from episodes.csv, other metrics from TensorBoard's event files. A run
that is still training is drawn as far as it is. Exit status: 0, or 2 where there are no runs, or damaged ones.
"""

import html
import io
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import tyro
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

matplotlib.rcParams["svg.hashsalt"] = "plot"  # the same runs give the same bytes
POINTS = 200  # of a curve
MANY = 6  # settings in one name
GRID = np.arange(1, POINTS + 1) / POINTS
# Okabe and Ito's palette
BLUE, ORANGE, GREEN, RED, PINK, SKY, GREY = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #666666".split()
EPISODES = {"charts/episodic_return": "return", "charts/episodic_length": "length"}  # {metric: column of episodes.csv}
NO_SETTINGS = {"env_id", "seed", "runs_dir", "track", "wandb_project", "wandb_entity"}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, or with runs somewhere below them"""
    by: tuple[str, ...] = ()
    """settings to group by, instead of all in which the runs differ: --by learning_rate gamma"""
    metric: str = "charts/episodic_return"
    """what to draw: a tag of TensorBoard"""
    output: Path = Path("plot.png")
    """the figure, .png or .svg; the table goes beside it, as .csv"""
    html: bool = False
    """write a page with values under the pointer beside it, as .html"""


def fail(message: str):
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def notice(message: str):
    print(f"notice: {message}", file=sys.stderr)


def replace_file(path: Path, data: bytes):
    """Write a file so that at any moment either the old or the new one is there, whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def natural(text: str) -> list:
    """Sorts clip-0.3 before clip-10, and 1e-05 before 0.001."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", text)
    return [(0, float(part)) if re.match(r"\d", part) else (1, part) for part in parts]


# --- Runs -------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    folder: Path
    settings: dict  # config.json's arguments in their order, with the script's name
    steps: np.ndarray  # [values], environment steps
    values: np.ndarray  # [values]
    end: float  # the step that it has reached
    finished: bool


def find_runs(folders) -> list[Path]:
    """The folders with a config.json among these and below them, each once; hidden ones are passed over."""
    found = []
    for folder in folders:
        configs = [path for path in folder.rglob("config.json") if "/." not in f"/{path.relative_to(folder)}"]
        if not configs:
            fail(f"{folder}: {'no run is in there' if folder.is_dir() else 'there is no such folder'}")
        found += [path.parent.resolve() for path in configs]
    return sorted(set(found), key=lambda path: natural(str(path)))


def read_values(folder: Path, metric: str) -> pd.Series:
    """A metric over environment steps, empty where there is none yet. ValueError for a damaged file."""
    if metric in EPISODES:
        if not (folder / "episodes.csv").exists() and not (folder / "result.json").exists():  # before a checkpoint
            return pd.Series(dtype=float)
        episodes = pd.read_csv(folder / "episodes.csv", usecols=["global_step", EPISODES[metric]], dtype=float)
        return episodes.set_index("global_step")[EPISODES[metric]]
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    events = reader.Scalars(metric) if metric in reader.Tags()["scalars"] else []
    return pd.Series({event.step: event.value for event in events}, dtype=float).sort_index()


def read_run(folder: Path, metric: str) -> Run:
    """ValueError for what is no run, or a damaged one."""
    try:
        config = json.loads((folder / "config.json").read_text())
        settings = {"script": Path(config["command"][0]).stem, **config["args"]}
        missing = {"env_id", "exp_name", "seed", "total_timesteps"} - settings.keys()
        if missing:
            raise ValueError(f"config.json has no {', '.join(sorted(missing))}")
        values = read_values(folder, metric).dropna()
        finished = (folder / "result.json").exists()
        last = values.index.max() if len(values) else 0
        end = json.loads((folder / "result.json").read_text())["global_step"] if finished else last
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} ({type(error).__name__}: {error})") from error
    return Run(folder, settings, values.index.to_numpy(float), values.to_numpy(), end, finished)


def read_runs(folders, metric: str) -> list[Run]:
    """All runs below these folders that have values; exits with 2 if one is damaged or none has any."""
    runs, damaged = [], []
    for folder in find_runs(folders):
        try:
            runs.append(read_run(folder, metric))
        except ValueError as error:
            damaged.append(str(error))
    if damaged:
        fail(f"not whole, or not runs of these scripts: {'; '.join(damaged)}")
    empty, runs = [run for run in runs if not run.values.size], [run for run in runs if run.values.size]
    if not runs:
        tags = EventAccumulator(str(empty[0].folder)).Reload().Tags()["scalars"]
        fail(f"no run has a value of {metric} yet; {empty[0].folder} has {', '.join(sorted(tags)) or 'none at all'}")
    if empty:
        notice(f"{len(empty)} runs have no {metric} and are left out: {', '.join(run.folder.name for run in empty)}")
    unfinished = sum(not run.finished for run in runs)
    if unfinished:
        notice(f"{unfinished} of {len(runs)} runs are not finished and are drawn as far as they are")
    return runs


def in_words(steps: int) -> str:
    """1 million, 100 thousand, 2,048."""
    if steps >= 10**6:
        return f"{steps / 10**6:.3g} million"
    return f"{steps / 1000:.3g} thousand" if steps >= 10**4 else f"{steps:,}"


def seeds_in_words(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def words(name: str, value) -> str:
    """A setting, as a legend names it."""
    if name in ("script", "exp_name"):
        return str(value)
    if name == "total_timesteps":
        return f"{in_words(value)} steps"
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, list):
        value = " ".join(map(str, value))
    return f"{name.replace('_', ' ')} {'none' if value is None else value}"


def name_groups(runs: list[Run], by: tuple[str, ...]) -> list[str]:
    """For each run the name of its group: the settings, in words, in which runs in the same environment differ.

    A script's runs differ from another's in many settings, as do those of two --exp-name, so these two come first, and
    of the others only what differs among runs that agree in them, in some environment. What a run does not have is no
    difference. The arguments that follow total_timesteps may change within a run and are no settings.
    """
    table = pd.DataFrame([{name: words(name, value) for name, value in run.settings.items()} for run in runs])
    settings = {}
    for run in runs:
        names = list(run.settings)
        settings |= dict.fromkeys(names[: names.index("total_timesteps") + 1])
    settings = [name for name in settings if name not in NO_SETTINGS]

    def differing(runs: pd.DataFrame, names, among: list[str]) -> list[str]:
        groups = runs.groupby(among, dropna=False)
        return [name for name in names if (groups[name].nunique() > 1).any()]

    first = differing(table, ["script"], ["env_id"]) + differing(table, ["exp_name"], ["env_id", "script"])
    others = [name for name in settings if name not in ("script", "exp_name")]
    alike = table.groupby(["script", "exp_name"])
    named = {key: first + differing(runs, others, ["env_id"]) for key, runs in alike}
    if by:
        kept = [name for name in settings if any(name in names for names in named.values())]
        by = [name.replace("-", "_") for name in by]
        for name in by:
            if name not in table:
                fail(f"--by {name}: no run has such a setting; they differ in {', '.join(kept) or 'none'}")
        mixed = differing(table, [name for name in kept if name not in by], ["env_id", *by])
        if mixed:
            notice(f"runs of one group differ in {', '.join(mixed)}")
        named = dict.fromkeys(named, by)
    elif max(map(len, named.values())) > MANY:
        notice("some runs differ in many settings: --by exp_name, or another setting, gives them shorter names")
    named_rows = [(row, row[named[row["script"], row["exp_name"]]].dropna()) for _, row in table.iterrows()]
    return [", ".join(name) or ("the others" if by else row["exp_name"]) for row, name in named_rows]


# --- Statistics -------------------------------------------------------------------------------------------------------


def curve(steps: np.ndarray, values: np.ndarray, total: float) -> np.ndarray:
    """[POINTS]: at each k / POINTS of `total` steps the mean of the values in the total / 50 steps before; nan for
    none. `steps` ascend."""
    ends = np.arange(1, POINTS + 1) * total / POINTS
    first, last = (np.searchsorted(steps, edges, side="right") for edges in (ends - total / 50, ends))
    return np.array([values[i:j].mean() if j > i else np.nan for i, j in zip(first, last)])


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


# --- Figures ----------------------------------------------------------------------------------------------------------


class Series:
    """A group's curve over `steps` [POINTS]: the IQM of its `seeds` [runs, POINTS], and the interval's ends; nan where
    not every run has a value."""

    def __init__(self, steps: np.ndarray, seeds: np.ndarray):
        self.steps = steps
        self.seeds = pd.DataFrame(seeds).interpolate(axis=1, limit_area="inside").to_numpy(float)
        self.whole = ~np.isnan(self.seeds).any(0)
        self.middle, self.low, self.high = np.full((3, len(steps)), np.nan)
        if self.whole.any():
            whole = self.seeds[:, self.whole]
            self.middle[self.whole] = iqm(whole, axis=0)
            self.low[self.whole], self.high[self.whole] = interval([whole], iqm)


def panels(count: int, columns: int = 4, size: tuple[float, float] = (3.1, 2.9)):
    """A figure and its axes, `size` inches each; those that are left over are blank, for the legend."""
    columns = min(count, columns)
    rows = -(-count // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return fig, list(axes.flat)


def tidy(axis):
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def draw(axis, title: str, group: dict[str, Series], styles: dict[str, dict], y_label: str = "episodic return"):
    """One environment's curves; of a single one every seed too."""
    for name, series in group.items():
        style, alone = styles[name], len(group) == 1 < len(series.seeds)
        for k, seed in enumerate(series.seeds):
            shown = seed if alone else np.where(series.whole, np.nan, seed)
            label = "a seed" if alone and k == 0 else None
            axis.plot(series.steps, shown, color=GREY if alone else style["color"], lw=0.6, alpha=0.6, label=label)
            (present,) = np.nonzero(~np.isnan(seed))
            if present.size:
                axis.plot(series.steps[present[-1]], seed[present[-1]], ".", color=style["color"], ms=5, alpha=0.8)
        axis.fill_between(series.steps, series.low, series.high, color=style["color"], alpha=0.2, lw=0)
        axis.plot(series.steps, series.middle, lw=1.5, label=name, **style)
    width = axis.figure.get_figwidth() / axis.get_gridspec().ncols
    axis.set_title(title, fontsize=min(10, 97 * width / max(map(len, title.splitlines()))))  # so that it fits
    axis.set(xlabel="environment steps", xlim=(0, None))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axis.get_subplotspec().is_first_col():
        axis.set_ylabel(y_label)
    tidy(axis)


def picture_of(fig, kind: str, **options) -> bytes:
    data = io.BytesIO()
    nothing = {"Software": None} if kind == "png" else dict.fromkeys(("Date", "Creator", "Format", "Type"))
    fig.savefig(data, format=kind, dpi=110, metadata=nothing, **options)
    plt.close(fig)
    return data.getvalue()


def save(fig, path: Path):
    path.parent.mkdir(exist_ok=True)
    if fig.get_layout_engine() is None:
        fig.tight_layout()
    replace_file(path, picture_of(fig, path.suffix[1:], bbox_inches="tight"))


def save_panels(fig, axes: list, path: Path):
    """With one legend for all of them, where no curve is: in the first blank panel, or below."""
    entries = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels())}
    options = {"frameon": False, "handles": list(entries.values()), "labels": list(entries)}
    blank = next((axis for axis in axes if not axis.axison), None)
    if blank and max(map(len, entries)) < 40 and len(entries) < 12:
        blank.legend(loc="center", **options)
    else:
        columns = max(1, int(12 * fig.get_figwidth() / (8 + max(map(len, entries)))))
        fig.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=min(columns, len(entries)), **options)
    save(fig, path)


def save_unlike_panels(fig, axes: list, path: Path):
    """With a legend below each panel, of its own curves alone."""
    grid = axes[0].get_gridspec()
    width, height = fig.get_size_inches() / (grid.ncols, grid.nrows)
    heights = np.full(grid.nrows, height)
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        labels = [textwrap.fill(label, int(13 * width)) for label in labels]
        axis.legend(handles, labels, loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False, fontsize=7)
        lines = sum(label.count("\n") + 1.5 for label in labels)
        row = axis.get_subplotspec().rowspan.start
        heights[row] = max(heights[row], height + 0.13 * lines)
    grid.set_height_ratios(heights)
    fig.set_figheight(heights.sum())
    fig.set_layout_engine("constrained")
    save(fig, path)


def styles_of(names) -> dict[str, dict]:
    """A colour and a kind of line for each group."""
    looks = product(("-", "--", ":", "-."), (BLUE, ORANGE, GREEN, RED, PINK, SKY, GREY))
    return {name: {"ls": line, "color": colour} for name, (line, colour) in zip(names, cycle(looks))}


# --- The page ---------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>TITLE</title>
<style>
body { font: 15px sans-serif; margin: 1em; color: #222; background: #fff }
main { display: flex; flex-wrap: wrap; gap: 1em }
figure { position: relative; margin: 0; width: 560px; max-width: 100% }
figure svg { display: block; width: 100%; height: auto }
.line { position: absolute; width: 1px; background: #888; pointer-events: none }
.values { position: absolute; z-index: 1; padding: 4px 8px; background: #fffe; border: 1px solid #888;
          font-size: 13px; pointer-events: none; box-sizing: border-box }
.scores { overflow-x: auto }
table { border-collapse: collapse; margin-top: 1em }
td, th { padding: 2px 10px; border-bottom: 1px solid #ddd; text-align: left }
</style>
<h1>TITLE</h1>
<main>FIGURES</main>
<div class="scores">TABLE</div>
<p>NOTE</p>
<script>
for (const figure of document.querySelectorAll("figure")) {
  const panel = JSON.parse(figure.querySelector("script").textContent), [left, bottom, right, top] = panel.box;
  const line = figure.querySelector(".line"), values = figure.querySelector(".values");
  figure.addEventListener("pointerleave", () => { line.hidden = values.hidden = true; });
  figure.addEventListener("pointermove", event => {
    const frame = figure.getBoundingClientRect();
    const at = ((event.clientX - frame.left) / frame.width - left) / (right - left);
    line.hidden = values.hidden = at < 0 || at > 1;
    if (line.hidden) return;
    const [low, high] = panel.limits, step = low + at * (high - low), total = panel.total;
    const k = Math.min(Math.max(Math.round(step / total * panel.points) - 1, 0), panel.points - 1);
    const here = (k + 1) / panel.points * total, x = left + (here - low) / (high - low) * (right - left);
    line.style = `left: ${100 * x}%; top: ${100 * (1 - top)}%; height: ${100 * (top - bottom)}%`;
    values.replaceChildren(`step ${Math.round(here).toLocaleString("en")}`);
    for (const { name, color, middle, low, high } of panel.series) {
      if (middle[k] === null) continue;
      const row = document.createElement("div"), mark = document.createElement("span");
      mark.textContent = "\\u25a0 ";
      mark.style.color = color;
      row.append(mark, `${name}: ${middle[k]}` + (low[k] === null ? "" : ` [${low[k]}, ${high[k]}]`));
      values.append(row);
    }
    const room = `${100 * Math.max(x, 1 - x) - 2}%`, width = `min(${room}, 360px)`;
    values.style = `${x < 0.5 ? "right" : "left"}: calc(${room} - ${width}); width: ${width}; top: 8%`;
  });
}
</script>
</html>
"""


def figure_of(title: str, group: dict[str, Series], styles: dict, y_label: str) -> str:
    """A panel of the page: the drawing, and the numbers behind it."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        fig, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
        draw(axis, title, group, styles, y_label)
        fig.legend(loc="outside lower center", frameon=False, ncols=1 if max(map(len, group)) > 25 else 2)
        fig.draw_without_rendering()  # places the axes
        box, limits = axis.get_position().extents.tolist(), axis.get_xlim()
        drawing = picture_of(fig, "svg").decode()

    def numbers(values) -> list:
        return [None if np.isnan(value) else float(f"{value:.4g}") for value in values]

    series = [
        {"name": name, "color": styles[name]["color"]}
        | {part: numbers(getattr(one, part)) for part in ("middle", "low", "high")}
        for name, one in group.items()
    ]
    steps = next(iter(group.values())).steps
    panel = {"box": box, "limits": limits, "total": steps[-1], "points": POINTS, "series": series}
    data = json.dumps(panel).replace("<", "\\u003c")
    return (
        f'<figure>{drawing[drawing.index("<svg") :]}<div class="line" hidden></div><div class="values" hidden></div>'
        f'<script type="application/json">{data}</script></figure>'
    )


# ----------------------------------------------------------------------------------------------------------------------


def task_of(env_id: str) -> str:
    """An environment's name without its module's."""
    return env_id.rpartition(":")[2]


def score_of(run: Run, metric: str) -> float:
    return run.values[-100 if metric in EPISODES else -10 :].mean()


def count_of(groups: list[list[Run]]) -> str:
    """How many runs a group has, by environment: 5 seeds; 2 to 5 seeds; 6 runs of 5 seeds."""
    seeds = [len({run.settings["seed"] for run in runs}) for runs in groups]
    text = seeds_in_words(max(seeds))
    if min(seeds) < max(seeds):
        text = f"{min(seeds)} to {text}"
    runs = sum(map(len, groups))
    return text if runs == sum(seeds) else f"{runs} runs of {text}"


def summary(env_id: str, name: str, runs: list[Run], metric: str) -> dict:
    """A row of the table."""
    scores = np.array([score_of(run, metric) for run in runs])
    low, high = interval([scores], iqm)
    row = {"environment": task_of(env_id), "setting": name, "seeds": len({run.settings["seed"] for run in runs})}
    row |= {"runs": len(runs), "steps": int(min(run.end for run in runs)), "mean": scores.mean(), "IQM": iqm(scores)}
    return row | {"IQM low": float(low), "IQM high": float(high), "each": " ".join(f"{score:.5g}" for score in scores)}


def main(args: Args):
    if args.output.suffix not in (".png", ".svg"):
        fail(f"--output {args.output}: must end in .png or .svg")
    if not args.output.parent.is_dir():
        fail(f"--output {args.output}: there is no folder {args.output.parent}")
    if (args.output.parent / "config.json").exists():
        fail(f"--output {args.output}: {args.output.parent} is a run's folder, whose files have such names")
    if not args.runs:
        fail("give at least one folder of runs")
    runs = read_runs(args.runs, args.metric)
    groups = {}  # {environment: {group: its runs}}
    for run, name in sorted(zip(runs, name_groups(runs, args.by)), key=lambda pair: natural(pair[1])):
        groups.setdefault(run.settings["env_id"], {}).setdefault(name, []).append(run)

    if args.metric in EPISODES:
        early = sum(run.steps[-100:][0] < 0.8 * run.end for run in runs)
        if early:
            notice(f"in {early} of {len(runs)} runs the last 100 episodes, the score, are more than a fifth of the run")
    rows = [summary(e, name, same, args.metric) for e in sorted(groups) for name, same in groups[e].items()]
    names = sorted({name for same in groups.values() for name in same}, key=natural)
    legend = {name: f"{name} ({count_of([same[name] for same in groups.values() if name in same])})" for name in names}
    styles = styles_of(legend.values())

    y_label = args.metric.rpartition("/")[2].replace("_", " ")
    fig, axes = panels(len(groups), size={1: (6.0, 4.0), 2: (4.5, 3.5)}.get(len(groups), (3.1, 2.9)))
    figures = []
    for axis, env_id in zip(axes, sorted(groups)):
        total = max(run.settings["total_timesteps"] for same in groups[env_id].values() for run in same)
        steps, series = GRID * total, {}
        for name, same in groups[env_id].items():
            seeds = [curve(run.steps, run.values, total) for run in same]
            for run, values in zip(same, seeds):
                values[steps > run.end + total / POINTS] = np.nan
            series[legend[name]] = Series(steps, np.array(seeds))
        title = f"{task_of(env_id)}, {in_words(total)} steps"
        draw(axis, title, series, styles, y_label)
        if args.html:
            figures.append(figure_of(title, series, styles, y_label))
    table = pd.DataFrame(rows)
    scored = f"{y_label} of each run, mean of its last {'100 episodes' if args.metric in EPISODES else '10 values'}"
    if all(len(same) == len(names) for same in groups.values()):
        save_panels(fig, axes, args.output)
    else:
        save_unlike_panels(fig, axes[: len(groups)], args.output)
    written = [args.output, args.output.with_suffix(".csv")]
    replace_file(written[1], table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode())
    if args.html:
        written.append(args.output.with_suffix(".html"))
        note = "Curves: interquartile mean over the seeds; bands: its 95 % bootstrap interval; dots: where seeds end. "
        note += f"Table: {scored}."
        parts = {"TITLE": html.escape(y_label.capitalize()), "FIGURES": "\n".join(figures), "NOTE": note}
        parts["TABLE"] = table.to_html(index=False, float_format="{:.5g}".format, na_rep="", border=0)
        page = re.sub("TITLE|FIGURES|NOTE|TABLE", lambda found: parts[found[0]], PAGE)
        replace_file(written[2], page.encode())
    print(f"{scored}; 95 % bootstrap interval of the interquartile mean (IQM)")
    print(table.drop(columns="each").to_string(index=False, float_format="{:.5g}".format, na_rep="-"))
    print(f"wrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
