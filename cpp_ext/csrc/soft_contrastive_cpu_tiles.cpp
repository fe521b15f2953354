// The inner loops of the CPU path. Compiled once for each instruction set with -DNTF_ISA=<name>; the width of a vector
// follows from the compiler's target. Nothing here may call a function that other files share: the linker would keep
// one copy of it, which could use instructions that the machine at hand does not have.
#include "soft_contrastive_cpu_tiles.h"

#ifndef NTF_ISA
#error "compile with -DNTF_ISA=<instruction set>: see cpp_ext/build.py"
#endif

namespace ntf::cpu::NTF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 12 of 16 registers accumulate
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 12;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4;
#endif
constexpr int kVectors = 2;  // vectors in a row of a register tile
static_assert(kBlock % kTileRows == 0 && kBlock % (kVectors * kVectorBytes / 4) == 0);

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename Lanes<T>::Vector;
template <typename T>
using Ints = typename Lanes<T>::Integers;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kTileCols = kVectors * kLanes<T>;

template <typename T>
inline Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(from);
}

template <typename T>
inline void store(T* to, Vec<T> value) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(to) = value;
}

template <typename T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};
}

template <typename T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <typename T>
inline Ints<T> lane_numbers() {
  Ints<T> lanes{};
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i;
  return lanes;
}

template <typename T>
inline T sum_of(Vec<T> value) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += value[i];
  return total;
}

template <typename T>
inline T max_of(Vec<T> value) {
  T high = value[0];
  for (int i = 1; i < kLanes<T>; ++i) high = value[i] > high ? value[i] : high;
  return high;
}

// 2^f for f in [-1/2, 1/2]. Float: interpolation at Chebyshev's points, relative error 1.9e-8 with these rounded
// coefficients; double: Taylor of exp(f ln 2) to the 13th power, 5e-18.
inline Vec<float> power_of_fraction(Vec<float> f) {
  Vec<float> p = splat(1.546144472e-4f);
  p = p * f + 1.340042818e-3f;
  p = p * f + 9.618056678e-3f;
  p = p * f + 5.550327227e-2f;
  p = p * f + 2.402265092e-1f;
  p = p * f + 6.931472067e-1f;
  return p * f + 1.0f;
}

inline Vec<double> power_of_fraction(Vec<double> f) {
  const Vec<double> x = f * 0.693147180559945309417;
  Vec<double> p = splat(1.0 / 6227020800);
  constexpr double kFactorials[] = {479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1};
  for (double factorial : kFactorials) p = p * x + 1.0 / factorial;
  return p;
}

template <typename T>
struct Format;
template <>
struct Format<float> {
  static constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr int kMantissa = 23;
  static constexpr float kSmallest = -126.0f;
};
template <>
struct Format<double> {
  static constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr double kSmallest = -1022.0;
};

