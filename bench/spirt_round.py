#!/usr/bin/python3
"""One round of `spirt train`: what pytorch_ddp.py measures, for SPIRT.

Runs the main job and prints one line of JSON: the time from round to round at
each peer (the first ones left out), and, half-way, the memory of the peers
and of their function instances (Linux only). Memory is proportional set size:
pages that several processes share count once in all.

    python3 bench/spirt_round.py [--spirt ./spirt] [--rounds 200]
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile


def pss_mb(pid):
    try:
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def parents():
    """The parent of every process."""
    found = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            pass  # ended meanwhile
    return found


def memory(peers):
    """MB of each peer and of each of its children, the function instances."""
    of_peers = [pss_mb(pid) for pid in peers]
    of_instances = [pss_mb(pid) for pid, parent in parents().items() if parent in peers]
    middle = lambda values: round(statistics.median(values), 1) if values else None
    of_peers, of_instances = [m for m in of_peers if m], [m for m in of_instances if m]
    return {"peer_mb": middle(of_peers), "instance_mb": middle(of_instances), "instances": len(of_instances)}


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--spirt", default="./spirt")
    flags.add_argument("--peers", type=int, default=4)
    flags.add_argument("--rounds", type=int, default=200)
    flags.add_argument("--warmup", type=int, default=20)
    flags.add_argument("--batch-size", type=int, default=64)
    flags.add_argument("--seed", type=int, default=1)
    args = flags.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        command = [args.spirt, "train", "--peers", args.peers, "--rounds", args.rounds + args.warmup,
                   "--batch-size", args.batch_size, "--seed", args.seed, "--run", f"{folder}/run", "--json"]
        process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True)
        peers, ms, held, done = set(), [], None, None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "peer" and event.get("pid"):
                peers.add(event["pid"])
            elif event["event"] == "round":
                if event["round"] > args.warmup and event.get("seconds"):
                    ms.append(1000 * event["seconds"])
                if held is None and event["round"] >= args.warmup + args.rounds // 2:
                    held = memory(peers)
            elif event["event"] == "done":
                done = event
        if process.wait() != 0 or done is None or not ms:
            sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode} after {len(ms)} rounds")
    ms.sort()
    print(json.dumps({
        "what": "lenet5-round", "peers": args.peers, "batch_size": args.batch_size, "rounds": args.rounds, "warmup": args.warmup,
        "ms_per_step": round(statistics.median(ms), 3), "ms_mean": round(statistics.fmean(ms), 3),
        "ms_p99": round(ms[int(0.99 * (len(ms) - 1))], 3), "accuracy": done["accuracy"], "seconds": done["seconds"],
        "invocations": done.get("invocations"), "gb_seconds": done.get("gb_seconds"), "bytes": done.get("bytes"), **(held or {}),
    }))


if __name__ == "__main__":
    main()
