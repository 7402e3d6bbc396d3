#!/usr/bin/env bash
# hppo_hybrid.py: the default loss (separate ratios, chosen parameters) on eight hybrid tasks, and all four combinations
# of --loss and --parameters on two of them; 5 seeds, 2M steps, 1,000 greedy episodes at the end. One setting for all,
# but that CatchPoint explores more; and Sliding once more with 10M steps.
# Kill it when you like and start it again. Flags go to the runner: --jobs 8, --dry-run, --cluster auto.
#
#     pip install -r benchmarks/requirements.txt hybrid-platform==0.1.0 numba==0.68.1 && benchmarks/hppo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
common="--num-envs 64 --num-steps 64 --num-minibatches 16 --gamma 0.995 --gae-lambda 0.99 --encoder-sizes 128 128"
common="$common --log-std-init -1 --eval-episodes 1000 --device cpu"
environments="HybridMoving-v0 HybridSliding-v0 HybridCatchPoint-v0 HybridHardMove4-v0 HybridHardMove6-v0
    HybridHardMove8-v0 HybridHardMove10-v0 gym_platform:Platform-v0"

run() {  # environment, seed, steps, name, flags
    echo "python hppo_hybrid.py --env-id $1 --seed $2 --total-timesteps $3 $common --exp-name $4 ${*:5}"
}

{
    for seed in 1 2 3 4 5; do
        for env in $environments; do
            entropy=0.003
            if [ "$env" = HybridCatchPoint-v0 ]; then entropy=0.1; fi
            run "$env" $seed 2000000 separate-chosen --ent-coef $entropy
        done
        for env in HybridMoving-v0 HybridHardMove4-v0; do
            for setting in "separate all" "joint chosen" "joint all"; do
                read -r loss parameters <<< "$setting"
                run "$env" $seed 2000000 "$loss-$parameters" --ent-coef 0.003 --loss "$loss" --parameters "$parameters"
            done
        done
    done
    for seed in 1 2 3 4 5; do run HybridSliding-v0 $seed 10000000 separate-chosen-10M --ent-coef 0.003; done
} | nice -n 19 python benchmarks/runner.py --name hppo --report "$@"
