#!/usr/bin/env bash
# Learning curves of ppo_continuous.py with its defaults, 1M steps: Hopper and Walker2d with 3 seeds, HalfCheetah, whose
# runs end in one of two gaits, with 10. Two runs at a time.
# Kill it when you like and start it again: finished runs are skipped, others resumed. Then writes
# results/ppo_continuous.csv, results/ppo_continuous_curves.csv.gz and figures/ppo_continuous.png.
#
#     pip install -r benchmarks/requirements.txt && benchmarks/ppo_continuous.sh [--jobs 2]
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=2
[ "${1:-}" = --jobs ] && jobs=$2
export runs=benchmarks/runs/ppo_continuous

run() {  # env seed: each run has a parent folder of its own, so that a restart finds it
    local parent="$runs/$1__$2" folder
    mkdir -p "$parent"
    folder=$(find "$parent" -mindepth 1 -maxdepth 1 -type d -not -name '.*' | head -n 1)
    if [ -n "$folder" ]; then
        python ppo_continuous.py --resume "$folder"
    else
        python ppo_continuous.py --env-id "$1" --seed "$2" --device cpu --runs-dir "$parent"
    fi >> "$parent/log" 2>&1
}
export -f run

{
    for seed in 1 2 3; do
        for env in HalfCheetah-v4 Hopper-v4 Walker2d-v4; do echo "$env $seed"; done
    done
    for seed in 4 5 6 7 8 9 10; do echo "HalfCheetah-v4 $seed"; done
} | nice -n 19 xargs -P "$jobs" -L 1 bash -c 'run $0 $1'

python benchmarks/curves.py "$runs" --name ppo_continuous
