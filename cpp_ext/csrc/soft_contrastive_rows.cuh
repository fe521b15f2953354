// Kernels that look at rows one by one: sums by label, coefficients, and what finishes the partial results of
// soft_contrastive_pairs.cuh. Little work, bound by memory; for the symbols see soft_contrastive.cu.
#pragma once

#include "soft_contrastive.h"
#include "soft_contrastive_pairs.cuh"

namespace ntf::cuda {
namespace {

// ---- Sums of rows by label ----

struct CountLabels {
  const int64_t* labels;
  int64_t rows;
  int64_t* counts;  // real, fake
};

// Counts the labels. Grid (1). Traffic 8 N.
__global__ void __launch_bounds__(kThreads) count_labels_kernel(CountLabels a) {
  __shared__ int64_t counts[2][kThreads];
  int64_t real = 0, fake = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < a.rows; i += kThreads) {
    const int label_class = class_of(a.labels[i]);
    real += label_class == kReal;
    fake += label_class == kFake;
  }
  counts[0][threadIdx.x] = real;
  counts[1][threadIdx.x] = fake;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
      counts[0][threadIdx.x] += counts[0][threadIdx.x + half];
      counts[1][threadIdx.x] += counts[1][threadIdx.x + half];
    }
  }
  if (threadIdx.x == 0) {
    a.counts[0] = counts[0][0];
    a.counts[1] = counts[1][0];
  }
}

// Sums S_c of the rows of class c, then G_c of the rows times their weight.
constexpr int kSums = 4;

template <typename Input>
struct ColumnSums {
  using Wide = typename WideOf<Input>::type;
  Matrix<Input> matrix;
  const int64_t* labels;  // null: all rows are of class 0
  const Wide* weights;    // null: no G
  Wide* partial;          // (blocks, kSums, width)
  int64_t rows_per_block;
};

// Partial sums of the rows of one block, in the order of the rows; a thread owns a column.
// Grid (ceil(C / kThreads), blocks). N C additions (3 N C with weights). Traffic N C b, and blocks 4 C w written.
template <typename Input>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(ColumnSums<Input> a) {
  using Wide = typename WideOf<Input>::type;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= a.matrix.width) {
    return;
  }
  const int64_t begin = blockIdx.y * a.rows_per_block;
  const int64_t end = begin + a.rows_per_block < a.matrix.rows ? begin + a.rows_per_block : a.matrix.rows;
  Wide sums[kSums] = {};
#pragma unroll 4
  for (int64_t i = begin; i < end; ++i) {
    const Wide value = widen(a.matrix.data[i * a.matrix.width + column]);
    const Wide weighted = a.weights ? a.weights[i] * value : Wide(0);
    const int label_class = a.labels ? class_of(a.labels[i]) : kReal;
    sums[0] += label_class == kReal ? value : Wide(0);
    sums[1] += label_class == kFake ? value : Wide(0);
    sums[2] += label_class == kReal ? weighted : Wide(0);
    sums[3] += label_class == kFake ? weighted : Wide(0);
  }
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    a.partial[(static_cast<int64_t>(blockIdx.y) * kSums + s) * a.matrix.width + column] = sums[s];
  }
}

template <typename Wide>
struct AddBlocks {
  const Wide* partial;  // (blocks, count)
  Wide* sums;           // (count,)
  int64_t count;
  int blocks;
};

// Adds the blocks of `column_sums_kernel` in their order. Grid (ceil(4 C / kThreads)). Traffic blocks 4 C w.
template <typename Wide>
__global__ void __launch_bounds__(kThreads) add_blocks_kernel(AddBlocks<Wide> a) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= a.count) {
    return;
  }
  Wide sum = 0;
#pragma unroll 8
  for (int block = 0; block < a.blocks; ++block) {
    sum += a.partial[block * a.count + place];
  }
  a.sums[place] = sum;
}

// ---- Rows, one by one ----

// What every per-row kernel knows.
struct RowContext {
  const int64_t* labels;
  const int64_t* counts;
  int64_t rows, traces;
  Form form;
  Denominator denominator;

  // Labels that are neither leave no meaningful counts; the callers look at `valid` first.
  __device__ __forceinline__ Counts counts_of(int64_t i) const {
    const int64_t same = counts[labels[i] == 1];
    return {same - 1, rows - same, traces};
  }
  __device__ __forceinline__ bool valid(int64_t i) const { return class_of(labels[i]) != kNeither; }
};

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    value += shuffle_xor(value, mask);
  }
  return value;
}

