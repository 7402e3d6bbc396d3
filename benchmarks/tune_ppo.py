"""One setting of ppo_continuous.py for all of MuJoCo: a search with Optuna, nothing tuned by hand.

    pip install -r benchmarks/requirements.txt && nice -n 19 python benchmarks/tune_ppo.py

A trial is a setting. It trains 1M steps on HalfCheetah, Hopper, Walker2d and Ant with seeds 101 to 103, twelve runs,
seed by seed. Its value is the mean over these of (mean return of the last 100 episodes) / (Tianshou's PPO at 1M steps);
that table only sets the scale of each task. The first trials are the default, the default with a smaller sigma, and
Tianshou's own setting; Optuna's TPE sampler draws the others from what the earlier ones have shown. A trial ends early
when its runs so far are worse, by a paired Wilcoxon test, than the same tasks and seeds of the best trial.

Study and runs are in runs/tune_ppo. Kill the search when you like and start it again: the settings that were running go
on from their last checkpoints. results/tune_ppo.csv has a row a trial and is written after each. Where there is no
study, on another machine say, it begins with these rows. --best prints the lines that compare the winners with the
default (tune_ppo_nine.sh).
"""

import json
import os
from dataclasses import dataclass

import numpy as np
import optuna
import pandas as pd
import tyro
from optuna.trial import TrialState
from report import SEARCHED, TIANSHOU
from runner import HERE, Run, start

RUNS = [(env_id, seed) for seed in (101, 102, 103) for env_id in SEARCHED]
CHOICES = {  # the default first
    "num_envs": [8, 4, 16, 32],
    "num_steps": [256, 64, 128, 512],
    "minibatch_size": [64, 128, 256, 512],
    "update_epochs": [10, 3, 5, 15, 20],
    "anneal_lr": [True, False],
    "gamma": [0.99, 0.98, 0.995],
    "gae_lambda": [0.95, 0.9, 0.98],
    "norm_adv": [True, False],
    "clip_coef": [0.2, 0.1, 0.3],
    "clip_vloss": [True, False],
    "vf_coef": [0.5, 0.25, 1.0],
    "max_grad_norm": [0.5, 1.0, 5.0],
    "std_type": ["independent", "state"],
    "log_std_init": [0.0, -0.5, -1.0, -1.5],
    "rescale_actions": [False, True],
}
DEFAULT = {name: choices[0] for name, choices in CHOICES.items()} | {"learning_rate": 3e-4}
STARTS = {
    "default": DEFAULT,
    "default, smaller sigma": DEFAULT | {"log_std_init": -1.0},
    # its examples/mujoco/mujoco_ppo.py, as far as these flags go
    "Tianshou": DEFAULT
    | {"num_envs": 32, "num_steps": 64, "norm_adv": False, "clip_vloss": False, "vf_coef": 0.25, "log_std_init": -0.5},
}
FOLDER = HERE / "runs" / "tune_ppo"
TABLE = HERE / "results" / "tune_ppo.csv"


@dataclass
class Args:
    trials: int = 60
    """settings in all, those of earlier starts included"""
    jobs: int = 2
    """settings at a time, a process of one thread each"""
    best: int = 0
    """search nothing; print command lines of the default and of so many best settings: nine tasks, seeds 1 to 5"""


