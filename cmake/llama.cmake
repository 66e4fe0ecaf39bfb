# Builds the llama.cpp tree in DSPARK_LLAMA_CPP_DIR as static libraries. Backend switches (GGML_CUDA, GGML_METAL,
# GGML_VULKAN, GGML_RPC, ...) pass through untouched.
set(BUILD_SHARED_LIBS OFF)
set(LLAMA_BUILD_COMMON ON)
foreach(_part TESTS TOOLS EXAMPLES SERVER APP UI)
    option(LLAMA_BUILD_${_part} "" OFF)
endforeach()
set(GGML_LLAMAFILE ON CACHE BOOL "" FORCE) # the way in for our kernels, see below
option(LLAMA_OPENSSL "" OFF)
option(LLAMA_SUBPROCESS "" OFF)
# Without these llama.cpp would report the commit of our repository as its own.
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT "${DSPARK_LLAMA_CPP_COMMIT}")
set(GGML_BUILD_NUMBER 0)
set(GGML_BUILD_COMMIT "${DSPARK_LLAMA_CPP_COMMIT}")
add_subdirectory("${DSPARK_LLAMA_CPP_DIR}" "${CMAKE_BINARY_DIR}/llama.cpp" EXCLUDE_FROM_ALL)

# GCC declares the operand of _tile_loadconfig as 8 bytes where the instruction reads 64, so the optimizer drops the
# stores in between and ggml's AMX path faults on the first quantized product (seen with GCC 12 on Sapphire Rapids).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    include(CheckCXXCompilerFlag)
    check_cxx_compiler_flag(-mno-amx-tile DSPARK_HAS_NO_AMX)
    if(DSPARK_HAS_NO_AMX)
        target_compile_options(ggml-cpu PRIVATE -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
    endif()
endif()

# Our kernels take the place of llamafile_sgemm, of the tiled path that comes before it for K-quants, of flash attention
# and of fills; graphs go through ours first; upstream's stay, under other names, for what ours do not cover.
set(_ggml_cpu_dir "${DSPARK_LLAMA_CPP_DIR}/ggml/src/ggml-cpu")
set_source_files_properties("${_ggml_cpu_dir}/llamafile/sgemm.cpp" TARGET_DIRECTORY ggml-cpu
    PROPERTIES COMPILE_DEFINITIONS "llamafile_sgemm=ggml_llamafile_sgemm")
set_source_files_properties("${_ggml_cpu_dir}/tiled/tiled.cpp" TARGET_DIRECTORY ggml-cpu
    PROPERTIES COMPILE_DEFINITIONS "ggml_compute_forward_mul_mat_tiled=ggml_upstream_mul_mat_tiled")
set_source_files_properties("${_ggml_cpu_dir}/ops.cpp" TARGET_DIRECTORY ggml-cpu
    PROPERTIES COMPILE_DEFINITIONS
    "ggml_compute_forward_flash_attn_ext=ggml_upstream_flash_attn_ext;ggml_compute_forward_fill=ggml_upstream_fill")
set_source_files_properties("${_ggml_cpu_dir}/ggml-cpu.cpp" TARGET_DIRECTORY ggml-cpu
    PROPERTIES COMPILE_DEFINITIONS "ggml_graph_compute=dspark_graph_compute")
target_sources(ggml-cpu PRIVATE "${PROJECT_SOURCE_DIR}/csrc/kernels/ggml_entry.cpp"
                                "${PROJECT_SOURCE_DIR}/csrc/kernels/ggml_groups.cpp"
                                "${PROJECT_SOURCE_DIR}/csrc/kernels/ggml_products.cpp"
                                "${PROJECT_SOURCE_DIR}/csrc/kernels/ggml_attention.cpp"
                                "${PROJECT_SOURCE_DIR}/csrc/kernels/ggml_fill.cpp")
target_include_directories(ggml-cpu PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
target_link_libraries(ggml-cpu PRIVATE dspark_kernels)
