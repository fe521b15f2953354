// Kernels that look at pairs of rows, tile by tile: the statistics of the scores, and sums of rows weighted by them.
// All the work is here; for the symbols see soft_contrastive.cu.
#pragma once

#include "soft_contrastive_tiles.cuh"

namespace ntf::cuda {
namespace {

constexpr int kReal = 0, kFake = 1, kNeither = 2;

__device__ __forceinline__ int class_of(int64_t label) { return label == 0 ? kReal : label == 1 ? kFake : kNeither; }

// y: +1 real, -1 fake, NaN for what is neither.
template <typename T>
__device__ __forceinline__ T sign_of(int64_t label) {
  return label == 0 ? T(1) : label == 1 ? T(-1) : T(NAN);
}

// coefficient * exp(exponent); a row that takes no part has the coefficient 0 and no meaningful exponent.
template <typename T>
__device__ __forceinline__ T term(T coefficient, T exponent) {
  return coefficient == 0 ? T(0) : coefficient * std::exp(exponent);
}

// A NaN wins.
template <typename T>
__device__ __forceinline__ T higher(T a, T b) {
  return b <= a ? a : b;
}

// log(sum of exp) so far: max + log(sum); of nothing: max is -infinity and sum 0.
template <typename T>
struct Running {
  T max, sum;

