#!/usr/bin/env bash
# Everything that needs a GPU, in one go: builds for the card at hand, runs the gpu tests, times the pair and real shapes.
#
#   tools/gpu_run.sh pack          where there is a network: puts the llama.cpp tree and wheels into build/gpu (< 64 MiB with
#                                  the checkout, so that both can be carried to a machine without one)
#   tools/gpu_run.sh run [OUT]     on the machine with the GPU and its toolkit: logs, JSON and plots into OUT (build/gpu/out)
#
# PYTHON names the interpreter of the GPU machine (for pack: its version, as 3.12, in PYTHON_VERSION); CMAKE_ARGS another
# backend than CUDA; SHAPE and QUANT another shape than Qwen3-8B in Q4_K_M. A step that fails is reported at the end and
# does not keep the later ones from running.
set -uo pipefail
cd "$(dirname "$0")/.."
PACK=build/gpu
PYTHON=${PYTHON:-python3}

pack() {
    set -e
    local tree=third_party/llama.cpp/src unused unused_parts=()
    test -d "$tree" || { echo "unpack llama.cpp first: make build" >&2; exit 1; }
    rm -rf "$PACK" && mkdir -p "$PACK/llama.cpp" "$PACK/wheels"
    for unused in vulkan sycl opencl metal hexagon cann musa webgpu zdnn zendnn openvino virtgpu et; do
        unused_parts+=(--exclude "./ggml/src/ggml-$unused")
    done
    tar -C "$tree" "${unused_parts[@]}" --exclude ./tools/ui -cf - . | tar -C "$PACK/llama.cpp" -xf -
    "$PYTHON" -m pip download --quiet --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --no-deps \
        -d "$PACK/wheels" scikit-build-core pybind11 gguf pytest pytest-timeout typer rich huggingface_hub safetensors \
        prometheus-client starlette uvicorn pathspec iniconfig pluggy packaging click shellingham annotated-doc \
        markdown-it-py mdurl pygments pyyaml tqdm
    du -sh "$PACK"
}

run() {
    local out failed=() shape=${SHAPE:-8B} quant=${QUANT:-q4_k_m} stem
    out=$(mkdir -p "${1:-$PACK/out}" && cd "${1:-$PACK/out}" && pwd)
    step() { # step NAME COMMAND...: runs, logs, remembers failures
        local name=$1 began=$SECONDS
        shift
        "$@" >"$out/$name.log" 2>&1 || failed+=("$name")
        echo "$name: $((SECONDS - began)) s"
        tail -n 3 "$out/$name.log"
    }
    "$PYTHON" -m venv --system-site-packages "$PACK/venv" || exit 1
    local bin=$PWD/$PACK/venv/bin
    if compgen -G "$PACK/wheels/*.whl" >/dev/null; then
        "$bin/pip" install --quiet --no-index --no-deps "$PACK"/wheels/*.whl || exit 1
    fi
    export PATH="$bin:$PATH" CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
    export CMAKE_ARGS="${CMAKE_ARGS:--DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=native}"
    if [ -d "$PACK/llama.cpp" ]; then
        CMAKE_ARGS+=" -DDSPARK_LLAMA_CPP_DIR=$PWD/$PACK/llama.cpp"
    fi
    step build pip install --no-index --no-build-isolation --no-deps -e . -C build-dir="$PACK/cmake"
    step info dspark info
    cat "$out/info.log"
    step gpu_tests python -m pytest -q -s -m gpu tests/test_gpu.py
    local device
    device=$(python -c 'from dspark_cpp import _core
print(next((d.name for d in _core.build_info().devices if "gpu" in d.kind.lower()), ""))')
    step graph_head_tests env DSPARK_TEST_DEVICE="$device" python -m pytest -q tests/test_graph_head.py
    step demo dspark demo
    stem=build/shapes/qwen3-$shape-$quant
    step shapes python tools/make_shape_pair.py --shape "$shape" --quant "$quant"
    step profile dspark profile "$stem.gguf" --draft "$stem-drafter-$quant.gguf" --json "$out/profile.json" --plots "$out"
    step bench dspark bench "$stem.gguf" --draft "$stem-drafter-$quant.gguf" --synthetic-acceptance qwen3-8b:gsm8k \
        --concurrency 1,4,16 --temperatures 0 --n-tokens 128 --budget 120 --json "$out/bench.json" --plots "$out"
    step bench_graph_head dspark bench "$stem.gguf" --draft "$stem-drafter-$quant.gguf" --head graph \
        --synthetic-acceptance qwen3-8b:gsm8k --policies off,adaptive --temperatures 0 --n-tokens 128 --budget 60 \
        --json "$out/bench_graph_head.json"
    echo "failed: ${failed[*]:-none}"
    [ ${#failed[@]} -eq 0 ]
}

case ${1:-} in
pack) pack ;;
run) run "${2:-}" ;;
*) sed -n '2,11s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
