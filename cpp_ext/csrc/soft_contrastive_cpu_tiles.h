// What the CPU driver asks of the vector code, which is compiled once for each instruction set.
//
// A batch is cut into blocks of at most kBlock rows of one label. Each block is packed three ways, zero-padded to
// whole strips, so that the inner loops read memory in order (T is float or double, C the width):
//   left    [strips of mr rows][C][mr]      left operand of z z^T
//   right   [strips of nr rows][C][nr]      right operand of z z^T
//   across  [strips of nr columns][row][nr] right operand of weights times z
// Exponents are kept in base 2: the scale of a tile includes log2(e).
#pragma once

#include <cstdint>

namespace ntf::cpu {

constexpr int kBlock = 192;       // rows of a block: three packed blocks and a tile of weights fit a 512 KiB L2 cache
constexpr int kTileStride = 208;  // elements between rows of a tile; 13 cache lines, which spread over all sets

// One tile of scaled products s_rc = scale * (left row r . right row c).
template <typename T>
struct Tile {
  const T* left;
  const T* right;
  int64_t width;  // C
  int rows, cols;
  bool diagonal;  // both sides are the same block: the pairs r == c do not count
  T scale;
};

// sum over terms of coefficient * 2^(s - shift), for the rows or the columns of a tile. Shifts are null where 2^s needs
// none; otherwise no pair that counts has s above a shift.
template <typename T>
struct Terms {
  int count = 0;  // 0 to 2
  const T* coefficient[2] = {nullptr, nullptr};
  const T* shift[2] = {nullptr, nullptr};
};

// A block in the layout "across".
template <typename T>
struct Across {
  T* data;
  int64_t capacity;  // rows in a strip
  int strips;
};

template <typename T>
struct TileKernels {
  const char* instruction_set;
  int mr, nr;

  // row_max[r] = max over c of s_rc, and likewise for columns where col_max is given.
  void (*maxima)(const Tile<T>& tile, T* row_max, T* col_max);

  // row_sum[r] = sum over c of e_rc = 2^(s_rc - row_shift[r]); likewise for columns with their own shift where col_sum
  // is given. Without shifts e_rc = 2^s_rc. Where `tile_out` is given, e_rc is stored (kTileStride elements a row).
  void (*sums)(const Tile<T>& tile, const T* row_shift, const T* col_shift, T* row_sum, T* col_sum, T* tile_out);

  // tile_out_rc = sum of the row's terms and of the column's, which have no shifts.
  void (*weights)(const Tile<T>& tile, const Terms<T>& rows, const Terms<T>& cols, T* tile_out);

  // The same with shifts.
  void (*shifted_weights)(const Tile<T>& tile, const Terms<T>& rows, const Terms<T>& cols, T* tile_out);

  // out[r] += sum over k < inner of tile[r][k] * rows[k], for r < `count`.
  void (*multiply)(const T* tile, int count, int inner, const Across<const T>& rows, const Across<T>& out);

  // out[c] += sum over r < inner of tile[r][c] * rows[r], for c < `count`.
  void (*multiply_transposed)(const T* tile, int count, int inner, const Across<const T>& rows, const Across<T>& out);
};

// Defined by soft_contrastive_cpu_tiles.cpp, once for each instruction set that it was compiled for.
#define NTF_DECLARE_TILES(isa)                 \
  namespace isa {                              \
  const TileKernels<float>& float_kernels();   \
  const TileKernels<double>& double_kernels(); \
  }
NTF_DECLARE_TILES(sse2)
NTF_DECLARE_TILES(avx2)
NTF_DECLARE_TILES(avx512)
NTF_DECLARE_TILES(generic)
#undef NTF_DECLARE_TILES

}  // namespace ntf::cpu
