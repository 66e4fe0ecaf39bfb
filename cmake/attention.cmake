# Attention on the CPU: one file per instruction set, as for the products. Contraction is off so that the compiler fuses
# no product and sum that the code does not fuse.
target_sources(dspark_kernels PRIVATE csrc/kernels/attention.cpp)
set(_level $<$<NOT:$<CONFIG:Debug>>:-O3>)
if(DSPARK_SANITIZE)
    set(_level "-O2;-fno-sanitize=undefined")
endif()

function(dspark_add_attention file)
    target_sources(dspark_kernels PRIVATE csrc/kernels/${file})
    set_source_files_properties(csrc/kernels/${file} PROPERTIES COMPILE_OPTIONS "${ARGN};-ffp-contract=off;${_level}")
endfunction()

if(NOT MSVC AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    dspark_add_attention(attention_avx2.cpp ${_avx2})
    list(REMOVE_ITEM _avx512 -mavx512vnni) # not needed: processors without it have attention too
    dspark_add_attention(attention_avx512.cpp ${_avx512})
    set_source_files_properties(csrc/kernels/attention.cpp PROPERTIES COMPILE_DEFINITIONS DSPARK_ATTENTION_X86)
elseif(NOT MSVC AND CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
    dspark_add_attention(attention_neon.cpp)
    set_source_files_properties(csrc/kernels/attention.cpp PROPERTIES COMPILE_DEFINITIONS DSPARK_ATTENTION_NEON)
endif()
