#!/usr/bin/env bash
# Everything that needs a GPU, in one go: builds for the card at hand, runs the gpu tests, times the pair and real shapes.
#
#   tools/gpu_run.sh pack          where there is a network: puts the llama.cpp tree and wheels into build/gpu (< 64 MiB with
#                                  the checkout, so that both can be carried to a machine without one)
#   tools/gpu_run.sh prebuild      instead, where a GPU's time is dear: compiles the extension and upstream's server here, with
#                                  the nvcc on the PATH, for CUDA_ARCH (90) and the interpreter PYTHON; fewer bytes to carry
#   tools/gpu_run.sh run [OUT]     on the machine with the GPU and its toolkit: logs, JSON and plots into OUT (build/gpu/out)
#
# PYTHON names the interpreter of the GPU machine, or here one of its version; CMAKE_ARGS another backend than CUDA; SHAPE
# and QUANT another shape than Qwen3-8B in Q4_K_M; STEPS some of the steps (see the end of run). A step that fails is
# reported at the end and does not keep the later ones from running.
set -uo pipefail
cd "$(dirname "$0")/.."
PACK=build/gpu
PYTHON=${PYTHON:-python3}
CUDA_ARCH=${CUDA_ARCH:-90}

wheels() {
    local version
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    rm -rf "$PACK/wheels" && mkdir -p "$PACK/wheels"
    "$PYTHON" -m pip download --quiet --only-binary=:all: --python-version "${PYTHON_VERSION:-$version}" \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d "$PACK/wheels" pybind11 gguf pytest pytest-timeout typer rich huggingface_hub safetensors prometheus-client \
        starlette uvicorn
    rm -f "$PACK"/wheels/{numpy,hf_xet}-* # large, and wherever there is a GPU or not needed
}

pack() {
    set -e
    local tree=third_party/llama.cpp/src unused unused_parts=()
    test -d "$tree" || { echo "unpack llama.cpp first: make build" >&2; exit 1; }
    rm -rf "$PACK/llama.cpp" "$PACK/built.tar.xz" && mkdir -p "$PACK/llama.cpp"
    for unused in vulkan sycl opencl metal hexagon cann musa webgpu zdnn zendnn openvino virtgpu et; do
        unused_parts+=(--exclude "./ggml/src/ggml-$unused")
    done
    tar -C "$tree" "${unused_parts[@]}" --exclude ./tools/ui -cf - . | tar -C "$PACK/llama.cpp" -xf -
    wheels
    du -sh "$PACK"
}

# Both programs share one tree and so one ggml-cuda.
compile() { # compile CMAKE_ARGUMENT...
    cmake -G Ninja -S . -B "$PACK/cmake" -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=on "$@" \
        -DLLAMA_BUILD_TOOLS=on -DLLAMA_BUILD_SERVER=on -DLLAMA_USE_PREBUILT_UI=off \
        -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
        -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" &&
        cmake --build "$PACK/cmake" --parallel "$(nproc)" --target _core llama-server
}

