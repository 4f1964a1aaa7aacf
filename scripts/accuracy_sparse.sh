#!/usr/bin/env bash
# Accuracy of every ALIKED network in fp32 and fp16, and of every way of matching with n16: the tables of docs/sparse.md,
# a row each in OUT/ROW/evaluation.md. Rows that are there already are left alone: run it again to go on.
# WEIGHTS: folder with aliked-{t16,n16,n16rot,n32}.pth as published (those that are missing are left out).
# usage, from the repository: scripts/accuracy_sparse.sh OUT PAIRS WEIGHTS [backend, default onnxruntime-cuda]
# On a CPU of x86 ONNX Runtime rounds to fp16 less often than a GPU does. ROWS="n32_fp16 n16_mutual" makes these alone.
set -eu
out=$1 pairs=$2 weights=$3 backend=${4:-onnxruntime-cuda}
every=({t16,n16,n16rot,n32}_{fp32,fp16} n16_{mutual,ratio})
run="python3 -m matchanything_ros.cli"
mkdir -p "$out/keys" && ln -sfn "$PWD/tools" "$out/keys/matchanything_tools"
export PYTHONPATH="$PWD:$out/keys${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
for row in ${ROWS:-${every[@]}}; do
    file=$weights/aliked-${row%_*}.pth kind=${row#*_}
    [ -f "$file" ] && [ ! -f "$out/$row/evaluation.md" ] || continue
    case $kind in fp32 | fp16) flags="--precision $kind" ;; *) flags="--matching $kind" ;; esac
    $run export aliked --variant "${row%_*}" --weights "$file" $flags --out "$out/$row.onnx"
    rm -rf "$out/$row"
    $run evaluate "$pairs" "$out/$row.onnx" --baseline none --backend "$backend" --poses 30 --out "$out/$row"
done
