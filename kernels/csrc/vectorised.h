// GCC and Clang compile a function so marked once per instruction set and choose when the library is loaded; XKD_CLONES names
// those sets that this compiler knows, as CMakeLists.txt has found out. Without it the function is compiled once. What it calls
// is compiled for the same instruction set only where it is inlined.
#pragma once

#ifdef XKD_CLONES
#define XKD_VECTORISED __attribute__((target_clones(XKD_CLONES)))
#else
#define XKD_VECTORISED
#endif
#define XKD_INLINED inline __attribute__((always_inline))
