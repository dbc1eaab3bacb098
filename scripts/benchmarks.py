#!/usr/bin/env python3
"""Makes the tables of BENCHMARKS.md of what `scripts/gpu-bench.sh` wrote.

    python3 scripts/benchmarks.py OUT > tables.md
"""
import json
import pathlib
import sys

UNITS = [("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)]


def seconds(s):
    unit, scale = next((u for u in UNITS if s >= u[1]), UNITS[-1])
    return f"{s / scale:.3g} {unit}"


def size(n):
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def tokens(n):
    return f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}K"


def table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("|" + "|".join("---" for _ in head) + "|")
    for r in rows:
        print("| " + " | ".join(r) + " |")
    print()


def main():
    out = pathlib.Path(sys.argv[1])
    lines = [json.loads(l) for l in (out / "rambac.jsonl").read_text().splitlines()]
    runs = [r for r in lines if "bench" in r]
    peers = json.loads((out / "peers.json").read_text()) if (out / "peers.json").exists() else {}
    some = runs[0]
    print(f"{some['on']}: large bf16 products at {some['machine_gemm_gflop_per_s'] / 1e3:.0f} TFLOP/s, "
          f"large copies at {some['machine_copy_gb_per_s'] / 1e3:.2f} TB/s (read and written), measured in the same run.\n")

    def peer(r):
        op, way = r["bench"].split()
        way = {"forward": "fwd", "backward": "bwd"}[way]
        names = {
            "attend": f"attend {way} triton {r['selections']} {r['len']}",
            "select": f"select {way} torch {r['len']}",
            "scan": f"scan {way} compiled {r['len']}",
        }
        p = peers.get(names[op])
        if r["batch"] != 8 or p is None:
            return "-"
        return p["why"] if p["us"] is None else f"{seconds(p['us'] / 1e6)} ({p['us'] / 1e6 / r['seconds']:.1f} x)"

    print("## Ops\n")
    rows = []
    for r in runs:
        if len(r["bench"].split()) == 2:
            rows.append([
                r["bench"], r["selections"] or "", f"{r['batch']} x {tokens(r['len'])}",
                f"{seconds(r['seconds'])} ({seconds(r['seconds_min'])} to {seconds(r['seconds_max'])})",
                seconds(r["floor_seconds"]), f"{r['times_floor']:.2f} x", peer(r), size(r["peak_bytes"]),
            ])
    table(["op", "selections", "shape", "time", "floor", "time / floor", "peer", "memory planned"], rows)
    flash = [(k, v) for k, v in peers.items() if "flash" in k]
    if flash:
        print("Full causal attention at the same shape (PyTorch's flash attention):\n")
        table(["", "time"], [[k, v["why"] if v["us"] is None else seconds(v["us"] / 1e6)] for k, v in flash])
    print("## Models\n")
    rows = []
    for r in runs:
        if len(r["bench"].split()) == 1:
            rows.append([
                f"{r['bench']} {r['preset']}", f"{r['batch']} x {tokens(r['len'])}",
                f"{seconds(r['seconds'])} ({seconds(r['seconds_min'])} to {seconds(r['seconds_max'])})",
                f"{r['tokens_per_s']:,.0f}", size(r["peak_bytes"]),
            ])
    table(["", "shape", "time", "tokens/s", "memory planned"], rows)
    steps = [r for r in lines if "profile" in r]
    if steps:
        print("## Ops of the training step\n")
        rows = [
            [r["op"], r["phase"], str(r["steps"]), seconds(r["seconds"]), f"{100 * r['share']:.1f} %",
             seconds(r["floor_seconds"]), f"{r['seconds'] / r['floor_seconds']:.1f} x" if r["floor_seconds"] else "-"]
            for r in steps if r["share"] >= 0.005
        ]
        table(["op", "phase", "steps", "time", "share", "floor", "time / floor"], rows)
    failed = [r for r in lines if "failed" in r]
    if failed:
        print("## What did not run\n")
        table(["command", "why"], [[r["command"], r["why"]] for r in failed])
    print("## Commands\n")
    for c in dict.fromkeys(r["command"] for r in lines):
        print(f"    {c}")


if __name__ == "__main__":
    main()
