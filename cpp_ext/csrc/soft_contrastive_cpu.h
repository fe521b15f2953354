// The soft contrastive loss on the CPU, in memory that grows with N + J.
#pragma once

#include "soft_contrastive.h"
#include "soft_contrastive_cpu_rows.h"

namespace ntf::cpu {

struct Batch {
  Matrix embeddings;
  const int64_t* labels;
  int64_t labels_stride;
  Matrix traces;
};

struct Settings {
  double temperature, eta;
  Form form;
  Denominator denominator;
  int threads;
};

// All (N,), contiguous; rows that do not contribute hold 0. `pull` is (N, C) or null.
template <typename T>
struct ForwardOutputs {
  T *loss, *log_keys, *log_positives, *log_traces, *pull;
};

// What the forward pass left, and the upstream gradient; contiguous. `pull` is null for log_mean.
template <typename T>
struct Saved {
  const T *grad_loss, *loss, *log_keys, *log_positives, *log_traces, *pull;
};

template <typename T>
void forward(const Batch& batch, const Settings& settings, const ForwardOutputs<T>& out);

// grad_embeddings (N, C), contiguous.
template <typename T>
void backward(const Batch& batch, const Settings& settings, const Saved<T>& saved, T* grad_embeddings);

// grad_traces (J, C), contiguous.
template <typename T>
void traces_backward(const Batch& batch, const Settings& settings, const Saved<T>& saved, T* grad_traces);

// Names of the instruction sets that this machine can run and that were compiled in, fastest first, comma-separated.
const char* instruction_sets();

// Use this one from now on; "" the fastest. Returns false where it is not among `instruction_sets`.
bool use_instruction_set(const char* name);

}  // namespace ntf::cpu
