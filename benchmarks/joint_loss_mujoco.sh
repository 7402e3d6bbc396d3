#!/usr/bin/env bash
# The four losses of ppo_multidiscrete_joint_loss.py at equal budgets on MuJoCo, and joint with eps 0.3, since mixing
# ratios widens the clip range too: 5 environments, 3 seeds, 1M steps, and 3M on two of them. Settings of the paper
# (Song et al. 2023): 3 layers of 64, Adam 2.5e-4, entropy 0.001, value weight 1; the rest as ppo_continuous.py has it,
# but for the value loss, which is never clipped, so that eps is a matter of the policy alone.
# Kill it when you like and start it again. Flags go to the runner: --jobs 8, --dry-run, --cluster auto.
#
#     pip install -r benchmarks/requirements.txt && benchmarks/joint_loss_mujoco.sh
set -euo pipefail
cd "$(dirname "$0")/.."
paper="--hidden-layers 3 --learning-rate 2.5e-4 --ent-coef 0.001 --vf-coef 1 --no-clip-vloss --device cpu"

run() {  # environment, seed, steps, what the setting's name ends in
    local command="python ppo_multidiscrete_joint_loss.py --env-id $1 --seed $2 --total-timesteps $3 $paper"
    for loss in joint separate mix-ratio mix-loss; do echo "$command --exp-name $loss$4 --loss $loss"; done
    echo "$command --exp-name joint-0.3$4 --loss joint --clip-coef 0.3"
}

{
    for seed in 1 2 3; do
        for env in HalfCheetah-v4 Hopper-v4 Walker2d-v4 Ant-v4 Swimmer-v4; do run "$env" "$seed" 1000000 ""; done
    done
    for seed in 1 2 3; do
        for env in HalfCheetah-v4 Walker2d-v4; do run "$env" "$seed" 3000000 -3M; done
    done
} | nice -n 19 python benchmarks/runner.py --name joint_loss_mujoco --report "$@"
