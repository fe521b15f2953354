// The statistics of every anchor. z z^T is symmetric, so a tile of it serves its rows and its columns: N^2 C
// operations. The traces take 2 N J C for their sums and 2 N J C for `pull`. The mean over positives and the form
// log_mean have closed forms through sums of rows.
//
// Where |s| is bounded (by the norms, as with unit rows and a usual temperature) 2^s is summed as it is, once for
// both sides. Elsewhere a first pass finds each row's maximum, and every row subtracts its own.
#include <algorithm>
#include <cmath>
#include <limits>

#include "soft_contrastive_cpu_anchors.h"

namespace ntf::cpu {

namespace {

template <typename T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

// log2 of the sums of 2^s_ik over the rows of the same and of the other label, by slot.
template <typename T>
struct PairSums {
  Buffer<T> shift[2];  // 0 same label, 1 the other; what the exponents were lowered by
  Buffer<double> sum[2];

  T log(bool other, int64_t slot) const {
    return static_cast<T>(shift[other][slot] * kLn2 + std::log(sum[other][slot]));
  }
};

template <typename T>
PairSums<T> sum_pairs(const PackedRows<T>& rows, const Anchors& anchors, const Settings& settings) {
  const Blocks& blocks = anchors.blocks;
  const TileKernels<T>& kernel = kernels<T>();
  const double factor = 1 / settings.temperature;
  const bool shifted = pairs_need_shifts(rows, settings);
  const int64_t slots = blocks.count() * rows.capacity, n = blocks.order.size();
  const int workers = workers_for(settings.threads, blocks.count(), n * n * rows.width);
  PairSums<T> result;
  for (int other : {0, 1}) {
    result.shift[other] = filled<T>(slots, shifted ? kLowest<T> : T(0));
    result.sum[other] = filled<double>(slots, 0);
  }
  const auto tile = [&](int64_t i, int64_t k) {
    return tile_of(rows, i, blocks.blocks[i].rows, rows, k, blocks.blocks[k].rows, i == k, factor);
  };
  const auto other_label = [&](int64_t i, int64_t k) { return blocks.blocks[i].label != blocks.blocks[k].label; };
  if (shifted) {
    run_pairs(workers, blocks, needs_same_label(settings), [&](int, int64_t i, int64_t k) {
      T row_max[kBlock], col_max[kBlock];
      T* high = result.shift[other_label(i, k)].get();
      const Tile<T> pair = tile(i, k);
      kernel.maxima(pair, row_max, i == k ? nullptr : col_max);
      for (int r = 0; r < pair.rows; ++r) {
        T& value = high[i * rows.capacity + r];
        value = std::max(value, row_max[r]);
      }
      for (int c = 0; i != k && c < pair.cols; ++c) {
        T& value = high[k * rows.capacity + c];
        value = std::max(value, col_max[c]);
      }
    });
    for (int other : {0, 1})
      for (int64_t slot = 0; slot < slots; ++slot)
        if (!std::isfinite(result.shift[other][slot])) result.shift[other][slot] = 0;  // padding, or no such rows
  }
  run_pairs(workers, blocks, needs_same_label(settings), [&](int, int64_t i, int64_t k) {
    T row_sum[kBlock], col_sum[kBlock];
    const bool other = other_label(i, k);
    const T* shift = result.shift[other].get();
    double* sum = result.sum[other].get();
    const Tile<T> pair = tile(i, k);
    kernel.sums(pair, shifted ? shift + i * rows.capacity : nullptr, shifted ? shift + k * rows.capacity : nullptr,
                row_sum, i == k ? nullptr : col_sum, nullptr);
    for (int r = 0; r < pair.rows; ++r) sum[i * rows.capacity + r] += row_sum[r];
    for (int c = 0; i != k && c < pair.cols; ++c) sum[k * rows.capacity + c] += col_sum[c];
  });
  return result;
}

// logsumexp_j (y eta t_ij) by slot, and where `pull` is given sum_j q_ij h_j for each row of the batch.
template <typename T>
Buffer<T> sum_traces(const Batch& batch, const PackedRows<T>& rows, const Anchors& anchors, const Settings& settings,
                     T* pull) {
  const Blocks& blocks = anchors.blocks;
  const TileKernels<T>& kernel = kernels<T>();
  const Blocks trace_blocks = blocks_of_traces(batch.traces.rows);
  const PackedRows<T> traces =
      pack<T>(batch.traces, trace_blocks, kRight | (pull != nullptr ? kAcross : 0), settings.threads, kernel);
  const double bound = std::abs(traces_factor(settings, 0)) * rows.largest_norm * traces.largest_norm * kLog2E;
  const bool shifted = bound > kUnshifted<T>;
  Buffer<T> logs(blocks.count() * rows.capacity);
  const int64_t work = batch.embeddings.rows * batch.traces.rows * rows.width;
  const int workers = workers_for(settings.threads, blocks.count(), work);
  const TileMemory<T> tiles(workers);
  const int64_t pulled_size = pull != nullptr ? traces.strips * kernel.nr * rows.capacity : 0;
  const Buffer<T> pulled_rows(workers * pulled_size);
  run_tasks(workers, blocks.count(), [&](int worker, int64_t i) {
    const Block& block = blocks.blocks[i];
    if (!anchors.contribute[block.label]) return;
    const double factor = traces_factor(settings, block.label);
    const auto tile = [&](int64_t k) {
      return tile_of(rows, i, block.rows, traces, k, trace_blocks.blocks[k].rows, false, factor);
    };
    T shift[kBlock] = {}, partial[kBlock];
    double sum[kBlock] = {};
    if (shifted) {
      std::fill_n(shift, block.rows, kLowest<T>);
      for (int64_t k = 0; k < trace_blocks.count(); ++k) {
        kernel.maxima(tile(k), partial, nullptr);
        for (int r = 0; r < block.rows; ++r) shift[r] = std::max(shift[r], partial[r]);
      }
    }
    T* pulled = pulled_rows.get() + worker * pulled_size;
    std::fill_n(pulled, pulled_size, T(0));
    for (int64_t k = 0; k < trace_blocks.count(); ++k) {
      T* weights = pull != nullptr ? tiles.of(worker) : nullptr;
      kernel.sums(tile(k), shifted ? shift : nullptr, nullptr, partial, nullptr, weights);
      for (int r = 0; r < block.rows; ++r) sum[r] += partial[r];
      if (pull != nullptr) {
        kernel.multiply(weights, block.rows, trace_blocks.blocks[k].rows, traces.across(k),
                        {pulled, rows.capacity, traces.strips});
      }
    }
    for (int r = 0; r < block.rows; ++r) {
      logs[i * rows.capacity + r] = static_cast<T>(shift[r] * kLn2 + std::log(sum[r]));
      if (pull == nullptr) continue;
      T* to = pull + blocks.row(block, r) * rows.width;
      const T scale = static_cast<T>(1 / sum[r]);
      for (int64_t c = 0; c < rows.width; ++c)
        to[c] = scale * pulled[((c / kernel.nr) * rows.capacity + r) * kernel.nr + c % kernel.nr];
    }
  });
  return logs;
}

}  // namespace

template <typename T>
void forward(const Batch& batch, const Settings& settings, const ForwardOutputs<T>& out) {
  const Anchors anchors(batch, settings);
  const Blocks& blocks = anchors.blocks;
  const int64_t n = batch.embeddings.rows, width = batch.embeddings.cols;
  for (T* values : {out.loss, out.log_keys, out.log_positives, out.log_traces}) std::fill_n(values, n, T(0));
  if (out.pull != nullptr) std::fill_n(out.pull, n * width, T(0));
  if (!anchors.any()) return;

  const PackedRows<T> rows = pack<T>(batch.embeddings, blocks, kLeft | kRight, settings.threads, kernels<T>());
  const PairSums<T> pairs = sum_pairs(rows, anchors, settings);
  const bool mean_form = settings.form == Form::log_mean;
  const std::vector<T> trace = mean_form ? mean_trace<T>(batch, settings) : std::vector<T>();
  const Buffer<T> log_traces = mean_form ? Buffer<T>() : sum_traces(batch, rows, anchors, settings, out.pull);
  const std::vector<T> sums = label_sums<T>(batch.embeddings, blocks, nullptr, 0, settings.threads);
  run_tasks(
      workers_for(settings.threads, blocks.count(), work_of_rows(batch.embeddings)), blocks.count(),
      [&](int, int64_t b) {
        const Block& block = blocks.blocks[b];
        if (!anchors.contribute[block.label]) return;
        const Counts counts = anchors.counts[block.label];
        std::vector<T> z(width);
        for (int r = 0; r < block.rows; ++r) {
          const int64_t row = blocks.row(block, r), slot = b * rows.capacity + r;
          read_row(batch.embeddings, row, z.data());
          const T others = dot(z.data(), sums.data() + block.label * width, width) - dot(z.data(), z.data(), width);
          Statistics<T> of;
          of.log_positives = pairs.log(false, slot);
          of.log_negatives = pairs.log(true, slot);
          of.mean_positive = others / static_cast<T>(settings.temperature * counts.positives);
          of.traces = mean_form
                          ? static_cast<T>(traces_factor(settings, block.label)) * dot(z.data(), trace.data(), width)
                          : log_traces[slot];
          out.loss[row] = anchor_loss(of, counts, settings.form, settings.denominator);
          out.log_keys[row] = log_keys(of, settings.denominator);
          out.log_positives[row] = settings.form == Form::literal ? of.log_positives : T(0);
          out.log_traces[row] = of.traces;
        }
      });
}

template void forward<float>(const Batch&, const Settings&, const ForwardOutputs<float>&);
template void forward<double>(const Batch&, const Settings&, const ForwardOutputs<double>&);

}  // namespace ntf::cpu
