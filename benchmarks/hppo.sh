#!/usr/bin/env bash
# hppo_hybrid.py: the default loss (separate ratios, chosen parameters) on eight hybrid tasks, and all four combinations
# of --loss and --parameters on two of them; 5 seeds, 2M steps, 1,000 greedy episodes at the end. One setting for all,
# but that CatchPoint explores more.
# Kill it when you like and start it again. Flags go to the runner: --jobs 8, --dry-run, --cluster auto.
#
#     pip install -r benchmarks/requirements.txt hybrid-platform==0.1.0 numba==0.68.1 && benchmarks/hppo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
run="--total-timesteps 2000000 --num-envs 64 --num-steps 32 --num-minibatches 8 --eval-episodes 1000 --device cpu"
environments="HybridMoving-v0 HybridSliding-v0 HybridCatchPoint-v0 HybridHardMove4-v0 HybridHardMove6-v0
    HybridHardMove8-v0 HybridHardMove10-v0 gym_platform:Platform-v0"

for seed in 1 2 3 4 5; do
    for env in $environments; do
        exploration="--ent-coef 0.01"
        if [ "$env" = HybridCatchPoint-v0 ]; then exploration="--ent-coef 0.1 --log-std-init -1"; fi
        echo "python hppo_hybrid.py --env-id $env --seed $seed $run $exploration --exp-name separate-chosen"
    done
    for env in HybridMoving-v0 HybridHardMove4-v0; do
        for setting in "separate all" "joint chosen" "joint all"; do
            read -r loss parameters <<< "$setting"
            flags="--ent-coef 0.01 --loss $loss --parameters $parameters --exp-name $loss-$parameters"
            echo "python hppo_hybrid.py --env-id $env --seed $seed $run $flags"
        done
    done
done | nice -n 19 python benchmarks/runner.py --name hppo --report "$@"
