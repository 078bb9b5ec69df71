#!/usr/bin/env bash
# Measures SPIRT and PyTorch on this machine in one session, taking turns so
# that a slow spell hits both, and prints a table in Markdown. Results, the
# raw ones too, go to bench/results/.
#
#   bench/run.sh [REPEATS]      default 3; takes about two minutes a repeat
#
# Needs Go and Debian's python3-torch and libopenblas0 (without the latter
# PyTorch multiplies matrices with the reference BLAS, at a tenth of the speed).
# PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

repeats=${1:-3}
python=${PYTHON:-/usr/bin/python3}
out=bench/results/$(date -u +%Y%m%dT%H%M%SZ)
mkdir -p "$out"

say() { echo "$(date +%T) $*" >&2; }

say "building"
make -s build
go test -c -o "$out/nn.test" ./nn
go test -c -o "$out/function.test" ./function
go test -c -o "$out/gradient.test" ./function/gradient

{
	echo "commit: $(git rev-parse --short HEAD)$(git diff --quiet HEAD || echo ' with changes')"
	echo "date: $(date -u +%F)"
	echo "cpu: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(nproc) cores"
	echo "system: $(uname -sr)"
	echo "go: $(go env GOVERSION)"
	echo "torch: $("$python" -c 'import torch; print(torch.__version__)')"
	echo "repeats: $repeats"
} | tee "$out/machine" >&2

for i in $(seq "$repeats"); do
	say "repeat $i: steps on one thread"
	(cd nn && "../$out/nn.test" -test.run '^$' -test.bench '^Benchmark(LeNet5Step|CNNStep)$' -test.benchtime 2s -test.cpu 1) >>"$out/steps-spirt.txt"
	OMP_NUM_THREADS=1 "$python" bench/pytorch_step.py >>"$out/steps-pytorch.jsonl"
	say "repeat $i: rounds of four peers"
	"$python" bench/spirt_round.py --spirt ./spirt >>"$out/rounds-spirt.jsonl"
	"$python" bench/pytorch_ddp.py >>"$out/rounds-pytorch.jsonl"
	say "repeat $i: invocations"
	(cd function && "../$out/function.test" -test.run '^$' -test.bench 'Invocation') >>"$out/invocations.txt"
	(cd function/gradient && "../../$out/gradient.test" -test.run '^$' -test.bench .) >>"$out/invocations.txt"
done

rm "$out"/*.test
"$python" bench/table.py "$out" | tee "$out/table.md"
