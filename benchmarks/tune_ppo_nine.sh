#!/usr/bin/env bash
# The three settings that tune_ppo.py found best, and the default, on nine MuJoCo tasks, 1M steps, 5 seeds: 180 runs.
# Kill it when you like and start it again. Flags go to the runner: --jobs 8, --dry-run, --cluster auto.
#
#     pip install -r benchmarks/requirements.txt && benchmarks/tune_ppo_nine.sh
set -euo pipefail
cd "$(dirname "$0")/.."
nine="Ant-v4 HalfCheetah-v4 Hopper-v4 Humanoid-v4 InvertedDoublePendulum-v4 InvertedPendulum-v4 Reacher-v4 Swimmer-v4"
nice -n 19 python benchmarks/random_policy.py $nine Walker2d-v4  # the zero of the scores; those in results/ stay
python benchmarks/tune_ppo.py --best 3 | nice -n 19 python benchmarks/runner.py --name tune_ppo_nine --report "$@"