  // What `sum` must be multiplied by when the maximum rises to `high`.
  __device__ __forceinline__ T rescale(T high) const { return max == -INFINITY ? T(0) : std::exp(max - high); }
  __device__ __forceinline__ T log() const { return sum == 0 ? T(-INFINITY) : max + std::log(sum); }
};

template <typename T>
__device__ __forceinline__ Running<T> merge(Running<T> a, Running<T> b) {
  const T high = higher(a.max, b.max);
  return {high, a.sum * a.rescale(high) + b.sum * b.rescale(high)};
}

// The partial results of one row, merged in the order of the splits.
template <typename T>
__device__ __forceinline__ Running<T> merge_splits(const Running<T>* partial, int splits, int64_t rows, int64_t row) {
  Running<T> merged{T(-INFINITY), T(0)};
  for (int split = 0; split < splits; ++split) {
    merged = merge(merged, partial[split * rows + row]);
  }
  return merged;
}

// How a block's threads share a tile of scores when they reduce its rows: a thread reads kColumns columns of one row,
// starting at a different one every 8 rows, so that a warp's reads touch 32 banks.
template <class Math>
struct RowShare {
  static constexpr int kParts = kThreads / Math::kTile;
  static constexpr int kColumns = Math::kTile / kParts;
  static __device__ __forceinline__ int row() { return threadIdx.x % Math::kTile; }
  static __device__ __forceinline__ int part() { return threadIdx.x / Math::kTile; }
  static __device__ __forceinline__ int column(int step) { return part() * kColumns + (step + row() / 8) % kColumns; }
};

// The tiles [begin, end) of the other rows that this block walks over.
struct Walk {
  int64_t begin, end;
};
__device__ __forceinline__ Walk walk_of(int64_t other_rows, int tile, int64_t tiles_per_split) {
  const int64_t tiles = (other_rows + tile - 1) / tile;
  const int64_t begin = blockIdx.y * tiles_per_split;
  return {begin, begin + tiles_per_split < tiles ? begin + tiles_per_split : tiles};
}

// Scalar products of a tile of owner rows and a tile of other rows. All threads have read the stages on return.
template <class Math, typename Input = typename Math::Input, typename Stage = typename Math::Stage>
__device__ __forceinline__ typename Math::Scores products(const Matrix<Input>& owners, int64_t owner,
                                                          const Matrix<Input>& others, int64_t other,
                                                          Stage* owner_stage, Stage* other_stage) {
  typename Math::Scores scores;
  const auto convert = [](Input value) { return Math::stage_value(value); };
  for (int64_t column = 0; column < owners.width; column += Math::kChunk) {
    stage<Math::kTile, Math::kChunk, Math::kPitch>(owner_stage, owners, owner, column, convert);
    stage<Math::kTile, Math::kChunk, Math::kPitch>(other_stage, others, other, column, convert);
    __syncthreads();
    Math::multiply_scores(scores, owner_stage, other_stage);
    __syncthreads();
  }
  return scores;
}

// ---- Statistics ----

template <class Math>
struct ScoreStatistics {
  using Wide = typename Math::Wide;
  Matrix<typename Math::Input> owners, others;
  const int64_t* labels;       // of the owners
  bool pairs;                  // others are the owners again; else they are the traces
  bool need_same;              // the rows of the same label count
  Wide scale;                  // 1 / tau, or eta / tau for the traces
  Running<Wide>*same, *other;  // (splits, owners); traces fill `other` alone
  int64_t tiles_per_split;
};

// Adds this thread's share of a row of scores to the running sums that `group` says, a column's number or -1.
template <class Math, typename Wide, class Group>
__device__ __forceinline__ void add_scores(Running<Wide> (&running)[2], const Wide* row_scores, Wide scale,
                                           Group group) {
  using Share = RowShare<Math>;
  Wide high[2] = {running[0].max, running[1].max};
#pragma unroll 4
  for (int step = 0; step < Share::kColumns; ++step) {
    const int column = Share::column(step);
    const Wide value = row_scores[column] * scale;
    const int g = group(column);
    high[0] = g == 0 ? higher(high[0], value) : high[0];
    high[1] = g == 1 ? higher(high[1], value) : high[1];
  }
  Wide sums[2] = {running[0].sum * running[0].rescale(high[0]), running[1].sum * running[1].rescale(high[1])};
#pragma unroll 4
  for (int step = 0; step < Share::kColumns; ++step) {
    const int column = Share::column(step);
    const Wide value = row_scores[column] * scale;
    const int g = group(column);
    if (g >= 0) {
      const Wide weight = std::exp(value - (g == 0 ? high[0] : high[1]));
      sums[0] += g == 0 ? weight : Wide(0);
      sums[1] += g == 1 ? weight : Wide(0);
    }
  }
  running[0] = {high[0], sums[0]};
  running[1] = {high[1], sums[1]};
}

// logsumexp over k != i of s_ik, for rows of the same and of the other label; or over j of y_i eta t_ij.
// Grid (row tiles, splits). 2 N K C operations and at most N K exponentials, K = N or J.
// Traffic (N / T) K (2 C b + 8), and splits N 4 w of partial results.
template <class Math>
__global__ void __launch_bounds__(kThreads, kStatisticsBlocks) statistics_kernel(ScoreStatistics<Math> a) {
  using Wide = typename Math::Wide;
  using Share = RowShare<Math>;
  alignas(16) __shared__ typename Math::Stage owner_stage[Math::kTile * Math::kPitch];
  alignas(16) __shared__ typename Math::Stage other_stage[Math::kTile * Math::kPitch];
  alignas(16) __shared__ Wide scores[Math::kTile * Math::kScorePitch];
  __shared__ int other_classes[Math::kTile];
  __shared__ Running<Wide> parts[2][Share::kParts * Math::kTile];

  const int r = Share::row();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Math::kTile;
  const int64_t i = first + r;
  const bool inside = i < a.owners.rows;
  const int64_t label = inside ? a.labels[i] : 0;
  const Wide scale = a.pairs ? a.scale : sign_of<Wide>(label) * a.scale;
  Running<Wide> running[2] = {{Wide(-INFINITY), Wide(0)}, {Wide(-INFINITY), Wide(0)}};

  const Walk walk = walk_of(a.others.rows, Math::kTile, a.tiles_per_split);
  for (int64_t tile = walk.begin; tile < walk.end; ++tile) {
    const int64_t other = tile * Math::kTile;
    const auto dots = products<Math>(a.owners, first, a.others, other, owner_stage, other_stage);
    Math::store_scores(dots, scores);
    if (threadIdx.x < Math::kTile && a.pairs) {
      const int64_t k = other + threadIdx.x;
      other_classes[threadIdx.x] = k < a.others.rows ? class_of(a.labels[k]) : kNeither;
    }
    __syncthreads();
    // 0 same, 1 other, -1 not counted
    add_scores<Math>(running, scores + r * Math::kScorePitch, scale, [&](int column) {
      const int64_t k = other + column;
      if (k >= a.others.rows || (a.pairs && k == i)) {
        return -1;
      }
      const bool same = a.pairs && other_classes[column] == class_of(label);
      return same ? (a.need_same ? 0 : -1) : 1;
    });
  }

  parts[0][threadIdx.x] = running[0];
  parts[1][threadIdx.x] = running[1];
  __syncthreads();
  if (threadIdx.x < Math::kTile && inside) {
    for (int part = 1; part < Share::kParts; ++part) {
      running[0] = merge(running[0], parts[0][part * Math::kTile + r]);
      running[1] = merge(running[1], parts[1][part * Math::kTile + r]);
    }
    const int64_t place = static_cast<int64_t>(blockIdx.y) * a.owners.rows + i;
    if (a.pairs) {
      a.same[place] = running[0];
    }
    a.other[place] = running[1];
  }
}

// ---- Weighted sums of rows ----

// What the rows of a batch contribute to the weights; a row that takes no part has the coefficients 0.
template <typename T>
struct PairTerms {
  T keys, log_keys, positives, log_positives;
};
template <typename T>
struct TraceTerms {
  T coefficient, log_traces, scale;
};

// The weight of z_k in tau dz_i, without the closed-form parts: the first two lines of
//   sum_{k != i, same label} {[all] (a_i e^{s-A_i} + a_k e^{s-A_k}) + b_i e^{s-LP_i} + b_k e^{s-LP_k}} z_k
//   + sum_{k other label} (a_i e^{s-A_i} + a_k e^{s-A_k}) z_k
template <typename T>
struct PairWeight {
  static constexpr bool kOnline = false;
  struct Row {
    PairTerms<T> terms;
    int label_class;
  };
  using Owner = Row;
  using Other = Row;
  const PairTerms<T>* terms;
  const int64_t* labels;
  T inverse_temperature;
  bool over_all;