# For any x86-64 with AVX2, and without the virtual memory calls for which a linker wants the driver.
prebuild() {
    set -e
    compile -DCMAKE_CUDA_ARCHITECTURES="$CUDA_ARCH-real" -DGGML_CUDA_NO_VMM=on -DGGML_NATIVE=off \
        -DCMAKE_CUDA_FLAGS=-Xfatbin=-compress-all
    rm -rf "$PACK/llama.cpp" "$PACK/built" && mkdir -p "$PACK/built"
    strip -o "$PACK/built/$(basename "$PACK"/cmake/_core*.so)" "$PACK"/cmake/_core*.so
    strip -o "$PACK/built/llama-server" "$PACK/cmake/bin/llama-server"
    # Both hold the same ggml-cuda: a window that reaches from one to the other packs it once.
    tar -C "$PACK/built" -cf - . | xz --lzma2=preset=6,dict=256MiB >"$PACK/built.tar.xz"
    rm -rf "$PACK/built"
    wheels
    du -sh "$PACK"/*
}

# Of the wheels, what this interpreter does not have.
install_missing() {
    local wheel name missing=()
    for wheel in "$PACK"/wheels/*.whl; do
        name=$(basename "${wheel%%-*}")
        [ ! -e "$wheel" ] || "$PYTHON" -c "import importlib.metadata as m; m.version('$name')" 2>/dev/null || missing+=("$wheel")
    done
    [ ${#missing[@]} -eq 0 ] ||
        "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$PACK/site" "${missing[@]}"
}

# Leaves the extension beside the package's sources.
use_built() {
    mkdir -p "$PACK/built"
    if [ -f "$PACK/built.tar.xz" ]; then
        tar -C "$PACK/built" -xJf "$PACK/built.tar.xz"
    else
        local llama_cpp=()
        [ ! -d "$PACK/llama.cpp" ] || llama_cpp=(-DDSPARK_LLAMA_CPP_DIR="$PWD/$PACK/llama.cpp")
        # shellcheck disable=SC2086
        step build compile -DCMAKE_CUDA_ARCHITECTURES=native "${llama_cpp[@]}" ${CMAKE_ARGS:-}
        cp "$PACK"/cmake/_core*.so "$PACK/cmake/bin/llama-server" "$PACK/built"
    fi
    cp "$PACK"/built/_core*.so python/dspark_cpp/ && chmod +x "$PACK"/built/*
    local library folder
    for library in libcublas libcudart; do # of a toolkit or of Python packages
        folder=$(find / -name "$library.so.[0-9]*" -not -path '/proc/*' -printf '%h\n' 2>/dev/null | head -n 1)
        LD_LIBRARY_PATH=$folder:${LD_LIBRARY_PATH:-}
    done
    export LD_LIBRARY_PATH
}

run() {
    local out failed=() shape=${SHAPE:-8B} quant=${QUANT:-q4_k_m} stem device
    out=$(mkdir -p "${1:-$PACK/out}" && cd "${1:-$PACK/out}" && pwd)
    wanted() { [[ ",${STEPS:-all}," == *",all,"* || ",$STEPS," == *",$1,"* ]]; }
    step() { # step NAME COMMAND...: runs, logs, remembers failures, adds a section to the report
        local name=$1 began=$SECONDS
        shift
        "$@" >"$out/$name.log" 2>&1 || failed+=("$name")
        echo "== $name: $((SECONDS - began)) s"
        tail -n "${LINES_OF_STEP:-3}" "$out/$name.log"
        # shellcheck disable=SC2016
        printf '\n## %s\n\n```\n$ %s\n%s\n```\n' "$name" "${*//$PWD\//}" "$(cat "$out/$name.log")" >>"$out/report.md"
    }
    : >"$out/report.md"
    mkdir -p "$PACK/bin"
    printf '#!/bin/sh\nexec "%s" "$@"\n' "$("$PYTHON" -c 'import sys; print(sys.executable)')" >"$PACK/bin/python"
    printf '#!/bin/sh\nexec python -c "from dspark_cpp.cli import main; main()" "$@"\n' >"$PACK/bin/dspark"
    chmod +x "$PACK"/bin/*
    export PATH=$PWD/$PACK/bin:$PATH PYTHONPATH=$PWD/python:$PWD/$PACK/site
    install_missing || exit 1
    use_built
    step info dspark info
    cat "$out/info.log"
    device=$(python -c 'from dspark_cpp import _core
print(next((d.name for d in _core.build_info().devices if "gpu" in d.kind.lower()), ""))')
    if wanted tests; then
        step gpu_tests python -m pytest -q -s -m gpu tests/test_gpu.py
        step graph_head_tests env DSPARK_TEST_DEVICE="$device" python -m pytest -q tests/test_graph_head.py
    fi
    ! wanted demo || step demo dspark demo
    stem=build/shapes/qwen3-$shape-$quant
    local pair=("$stem.gguf" --draft "$stem-drafter-$quant.gguf") rates=(--synthetic-acceptance qwen3-8b:gsm8k)
    [ -f "$stem.gguf" ] || step shapes python tools/make_shape_pair.py --shape "$shape" --quant "$quant"
    if wanted profile; then
        step profile dspark profile "${pair[@]}" --concurrency 16 --n-ctx 2048 --json "$out/profile.json" --plots "$out"
    fi
    if wanted bench; then
        step bench dspark bench "${pair[@]}" "${rates[@]}" --temperatures 0 --n-tokens 128 --budget 60 --profile \
            --json "$out/bench.json"
    fi
    if wanted streams; then
        step streams dspark bench "${pair[@]}" "${rates[@]}" --concurrency 4,16 --policies off,fixed:2,fixed:4,fixed:7,adaptive \
            --temperatures 0 --n-tokens 128 --budget 60 --profile --json "$out/streams.json" --plots "$out"
    fi
    if wanted graph_head; then
        step graph_head dspark bench "${pair[@]}" "${rates[@]}" --head graph --policies off,fixed:7,adaptive --concurrency 1,4 \
            --temperatures 0 --n-tokens 128 --budget 40 --profile --json "$out/graph_head.json"
    fi
    if wanted upstream; then
        step upstream_drafting python tools/bench_upstream.py --drafting --shape "$shape" --quant "$quant" --repeats 2 \
            --n-gpu-layers 999 --server "$PACK/built/llama-server" --json "$out/upstream_drafting.json"
        step upstream_sweep python tools/bench_upstream.py --sweep --budget 60 --lengths 3,7 --n-gpu-layers 999 \
            --server "$PACK/built/llama-server" --json "$out/upstream_sweep.json"
    fi
    echo "failed: ${failed[*]:-none}"
    [ ${#failed[@]} -eq 0 ]
}

case ${1:-} in
pack) pack ;;
prebuild) prebuild ;;
run) run "${2:-}" ;;
*) sed -n '2,15s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
