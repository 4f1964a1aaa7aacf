#!/usr/bin/env bash
# Speed of MatchAnything-ELoFTR on a GPU, one command for every row: 640x480 and 832x832, fp16 and fp32, with seeded
# weights (speed does not depend on them), against the PyTorch network in fp32, under autocast, in fp16 and in a CUDA graph;
# and what fp16 changes in the matches there.
# usage, from the repository: scripts/bench_eloftr.sh OUT [backend, default onnxruntime-cuda]
set -eu
out=$1 backend=${2:-onnxruntime-cuda}
run="python3 -m matchanything_ros.cli"
mkdir -p "$out/tools_path" && ln -sfn "$PWD/tools" "$out/tools_path/matchanything_tools"
export PYTHONPATH="$PWD:$out/tools_path:$PWD/test${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=4
python3 test/seeded.py eloftr --out "$out/eloftr.ckpt"
pids=()
for size in 480x640 832x832; do
    for precision in fp16 fp32; do
        $run export eloftr --weights "$out/eloftr.ckpt" --size $size --precision $precision --score-threshold 0.01 \
            --out "$out/eloftr_${size}_$precision.onnx" > "$out/log.$size.$precision.txt" 2>&1 & pids+=($!)
    done
done
for pid in "${pids[@]}"; do wait "$pid" || { cat "$out"/log.*.txt; exit 1; }; done
unset OMP_NUM_THREADS
# The speedup column is against the first row of a bundle. In parts, so that what was measured is there if time runs out.
for size in 480x640 832x832; do
    $run bench "$out/eloftr_${size}_fp16.onnx" --backend "$backend" --against original original-autocast pytorch pytorch-graph \
        --weights "$out/eloftr.ckpt" --runs 40 --warm-up 8 --out "$out/bench_${size}_fp16.json"
    $run bench "$out/eloftr_${size}_fp32.onnx" --backend "$backend" --against original --weights "$out/eloftr.ckpt" \
        --runs 20 --warm-up 5 --out "$out/bench_${size}_fp32.json"
done
$run validate "$out/eloftr_480x640_fp16.onnx" --backend "$backend" --weights "$out/eloftr.ckpt" --pairs test/data/pairs \
    --out "$out/validation_480x640_fp16.json" || true
rm -f "$out"/*.onnx "$out"/*.onnx.data "$out/eloftr.ckpt" # large: what comes back are the figures
