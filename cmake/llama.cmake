# Builds the llama.cpp tree in DSPARK_LLAMA_CPP_DIR as static libraries. Backend switches (GGML_CUDA, GGML_METAL,
# GGML_VULKAN, GGML_RPC, ...) pass through untouched.
set(BUILD_SHARED_LIBS OFF)
set(LLAMA_BUILD_COMMON ON)
foreach(_part TESTS TOOLS EXAMPLES SERVER APP UI)
    option(LLAMA_BUILD_${_part} "" OFF)
endforeach()
option(LLAMA_OPENSSL "" OFF)
option(LLAMA_SUBPROCESS "" OFF)
# Without these llama.cpp would report the commit of our repository as its own.
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT "${DSPARK_LLAMA_CPP_COMMIT}")
set(GGML_BUILD_NUMBER 0)
set(GGML_BUILD_COMMIT "${DSPARK_LLAMA_CPP_COMMIT}")
add_subdirectory("${DSPARK_LLAMA_CPP_DIR}" "${CMAKE_BINARY_DIR}/llama.cpp" EXCLUDE_FROM_ALL)
