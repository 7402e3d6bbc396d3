#!/usr/bin/env bash
# What a CUDA GPU does for the scripts, and the CPU beside it, in at most 12 minutes: docs/gpu.md says what to expect.
# Prints to the terminal and into OUT (default: gpu); a step that fails or runs out of time does not stop the others.
# EnvPool, MicroRTS and Playground are left out, and said, where their packages are missing.
#
#     pip install -r tests/requirements.txt && benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu}
mkdir -p "$out"
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
cheetah="--env-id HalfCheetah-v4"
microrts="--env-id environments.microrts:MicroRTS-10x10-basesWorkers"

# step SECONDS NAME COMMAND...: run it, at most so long, and not beyond the twelfth minute
step() {
    local seconds=$1 name=$2 left=$((720 - SECONDS))
    shift 2
    if [ "$left" -le 0 ]; then
        echo "=== $name: no time left" | tee "$out/$name.txt"
        return
    fi
    seconds=$((seconds < left ? seconds : left))
    echo "=== $name: $*"
    timeout "$seconds" "$@" 2>&1 | tail -n 40 | tee "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || echo "=== $name ended with status $status" | tee -a "$out/$name.txt"
}

# phases NAME DEVICE SCRIPT FLAGS...: milliseconds of rollout, batch and update
phases() {
    local name=$1 device=$2
    shift 2
    step 90 "$name-$device" python benchmarks/phases.py "$@" --device "$device" --eval-episodes 0 --runs-dir "$temporary"
}

nvidia-smi | tee "$out/nvidia-smi.txt"
python -c "import os, platform, torch; print(platform.processor(), os.cpu_count(), torch.__version__, torch.version.cuda)"

step 200 tests python -m pytest -q -x tests/test_cuda.py

for device in cuda cpu; do
    phases small "$device" ppo_continuous.py $cheetah --total-timesteps 20480
done

# Networks of three layers of 1,024: a copy of the script with other layers.
sed -e 's/layer_init(64, 64), nn.Tanh()/layer_init(1024, 1024), nn.Tanh(), layer_init(1024, 1024), nn.Tanh()/' \
    -e 's/layer_init(obs_dim, 64)/layer_init(obs_dim, 1024)/; s/layer_init(64, /layer_init(1024, /' \
    ppo_continuous.py > "$temporary/ppo_wide.py"
for device in cuda cpu; do
    phases wide "$device" "$temporary/ppo_wide.py" $cheetah --total-timesteps 8192 --num-minibatches 4 --update-epochs 4
done

for device in cuda cpu; do
    phases batch "$device" ppo_continuous.py $cheetah --num-envs 1024 --num-steps 16 --num-minibatches 8 \
        --total-timesteps 65536
done

if python -c "import envpool" 2> /dev/null; then
    for device in cuda cpu; do
        phases envpool "$device" ppo_continuous.py --env-id environments.envpool:EnvPool-HalfCheetah-v4 \
            --num-envs 1024 --num-steps 16 --num-minibatches 8 --update-epochs 4 --total-timesteps 163840
    done
else
    echo "=== envpool is not installed"
fi

if python -c "import jpype, importlib.util as util; assert util.find_spec('gym_microrts')" 2> /dev/null; then
    phases gridnet cuda ppo_multidiscrete_joint_loss.py $microrts \
        --env-kwargs '{"action_mode": "gridnet", "opponents": ["passiveAI"]}' --total-timesteps 8192
    phases gridnet cpu ppo_multidiscrete_joint_loss.py $microrts --no-compile \
        --env-kwargs '{"action_mode": "gridnet", "opponents": ["passiveAI"]}' --total-timesteps 6144
else
    echo "=== MicroRTS is not installed"
fi

if python -c "import mujoco_playground" 2> /dev/null; then
    for device in cuda cpu; do
        phases playground "$device" ppo_continuous.py --env-id environments.playground:Playground-CartpoleBalance \
            --num-envs 2048 --num-steps 16 --num-minibatches 16 --update-epochs 4 --total-timesteps 163840
    done
else
    echo "=== MuJoCo Playground is not installed"
fi
