# The x86 kernels. Flags name an instruction set in full and undo -march=native: on a machine with AVX-512 the AVX2
# kernels would otherwise use it too, and not be what runs elsewhere.
target_compile_definitions(dspark_kernels PRIVATE DSPARK_KERNELS_X86)
target_sources(dspark_kernels PRIVATE csrc/kernels/x86_prefetch.cpp)

# The kernels are their inner loops: optimised in every build type but Debug. Under the sanitizers the address checks
# stay, as calls and without the ranges of variables: otherwise GCC takes over five minutes a file.
set(_level $<$<NOT:$<CONFIG:Debug>>:-O3>)
if(DSPARK_SANITIZE)
    set(_level "-O1;-fno-sanitize=undefined")
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        list(APPEND _level -fno-var-tracking --param=asan-instrumentation-with-call-threshold=0)
    endif()
endif()

function(dspark_add_x86_kernel file)
    target_sources(dspark_kernels PRIVATE csrc/kernels/${file})
    set_source_files_properties(csrc/kernels/${file} PROPERTIES COMPILE_OPTIONS "${ARGN};${_level}")
endfunction()

set(_avx2 -march=x86-64 -mtune=generic -mavx2 -mfma -mf16c)
set(_avx512 ${_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND _avx512 -Wno-uninitialized) # GCC's own header, in _mm512_castps512_ps256
endif()
dspark_add_x86_kernel(x86_columns.cpp ${_avx2})
dspark_add_x86_kernel(avx2.cpp ${_avx2})
dspark_add_x86_kernel(avxvnni.cpp ${_avx2} -mavxvnni)
dspark_add_x86_kernel(avx512.cpp ${_avx512})
dspark_add_x86_kernel(avx512vl.cpp ${_avx512})
