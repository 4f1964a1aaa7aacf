#!/usr/bin/env bash
# Speed and memory of every network on a GPU: all rows of docs/performance.md. Weights are seeded where the published ones
# are not in this repository: speed does not depend on them. (n16rot has n16's layers, and so its speed.)
# usage, from the repository: scripts/bench_gpu.sh OUT [export|bench]   (both without the second word)
# BACKEND: default onnxruntime-cuda. JOBS: exports at a time, default 4, each of up to 8 GB of memory.
set -eu
out=$1 part=${2:-both} backend=${BACKEND:-onnxruntime-cuda}
mkdir -p "$out/path" && out=$(realpath "$out") && ln -sfn "$PWD/tools" "$out/path/matchanything_tools"
export PYTHONPATH="$PWD:$out/path:$PWD/test${PYTHONPATH:+:$PYTHONPATH}"
run="python3 -m matchanything_ros.cli"
dedode="--weights $out/dedode_detector_L.pth --descriptor $out/dedode_descriptor_B.pth"
roma="--weights $out/roma.pth --dinov2 $out/dinov2.pth --no-dense"
kestrel=matchanything_ros/bundles/kestrel.pt
aliked="test/data/weights/aliked-t16.pth test/data/weights/aliked-n16.pth"
eloftr="--weights $out/eloftr.pth --score-threshold 0.01"

exports() { # NAME FAMILY flags...: one export a line
    echo "roma_accurate roma $roma --precision fp16"
    echo "roma_fast roma $roma --variant fast --precision fp16"
    echo "roma_coarse roma $roma --variant coarse --precision fp16"
    for size in 480x640 832x832; do
        for precision in fp16 fp32; do echo "eloftr_${size}_$precision eloftr $eloftr --size $size --precision $precision"; done
    done
    for k in 1024 2048 3840 8192; do echo "dedode_k$k dedode $dedode --size 512x512 --keypoints $k --precision fp16"; done
    for variant in t16 n16; do
        for size in 480x640 376x1241; do
            for k in 1000 2000; do
                echo "aliked_${variant}_${size}_k$k aliked --variant $variant --weights test/data/weights/aliked-$variant.pth" \
                    "--size $size --keypoints $k --precision fp16"
            done
        done
    done
    echo "kestrel_480x640 kestrel --weights $kestrel --size 480x640 --precision fp16"
}

export_one() { # as in a line above; a bundle that is there stays
    [ -e "$OUT/$1.json" ] && return
    OMP_NUM_THREADS=4 python3 -m matchanything_ros.cli export "${@:2}" --out "$OUT/$1.onnx" > "$OUT/$1.log" 2>&1 && return
    cat "$OUT/$1.log" && return 255 # xargs stops
}

bench() { # NAME "modes of PyTorch, or nothing" "checkpoints" bundles...
    local bundles=()
    for name in "${@:4}"; do bundles+=("$out/$name.onnx"); done
    $run bench "${bundles[@]}" --backend "$backend" ${2:+--against $2 --weights $3} --runs 30 --warm-up 8 --out "$out/bench_$1.json" || failed+=("$1")
}

if [ "$part" != bench ]; then
    for name in roma dinov2 eloftr dedode_detector_L dedode_descriptor_B; do
        [ -e "$out/$name.pth" ] || python3 test/seeded.py $name --out "$out/$name.pth" &
    done
    wait
    export OUT=$out && export -f export_one
    exports | xargs -P "${JOBS:-4}" -L 1 bash -c 'export_one "$0" "$@"'
fi
[ "$part" != export ] || exit 0
failed=() # the others are measured all the same
# Some at a time, so that what was measured is there if the time runs out. "original" is RoMa and DeDoDe under autocast, the
# others in fp32, as their authors run them.
bench kestrel "pytorch" $kestrel kestrel_480x640
bench roma "original" "$out/roma.pth $out/dinov2.pth" roma_accurate roma_fast roma_coarse
bench eloftr "original original-autocast" "$out/eloftr.pth" eloftr_{480x640,832x832}_fp16
bench eloftr_fp32 "" "" eloftr_{480x640,832x832}_fp32
NVIDIA_TF32_OVERRIDE=1 bench eloftr_tf32 "original" "$out/eloftr.pth" eloftr_{480x640,832x832}_fp32
bench dedode "original" "$out/dedode_detector_L.pth $out/dedode_descriptor_B.pth" dedode_k{1024,2048,3840,8192}
bench aliked "original original-autocast" "$aliked" aliked_{t16,n16}_480x640_k{1000,2000}
bench aliked_wide "original" "$aliked" aliked_{t16,n16}_376x1241_k{1000,2000}
# torch.compile takes a minute or more for each network, and needs a C++ compiler.
bench aliked_compiled "original-compiled" "$aliked" aliked_{t16,n16}_480x640_k1000
bench dedode_compiled "original-compiled" "$out/dedode_detector_L.pth $out/dedode_descriptor_B.pth" dedode_k1024
bench eloftr_compiled "original-compiled" "$out/eloftr.pth" eloftr_480x640_fp16
[ ${#failed[@]} -eq 0 ] || { echo "not measured: ${failed[*]}" && exit 1; }
