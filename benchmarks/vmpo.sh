#!/usr/bin/env bash
# vmpo.py: softmax policies on three tasks, 5 seeds; Gaussian ones on five, 3 seeds and 3M steps, beside
# ppo_continuous.py with the same rollout and network; which of its parts matter, on two of them, 1M steps; and one long
# pair. N iterations can move log sigma by N sqrt(eps_alpha_cov / dimensions), so the default, which is for 1M steps, is
# divided by 9 for 3M and by 400 for 20M. These runs start from sigma 0.37: from 1 Ant learned nothing in its first
# million steps; PPO runs from both. The committed results are of the first version, which had --control-variate by
# default; --fresh runs them again, as the script is now.
# Kill it when you like and start it again. Flags go to the runner: --jobs 8, --dry-run, --cluster auto.
#
#     pip install -r benchmarks/requirements.txt && benchmarks/vmpo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
continuous="Hopper-v4 Walker2d-v4 HalfCheetah-v4 Ant-v4 Humanoid-v4"

{
    for seed in 1 2 3 4 5; do
        for env in CartPole-v1 Acrobot-v1 LunarLander-v3; do
            flags="--total-timesteps 500000"
            if [ "$env" = LunarLander-v3 ]; then flags="--total-timesteps 1000000 --gamma 0.999"; fi
            echo "python vmpo.py --env-id $env --seed $seed $flags --device cpu"
        done
    done
    for seed in 1 2 3; do
        for env in $continuous; do
            flags="--env-id $env --seed $seed --total-timesteps 3000000 --device cpu"
            echo "python vmpo.py $flags --eps-alpha-cov 1e-5 --log-std-init -1"
            echo "python ppo_continuous.py $flags"
            echo "python ppo_continuous.py $flags --log-std-init -1 --exp-name ppo_continuous-0.37"
        done
    done
    for seed in 1 2 3; do
        for env in Hopper-v4 HalfCheetah-v4; do
            ablation() {  # name of the setting, flags
                local name=$1
                shift
                echo "python vmpo.py --env-id $env --seed $seed --device cpu --exp-name $name-1M $*"
            }
            ablation default
            ablation all-samples --no-top-half
            ablation control-variate --control-variate
            ablation coupled --kl coupled
            for period in 10 100; do ablation "period-$period" --target-period "$period"; done
            for epochs in 1 16; do ablation "epochs-$epochs" --update-epochs "$epochs"; done
            ablation popart --popart
            ablation nstep --gae-lambda 1
            ablation sigma-0.37 --log-std-init -1
        done
    done
    flags="--env-id Ant-v4 --total-timesteps 20000000 --device cpu --log-std-init -1"
    echo "python vmpo.py $flags --exp-name vmpo-20M --eps-alpha-cov 2.5e-7"
    echo "python ppo_continuous.py $flags --exp-name ppo_continuous-20M"
} | nice -n 19 python benchmarks/runner.py --name vmpo --report "$@"