def flags_of(params: dict) -> list[str]:
    """A trial's setting as flags of ppo_continuous.py."""
    params = dict(params)
    params["num_minibatches"] = max(params["num_envs"] * params["num_steps"] // params.pop("minibatch_size"), 1)
    flags = []
    for name, value in params.items():
        flag = name.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


def train(params: dict, env_id: str, seed: int) -> float:
    """The score of a run, which goes on from its last checkpoint if it has one: the mean return of the last 100
    episodes, or 0 where it went wrong, which nan does."""
    command = ["python", "ppo_continuous.py", "--env-id", env_id, "--seed", str(seed), "--device", "cpu"]
    run = Run([*command, *flags_of(params), "--eval-episodes", "1"], FOLDER)
    if not run.acquire():
        raise RuntimeError(f"another process has {run.home}")
    with run.lock:
        diverged = run.home / "failed"
        if not run.finished() and not diverged.exists():
            with open(run.home / "log", "a") as log:
                status = start(run.script, run.process_flags(), log, pass_fds=[run.lock.fileno()]).wait()
            if status == 1:
                diverged.touch()
            elif status != 0:
                raise RuntimeError(f"{run.command} ended with status {status}:\n{run.log_end()}")
        if not run.finished():
            return 0.0
        return float(np.loadtxt(run.folder() / "episodes.csv", delimiter=",", skiprows=1)[-100:, 1].mean())


def objective(trial: optuna.Trial) -> float:
    params = {name: trial.suggest_categorical(name, choices) for name, choices in CHOICES.items()}
    params["learning_rate"] = float(f"{trial.suggest_float('learning_rate', 5e-5, 2e-3, log=True):.3g}")
    for number, (env_id, seed) in enumerate(RUNS):
        score = train(params, env_id, seed)
        trial.set_user_attr(f"{env_id} seed {seed}", score)
        trial.report(score / TIANSHOU[env_id], number)
        if trial.should_prune():
            raise optuna.TrialPruned
    return value_of(trial)


def value_of(trial: optuna.Trial | optuna.trial.FrozenTrial) -> float:
    """The mean over the runs that the trial has done."""
    done = [
        (env_id, score) for env_id, seed in RUNS if (score := trial.user_attrs.get(f"{env_id} seed {seed}")) is not None
    ]
    return float(np.mean([score / TIANSHOU[env_id] for env_id, score in done]))


def finished(study: optuna.Study) -> list:
    return [trial for trial in study.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def write_table(study: optuna.Study, _):
    """results/tune_ppo.csv from the study: the best first, those that ended early last."""
    rows = [
        {
            "state": trial.state.name.lower(),
            "value": value_of(trial),
            "start": next((name for name, params in STARTS.items() if params == trial.params), ""),
            "params": json.dumps(trial.params),
            **trial.user_attrs,
        }
        for trial in finished(study)
    ]
    table = pd.DataFrame(rows, columns=["state", "value", "start", "params", *(f"{e} seed {x}" for e, x in RUNS)])
    table = table.sort_values(["state", "value"], ascending=[True, False], kind="stable")  # complete, then pruned
    temporary = TABLE.with_suffix(".tmp")
    table.to_csv(temporary, index=False)
    os.replace(temporary, TABLE)


def read_table(study: optuna.Study):
    """Give the study the trials of results/tune_ppo.csv."""
    distributions = {name: optuna.distributions.CategoricalDistribution(c) for name, c in CHOICES.items()}
    distributions["learning_rate"] = optuna.distributions.FloatDistribution(5e-5, 2e-3, log=True)
    for row in pd.read_csv(TABLE).to_dict("records"):
        scores = [(env_id, seed, row[f"{env_id} seed {seed}"]) for env_id, seed in RUNS]
        scores = [(env_id, seed, score) for env_id, seed, score in scores if pd.notna(score)]
        trial = optuna.create_trial(
            state=TrialState[row["state"].upper()],
            value=row["value"],
            params=json.loads(row["params"]),
            distributions=distributions,
            user_attrs={f"{env_id} seed {seed}": score for env_id, seed, score in scores},
            intermediate_values={n: score / TIANSHOU[env_id] for n, (env_id, _, score) in enumerate(scores)},
        )
        study.add_trial(trial)


def print_best(count: int):
    """Command lines for runner.py, of the default and of the best settings that were tried with all seeds."""
    if not TABLE.exists():
        raise SystemExit(f"error: no {TABLE} yet: run the search first")
    table = pd.read_csv(TABLE)  # the best first
    tried = table[(table.state == "complete") & (table.start != "default")].params.head(count)
    settings = {"default": ""}
    for place, params in enumerate(map(json.loads, tried), 1):
        params["learning_rate"] = float(f"{params['learning_rate']:.3g}")
        settings[f"tuned-{place}"] = " ".join(flags_of(params))
    for seed in range(1, 6):
        for env_id in TIANSHOU:
            for name, flags in settings.items():
                line = f"python ppo_continuous.py --env-id {env_id} --exp-name {name} --seed {seed} {flags}"
                print(line.rstrip(), "--device cpu")


def main(args: Args):
    if args.best:
        print_best(args.best)
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{FOLDER / 'study.db'}"
    pruner = optuna.pruners.WilcoxonPruner(p_threshold=0.15)  # three runs, all worse: p = 0.125
    study = optuna.create_study(storage=storage, study_name="ppo", direction="maximize", load_if_exists=True)
    study.pruner = pruner
    if not study.trials and TABLE.exists():
        read_table(study)
    for params in STARTS.values():
        study.enqueue_trial(params, skip_if_exists=True)
    killed = (TrialState.RUNNING, TrialState.FAIL)  # what ran when the last start ended goes on
    kept = [trial.system_attrs.get("fixed_params", trial.params) for trial in study.trials if trial.state not in killed]
    for trial in study.trials:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.state in killed and trial.params not in kept:
            kept.append(trial.params)
            study.enqueue_trial(trial.params)
    options = {"n_startup_trials": 5, "multivariate": True, "constant_liar": True}
    study.sampler = optuna.samplers.TPESampler(**options, seed=len(study.trials))
    left = max(args.trials - len(finished(study)), 0)
    study.optimize(objective, n_trials=left, n_jobs=args.jobs, callbacks=[write_table])
    print(pd.read_csv(TABLE)[["state", "value", "params"]].head().to_string())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
