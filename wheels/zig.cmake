# A toolchain: zig, which brings the C library of old Linux systems, on x86-64 and on Arm.
#
# BNLAYER_ZIG names the program, BNLAYER_TARGET what to compile for, such as aarch64-linux-gnu.2.17.

set(CMAKE_SYSTEM_NAME Linux)
string(REGEX REPLACE "-.*" "" CMAKE_SYSTEM_PROCESSOR $ENV{BNLAYER_TARGET})
set(CMAKE_CXX_COMPILER $ENV{BNLAYER_ZIG} c++)
set(CMAKE_CXX_COMPILER_TARGET $ENV{BNLAYER_TARGET})
set(CMAKE_CXX_FLAGS_INIT -fno-sanitize=all)  # zig's own default is another one

# The module uses headers of the C++ library alone. With nothing ever linked as C++, zig need not compile that library,
# which takes it minutes.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_CXX_CREATE_SHARED_MODULE
  "$ENV{BNLAYER_ZIG} cc --target=$ENV{BNLAYER_TARGET} -shared -s <LINK_FLAGS> -o <TARGET> <OBJECTS> <LINK_LIBRARIES>")
set(CMAKE_AR "$ENV{BNLAYER_ZIG}" CACHE FILEPATH "zig's own")
set(CMAKE_CXX_ARCHIVE_CREATE "<CMAKE_AR> ar qc <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "")
