#!/usr/bin/python3
"""Turns the files of one bench/run.sh session into Markdown tables.

    python3 bench/table.py bench/results/<time>
"""

import json
import pathlib
import re
import statistics
import sys


def json_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")] if file.exists() else []


def go_metrics(file):
    """{benchmark: {unit: [values]}} of go test -bench output."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        match = re.match(r"Benchmark(\S+?)(?:-\d+)?\s+\d+\s+(.*)", line)
        if match:
            units = found.setdefault(match[1], {})
            fields = match[2].split()
            for value, unit in zip(fields[::2], fields[1::2]):
                units.setdefault(unit, []).append(float(value))
    return found


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def ms(values):
    """Median of the repeats, with the least and the most."""
    if not values:
        return "not measured"
    middle = statistics.median(values)
    return f"{middle:.1f} ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else f"{middle:.1f}"


def ratio(ours, theirs, bound):
    if not ours or not theirs:
        return "-"
    r = statistics.median(ours) / statistics.median(theirs)
    return f"{r:.2f} ({'met' if r <= bound else 'missed'}: at most {bound:.1f})"


def main(folder):
    machine = dict(line.split(": ", 1) for line in (folder / "machine").read_text().splitlines())
    print(f"{machine['date']}, commit {machine['commit']}, {machine['cpu']}, {machine['system']}, "
          f"{machine['go']}, PyTorch {machine['torch']}, {machine['repeats']} repeats: `bench/run.sh {machine['repeats']}`\n")

    steps, theirs = go_metrics(folder / "steps-spirt.txt"), {}
    for r in json_lines(folder / "steps-pytorch.jsonl"):
        for model in ("lenet5", "cnn"):
            theirs.setdefault(model, []).append(r[model]["median_ms"])
    rounds, ddp = json_lines(folder / "rounds-spirt.jsonl"), json_lines(folder / "rounds-pytorch.jsonl")
    rows = []
    for what, bench, model, bound in [("LeNet-5 step", "LeNet5Step", "lenet5", 1.0), ("CNN step", "CNNStep", "cnn", 2.0)]:
        ours = [v / 1e6 for v in steps.get(bench, {}).get("ns/op", [])]
        rows.append([f"{what}, batch 64, one thread, ms", ms(ours), ms(theirs.get(model)), ratio(ours, theirs.get(model), bound)])
    ours, other = [r["ms_per_step"] for r in rounds], [r["ms_per_step"] for r in ddp]
    rows.append(["round of 4 x 64 images, ms", ms(ours), ms(other), ratio(ours, other, 1.0)])
    if rounds and ddp:
        rows.append(["its 99th percentile, ms", ms([r["ms_p99"] for r in rounds]), ms([r["ms_p99"] for r in ddp]), ""])
        accuracy = lambda results: f"{100 * statistics.median(r['accuracy'] for r in results):.1f} %"
        rows.append([f"test accuracy after {rounds[0]['rounds'] + rounds[0]['warmup']} rounds", accuracy(rounds), accuracy(ddp), ""])
    table(["", "SPIRT", "PyTorch", "ratio"], rows)

    invocations = go_metrics(folder / "invocations.txt")
    quantiles = ("p50-ms", "p99-ms")
    rows = [[name] + [f"{statistics.median(units[q]):.2f}" for q in quantiles]
            for name, units in invocations.items() if all(q in units for q in quantiles)]
    if rows:
        table(["invocation", "p50, ms", "p99, ms"], rows)
    held = [r for r in rounds if r.get("peer_mb")]
    if held:
        middle = lambda key: f"{statistics.median(r[key] for r in held if r[key]):.1f}"
        table(["memory in mid-run, MB", ""], [["a peer, its database included", middle("peer_mb")], ["a function instance", middle("instance_mb")]])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