// The product, rounded: a compiler may not make one instruction of it and what follows. The maxima are rounded too, so
// that an exponent lowered by its row's maximum is 0 or below it, in every pass alike.
template <typename T>
inline Vec<T> rounded_product(Vec<T> x, T scale) {
  Vec<T> product = x * scale;
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

// 2^(x * scale - shift). Without kShifted the exponent has to be between those of the type's smallest and largest
// number. With kShifted it is brought between the smallest and 0: a shift is a maximum, above which only pairs that do
// not count can lie. A NaN stays one.
template <bool kShifted, typename T>
inline Vec<T> power_of_two(Vec<T> x, T scale, Vec<T> shift) {
  using Bits = typename Lanes<T>::Bits;
  Vec<T> exponent = kShifted ? rounded_product(x, scale) - shift : x * scale;
  if (kShifted) {
    exponent = exponent > 0 ? Vec<T>{} : exponent;
    exponent = exponent < Format<T>::kSmallest ? splat(Format<T>::kSmallest) : exponent;
  }
  const Vec<T> rounded = exponent + Format<T>::kRounder;
  const Vec<T> whole = rounded - Format<T>::kRounder;
  const Vec<T> fraction = kShifted ? exponent - whole : x * scale - whole;
  const Vec<T> power = reinterpret_cast<Vec<T>>(reinterpret_cast<Bits>(power_of_fraction(fraction)) +
                                                (reinterpret_cast<Bits>(rounded) << Format<T>::kMantissa));
  return exponent == exponent ? power : exponent;
}

template <typename T>
using Accumulators = Vec<T>[kTileRows][kVectors];

// acc[r][.] = sum over k of left[k * left_step + r * left_row] * right[k * kTileCols + .]
template <typename T>
inline void multiply_strips(const T* left, int64_t left_step, int64_t left_row, const T* right, int64_t inner,
                            Accumulators<T>& acc) {
  for (int64_t k = 0; k < inner; ++k, left += left_step, right += kTileCols<T>) {
    const Vec<T> first = load(right), second = load(right + kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const T value = left[r * left_row];
      acc[r][0] += value * first;
      acc[r][1] += value * second;
    }
  }
}

// Which pairs of a register tile count: columns inside the block, and on the diagonal block r != c.
template <typename T>
inline Ints<T> counted(const Tile<T>& tile, int row, int col) {
  const Ints<T> cols = lane_numbers<T>() + static_cast<decltype(Ints<T>{}[0] + 0)>(col);
  Ints<T> inside = cols < tile.cols;
  if (tile.diagonal) inside &= cols != row;
  return inside;
}

// Calls `before(r0)` before and `after(r0)` after the register tiles of a strip of rows, and `body(acc, r0, c0, edge)`
// for each of them; `edge` says whether `counted` has to be asked.
template <typename T, typename Body, typename Before, typename After>
inline void for_each_register_tile(const Tile<T>& tile, Before before, Body body, After after) {
  for (int r0 = 0; r0 < tile.rows; r0 += kTileRows) {
    before(r0);
    for (int c0 = 0; c0 < tile.cols; c0 += kTileCols<T>) {
      Accumulators<T> acc{};
      multiply_strips<T>(tile.left + r0 * tile.width, kTileRows, 1, tile.right + c0 * tile.width, tile.width, acc);
      body(acc, r0, c0, tile.diagonal || c0 + kTileCols<T> > tile.cols);
    }
    after(r0);
  }
}

template <typename T>
void maxima(const Tile<T>& tile, T* row_max, T* col_max) {
  constexpr T kLowest = -__builtin_inf();
  Vec<T> rows[kTileRows], cols[kBlock / kLanes<T>];
  for (Vec<T>& value : cols) value = splat(kLowest);
  for_each_register_tile(
      tile,
      [&](int) {
        for (Vec<T>& value : rows) value = splat(kLowest);
      },
      [&](const Accumulators<T>& acc, int r0, int c0, bool edge) {
        for (int v = 0; v < kVectors; ++v) {
          Vec<T>& col = cols[c0 / kLanes<T> + v];
          for (int r = 0; r < kTileRows; ++r) {
            Vec<T> s = acc[r][v] * tile.scale;
            if (edge) s = counted(tile, r0 + r, c0 + v * kLanes<T>) ? s : splat(kLowest);
            rows[r] = larger<T>(rows[r], s);
            if (r0 + r < tile.rows) col = larger<T>(col, s);
          }
        }
      },
      [&](int r0) {
        for (int r = 0; r < kTileRows && r0 + r < tile.rows; ++r) row_max[r0 + r] = max_of<T>(rows[r]);
      });
  if (col_max != nullptr)
    for (int c = 0; c < tile.cols; ++c) col_max[c] = cols[c / kLanes<T>][c % kLanes<T>];
}

template <bool kShifted, bool kColumns, bool kStore, typename T>
void sums_of(const Tile<T>& tile, const T* row_shift, const T* col_shift, T* row_sum, T* col_sum, T* tile_out) {
  Vec<T> rows[kTileRows], cols[kBlock / kLanes<T>] = {};
  for_each_register_tile(
      tile,
      [&](int) {
        for (Vec<T>& value : rows) value = Vec<T>{};
      },
      [&](const Accumulators<T>& acc, int r0, int c0, bool edge) {
        for (int v = 0; v < kVectors; ++v) {
          const int c = c0 + v * kLanes<T>;
          Vec<T> col{};
          const Vec<T> shift_of_cols = kShifted && kColumns ? load(col_shift + c) : Vec<T>{};
          for (int r = 0; r < kTileRows; ++r) {
            const Vec<T> shift_of_row = kShifted ? splat(row_shift[r0 + r]) : Vec<T>{};
            Vec<T> e = power_of_two<kShifted>(acc[r][v], tile.scale, shift_of_row);
            if (edge) e = counted(tile, r0 + r, c) ? e : Vec<T>{};
            rows[r] += e;
            if (kStore) store(tile_out + (r0 + r) * kTileStride + c, e);
            if (kColumns && r0 + r < tile.rows)
              col += kShifted ? power_of_two<kShifted>(acc[r][v], tile.scale, shift_of_cols) : e;
          }
          if (kColumns) cols[c / kLanes<T>] += col;
        }
      },
      [&](int r0) {
        for (int r = 0; r < kTileRows && r0 + r < tile.rows; ++r) row_sum[r0 + r] = sum_of<T>(rows[r]);
      });
  if (kColumns)
    for (int c = 0; c < tile.cols; ++c) col_sum[c] = cols[c / kLanes<T>][c % kLanes<T>];
}

template <typename T>
void sums(const Tile<T>& tile, const T* row_shift, const T* col_shift, T* row_sum, T* col_sum, T* tile_out) {
  auto run = row_shift == nullptr ? (col_sum != nullptr    ? sums_of<false, true, false, T>
                                     : tile_out != nullptr ? sums_of<false, false, true, T>
                                                           : sums_of<false, false, false, T>)
                                  : (col_sum != nullptr    ? sums_of<true, true, false, T>
                                     : tile_out != nullptr ? sums_of<true, false, true, T>
                                                           : sums_of<true, false, false, T>);
  run(tile, row_shift, col_shift, row_sum, col_sum, tile_out);
}

template <typename T>
inline void clear_diagonal(const Tile<T>& tile, T* tile_out) {
  if (tile.diagonal)
    for (int r = 0; r < tile.rows; ++r) tile_out[r * kTileStride + r] = 0;
}

// The sum of a side's coefficients: one or two arrays.
template <typename T>
inline Vec<T> coefficients_at(const Terms<T>& terms, int place) {
  Vec<T> total{};
  for (int t = 0; t < terms.count; ++t) total += load(terms.coefficient[t] + place);
  return total;
}

template <typename T>
void weights(const Tile<T>& tile, const Terms<T>& rows, const Terms<T>& cols, T* tile_out) {
  T of_rows[kTileRows];
  for_each_register_tile(
      tile,
      [&](int r0) {
        for (int r = 0; r < kTileRows; ++r) {
          of_rows[r] = 0;
          for (int t = 0; t < rows.count; ++t) of_rows[r] += rows.coefficient[t][r0 + r];
        }
      },
      [&](const Accumulators<T>& acc, int r0, int c0, bool) {
        for (int v = 0; v < kVectors; ++v) {
          const int c = c0 + v * kLanes<T>;
          const Vec<T> of_cols = coefficients_at(cols, c);
          for (int r = 0; r < kTileRows; ++r) {
            const Vec<T> e = power_of_two<false>(acc[r][v], tile.scale, Vec<T>{});
            store(tile_out + (r0 + r) * kTileStride + c, e * (of_cols + of_rows[r]));
          }
        }
      },
      [](int) {});
  clear_diagonal(tile, tile_out);
}

template <typename T>
void shifted_weights(const Tile<T>& tile, const Terms<T>& rows, const Terms<T>& cols, T* tile_out) {
  for_each_register_tile(
      tile, [](int) {},
      [&](const Accumulators<T>& acc, int r0, int c0, bool) {
        for (int v = 0; v < kVectors; ++v) {
          const int c = c0 + v * kLanes<T>;
          for (int r = 0; r < kTileRows; ++r) {
            Vec<T> total{};
            for (int t = 0; t < rows.count; ++t)
              total +=
                  rows.coefficient[t][r0 + r] * power_of_two<true>(acc[r][v], tile.scale, splat(rows.shift[t][r0 + r]));
            for (int t = 0; t < cols.count; ++t)
              total +=
                  load(cols.coefficient[t] + c) * power_of_two<true>(acc[r][v], tile.scale, load(cols.shift[t] + c));
            store(tile_out + (r0 + r) * kTileStride + c, total);
          }
        }
      },
      [](int) {});
  clear_diagonal(tile, tile_out);
}

template <bool kTransposed, typename T>
void multiply(const T* tile, int count, int inner, const Across<const T>& rows, const Across<T>& out) {
  const int64_t step = kTransposed ? kTileStride : 1;
  for (int strip = 0; strip < rows.strips; ++strip) {
    const T* right = rows.data + strip * rows.capacity * kTileCols<T>;
    for (int r0 = 0; r0 < count; r0 += kTileRows) {
      Accumulators<T> acc{};
      const T* left = tile + (kTransposed ? r0 : r0 * kTileStride);
      multiply_strips<T>(left, step, kTransposed ? 1 : kTileStride, right, inner, acc);
      T* to = out.data + (strip * out.capacity + r0) * kTileCols<T>;
      for (int r = 0; r < kTileRows; ++r, to += kTileCols<T>) {
        store(to, load(to) + acc[r][0]);
        store(to + kLanes<T>, load(to + kLanes<T>) + acc[r][1]);
      }
    }
  }
}

#define NTF_STRING(x) #x
#define NTF_NAME(x) NTF_STRING(x)

template <typename T>
constexpr TileKernels<T> kKernels{
    NTF_NAME(NTF_ISA), kTileRows,          kTileCols<T>,       maxima<T>,         sums<T>,
    weights<T>,        shifted_weights<T>, multiply<false, T>, multiply<true, T>,
};

}  // namespace

const TileKernels<float>& float_kernels() { return kKernels<float>; }
const TileKernels<double>& double_kernels() { return kKernels<double>; }

}  // namespace ntf::cpu::NTF_ISA
