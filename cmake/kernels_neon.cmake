# NEON: one file per instruction set, each compiled for it whatever the build's own processor flags say (the last -march
# wins). Contraction is off so that the compiler fuses no product and sum that the code does not fuse.
target_sources(dspark_kernels PRIVATE csrc/kernels/neon_detect.cpp csrc/kernels/neon_dotprod.cpp
                                      csrc/kernels/neon_i8mm.cpp)
target_compile_definitions(dspark_kernels PRIVATE DSPARK_KERNELS_NEON)
set(_neon -ffp-contract=off $<$<NOT:$<CONFIG:Debug>>:-O3>)
set_source_files_properties(csrc/kernels/neon_dotprod.cpp PROPERTIES COMPILE_OPTIONS
    "-march=armv8.2-a+dotprod;${_neon}")
set_source_files_properties(csrc/kernels/neon_i8mm.cpp PROPERTIES COMPILE_OPTIONS
    "-march=armv8.2-a+dotprod+i8mm;${_neon}")
