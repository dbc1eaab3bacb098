#!/usr/bin/env bash
# Times a GPU beside its peers.  Builds nothing: a folder made by `scripts/gpu-pack.sh` has the binary.
#
#   gpu-bench.sh FOLDER [OUT] [DEVICE] [PARTS]
#
# PARTS, one after another: ops, peers, train, decode, long.  Every case has a time limit of its own, and what it printed
# goes to OUT/rambac.jsonl with its command; `scripts/benchmarks.py OUT` makes tables of that.
set -u
folder=$(cd "${1:?gpu-bench.sh FOLDER [OUT] [DEVICE] [PARTS]}" && pwd)
out=${2:-gpu-bench} device=${3:-cuda:0} parts=${4:-ops,peers,train,decode,long}
export RAMBAC_CACHE=${RAMBAC_CACHE:-$(mktemp -d)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
failed=0
began=$SECONDS

# bench SECONDS ARGUMENTS…
bench() {
    local limit=$1 rc
    shift
    timeout -k 5 "$limit" "$folder/rambac" bench "$@" --device "$device" --json >"$out/one" 2>"$out/error"
    rc=$?
    python3 - "$rc" "$*" "$out" <<'P'
import json, sys
rc, command, out = sys.argv[1:]
command = f"rambac bench {command} --device cuda:0"
with open(f"{out}/rambac.jsonl", "a") as f:
    for line in open(f"{out}/one"):
        if line.startswith("{"):
            r = json.loads(line) | {"command": command}
            print(json.dumps(r), file=f)
            if "bench" in r:
                floor = f"{r['times_floor']:6.2f} x floor" if "times_floor" in r else f"{r['tokens_per_s']:10.0f} tokens/s"
                print(f"{r['seconds'] * 1e6:12.1f} us {floor}  {r['bench']}: {command}")
    if rc != "0":
        why = " ".join(open(f"{out}/error").read().split())[-300:]
        print(json.dumps({"failed": rc, "why": why, "command": command}), file=f)
        print(f"failed, {rc}: {command}: {why}")
P
    [ $rc -eq 0 ] || failed=$((failed + 1))
}

for part in ${parts//,/ }; do
    case $part in
        ops)
            # Sequences and tokens: as many as fit.
            for at in "8 4096" "8 16384" "8 65536" "8 262144" "1 1048576"; do
                set -- $at
                shape="--preset 370m --batch $1 --len $2 --runs 21 --precision bf16"
                for selections in clustered uniform; do
                    bench 60 attend $shape --selections $selections
                done
                bench 60 select $shape
                bench 60 scan $shape
            done
            ;;
        peers)
            timeout -k 5 200 python3 "$here/gpu_peers.py" --lens 4096,16384,65536 --json "$out/peers.json" >"$out/peers.log" 2>&1 ||
                failed=$((failed + 1))
            tail -n +1 "$out/peers.log"
            ;;
        train)
            bench 120 train --preset 370m --batch 8 --len 4096 --runs 11 --precision bf16 --profile
            ;;
        decode)
            for at in "1 65536" "32 65536" "1 1048576"; do
                set -- $at
                bench 120 decode --preset 370m --batch $1 --len $2 --runs 9 --weights bf16
            done
            bench 60 prefill --preset 370m --len 65536 --runs 5 --weights bf16
            ;;
        long)
            bench 120 train --preset 370m --batch 1 --len 65536 --runs 5 --precision bf16 --recompute
            ;;
        *)
            echo "no part is named $part" >&2
            exit 2
            ;;
    esac
done
rm -f "$out/one" "$out/error"
echo "$failed failed, $((SECONDS - began)) s"
exit "$failed"
