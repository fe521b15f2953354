// Tiles of the matrix products: staging rows in shared memory, and two ways to multiply them.
//
//   Simt<T>        float or double, one fused multiply-add at a time, register tiles
//   TensorCore<T>  __half, __nv_bfloat16 or float (rounded to TF32), mma.sync; needs sm_80
//
// Both offer the same two products of a block of kThreads threads:
//   scores (kTile x kTile) += owner rows (kTile x kChunk) . other rows (kTile x kChunk)^T
//   out (kTile x kOut)     += weights (kTile x kOutRows) . other rows (kOutRows x kOut)
// The second runs in Wide (Simt) or TF32 (TensorCore, also for the half types: their numbers are exact in TF32, and
// weights far below the smallest float16 stay what they are; a weight is rounded to 11 bits, 4.9e-4 relative).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "soft_contrastive_cuda.h"

namespace ntf::cuda {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
// Blocks on a multiprocessor of 65536 registers, and so the most registers a thread may take, in steps of 8: 128 for
// the statistics and 168 for the weighted rows (kWeightedRowsBlocks), which hold 64 more sums.
constexpr int kStatisticsBlocks = 4;

// ---- Every instruction that has no name in C++. A host compiler takes these from an emulation. ----
#ifdef __CUDACC__

__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ double shuffle_xor(double value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

// Nearest number of 8 + 10 bits, ties away from zero.
__device__ __forceinline__ float round_to_tf32(float value) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  return value;
#endif
}

// d += a (16 x 16, row by row) . b (16 x 8, column by column); fragments as in the PTX manual, mma.m16n8k16.
__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d += a (16 x 8) . b (8 x 8), numbers already rounded to TF32; mma.m16n8k8.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}

// Enqueues `kernel`, a __global__ function of one argument.
template <auto kernel, typename Arguments>
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Arguments arguments) {
  void* pointers[] = {&arguments};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes, stream);
  return error == cudaSuccess ? cudaGetLastError() : error;
}

#endif  // __CUDACC__

// ---- Number types ----

__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

__device__ __forceinline__ void narrow(float value, __half& out) { out = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ __forceinline__ void narrow(float value, float& out) { out = value; }
__device__ __forceinline__ void narrow(double value, double& out) { out = value; }

template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};

// Moved by one 16-byte instruction.
template <typename T, int kCount = 16 / sizeof(T)>
struct alignas(16) Pack {
  T values[kCount];
};

// A contiguous (rows, width) matrix in device memory.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, width;
  bool packs;  // every row starts at a multiple of 16 bytes
};

template <typename T>
Matrix<T> matrix_of(const void* data, int64_t rows, int64_t width) {
  const bool packs = reinterpret_cast<uintptr_t>(data) % 16 == 0 && width * sizeof(T) % 16 == 0;
  return {static_cast<const T*>(data), rows, width, packs};
}

// The first `inside` numbers from `place` on, then zeros; by one instruction where `whole`.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* place, bool whole, int inside) {
  if (whole) {
    return *reinterpret_cast<const Pack<T>*>(place);
  }
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) {
    narrow(0, pack.values[i]);
    if (i < inside) {
      pack.values[i] = place[i];
    }
  }
  return pack;
}

// Copies kRows x kColumns numbers from (row, column) on into shared memory, row by row, kPitch apart; 0 outside.
template <int kRows, int kColumns, int kPitch, class Convert, typename Source, typename Target>
__device__ __forceinline__ void stage(Target* target, const Matrix<Source>& matrix, int64_t row, int64_t column,
                                      Convert convert) {
  constexpr int kCount = 16 / sizeof(Source);
  constexpr int kPacks = kColumns / kCount;
  constexpr int kStep = kThreads / kPacks;
  static_assert(kThreads % kPacks == 0 && kRows % kStep == 0, "every thread copies equally many packs");
  static_assert(kPitch * sizeof(Target) % 16 == 0, "rows start at multiples of 16 bytes");
  const int r = threadIdx.x / kPacks, c = threadIdx.x % kPacks * kCount;
  const int rows_left = matrix.rows - row < kRows ? static_cast<int>(matrix.rows - row) : kRows;
  const int columns_left = matrix.width - column < kColumns ? static_cast<int>(matrix.width - column) : kColumns;
  const bool whole = matrix.packs && c + kCount <= columns_left;
  const Source* source = matrix.data + (row + r) * matrix.width + column + c;
  // Two reads in flight: four would take the registers that the weighted rows do not have.
#pragma unroll 2
  for (int step = 0; step < kRows; step += kStep) {
    const bool inside = r + step < rows_left;
    const Pack<Source> read = load_pack(source, whole && inside, inside ? columns_left - c : 0);
    Pack<Target, kCount> converted;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      converted.values[i] = convert(read.values[i]);
    }
    *reinterpret_cast<Pack<Target, kCount>*>(target + (r + step) * kPitch + c) = converted;
    source += kStep * matrix.width;
  }
}

