# The kernel tests on the processors that the emulator knows, and the instruction set that must be chosen on each.
foreach(_choice "max=neon i8mm" "neoverse-n1=neon dotprod" "cortex-a76=neon dotprod" "cortex-a72=none")
    string(REPLACE "=" ";" _choice "${_choice}")
    list(GET _choice 0 _cpu)
    list(GET _choice 1 _isa)
    set(_run ${CMAKE_CROSSCOMPILING_EMULATOR} -cpu ${_cpu})
    add_test(NAME emulated_kernels_${_cpu} COMMAND ${_run} $<TARGET_FILE:test_kernels>)
    add_test(NAME emulated_kernel_oracle_${_cpu} COMMAND ${_run} $<TARGET_FILE:test_kernel_oracle> ${_isa})
endforeach()
