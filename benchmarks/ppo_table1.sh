#!/usr/bin/env bash
# Table 1 of the PPO paper (Schulman et al. 2017): 11 surrogate objectives x 7 environments x 3 seeds, 1M steps each,
# with the hyperparameters of its Table 3: horizon 2048, Adam 3e-4 without annealing, 10 epochs, minibatches of 64,
# gamma 0.99, lambda 0.95. The value loss is unclipped in every setting, so that only the surrogate differs.
# Kill it when you like and start it again. Flags go to the runner: --jobs 8, --dry-run, --cluster auto.
#
#     pip install -r benchmarks/requirements.txt && benchmarks/ppo_table1.sh
set -euo pipefail
cd "$(dirname "$0")/.."
table3="--num-envs 1 --num-steps 2048 --no-anneal-lr --device cpu"
environments="HalfCheetah-v4 Hopper-v4 InvertedDoublePendulum-v4 InvertedPendulum-v4 Reacher-v4 Swimmer-v4 Walker2d-v4"

nice -n 19 python benchmarks/random_policy.py $environments  # the zero of the scores; those in results/ stay
for seed in 1 2 3; do
    for env in $environments; do
        run="--env-id $env --seed $seed $table3"
        clip="python ppo_continuous.py $run --no-clip-vloss"
        klpen="python ppo_klpen.py $run"
        echo "$clip --exp-name none --clip-coef 0"
        for eps in 0.1 0.2 0.3; do echo "$clip --exp-name clip-$eps --clip-coef $eps"; done
        for target in 0.003 0.01 0.03; do echo "$klpen --exp-name adaptive-$target --kl-target $target"; done
        for beta in 0.3 1 3 10; do echo "$klpen --exp-name fixed-$beta --kl-mode fixed --kl-beta $beta"; done
    done
done | nice -n 19 python benchmarks/runner.py --name ppo_table1 --report "$@"
