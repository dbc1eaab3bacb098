#!/usr/bin/env bash
# Checks a machine with a GPU, then times it.  Builds nothing: a folder made by `scripts/gpu-pack.sh` has all it needs.
#
#   gpu-check.sh FOLDER [OUT] [DEVICE] [PARTS]
#
# PARTS, one after another: stored (values in f32 and bf16), steps (losses beside the CPU's), tests (of kernels and whole graphs),
# sanitizer (the kernels' tests under compute-sanitizer: memory, then races), time.  Every command has a time limit of its own, so that one that hangs costs no other; logs go to OUT, a line per command to
# the terminal.  Exits with the number of commands that failed.
set -u
folder=$(cd "${1:?gpu-check.sh FOLDER [OUT] [DEVICE]}" && pwd)
out=${2:-gpu-check} parts=${4:-stored,steps,tests,time}
export RAMBAC_TEST_DEVICE=${3:-cuda:0}
export RAMBAC_CACHE=${RAMBAC_CACHE:-$(mktemp -d)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
rambac=$folder/rambac
failed=0
began=$SECONDS

# step NAME SECONDS COMMAND…
step() {
    local name=$1 limit=$2 at=$SECONDS rc
    shift 2
    case $(type -t "$1") in
        # A function has the limits of its commands.
        function) "$@" ;;
        *) timeout -k 5 "$limit" "$@" ;;
    esac >"$out/$name.log" 2>&1
    rc=$?
    [ $rc -eq 0 ] || failed=$((failed + 1))
    printf '%-28s %-6s %3d s\n' "$name" "$([ $rc -eq 0 ] && echo ok || echo "rc $rc")" $((SECONDS - at)) | tee -a "$out/summary.txt"
    return $rc
}

# Test by test, several at once: a fault ends one process, not the others.  What follows the limit is put before the test.
tests() {
    local name=$1 binary=$2 limit=$3
    shift 3
    "$binary" --list | sed -n 's/: test$//p' >"$out/$name.names"
    mkdir -p "$out/$name"
    # shellcheck disable=SC2016
    xargs -d '\n' -P 8 -I{} bash -c 'n=$1 to=$2; shift 2; timeout -k 5 "$@" "$n" >"$to/$n.log" 2>&1; echo "$n rc $?"' _ {} "$out/$name" "$limit" "$@" "$binary" \
        <"$out/$name.names" | sort >"$out/$name.results"
    cat "$out/$name.results"
    ! grep -qv 'rc 0$' "$out/$name.results"
}

# The same steps on the cpu and on the device; the losses side by side.
compare() {
    local file=$1 arch=$2
    shift 2
    "$rambac" run "$file" --device cpu --json "$@" >"$out/cpu.json" || return 1
    "$rambac" run "$file" --device "$RAMBAC_TEST_DEVICE" --target "$arch" --json "$@" >"$out/device.json" || return 1
    python3 - "$out/cpu.json" "$out/device.json" <<'P'
import json, sys
a, b = ([json.loads(l) for l in open(p)] for p in sys.argv[1:])
worst = 0.0
for x, y in zip(a, b, strict=True):
    for k in ("loss", "grad_norm"):
        worst = max(worst, abs(x[k] - y[k]) / max(abs(x[k]), 1e-6))
    print(x["step"], x["loss"], y["loss"], x["grad_norm"], y["grad_norm"], y["seconds"])
print("largest relative difference", worst)
sys.exit(worst > 2e-3)
P
}

step nvidia-smi 30 nvidia-smi
step doctor 60 "$rambac" doctor
for part in ${parts//,/ }; do
    case $part in
        stored)
            for precision in f32 bf16; do
                step "check-$precision" 120 "$rambac" check "$folder/fixtures" --device "$RAMBAC_TEST_DEVICE" --precision $precision
            done
            ;;
        steps)
            for arch in sm_90a sm_80; do
                step "tiny-$arch" 60 compare "$folder/tiny-train.rambac" $arch --len 256 --batch 2 --steps 5
            done
            ;;
        tests)
            step tests-kernels 200 tests kernels "$folder/gpu-kernels" 100
            step tests-graphs 150 tests graphs "$folder/gpu-graphs" 100
            ;;
        sanitizer)
            for tool in memcheck racecheck; do
                step "$tool" 300 tests "$tool" "$folder/gpu-kernels" 150 compute-sanitizer --tool $tool --error-exitcode 9
            done
            ;;
        time)
            step compile-370m 90 "$rambac" compile 370m --train --target sm_90a --no-weights -o "$out/370m.rambac"
            step time-370m 90 "$rambac" run "$out/370m.rambac" --device "$RAMBAC_TEST_DEVICE" --len 4096 --batch 1 --steps 5
            rm -f "$out/370m.rambac"
            ;;
        *)
            echo "no part is named $part" >&2
            exit 2
            ;;
    esac
done
echo "$failed failed, $((SECONDS - began)) s" | tee -a "$out/summary.txt"
exit "$failed"