  __device__ __forceinline__ Owner owner(int64_t i) const { return {terms[i], class_of(labels[i])}; }
  __device__ __forceinline__ Other other(int64_t k) const { return {terms[k], class_of(labels[k])}; }
  __device__ __forceinline__ T value(const Owner& i, const Other& k, T dot, bool self) const {
    const T s = dot * inverse_temperature;
    const bool same = i.label_class == k.label_class;
    T weight = 0;
    if (over_all || !same) {
      weight = term(i.terms.keys, s - i.terms.log_keys) + term(k.terms.keys, s - k.terms.log_keys);
    }
    if (same) {
      weight += term(i.terms.positives, s - i.terms.log_positives) + term(k.terms.positives, s - k.terms.log_positives);
    }
    return self ? T(0) : weight;
  }
};

// The exponent y_i eta t_ij of the softmax over the traces; the kernel keeps the running maximum.
template <typename T>
struct PullWeight {
  static constexpr bool kOnline = true;
  struct Owner {
    T scale;
  };
  struct Other {};
  const int64_t* labels;
  T scale;  // eta / tau

  __device__ __forceinline__ Owner owner(int64_t i) const { return {sign_of<T>(labels[i]) * scale}; }
  __device__ __forceinline__ Other other(int64_t) const { return {}; }
  __device__ __forceinline__ T value(const Owner& i, const Other&, T dot, bool) const { return dot * i.scale; }
};

// The weight of z_i in (tau / eta) dh_j: c_i y_i q_ij.
template <typename T>
struct TraceWeight {
  static constexpr bool kOnline = false;
  struct Owner {};
  using Other = TraceTerms<T>;
  const TraceTerms<T>* terms;

