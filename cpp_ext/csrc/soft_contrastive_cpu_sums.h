// Sums of exponentials over the columns of z z^T and z h^T, from which every logsumexp and every softmax weight
// follows.
#pragma once

#include <cmath>

#include "soft_contrastive_cpu_anchors.h"

namespace ntf::cpu {

// sum of 2^(s - shift) over a set of columns, by slot; the shifts are 0 unless the set needed them.
template <typename T>
struct Sums {
  Buffer<T> shift;
  Buffer<double> sum;

  T log(int64_t slot) const { return static_cast<T>(shift[slot] * kLn2 + std::log(sum[slot])); }
};

// Over the other rows of the same label and over those of the other one.
template <typename T>
struct PairSums {
  Sums<T> same, other;
};

// Whether some exponent may be too large for 2^s to be summed as it is: by the norms, so a NaN does not count.
template <typename T>
bool pairs_need_shifts(const PackedRows<T>& rows, const Settings& settings);
template <typename T>
bool traces_need_shifts(const PackedRows<T>& rows, const PackedRows<T>& traces, const Settings& settings);

template <typename T>
PairSums<T> sum_pairs(const TileKernels<T>& kernel, const PackedRows<T>& rows, const Anchors& anchors,
                      const Settings& settings);

// Over the traces, s = y_i eta t_ij; where `pull` is given also sum_j q_ij h_j for each row of the batch.
template <typename T>
Sums<T> sum_traces(const TileKernels<T>& kernel, const PackedRows<T>& rows, const Anchors& anchors,
                   const PackedRows<T>& traces, const Blocks& trace_blocks, const Settings& settings, T* pull);

}  // namespace ntf::cpu
