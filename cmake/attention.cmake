# Attention on the CPU: one file per instruction set, as for the products. Contraction is off so that the compiler fuses
# no product and sum that the code does not fuse.
target_sources(dspark_kernels PRIVATE csrc/kernels/attention.cpp)
set(_level $<$<NOT:$<CONFIG:Debug>>:-O3>)
if(DSPARK_SANITIZE)
    set(_level "-O2;-fno-sanitize=undefined")
endif()
if(NOT MSVC AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_sources(dspark_kernels PRIVATE csrc/kernels/attention_avx2.cpp)
    set_source_files_properties(csrc/kernels/attention_avx2.cpp PROPERTIES COMPILE_OPTIONS
        "-mavx2;-mfma;-mf16c;-ffp-contract=off;${_level}")
    set_source_files_properties(csrc/kernels/attention.cpp PROPERTIES COMPILE_DEFINITIONS DSPARK_ATTENTION_AVX2)
elseif(NOT MSVC AND CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
    target_sources(dspark_kernels PRIVATE csrc/kernels/attention_neon.cpp)
    set_source_files_properties(csrc/kernels/attention_neon.cpp PROPERTIES COMPILE_OPTIONS "-ffp-contract=off;${_level}")
    set_source_files_properties(csrc/kernels/attention.cpp PROPERTIES COMPILE_DEFINITIONS DSPARK_ATTENTION_NEON)
endif()