template <typename Input>
struct FinishForward {
  using Wide = typename WideOf<Input>::type;
  RowContext rows;
  Matrix<Input> embeddings;
  const Running<Wide>*same, *other;  // (pair_splits, rows)
  const Running<Wide>* traces;       // (trace_splits, rows), null for log_mean
  const Wide* class_sums;            // (2, width), null for literal
  const Wide* trace_sums;            // (width,), for log_mean
  const Wide* partial_pull;          // (trace_splits, rows, width), or null
  int pair_splits, trace_splits;
  Wide inverse_temperature, eta;
  Wide *loss, *log_keys, *log_positives, *log_traces, *pull;
};

// The statistics of a row, then its loss; a warp owns a row. Grid (ceil(N / 4)).
// mean_P s = (z_i . S_c - z_i . z_i) / (n tau). 6 N C operations. Traffic N C (b + 2 w) + N 4 w splits, and with a
// pull N C w (splits + 1).
template <typename Input>
__global__ void __launch_bounds__(kThreads) finish_forward_kernel(FinishForward<Input> a) {
  using Wide = typename WideOf<Input>::type;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (i >= a.rows.rows) {
    return;
  }
  const int64_t width = a.embeddings.width;
  const bool valid = a.rows.valid(i);
  const Counts counts = a.rows.counts_of(i);
  const bool contributing = valid && contributes(counts, a.rows.denominator);

  Statistics<Wide> row{};
  Wide pull_scale = 0;
  Running<Wide> traces{Wide(-INFINITY), Wide(0)};
  if (contributing) {
    Wide same_sum = 0, self = 0, trace_sum = 0;
    for (int64_t column = lane; column < width; column += kWarp) {
      const Wide value = widen(a.embeddings.data[i * width + column]);
      if (a.class_sums) {
        same_sum += value * a.class_sums[(a.rows.labels[i] == 1) * width + column];
        self += value * value;
      }
      if (a.trace_sums) {
        trace_sum += value * a.trace_sums[column];
      }
    }
    row.mean_positive = warp_sum(same_sum - self) * a.inverse_temperature / static_cast<Wide>(counts.positives);
    row.log_positives = merge_splits(a.same, a.pair_splits, a.rows.rows, i).log();
    row.log_negatives = merge_splits(a.other, a.pair_splits, a.rows.rows, i).log();
    if (a.trace_sums) {
      row.traces = warp_sum(trace_sum) * a.inverse_temperature * sign_of<Wide>(a.rows.labels[i]) * a.eta /
                   static_cast<Wide>(counts.traces);
    } else {
      traces = merge_splits(a.traces, a.trace_splits, a.rows.rows, i);
      row.traces = traces.log();
      pull_scale = Wide(1) / traces.sum;
    }
  }
  if (lane == 0) {
    const Wide absent = valid ? Wide(0) : Wide(NAN);
    a.loss[i] = contributing ? anchor_loss(row, counts, a.rows.form, a.rows.denominator) : absent;
    a.log_keys[i] = contributing ? log_keys(row, a.rows.denominator) : absent;
    a.log_positives[i] = contributing && a.rows.form == Form::literal ? row.log_positives : absent;
    a.log_traces[i] = contributing ? row.traces : absent;
  }
  if (!a.pull) {
    return;
  }
  for (int64_t column = lane; column < width; column += kWarp) {
    Wide sum = 0;
    for (int split = 0; contributing && split < a.trace_splits; ++split) {
      const int64_t place = split * a.rows.rows + i;
      sum += a.partial_pull[place * width + column] * a.traces[place].rescale(traces.max);
    }
    a.pull[i * width + column] = sum * pull_scale;
  }
}

template <typename Wide>
struct RowTerms {
  RowContext rows;
  const Wide *grad_loss, *loss, *log_keys, *log_positives, *log_traces;
  Wide trace_scale;             // eta / tau
  PairTerms<Wide>* pair_terms;  // null: not wanted
  TraceTerms<Wide>* trace_terms;
  Wide* means;   // m_i
  Wide* traces;  // c_i y_i
};