// ---- Products ----

// Threads form a grid of 8 x 16; thread (y, x) owns rows y + 8 i, score columns x + 16 j and packs of out columns.
template <typename T>
struct Simt {
  using Input = T;
  using Stage = T;
  using Wide = T;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kTile = sizeof(T) == 8 ? 32 : 64;
  static constexpr int kChunk = 8 * kVector;
  static constexpr int kPitch = kChunk + kVector;  // 16-byte reads of 8 rows touch 32 different banks
  static constexpr int kScorePitch = kTile + kVector;
  static constexpr int kOut = 32 * kVector;
  static constexpr int kOutRows = 4 * kVector;
  static constexpr int kOutPitch = kOut;
  static constexpr int kRows = kTile / 8, kColumns = kTile / 16, kOutColumns = 2 * kVector;

  struct Scores {
    T values[kRows][kColumns] = {};
  };
  struct Out {
    T values[kRows][kOutColumns] = {};
  };
  static __device__ __forceinline__ int y() { return threadIdx.x / 16; }
  static __device__ __forceinline__ int x() { return threadIdx.x % 16; }
  static __device__ __forceinline__ T stage_value(T value) { return value; }
  static __device__ __forceinline__ T stage_row_value(T value) { return value; }
  static __device__ __forceinline__ T round_weight(T value) { return value; }

  static __device__ __forceinline__ void multiply_scores(Scores& scores, const T* owners, const T* others) {
#pragma unroll 1
    for (int k = 0; k < kChunk; k += kVector) {
      Pack<T> other[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        other[j] = *reinterpret_cast<const Pack<T>*>(others + (x() + 16 * j) * kPitch + k);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Pack<T> owner = *reinterpret_cast<const Pack<T>*>(owners + (y() + 8 * i) * kPitch + k);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            scores.values[i][j] += owner.values[v] * other[j].values[v];
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void store_scores(const Scores& scores, T* target) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        target[(y() + 8 * i) * kScorePitch + x() + 16 * j] = scores.values[i][j];
      }
    }
  }

  static __device__ __forceinline__ void multiply_out(Out& out, const T* weights, const T* rows) {
#pragma unroll 2
    for (int k = 0; k < kOutRows; ++k) {
      Pack<T> row[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        row[j] = *reinterpret_cast<const Pack<T>*>(rows + k * kOutPitch + (x() + 16 * j) * kVector);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const T weight = weights[(y() + 8 * i) * kScorePitch + k];
#pragma unroll
        for (int j = 0; j < kOutColumns; ++j) {
          out.values[i][j] += weight * row[j / kVector].values[j % kVector];
        }
      }
    }
  }

  // Calls visit(number, row, column) for every number of `out` that this thread owns.
  template <class Visit>
  static __device__ __forceinline__ void for_each(Out& out, Visit visit) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kOutColumns; ++j) {
        visit(out.values[i][j], y() + 8 * i, (x() + 16 * (j / kVector)) * kVector + j % kVector);
      }
    }
  }
};

// Warps form a grid of 2 x 2; each owns 32 x 32 scores and 32 x 64 of out, in fragments of 16 x 8. In a fragment,
// lane 4 g + q holds rows g and g + 8, columns 2 q and 2 q + 1. The pitches let a warp's 32 reads touch 32 banks.
template <typename T>
struct TensorCore {
  using Input = T;
  using Stage = T;
  using Wide = float;
  static constexpr int kTile = 64;
  static constexpr int kChunk = 128 / sizeof(T);
  static constexpr int kPitch = kChunk + 16 / sizeof(T);
  static constexpr int kScorePitch = kTile + 4;
  static constexpr int kOut = 128;
  static constexpr int kOutRows = 16;
  static constexpr int kOutPitch = kOut + 8;

