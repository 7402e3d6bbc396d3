"""From finished runs to what is committed: a table of runs, thinned learning curves and a figure.

    python benchmarks/curves.py benchmarks/runs/ppo_continuous --name ppo_continuous
    python benchmarks/curves.py --name ppo_continuous      # only the figure and the table, from benchmarks/results/

A run's score is the mean return of its last 100 training episodes, the protocol of the PPO paper and of CleanRL. A
curve has 200 points, each the mean return of the episodes that ended in the 20,000 steps before it.
"""

import csv
import gzip
import io
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
WINDOW = 20_000  # steps
POINTS = 200
ORANGE, BLUE = "#D55E00", "#0072B2"  # Okabe and Ito, told apart by everyone

# Mean and standard deviation over 3 seeds of the last 100 episodes at 1M steps, ppo_continuous_action.py on the v4
# environments: the table in CleanRL's documentation, docs.cleanrl.dev/rl-algorithms/ppo.
CLEANRL = {"HalfCheetah-v4": (1442.6, 46.0), "Hopper-v4": (2382.9, 272.0), "Walker2d-v4": (2288.0, 572.0)}


@dataclass
class Args:
    runs: tyro.conf.Positional[Path | None] = None
    """folder with finished runs, at any depth; without it the committed results are used"""
    name: str = "ppo_continuous"
    """results/NAME.csv, results/NAME_curves.csv.gz and figures/NAME.png"""


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """The row of a finished run's folder, and its curve."""
    config, result = (json.loads((folder / name).read_text()) for name in ("config.json", "result.json"))
    episodes = np.loadtxt(folder / "episodes.csv", delimiter=",", skiprows=1)
    steps, returns = episodes[:, 0], episodes[:, 1]
    args = config["args"]
    key = {"env_id": args["env_id"], "seed": args["seed"]}
    row = {
        **key,
        "steps": result["global_step"],
        "score": f"{returns[-100:].mean():.2f}",
        "eval_return": f"{np.mean(result['eval_returns']):.2f}",
        "seconds": f"{result['seconds']:.0f}",
        "sps": f"{result['global_step'] / result['seconds']:.0f}",
        "backend": args["backend"],
        "device": config["device"],
        "torch": config["versions"]["torch"],
        "git_commit": config["git_commit"],
    }
    curve = []
    for end in np.linspace(0, result["global_step"], POINTS + 1)[1:]:
        inside = (steps > end - WINDOW) & (steps <= end)
        if inside.any():
            curve.append({**key, "global_step": int(end), "return": f"{returns[inside].mean():.2f}"})
    return row, curve


def write_csv(path: Path, rows: list[dict]):
    """The same rows give the same bytes, compressed or not."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def read_csv(path: Path) -> list[dict]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        return list(csv.DictReader(file))


def grouped(rows: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """{env_id: {seed: rows}}"""
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["env_id"]][row["seed"]].append(row)
    return groups


def figure(rows: list[dict], curves: list[dict], path: Path):
    environments = grouped(curves)
    fig, axes = plt.subplots(1, len(environments), figsize=(4 * len(environments), 3.4), squeeze=False)
    for axis, (env_id, seeds) in zip(axes[0], environments.items()):
        for k, curve in enumerate(seeds.values()):
            x = [int(point["global_step"]) / 1e6 for point in curve]
            axis.plot(
                x, [float(point["return"]) for point in curve], color=BLUE, lw=1.2, label="a seed" if not k else None
            )
        if env_id in CLEANRL:
            mean, std = CLEANRL[env_id]
            axis.axhline(mean, color=ORANGE, ls="--", lw=1.5, label="CleanRL's end, ± std")
            axis.axhspan(mean - std, mean + std, color=ORANGE, alpha=0.15, lw=0)
        axis.set(title=f"{env_id}, {len(seeds)} seeds", xlabel="environment steps (millions)", xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("episodic return (mean over 20k steps)")
    axes[0, 0].legend(frameon=False, loc="lower right")
    fig.tight_layout()
    fig.savefig(path, dpi=110, metadata={"Software": None})


def table(rows: list[dict]) -> str:
    """Markdown: scores by environment, beside CleanRL's."""
    lines = ["| environment | seeds | score of each | mean ± std | CleanRL |", "|---|---|---|---|---|"]
    for env_id, seeds in grouped(rows).items():
        scores = np.array([float(row["score"]) for (row,) in seeds.values()])
        peer = "{:.0f} ± {:.0f}".format(*CLEANRL[env_id]) if env_id in CLEANRL else "-"
        each = ", ".join(f"{score:.0f}" for score in scores)
        lines.append(f"| {env_id} | {len(seeds)} | {each} | {scores.mean():.0f} ± {scores.std():.0f} | {peer} |")
    return "\n".join(lines)


def main(args: Args):
    for folder in ("results", "figures"):
        (HERE / folder).mkdir(exist_ok=True)
    rows_csv, curves_csv = HERE / f"results/{args.name}.csv", HERE / f"results/{args.name}_curves.csv.gz"
    if args.runs is not None:
        runs = [read_run(path.parent) for path in args.runs.rglob("result.json")]
        runs.sort(key=lambda run: (run[0]["env_id"], run[0]["seed"]))
        if not runs:
            sys.exit(f"error: {args.runs} holds no finished run")
        write_csv(rows_csv, [row for row, _ in runs])
        write_csv(curves_csv, [point for _, curve in runs for point in curve])
    rows, curves = read_csv(rows_csv), read_csv(curves_csv)
    figure(rows, curves, HERE / f"figures/{args.name}.png")
    print(table(rows))


if __name__ == "__main__":
    main(tyro.cli(Args))
