# Our matrix kernels: pure C++, one file per instruction set, compiled with its flags and chosen at run time.
add_library(dspark_kernels STATIC csrc/kernels/dispatch.cpp)
target_include_directories(dspark_kernels PUBLIC csrc)
dspark_compile_options(dspark_kernels)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND NOT MSVC)
    include(${CMAKE_CURRENT_LIST_DIR}/kernels_x86.cmake)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64" AND NOT MSVC)
    include(${CMAKE_CURRENT_LIST_DIR}/kernels_neon.cmake)
endif()
