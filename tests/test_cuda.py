"""What the scripts do on a GPU: the update, compiled to CUDA graphs, learns what the plain one learns on the CPU, and a
run moves between the two. Skipped where there is none."""

import importlib
import json
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import finish, load, only, run, start

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")

SIZES = "--num-envs 4 --num-steps 32 --num-minibatches 4 --eval-episodes 1".split()
MICRORTS = "ppo_multidiscrete_joint_loss --env-id environments.microrts:MicroRTS-8x8-basesWorkers --env-kwargs"
BOT = '"opponents":["passiveAI"],"max_steps":30'
RUNS = [
    "ppo_continuous --env-id Hopper-v4",
    "ppo_klpen --env-id Hopper-v4",
    "vmpo --env-id Hopper-v4",
    "vmpo --env-id CartPole-v1 --popart --gae-lambda 1 --control-variate",
    "vmpo_lstm --env-id CartPole-v1 --num-steps 8",
    "hppo_hybrid --env-id environments.hybrid:HybridMoving-v0",
    "ppo_multidiscrete_joint_loss --env-id Hopper-v4 --loss mix-ratio",
    f'{MICRORTS} {{"action_mode":"unit",{BOT}}}',
    f'{MICRORTS} {{"action_mode":"gridnet",{BOT}}}',
]


def train(module, runs_dir: Path, *flags) -> tuple[dict, dict]:
    """A run in this process: the parameters it ends with, and its config.json."""
    module.main(module.parse_args([*SIZES, *flags, "--runs-dir", str(runs_dir)]))
    folder = only(runs_dir)
    return load(folder / "model.pt"), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("line", RUNS, ids=[line.replace(MICRORTS, "MicroRTS") for line in RUNS])
def test_cuda_graphs_learn_what_the_plain_update_learns_on_the_cpu(line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # 5 % apart with it, of gridnet's eight convolutions
    name, *flags = line.split()
    module = importlib.import_module(name)
    num_steps = int(flags[flags.index("--num-steps") + 1]) if "--num-steps" in flags else 32
    flags += ["--total-timesteps", str(2 * 4 * num_steps), "--update-epochs", "2"]
    args = module.parse_args([*SIZES, *flags])
    torch.manual_seed(args.seed)
    make_agent = getattr(module, "make_agent", module.Agent)
    first = dict(make_agent(module.Envs(args, range(4)), args).named_parameters())
    plain, _ = train(module, tmp_path / "cpu", *flags, "--device", "cpu", "--no-compile")
    graphs, config = train(module, tmp_path / "cuda", *flags, "--device", "cuda")
    assert "notice" not in capsys.readouterr().err  # of an update that runs uncompiled
    assert config["device"] == torch.cuda.get_device_name()
    moved = sum((plain[name] - first[name]).square().sum() for name in first).sqrt()
    apart = sum((plain[name] - graphs[name]).square().sum() for name in first).sqrt()
    assert 0 < moved and apart < 0.02 * moved


def test_a_run_on_the_gpu_goes_on_there_and_is_evaluated_without_it(tmp_path):
    flags = [*SIZES, "--env-id", "Hopper-v4", "--total-timesteps", 5120, "--checkpoint-every", 0]
    process = start(*flags, "--runs-dir", tmp_path)
    while not list(tmp_path.glob("*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130, err
    folder = only(tmp_path)
    assert "cuda" in out and load(folder / "checkpoint.pt")["progress"]["iteration"] < 40
    again = run(*shlex.split(out.splitlines()[-1].split("continue with: ")[1])[2:])
    assert again[0] == 0 and "cuda" in again[1], again[2]
    result = json.loads((folder / "result.json").read_text())
    assert result["global_step"] == 5120 and len(result["eval_returns"]) == 1
    one, other = (run("--eval", folder, "--device", device) for device in ("cpu", "cuda"))
    assert one[0] == other[0] == 0, one[2] + other[2]
    mean = [float(out.split("return ")[1].split()[0]) for _, out, _ in (one, other)]
    assert mean[0] == pytest.approx(mean[1], rel=0.1)
