#!/usr/bin/env bash
# vmpo.py as the paper has it for continuous control (Song et al. 2019): one gradient step for each batch of unrolls of
# 39 steps, a new target network every 100, n-step returns, PopArt, raw advantages, Adam at 1e-4 for everything, a
# shared network whose head gives sigma. It learns slowly and steadily; the paper's own curves go on for 10^8 steps and
# more. Kill it when you like and start it again. Flags go to the runner: --jobs 3, --dry-run.
#
#     pip install -r benchmarks/requirements.txt && benchmarks/vmpo_paper.sh
set -euo pipefail
cd "$(dirname "$0")/.."
network="--network shared --std-type state"
batch="--num-steps 39 --gae-lambda 1 --update-epochs 1 --num-minibatches 1 --target-period 100"
bounds="--eps-eta 0.01 --eps-alpha 0.0075 --eps-alpha-cov 1e-5"
adam="--learning-rate 1e-4 --dual-learning-rate 1e-4 --no-anneal-lr --max-grad-norm inf"
value="--popart --vf-coef 1 --no-norm-adv"

for seed in 1 2 3; do
    run="--env-id HalfCheetah-v4 --seed $seed --total-timesteps 5000000 --device cpu"
    echo "python vmpo.py $run $network $batch $bounds $adam $value"
done | nice -n 19 python benchmarks/runner.py --name vmpo_paper --report "$@"
