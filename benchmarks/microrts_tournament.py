"""100 games of every trained MicroRTS policy against each bot; a row each, as it ends, in a CSV file.

    python benchmarks/microrts_tournament.py                            # the finished runs of joint_loss_microrts.sh
    python benchmarks/microrts_tournament.py --opponents workerRushAI --jobs 1

A match is `ppo_multidiscrete_joint_loss.py --eval RUN` with the bot in --env-kwargs in place of those of the training.
Actions are drawn: against a greedy policy most bots play the same game over and over. Matches that the file
has, with as many games, are skipped, so that a killed tournament goes on where it was. report.py joint_loss_microrts
makes the table.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import tyro
from report import fail, read_csv, write_csv
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "ppo_multidiscrete_joint_loss.py"


@dataclass
class Args:
    runs: Path = HERE / "runs/joint_loss_microrts"
    """folder of a sweep's runs"""
    results: Path = HERE / "results/microrts_tournament.csv"
    """where the rows go"""
    opponents: tuple[str, ...] = ("passiveAI", "randomBiasedAI", "workerRushAI", "lightRushAI", "coacAI")
    """the bots, also by their Java names; naiveMCTSAI thinks for 0.1 s a step, which makes an hour of 100 games"""
    games: int = 100
    """games a match"""
    jobs: int = 2
    """matches at a time"""


def task_of(config: dict) -> str:
    """The name of a run's task, without the module that it comes from."""
    return config["env_id"].split(":")[-1]


def key_of(row: dict) -> tuple[str, ...]:
    return row["setting"], row["env_id"], row["seed"], row["opponent"]


def play(run: Path, opponent: str, games: int) -> dict:
    """The row of a match. Raises RuntimeError with the end of its output when it fails."""
    args = json.loads((run / "config.json").read_text())["args"]
    kwargs = json.dumps({**json.loads(args["env_kwargs"]), "opponents": [opponent]})
    command = [sys.executable, str(SCRIPT), "--eval", str(run), "--env-id", args["env_id"], "--env-kwargs", kwargs]
    command += ["--eval-episodes", str(games), "--eval-sample", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    said = re.search(r"^evaluation: (\d+) episodes.* success ([\d.]+)%$", done.stdout, re.MULTILINE)
    if done.returncode or not said:
        raise RuntimeError(f"{' '.join(command[1:])}: {(done.stdout + done.stderr)[-500:]}")
    key = {"setting": args["exp_name"], "env_id": task_of(args), "seed": str(args["seed"]), "opponent": opponent}
    return {**key, "games": said[1], "win_rate": f"{float(said[2]) / 100:.3f}"}


def main(args: Args):
    rows = {key_of(row): row for row in read_csv(args.results)}
    matches, results = [], sorted(args.runs.glob("*/*/result.json"))
    if not results:
        fail(f"--runs {args.runs}: no finished run is in there")
    for result in results:
        config = json.loads((result.parent / "config.json").read_text())["args"]
        for opponent in args.opponents:
            row = rows.get((config["exp_name"], task_of(config), str(config["seed"]), opponent))
            if row is None or int(row["games"]) < args.games:
                matches.append((result.parent, opponent))
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(matches), unit="match", file=sys.stdout) as bar:
        futures = [pool.submit(play, *match, args.games) for match in matches]
        try:
            for future in as_completed(futures):
                if future.exception() is None:
                    row = future.result()
                    rows[key_of(row)] = row
                    write_csv(args.results, [rows[key] for key in sorted(rows)])
                    bar.update()
                else:
                    failed += 1
                    print(f"error: {future.exception()}", file=sys.stderr)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # else the matches that wait would begin now
            raise SystemExit(130) from None
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