  struct Scores {
    float values[2][4][4] = {};
  };
  struct Out {
    float values[2][8][4] = {};
  };
  static __device__ __forceinline__ int group() { return threadIdx.x % kWarp / 4; }
  static __device__ __forceinline__ int quad() { return threadIdx.x % 4; }
  static __device__ __forceinline__ int row() { return threadIdx.x / (2 * kWarp) * 32; }
  static __device__ __forceinline__ int column() { return threadIdx.x / kWarp % 2 * 32; }
  static __device__ __forceinline__ __half stage_value(__half value) { return value; }
  static __device__ __forceinline__ __nv_bfloat16 stage_value(__nv_bfloat16 value) { return value; }
  static __device__ __forceinline__ float stage_value(float value) { return round_to_tf32(value); }
  static __device__ __forceinline__ float stage_row_value(T value) { return round_to_tf32(widen(value)); }
  static __device__ __forceinline__ float round_weight(float value) { return round_to_tf32(value); }

  static __device__ __forceinline__ uint32_t pair(const T* values) {
    return *reinterpret_cast<const uint32_t*>(values);
  }

  static __device__ __forceinline__ void multiply_scores(Scores& scores, const T* owners, const T* others) {
    if constexpr (sizeof(T) == 4) {
      multiply_scores_tf32(scores, owners, others);
    } else {
      multiply_scores_half(scores, owners, others);
    }
  }

  static __device__ __forceinline__ void multiply_scores_half(Scores& scores, const T* owners, const T* others) {
#pragma unroll 2
    for (int k = 0; k < kChunk; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const T* corner = owners + (row() + 16 * m + group()) * kPitch + k + 2 * quad();
        a[m][0] = pair(corner);
        a[m][1] = pair(corner + 8 * kPitch);
        a[m][2] = pair(corner + 8);
        a[m][3] = pair(corner + 8 * kPitch + 8);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const T* corner = others + (column() + 8 * n + group()) * kPitch + k + 2 * quad();
        const uint32_t b[2] = {pair(corner), pair(corner + 8)};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_half(scores.values[m][n], a[m], b, T());
        }
      }
    }
  }

  static __device__ __forceinline__ void multiply_scores_tf32(Scores& scores, const float* owners,
                                                              const float* others) {
#pragma unroll 2
    for (int k = 0; k < kChunk; k += 8) {
      float a[2][4];
      load_a(a, owners + row() * kPitch + k, kPitch);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float* corner = others + (column() + 8 * n + group()) * kPitch + k + quad();
        const float b[2] = {corner[0], corner[4]};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_tf32(scores.values[m][n], a[m], b);
        }
      }
    }
  }

  static __device__ __forceinline__ void load_a(float (&a)[2][4], const float* tile, int pitch) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float* corner = tile + (16 * m + group()) * pitch + quad();
      a[m][0] = corner[0];
      a[m][1] = corner[8 * pitch];
      a[m][2] = corner[4];
      a[m][3] = corner[8 * pitch + 4];
    }
  }

  static __device__ __forceinline__ void store_scores(const Scores& scores, float* target) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = row() + 16 * m + group() + e / 2 * 8, c = column() + 8 * n + 2 * quad() + e % 2;
          target[r * kScorePitch + c] = scores.values[m][n][e];
        }
      }
    }
  }

  static __device__ __forceinline__ void multiply_out(Out& out, const float* weights, const float* rows) {
#pragma unroll 1
    for (int k = 0; k < kOutRows; k += 8) {
      float a[2][4];
      load_a(a, weights + row() * kScorePitch + k, kScorePitch);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float* corner = rows + (k + quad()) * kOutPitch + 2 * column() + 8 * n + group();
        const float b[2] = {corner[0], corner[4 * kOutPitch]};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_tf32(out.values[m][n], a[m], b);
        }
      }
    }
  }

  template <class Visit>
  static __device__ __forceinline__ void for_each(Out& out, Visit visit) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          visit(out.values[m][n][e], row() + 16 * m + group() + e / 2 * 8, 2 * column() + 8 * n + 2 * quad() + e % 2);
        }
      }
    }
  }
};

}  // namespace ntf::cuda
