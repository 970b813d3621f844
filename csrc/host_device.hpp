// What code compiled for host and device needs: the mark of its functions, and the standard names it uses.
#pragma once

#if defined(__CUDACC__)
#define MGT_HOST_DEVICE __host__ __device__
#else
#define MGT_HOST_DEVICE
#endif

#if defined(__CUDACC_RTC__)
// NVRTC knows the functions and has no headers.
namespace std {
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using ::cbrt;
using ::ceil;
using ::exp;
using ::fabs;
using ::floor;
using ::fmax;
using ::fmin;
using ::fmod;
using ::nearbyint;
using ::sqrt;
}  // namespace std
#else
#include <cmath>
#include <cstdint>
#endif
