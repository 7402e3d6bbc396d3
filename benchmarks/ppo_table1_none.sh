#!/usr/bin/env bash
# Why Table 1's objective without clipping or penalty is not as bad here as in the PPO paper, whose authors name
# HalfCheetah as the cause: this environment without what the scripts do and the paper's code may not have done, 3 seeds.
# Kill it when you like and start it again. Flags go to the runner: --jobs 8, --dry-run, --cluster auto.
#
#     pip install -r benchmarks/requirements.txt && benchmarks/ppo_table1_none.sh
set -euo pipefail
cd "$(dirname "$0")/.."
table3="--num-envs 1 --num-steps 2048 --no-anneal-lr --device cpu --no-clip-vloss"
unclipped="benchmarks.half_cheetah_unclipped:HalfCheetahUnclipped-v4"

for seed in 1 2 3; do
    run() {  # environment, setting, flags
        echo "python ppo_continuous.py --env-id $1 --seed $seed $table3 --exp-name $2 ${*:3}"
    }
    run HalfCheetah-v4 none-raw-rewards --clip-coef 0 --no-norm-reward
    run HalfCheetah-v4 none-raw-observations --clip-coef 0 --no-norm-obs
    run "$unclipped" none-unclipped-actions --clip-coef 0
    run "$unclipped" none-unclipped-actions-raw-rewards --clip-coef 0 --no-norm-reward
    run "$unclipped" none-unclipped-actions-raw-rewards-free-gradient --clip-coef 0 --no-norm-reward --max-grad-norm 1e9
    run "$unclipped" clip-0.2-unclipped-actions --clip-coef 0.2
done | nice -n 19 python benchmarks/runner.py --name ppo_table1_none --report "$@"
