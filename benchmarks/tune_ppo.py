"""One setting of ppo_continuous.py for all of MuJoCo: a search with Optuna, nothing tuned by hand.

    pip install -r benchmarks/requirements.txt && nice -n 19 python benchmarks/tune_ppo.py

A trial is a setting. It trains 1M steps on HalfCheetah, Hopper, Walker2d and Ant with seeds 101 to 103, twelve runs,
seed by seed. Its value is the mean over these of (mean return of the last 100 episodes) / (Tianshou's PPO at 1M steps);
that table only sets the scale of each task. The first trial is the default. A trial ends after its first seed, or
later, when its mean so far is below the median, at the same run, of those that went to their end. Optuna's TPE sampler
draws the next setting from what the earlier ones have shown.

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
from runner import HERE, Run, start

TIANSHOU = {"HalfCheetah-v4": 5783.9, "Hopper-v4": 2609.3, "Walker2d-v4": 3588.5, "Ant-v4": 3258.4}
RUNS = [(env_id, seed) for seed in (101, 102, 103) for env_id in TIANSHOU]
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
FOLDER = HERE / "runs" / "tune_ppo"
TABLE = HERE / "results" / "tune_ppo.csv"
NINE = "Ant HalfCheetah Hopper Walker2d Swimmer Humanoid Reacher InvertedPendulum InvertedDoublePendulum".split()


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
    values = []
    for number, (env_id, seed) in enumerate(RUNS):
        score = train(params, env_id, seed)
        trial.set_user_attr(f"{env_id} seed {seed}", score)
        values.append(score / TIANSHOU[env_id])
        trial.report(float(np.mean(values)), number)
        if trial.should_prune():
            raise optuna.TrialPruned
    return float(np.mean(values))


def finished(study: optuna.Study) -> list:
    return [trial for trial in study.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def write_table(study: optuna.Study, _):
    """results/tune_ppo.csv from the study, the best first."""
    rows = [
        {"state": trial.state.name.lower(), "value": trial.value, "params": json.dumps(trial.params)}
        | trial.user_attrs
        | {"means": json.dumps(list(trial.intermediate_values.values()))}
        for trial in finished(study)
    ]
    table = pd.DataFrame(rows, columns=["state", "value", "params", *(f"{e} seed {s}" for e, s in RUNS), "means"])
    temporary = TABLE.with_suffix(".tmp")
    table.sort_values("value", ascending=False, kind="stable").to_csv(temporary, index=False)
    os.replace(temporary, TABLE)


def read_table(study: optuna.Study):
    """Give the study the trials of results/tune_ppo.csv."""
    distributions = {name: optuna.distributions.CategoricalDistribution(c) for name, c in CHOICES.items()}
    distributions["learning_rate"] = optuna.distributions.FloatDistribution(5e-5, 2e-3, log=True)
    for row in pd.read_csv(TABLE).to_dict("records"):
        trial = optuna.create_trial(
            state=TrialState[row["state"].upper()],
            value=row["value"],
            params=json.loads(row["params"]),
            distributions=distributions,
            user_attrs={f"{e} seed {s}": row[f"{e} seed {s}"] for e, s in RUNS if pd.notna(row[f"{e} seed {s}"])},
            intermediate_values=dict(enumerate(json.loads(row["means"]))),
        )
        study.add_trial(trial)


def print_best(count: int):
    """Command lines for runner.py, of the default and of the best settings that were tried with all seeds."""
    if not TABLE.exists():
        raise SystemExit(f"error: no {TABLE} yet: run the search first")
    table = pd.read_csv(TABLE)  # the best first
    settings = {"default": ""}
    tried = [params for params in map(json.loads, table[table.state == "complete"].params) if params != DEFAULT]
    for place, params in enumerate(tried[:count], 1):
        params["learning_rate"] = float(f"{params['learning_rate']:.3g}")
        settings[f"tuned-{place}"] = " ".join(flags_of(params))
    for seed in range(1, 6):
        for task in NINE:
            for name, flags in settings.items():
                line = f"python ppo_continuous.py --env-id {task}-v4 --exp-name {name} --seed {seed} {flags}"
                print(line.rstrip(), "--device cpu")


def main(args: Args):
    if args.best:
        print_best(args.best)
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{FOLDER / 'study.db'}"
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=len(TIANSHOU) - 1)
    study = optuna.create_study(storage=storage, study_name="ppo", direction="maximize", load_if_exists=True)
    study.pruner = pruner
    if not study.trials and TABLE.exists():
        read_table(study)
    if not study.trials:
        study.enqueue_trial(DEFAULT)
    done = [trial.params for trial in finished(study)]
    for trial in study.trials:  # what ran when the last start was killed
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.state in (TrialState.RUNNING, TrialState.FAIL) and trial.params not in done:
            done.append(trial.params)
            study.enqueue_trial(trial.params)
    study.sampler = optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=len(study.trials))
    left = max(args.trials - len(finished(study)), 0)
    study.optimize(objective, n_trials=left, n_jobs=args.jobs, callbacks=[write_table])
    print(pd.read_csv(TABLE)[["state", "value", "params"]].head().to_string())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
