# Our matrix kernels: pure C++, one file per instruction set, compiled with its flags and chosen at run time.
add_library(dspark_kernels STATIC csrc/kernels/dispatch.cpp)
target_include_directories(dspark_kernels PUBLIC csrc)
dspark_compile_options(dspark_kernels)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND NOT MSVC)
    set(_avx2 csrc/kernels/avx2.cpp csrc/kernels/avx2_columns.cpp)
    target_sources(dspark_kernels PRIVATE ${_avx2})
    target_compile_definitions(dspark_kernels PRIVATE DSPARK_KERNELS_AVX2)
    # The kernels are their inner loops: optimised in every build type but Debug. Under the sanitizers the address
    # checks stay; those of undefined behaviour would take GCC minutes over the unrolled loops.
    set(_level $<$<NOT:$<CONFIG:Debug>>:-O3>)
    if(DSPARK_SANITIZE)
        set(_level "-O2;-fno-sanitize=undefined")
    endif()
    set_source_files_properties(${_avx2} PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c;${_level}")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64" AND NOT MSVC)
    include(${CMAKE_CURRENT_LIST_DIR}/kernels_neon.cmake)
endif()
