#!/usr/bin/env bash
# The four losses on MicroRTS 10x10 against CoacAI, one unit a step (Song et al. 2023), at clip 0.2, and joint and
# separate without a clip and at 0.5: 2 seeds, 3M steps, 100 games with the trained policy at the end. The value loss is
# never clipped, as in the authors' code, so that eps is a matter of the policy alone.
# Kill it when you like and start it again. Flags go to the runner: --jobs 8, --dry-run, --cluster auto.
#
#     pip install -r benchmarks/requirements.txt && pip install --no-deps gym-microrts==0.4.3
#     benchmarks/joint_loss_microrts.sh
set -euo pipefail
cd "$(dirname "$0")/.."
batch="--num-envs 32 --num-steps 512 --num-minibatches 16 --update-epochs 4 --learning-rate 2.5e-4 --ent-coef 0.01"
run="--env-id MicroRTS-10x10-basesWorkers --opponent coacAI --max-steps 5000 --total-timesteps 3000000 $batch"
run="$run --no-norm-reward --no-clip-vloss --eval-episodes 100 --device cpu"
run="$run --no-compile"  # on a CPU compiling gains convolutions nothing

for seed in 1 2; do
    command="python ppo_multidiscrete_joint_loss.py --seed $seed $run"
    for loss in joint separate mix-ratio mix-loss; do echo "$command --exp-name $loss-0.2 --loss $loss"; done
    for loss in joint separate; do
        for eps in 0 0.5; do echo "$command --exp-name $loss-$eps --loss $loss --clip-coef $eps"; done
    done
done | nice -n 19 python benchmarks/runner.py --name joint_loss_microrts --report "$@"
