#!/usr/bin/env bash
# Packs what `scripts/gpu-check.sh` needs on a machine that has a GPU and no compiler: binaries, fixtures, an executable.
#
#   gpu-pack.sh FOLDER FIXTURES
set -eu
folder=${1:?gpu-pack.sh FOLDER FIXTURES} fixtures=${2:?gpu-pack.sh FOLDER FIXTURES}
cd "$(dirname "$0")/.."
mkdir -p "$folder"

test_binary() {
    cargo test -p "$1" --test gpu --no-run --message-format json | python3 -c '
import json, sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable") and m["target"]["kind"] == ["test"]:
        print(m["executable"])'
}

cargo build --release
strip -o "$folder/rambac" target/release/rambac
strip -o "$folder/gpu-kernels" "$(test_binary rambac-runtime)"
strip -o "$folder/gpu-graphs" "$(test_binary rambac)"
rm -rf "$folder/fixtures"
cp -r "$fixtures" "$folder/fixtures"
cp scripts/gpu-check.sh "$folder/"
"$folder/rambac" compile tiny --train --target sm_80,sm_90a --init 1 -o "$folder/tiny-train.rambac"
du -sh "$folder"