// The coefficients of each row's terms times its incoming gradient; a thread owns a row. Grid (ceil(N / kThreads)).
// Traffic N (8 + 12 w).
template <typename Wide>
__global__ void __launch_bounds__(kThreads) row_terms_kernel(RowTerms<Wide> a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.rows.rows) {
    return;
  }
  Coefficients<Wide> of{};
  if (!a.rows.valid(i)) {
    of = {Wide(NAN), Wide(NAN), Wide(NAN), Wide(NAN)};
  } else if (contributes(a.rows.counts_of(i), a.rows.denominator)) {
    of = anchor_coefficients(a.loss[i], a.rows.form);
    const Wide g = a.grad_loss[i];
    of = {g * of.keys, g * of.positives, g * of.mean, g * of.traces};
  }
  const Wide sign = sign_of<Wide>(a.rows.labels[i]);
  if (a.pair_terms) {
    a.pair_terms[i] = {of.keys, a.log_keys[i], of.positives, a.log_positives[i]};
  }
  if (a.trace_terms) {
    a.trace_terms[i] = {sign * of.traces, a.log_traces[i], sign * a.trace_scale};
  }
  if (a.means) {
    a.means[i] = of.mean;
  }
  a.traces[i] = sign * of.traces;
}

// sum over the splits of partial[split][place], in their order.
template <typename Wide>
__device__ __forceinline__ Wide add_splits(const Wide* partial, int splits, int64_t count, int64_t place) {
  Wide sum = 0;
  for (int split = 0; split < splits; ++split) {
    sum += partial[split * count + place];
  }
  return sum;
}

template <typename Input>
struct FinishBackward {
  using Wide = typename WideOf<Input>::type;
  RowContext rows;
  Matrix<Input> embeddings;
  const Wide* partial;         // (splits, rows, width)
  const Wide *means, *traces;  // (rows,) m_i and c_i y_i
  const Wide* class_sums;      // (kSums, width), null for literal
  const Wide* trace_sums;      // (width,), for log_mean
  const Wide* pull;            // (rows, width), for the other forms
  int splits;
  Wide inverse_temperature, eta;
  Input* grad_embeddings;
};

// dz_i = (pairs + m_i/n (S_c - z_i) + (G_c - m_i z_i)/n + c_i y_i eta pull_i) / tau; a thread owns a number.
// Grid (ceil(N C / kThreads)). (10 + splits) N C operations. Traffic N C (2 b + w (splits + 1)).
template <typename Input>
__global__ void __launch_bounds__(kThreads) finish_backward_kernel(FinishBackward<Input> a) {
  using Wide = typename WideOf<Input>::type;
  const int64_t width = a.embeddings.width;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= a.rows.rows * width) {
    return;
  }
  const int64_t i = place / width, column = place % width;
  Wide sum = add_splits(a.partial, a.splits, a.rows.rows * width, place);
  const Counts counts = a.rows.counts_of(i);
  if (a.class_sums && counts.positives > 0) {
    const int64_t fake = a.rows.labels[i] == 1;
    const Wide value = widen(a.embeddings.data[place]), mean = a.means[i];
    const Wide same = a.class_sums[fake * width + column], weighted = a.class_sums[(2 + fake) * width + column];
    sum += (mean * (same - value) + weighted - mean * value) / static_cast<Wide>(counts.positives);
  }
  const Wide coefficient = a.traces[i] * a.eta;
  if (coefficient != 0) {
    sum += coefficient * (a.pull ? a.pull[place] : a.trace_sums[column] / static_cast<Wide>(counts.traces));
  }
  narrow(sum * a.inverse_temperature, a.grad_embeddings[place]);
}

template <typename Input>
struct FinishTraces {
  using Wide = typename WideOf<Input>::type;
  const Wide* partial;  // (splits, traces, width), or null
  const Wide* sums;     // (kSums, width), for log_mean: the third is the sum of c_i y_i z_i
  int splits;
  int64_t traces, width;
  Wide scale;  // eta / tau
  Input* grad_traces;
};

// dh_j = eta / tau sum_i c_i y_i q_ij z_i, with q_ij = 1 / J for log_mean; a thread owns a number.
// Grid (ceil(J C / kThreads)). Traffic J C (b + splits w).
template <typename Input>
__global__ void __launch_bounds__(kThreads) finish_traces_kernel(FinishTraces<Input> a) {
  using Wide = typename WideOf<Input>::type;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= a.traces * a.width) {
    return;
  }
  const Wide sum = a.sums ? a.sums[2 * a.width + place % a.width] / static_cast<Wide>(a.traces)
                          : add_splits(a.partial, a.splits, a.traces * a.width, place);
  narrow(sum * a.scale, a.grad_traces[place]);
}

}  // namespace
}  // namespace ntf::cuda
