#!/usr/bin/python3
"""What the exchange between peers adds to a round of `spirt train`.

Takes turns between one run of N peers and N runs of one peer each at the same
time, which compute the same number of gradients in as many processes and talk
to nobody, and prints one line of JSON: the percentiles of the time from round
to round of both, and the difference of the medians, the overhead. A peer alone
still averages, hashes, signs and updates, so that is not in the overhead.

    python3 bench/spirt_overhead.py [--spirt ./spirt] [--peers 4] [--rounds 300] [--repeats 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile


def start(args, folder, peers):
    command = [args.spirt, "train", "--peers", peers, "--rounds", args.rounds + args.warmup, "--model", args.model,
               "--batch-size", args.batch_size, "--run", folder, "--json"]
    procs = max(1, (os.cpu_count() or 1) // args.peers)
    return subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                            env=dict(os.environ, GOMAXPROCS=str(procs)))


def rounds(args, process):
    ms = [1000 * e["seconds"] for e in map(json.loads, process.stdout)
          if e["event"] == "round" and e["round"] > args.warmup and e.get("seconds")]
    if process.wait() != 0:
        raise SystemExit(f"a run ended with {process.returncode}")
    return ms


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--spirt", default="./spirt")
    flags.add_argument("--peers", type=int, default=4)
    flags.add_argument("--rounds", type=int, default=300)
    flags.add_argument("--warmup", type=int, default=20)
    flags.add_argument("--repeats", type=int, default=3)
    flags.add_argument("--model", default="lenet5")
    flags.add_argument("--batch-size", type=int, default=64)
    args = flags.parse_args()

    together, alone, overheads = [], [], []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            a = rounds(args, start(args, f"{folder}/run", args.peers))
            started = [start(args, f"{folder}/alone-{i}", 1) for i in range(args.peers)]
            b = [ms for process in started for ms in rounds(args, process)]
        together += a
        alone += b
        overheads.append(statistics.median(a) - statistics.median(b))
    at = lambda values, p: round(statistics.quantiles(values, n=100)[p - 1], 2)
    print(json.dumps({
        "peers": args.peers, "model": args.model, "rounds": args.rounds, "repeats": args.repeats,
        "overhead_p50_ms": round(statistics.median(overheads), 2),
        "overheads_ms": [round(o, 2) for o in overheads],
        "round_ms": {"p50": at(together, 50), "p90": at(together, 90), "p99": at(together, 99)},
        "alone_ms": {"p50": at(alone, 50), "p90": at(alone, 90), "p99": at(alone, 99)},
    }))


if __name__ == "__main__":
    main()
