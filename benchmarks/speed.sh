#!/usr/bin/env bash
# The README's table of speeds; about 40 minutes on two otherwise idle cores. --help lists the flags, e.g.
#   benchmarks/speed.sh --env-ids Hopper-v4 --json speed.json
#   benchmarks/speed.sh --versus 'python other.py --env-id Hopper-v4 --total-timesteps 102400'
set -euo pipefail
exec python "$(dirname "$0")/speed.py" "$@"
