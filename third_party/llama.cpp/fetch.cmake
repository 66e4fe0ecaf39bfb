# Provides DSPARK_LLAMA_CPP_DIR: an unpacked llama.cpp tree. Fetches the pinned one with pip (version and
# SHA-256 in requirements.txt) into third_party/llama.cpp/src unless the caller names another checkout.
# Nothing of llama.cpp is committed or installed.

set(DSPARK_LLAMA_CPP_COMMIT "0c1e57098" CACHE STRING "llama.cpp commit of the tree (for reports and cache keys)")
set(DSPARK_LLAMA_CPP_DIR "" CACHE PATH "A llama.cpp checkout to build instead of the pinned one")

function(dspark_unpack_llama_cpp destination)
    set(download_dir "${CMAKE_BINARY_DIR}/llama.cpp-download")
    file(MAKE_DIRECTORY "${download_dir}")
    message(STATUS "dspark: fetching the pinned llama.cpp tree with pip")
    execute_process(
        COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --no-deps --no-binary=llama-cpp-python --require-hashes
                --disable-pip-version-check -r "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/requirements.txt" -d "${download_dir}"
        RESULT_VARIABLE status)
    file(GLOB archive "${download_dir}/llama_cpp_python-*.tar.gz")
    if(NOT status EQUAL 0 OR NOT archive)
        message(FATAL_ERROR "cannot fetch llama.cpp: pip failed (status ${status}); "
                            "pass -DDSPARK_LLAMA_CPP_DIR=<checkout> to build from a local tree")
    endif()

    message(STATUS "dspark: unpacking ${archive}")
    set(parts CMakeLists.txt LICENSE licenses cmake common ggml include scripts src vendor tools)
    list(TRANSFORM parts PREPEND "*/vendor/llama.cpp/")
    file(REMOVE_RECURSE "${destination}.tmp")
    file(ARCHIVE_EXTRACT INPUT "${archive}" DESTINATION "${destination}.tmp" PATTERNS ${parts})
    file(GLOB tree "${destination}.tmp/*/vendor/llama.cpp")
    file(RENAME "${tree}" "${destination}")
    file(REMOVE_RECURSE "${destination}.tmp" "${download_dir}")
endfunction()

if(NOT DSPARK_LLAMA_CPP_DIR)
    set(_pinned "${CMAKE_CURRENT_LIST_DIR}/src")
    if(NOT EXISTS "${_pinned}/CMakeLists.txt")
        dspark_unpack_llama_cpp("${_pinned}")
    endif()
    set(DSPARK_LLAMA_CPP_DIR "${_pinned}")
endif()
if(NOT EXISTS "${DSPARK_LLAMA_CPP_DIR}/src/llama-ext.h")
    message(FATAL_ERROR "DSPARK_LLAMA_CPP_DIR must be a llama.cpp checkout with src/llama-ext.h, got ${DSPARK_LLAMA_CPP_DIR}")
endif()
