#!/usr/bin/env bash
# All that needs a GPU, with a report to paste: bash docs/on_a_gpu.sh
#
# In an environment with a CUDA build of torch and `pip install -e '.[test]'`. The tests on each device, steps that are
# captured in CUDA graphs, and the benchmark; some minutes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export MPLBACKEND=Agg
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

python - <<'PYTHON' || exit 1
import sys, platform, torch, tieopt

if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device here")
devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
print(f"tieopt {tieopt.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {devices}")
PYTHON
python -m pytest -q -p no:cacheprovider -k cuda --durations=5 tests
tests=$?
python docs/benchmarks/benchmark.py --quick --device cuda --output "$scratch"
benchmark=$?
cat "$scratch"/*.md
echo "exit status: tests $tests, benchmark $benchmark"
exit $((tests + benchmark))
