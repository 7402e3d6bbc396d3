#!/usr/bin/env bash
# Learning curves of ppo_continuous.py with its defaults, 1M steps: Hopper and Walker2d with 3 seeds, HalfCheetah, whose
# runs end in one of two gaits, with 10. Kill it when you like and start it again.
# Flags go to the runner: --jobs 8, --dry-run, --cluster auto.
#
#     pip install -r benchmarks/requirements.txt && benchmarks/ppo_continuous.sh
set -euo pipefail
cd "$(dirname "$0")/.."

for seed in 1 2 3 4 5 6 7 8 9 10; do
    for env in HalfCheetah-v4 Hopper-v4 Walker2d-v4; do
        if [ "$env" = HalfCheetah-v4 ] || [ "$seed" -le 3 ]; then
            echo "python ppo_continuous.py --env-id $env --seed $seed --device cpu"
        fi
    done
done | nice -n 19 python benchmarks/runner.py --name ppo_continuous --report "$@"
