// float16 for a host compiler: the compiler's own type does the rounding, to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  _Float16 number;
  std::memcpy(&number, &value.bits, sizeof(number));
  return number;
}

inline __half __float2half_rn(float value) {
  const _Float16 number = static_cast<_Float16>(value);
  __half half;
  std::memcpy(&half.bits, &number, sizeof(number));
  return half;
}