  __device__ __forceinline__ Owner owner(int64_t) const { return {}; }
  __device__ __forceinline__ Other other(int64_t i) const { return terms[i]; }
  __device__ __forceinline__ T value(const Owner&, const Other& i, T dot, bool) const {
    return term(i.coefficient, dot * i.scale - i.log_traces);
  }
};

// The running sum relative to the maximum over one more tile, the same for all threads that share a row; `rescales`
// gets what the sums of its out row must be multiplied by.
template <class Math, typename Wide, class Value>
__device__ __forceinline__ Running<Wide> raise_maximum(Running<Wide> running, Wide* part_values, Wide* rescales,
                                                       int64_t columns, Value value) {
  using Share = RowShare<Math>;
  Wide high = running.max;
  for (int step = 0; step < Share::kColumns; ++step) {
    const int column = Share::column(step);
    high = column < columns ? higher(high, value(column)) : high;
  }
  part_values[threadIdx.x] = high;
  __syncthreads();
  for (int part = 0; part < Share::kParts; ++part) {
    high = higher(high, part_values[part * Math::kTile + Share::row()]);
  }
  const Wide rescale = running.rescale(high);
  if (Share::part() == 0) {
    rescales[Share::row()] = rescale;
  }
  return {high, running.sum * rescale};
}

template <class Math, class Weight>
struct WeightedRows {
  using Wide = typename Math::Wide;
  Matrix<typename Math::Input> owners, others;
  Weight weight;
  bool pairs;             // others are the owners again
  Wide* partial;          // (splits, owners, width)
  Running<Wide>* online;  // (splits, owners), for an online weight: `partial` is relative to these maxima
  int64_t tiles_per_split;
};

// out_i = sum over k of weight(i, k, s_ik) other_k: the gradient of z over z, the pull over h, the gradient of h over
// z. An online weight is an exponent: out_i = sum_k exp(value_ik - max_k value_ik) other_k, the maximum as far as seen.
// Grid (row tiles, splits, X) with X = ceil(C / kOut) chunks of columns; each chunk computes the scores again.
// 2 O K C (X + 1) operations for O owners and K others, O K X exponentials (twice that for pairs, 4 for literal pairs).
// Traffic X (O / T) K 2 C b for the scores, (O / T) K C b for the rows, splits O C w of partial results.
// With TensorCore, weights are rounded to 11 bits (4.9e-4 relative each); the sums are float32.
template <class Math, class Weight>
__global__ void __launch_bounds__(kThreads, kWeightedRowsBlocks) weighted_rows_kernel(WeightedRows<Math, Weight> a) {
  using Wide = typename Math::Wide;
  using Share = RowShare<Math>;
  alignas(16) __shared__ typename Math::Stage owner_stage[Math::kTile * Math::kPitch];
  alignas(16) __shared__ typename Math::Stage other_stage[Math::kTile * Math::kPitch];
  alignas(16) __shared__ Wide scores[Math::kTile * Math::kScorePitch];
  alignas(16) __shared__ Wide row_stage[Math::kOutRows * Math::kOutPitch];
  __shared__ typename Weight::Other other_rows[Math::kTile];
  __shared__ Wide part_values[Share::kParts * Math::kTile];
  __shared__ Wide rescales[Math::kTile];

  const int r = Share::row();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Math::kTile;
  const int64_t i = first + r;
  const bool inside = i < a.owners.rows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.z) * Math::kOut;
  const auto owner = a.weight.owner(inside ? i : 0);
  const auto convert_row = [](typename Math::Input value) { return Math::stage_row_value(value); };
  typename Math::Out out;
  Running<Wide> running{Wide(-INFINITY), Wide(0)};

  const Walk walk = walk_of(a.others.rows, Math::kTile, a.tiles_per_split);
  for (int64_t tile = walk.begin; tile < walk.end; ++tile) {
    const int64_t other = tile * Math::kTile;
    const auto dots = products<Math>(a.owners, first, a.others, other, owner_stage, other_stage);
    Math::store_scores(dots, scores);
    if (threadIdx.x < Math::kTile && other + threadIdx.x < a.others.rows) {
      other_rows[threadIdx.x] = a.weight.other(other + threadIdx.x);
    }
    __syncthreads();

    Wide* row_scores = scores + r * Math::kScorePitch;
    const int64_t columns = a.others.rows - other;
    const auto value = [&](int column) {
      return a.weight.value(owner, other_rows[column], row_scores[column], a.pairs && other + column == i);
    };
    if constexpr (Weight::kOnline) {
      running = raise_maximum<Math>(running, part_values, rescales, columns, value);
    }
#pragma unroll 2
    for (int step = 0; step < Share::kColumns; ++step) {
      const int column = Share::column(step);
      Wide weight = inside && column < columns ? value(column) : Wide(0);
      if constexpr (Weight::kOnline) {
        weight = column < columns ? std::exp(weight - running.max) : Wide(0);
        running.sum += weight;
      }
      row_scores[column] = Math::round_weight(weight);
    }
    __syncthreads();
    if constexpr (Weight::kOnline) {
      Math::for_each(out, [&](Wide& value, int row, int) { value *= rescales[row]; });
    }
    for (int k = 0; k < Math::kTile && other + k < a.others.rows; k += Math::kOutRows) {
      stage<Math::kOutRows, Math::kOut, Math::kOutPitch>(row_stage, a.others, other + k, column0, convert_row);
      __syncthreads();
      Math::multiply_out(out, scores + k, row_stage);
      __syncthreads();
    }
  }

  const int64_t base = static_cast<int64_t>(blockIdx.y) * a.owners.rows;
  Math::for_each(out, [&](Wide& value, int row, int column) {
    if (first + row < a.owners.rows && column0 + column < a.owners.width) {
      a.partial[(base + first + row) * a.owners.width + column0 + column] = value;
    }
  });
  if constexpr (Weight::kOnline) {
    part_values[threadIdx.x] = running.sum;
    __syncthreads();
    if (threadIdx.x < Math::kTile && inside && blockIdx.z == 0) {
      for (int part = 1; part < Share::kParts; ++part) {
        running.sum += part_values[part * Math::kTile + r];
      }
      a.online[base + i] = running;
    }
  }
}

}  // namespace
}  // namespace ntf::cuda
