#!/usr/bin/env bash
# Steps a second against the number of environments, 1 to 4,096, and of processes: results/scale.csv, figures/scale.png
# and the tables of docs/scale.md. Some 15 minutes; nothing else should run beside it.
#
#     pip install -r benchmarks/requirements.txt && benchmarks/scale.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmarks/scale.py "$@"
python benchmarks/report.py scale
