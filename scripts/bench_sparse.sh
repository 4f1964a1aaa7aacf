#!/usr/bin/env bash
# Speed of the sparse networks on a GPU, one command for every row: DeDoDe L+B at 512x512 with seeded weights (speed does
# not depend on them), ALIKED t16 and n16 (n16rot, which is n16 trained with rotations, has the same layers and so the same
# speed) at 640x480 and 1241x376, against the PyTorch network as it is, in autocast, in a CUDA graph, and compiled.
# usage, from the repository: scripts/bench_sparse.sh OUT [backend, default onnxruntime-cuda]
set -eu
out=$1 backend=${2:-onnxruntime-cuda}
run="python3 -m matchanything_ros.cli"
mkdir -p "$out/keys" && ln -sfn "$PWD/tools" "$out/keys/matchanything_tools"
export PYTHONPATH="$PWD:$out/keys:$PWD/test${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=4
for target in dedode_detector_L dedode_descriptor_B; do python3 test/seeded.py $target --out "$out/$target.pth" & done
wait
dedode="--weights $out/dedode_detector_L.pth --descriptor $out/dedode_descriptor_B.pth --size 512x512"
export_one() { $run export "$@" > "$out/log.$(basename "${@: -1}").txt" 2>&1 || { cat "$out/log.$(basename "${@: -1}").txt"; exit 1; }; }
pids=()
for k in 1024 2048 3840 8192; do
    export_one dedode $dedode --keypoints $k --precision fp16 --out "$out/dedode_k${k}_fp16.onnx" & pids+=($!)
done
for v in t16 n16; do
    for size in 480x640 376x1241; do
        for k in 1000 2000; do
            export_one aliked --variant $v --weights test/data/weights/aliked-$v.pth --size $size --keypoints $k \
                --precision fp16 --out "$out/aliked_${v}_${size}_k${k}_fp16.onnx" & pids+=($!)
        done
    done
done
for pid in "${pids[@]}"; do wait "$pid"; done
weights="test/data/weights/aliked-t16.pth test/data/weights/aliked-n16.pth $out/dedode_detector_L.pth $out/dedode_descriptor_B.pth"
# In parts, so that what was measured is there if the time runs out. The speedup column is against the first row of a bundle.
bench() { # NAME bundles and further arguments...
    $run bench "${@:2}" --backend "$backend" --weights $weights --out "$out/bench_$1.json"
}
bench main "$out"/dedode_k1024_fp16.onnx "$out"/aliked_{t16,n16}_480x640_k1000_fp16.onnx --against original original-autocast \
    pytorch-graph --runs 30 --warm-up 5
bench rest "$out"/dedode_k{2048,3840,8192}_fp16.onnx "$out"/aliked_*376x1241*.onnx "$out"/aliked_*480x640_k2000*.onnx \
    --against original --runs 30 --warm-up 5
# torch.compile takes a minute or more for each network, and needs a C++ compiler; 5 pairs first: it records on the second.
bench compiled "$out"/aliked_{t16,n16}_480x640_k1000_fp16.onnx "$out"/dedode_k1024_fp16.onnx --against original-compiled \
    --runs 30 --warm-up 5
