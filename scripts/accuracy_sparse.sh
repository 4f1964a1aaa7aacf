#!/usr/bin/env bash
# Accuracy of every ALIKED network in fp32 and fp16, and of every way of matching with n16: the tables of docs/sparse.md.
# WEIGHTS: folder with aliked-{t16,n16,n16rot,n32}.pth as published (those that are missing are left out).
# usage, from the repository: scripts/accuracy_sparse.sh OUT PAIRS WEIGHTS [backend, default onnxruntime-cuda]
# On a CPU of x86 ONNX Runtime rounds to fp16 less often than a GPU does. PRECISIONS=fp16 makes the rows of fp16 alone.
set -eu
out=$1 pairs=$2 weights=$3 backend=${4:-onnxruntime-cuda} precisions=${PRECISIONS:-fp32 fp16}
run="python3 -m matchanything_ros.cli"
mkdir -p "$out/keys" && ln -sfn "$PWD/tools" "$out/keys/matchanything_tools"
export PYTHONPATH="$PWD:$out/keys${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
bundles=()
add() { # NAME flags...: export one bundle with the packaged one's sizes
    local name=$1
    shift
    $run export aliked "$@" --out "$out/$name.onnx" > "$out/log.$name.txt" 2>&1 || { cat "$out/log.$name.txt"; exit 1; }
}
for variant in t16 n16 n16rot n32; do
    [ -f "$weights/aliked-$variant.pth" ] || continue
    for precision in $precisions; do
        bundles+=("$out/${variant}_$precision.onnx")
        add "${variant}_$precision" --variant $variant --weights "$weights/aliked-$variant.pth" --precision $precision &
    done
    wait
done
[[ $precisions == *fp32* ]] && for matching in mutual ratio; do
    bundles+=("$out/n16_$matching.onnx")
    add "n16_$matching" --variant n16 --weights "$weights/aliked-n16.pth" --matching $matching &
done
wait
$run evaluate "$pairs" "${bundles[@]}" --backend "$backend" --poses 30 --out "$out/accuracy"
