// Launch interface of the CUDA kernels: raw device pointers and a stream, no torch. Nothing here waits for the device.
//
// Every call of one shape runs the same additions in the same order: equal inputs give equal bits. No array of N x N
// or N x J is made; the workspace is linear in N and J (see `workspace_bytes`).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "soft_contrastive.h"

namespace ntf::cuda {

enum class Type { float16, bfloat16, float32, float64 };

// What the launchers must know of the device that the stream belongs to.
// What decides how many of the largest blocks a multiprocessor holds: their registers (kWeightedRowsBlocks of them),
// and their shared memory, with the 1 KiB that the device keeps for itself.
constexpr int kWeightedRowsBlocks = 3;
constexpr int kBlockSharedBytes = 46 * 1024;

struct Device {
  int multiprocessors;
  int resident_blocks;  // of a multiprocessor; both decide over how many blocks the columns are split
  bool tensor_cores;    // bfloat16 and TF32 products: compute capability 8.0 or newer
};

// One batch. Matrices are contiguous, row by row, of the same type; `Wide` below is float64 for float64, else float32.
// float16 and bfloat16 need `Device::tensor_cores`; elsewhere the caller widens them to float32, which is exact.
// A label other than 0 and 1 cannot be refused without waiting for the device: it makes its row's loss, and all
// gradients, NaN.
struct Batch {
  Type type;
  const void* embeddings;  // (rows, width)
  const int64_t* labels;   // (rows,)
  const void* traces;      // (traces_count, width)
  int64_t rows, traces_count, width;
  double temperature, eta;
  Form form;
  Denominator denominator;
  bool allow_tf32;  // float32 products on tensor cores, inputs rounded to 11 bits
};

struct Forward {
  void *loss, *log_keys, *log_positives, *log_traces;  // (rows,) Wide, rows that do not contribute hold 0
  void* pull;  // (rows, width) Wide, or null: not wanted (always null for log_mean)
};

struct Backward {
  const void *grad_loss, *loss, *log_keys, *log_positives;  // (rows,) Wide
  const void* pull;                                         // (rows, width) Wide; not read for log_mean
  void* grad_embeddings;                                    // (rows, width), the type of the embeddings
};

struct TracesBackward {
  const void *grad_loss, *loss, *log_traces;  // (rows,) Wide
  void* grad_traces;                          // (traces_count, width), the type of the embeddings
};

// Bytes of device memory that the call of the same arguments needs as `workspace`, aligned to 256 bytes: at most
// a small multiple of (rows + traces_count + 64 multiprocessors resident_blocks) x width numbers, whatever rows x rows
// is.
size_t workspace_bytes(const Batch& batch, const Forward& arrays, Device device);
size_t workspace_bytes(const Batch& batch, const Backward& arrays, Device device);
size_t workspace_bytes(const Batch& batch, const TracesBackward& arrays, Device device);

// Enqueue the kernels; the result is the first error of a launch, cudaErrorNotSupported for a half type on a device
// without tensor cores.
cudaError_t run(const Batch& batch, const Forward& arrays, Device device, void* workspace, cudaStream_t stream);
cudaError_t run(const Batch& batch, const Backward& arrays, Device device, void* workspace, cudaStream_t stream);
cudaError_t run(const Batch& batch, const TracesBackward& arrays, Device device, void* workspace, cudaStream_t stream);

}  // namespace ntf::cuda
