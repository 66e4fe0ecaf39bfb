# Compile through ccache when it is there. Paths are hashed relative to the checkout, so a fresh clone reuses the
# cache; the processor's flags name the cache, because -march=native means something else on another machine.
find_program(DSPARK_CCACHE ccache)
if(DSPARK_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER AND NOT WIN32)
    set(_cpu "${CMAKE_HOST_SYSTEM_PROCESSOR}")
    if(EXISTS /proc/cpuinfo)
        file(STRINGS /proc/cpuinfo _flags REGEX "^(flags|Features)" LIMIT_COUNT 1)
        string(SHA256 _hash "${_flags}")
        string(SUBSTRING "${_hash}" 0 12 _cpu)
    endif()
    set(_launcher ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=1
                  CCACHE_NAMESPACE=dspark-${_cpu} ${DSPARK_CCACHE})
    foreach(_language C CXX CUDA)
        set(CMAKE_${_language}_COMPILER_LAUNCHER ${_launcher})
    endforeach()
    set(GGML_CCACHE OFF CACHE BOOL "" FORCE)
endif()
