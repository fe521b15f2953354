// Gradients. A tile of z z^T is made again (N^2 C operations), turned into weights, and multiplies the rows of both its
// sides (2 N^2 C). The traces' part of the gradient of the embeddings was made in the forward pass (`pull`).
//
// A weight is coefficient * exp(s - logsumexp). Where exponents are large, a logsumexp of the type has lost the digits
// that count; there the sums are made again (2 N^2 C), and every row subtracts its maximum and divides by its sum.
#include <algorithm>
#include <cmath>

#include "soft_contrastive_cpu_sums.h"

namespace ntf::cpu {

namespace {

// The coefficients of every row by slot, for the upstream gradients divided by the largest of them: so neither tiny nor
// huge ones leave the range of T on the way. Padding and rows that do not contribute hold 0.
template <typename T>
struct RowCoefficients {
  Buffer<T> keys, positives, mean, traces;
  T largest_upstream = 0;

  RowCoefficients(const Anchors& anchors, const Settings& settings, const Saved<T>& saved, int64_t capacity) {
    const Blocks& blocks = anchors.blocks;
    for (Buffer<T>* buffer : {&keys, &positives, &mean, &traces}) *buffer = filled<T>(blocks.count() * capacity, T(0));
    for (size_t row = 0; row < blocks.order.size(); ++row)
      largest_upstream = std::max(largest_upstream, std::abs(saved.grad_loss[row]));
    if (largest_upstream == 0 || !std::isfinite(largest_upstream)) largest_upstream = 1;
    for (int64_t b = 0; b < blocks.count(); ++b) {
      const Block& block = blocks.blocks[b];
      if (!anchors.contribute[block.label]) continue;
      for (int r = 0; r < block.rows; ++r) {
        const int64_t row = blocks.row(block, r), slot = b * capacity + r;
        const Coefficients<T> of = anchor_coefficients(saved.loss[row], settings.form);
        const T upstream = saved.grad_loss[row] / largest_upstream;
        keys[slot] = upstream * of.keys;
        positives[slot] = upstream * of.positives;
        mean[slot] = upstream * of.mean;
        traces[slot] = upstream * of.traces;
      }
    }
  }
};

// coefficient * 2^(s - shift) by slot: what a row gives to the weights of its pairs. Without shifts the power is part
// of the coefficient.
template <typename T>
struct RowTerm {
  Buffer<T> coefficient, shift;
};

// From the logsumexp of each row of the batch.
template <typename T>
RowTerm<T> unshifted_term(const Blocks& blocks, const Buffer<T>& coefficients, const T* logs, int64_t capacity) {
  RowTerm<T> term{filled<T>(blocks.count() * capacity, T(0)), Buffer<T>()};
  for (int64_t b = 0; b < blocks.count(); ++b)
    for (int r = 0; r < blocks.blocks[b].rows; ++r) {
      const int64_t slot = b * capacity + r;
      if (coefficients[slot] == 0) continue;
      const T log2 = logs[blocks.row(blocks.blocks[b], r)] * static_cast<T>(kLog2E);
      term.coefficient[slot] = coefficients[slot] * std::exp2(-log2);
    }
  return term;
}

// From the sums over one or two sets of columns (`more` may be null).
template <typename T>
RowTerm<T> shifted_term(int64_t slots, const Buffer<T>& coefficients, const Sums<T>& sums, const Sums<T>* more) {
  RowTerm<T> term{filled<T>(slots, T(0)), filled<T>(slots, T(0))};
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (coefficients[slot] == 0) continue;
    T shift = sums.shift[slot];
    double sum = sums.sum[slot];
    if (more != nullptr && more->sum[slot] != 0) {
      const T high = sum == 0 ? more->shift[slot] : std::max(shift, more->shift[slot]);
      const double mine = sum == 0 ? 0 : sum * std::exp2(static_cast<double>(shift) - high);
      sum = mine + more->sum[slot] * std::exp2(static_cast<double>(more->shift[slot]) - high);
      shift = high;
    }
    term.shift[slot] = shift;
    term.coefficient[slot] = static_cast<T>(coefficients[slot] / sum);
  }
  return term;
}

// Adds to `out` (layout "across", by block) the sum over k != i of (weight of i + weight of k in their pair) z_k.
template <typename T>
void multiply_pairs(const TileKernels<T>& kernel, const PackedRows<T>& rows, const Anchors& anchors,
                    const Settings& settings, const RowCoefficients<T>& row, const Saved<T>& saved, T* out) {
  const Blocks& blocks = anchors.blocks;
  const bool shifted = pairs_need_shifts(rows, settings);
  const bool same_keys = settings.denominator == Denominator::all, literal = settings.form == Form::literal;
  const int64_t capacity = rows.capacity, slots = blocks.count() * capacity, n = blocks.order.size();
  RowTerm<T> keys, positives;
  if (shifted) {
    const PairSums<T> sums = sum_pairs(kernel, rows, anchors, settings);
    keys = shifted_term(slots, row.keys, sums.other, same_keys ? &sums.same : nullptr);
    if (literal) positives = shifted_term<T>(slots, row.positives, sums.same, nullptr);
  } else {
    keys = unshifted_term(blocks, row.keys, saved.log_keys, capacity);
    if (literal) positives = unshifted_term(blocks, row.positives, saved.log_positives, capacity);
  }
  // The terms of a pair's side; same label: keys over all rows, and positives; other label: keys.
  const auto terms_of = [&](bool other, int64_t block) {
    Terms<T> found;
    const auto add = [&](const RowTerm<T>& term) {
      found.coefficient[found.count] = term.coefficient.get() + block * capacity;
      found.shift[found.count++] = shifted ? term.shift.get() + block * capacity : nullptr;
    };
    if (other || same_keys) add(keys);
    if (!other && literal) add(positives);
    return found;
  };
  const int workers = workers_for(settings.threads, blocks.count(), n * n * rows.width);
  const TileMemory<T> tiles(workers);
  run_pairs(workers, blocks, needs_same_label(settings), [&](int worker, int64_t i, int64_t k) {
    const bool other = blocks.blocks[i].label != blocks.blocks[k].label;
    const Tile<T> tile = pair_tile(rows, blocks, i, k, settings);
    T* weights = tiles.of(worker);
    (shifted ? kernel.shifted_weights : kernel.weights)(tile, terms_of(other, i), terms_of(other, k), weights);
    kernel.multiply(weights, tile.rows, tile.cols, rows.across(k), {out + i * rows.across_size, capacity, rows.strips});
    if (i != k) {
      kernel.multiply_transposed(weights, tile.cols, tile.rows, rows.across(i),
                                 {out + k * rows.across_size, capacity, rows.strips});
    }
  });
}

// (J, C): sum over i of row i's weight for the trace j times z_i.
template <typename T>
void multiply_traces(const TileKernels<T>& kernel, const PackedRows<T>& rows, const Anchors& anchors,
                     const PackedRows<T>& traces, const Blocks& trace_blocks, const Settings& settings,
                     const RowTerm<T>& term, bool shifted, T* out) {
  const Blocks& blocks = anchors.blocks;
  const int64_t work = blocks.order.size() * trace_blocks.order.size() * rows.width;
  const int workers = workers_for(settings.threads, trace_blocks.count(), work);
  const TileMemory<T> tiles(workers);
  const int64_t size = rows.strips * kernel.nr * traces.capacity;
  const Buffer<T> sums(workers * size);
  run_tasks(workers, trace_blocks.count(), [&](int worker, int64_t k) {
    const Block& block = trace_blocks.blocks[k];
    T* sum = sums.get() + worker * size;
    std::fill_n(sum, size, T(0));
    for (int64_t i = 0; i < blocks.count(); ++i) {
      const Block& left = blocks.blocks[i];
      if (!anchors.contribute[left.label]) continue;
      const double factor = traces_factor(settings, left.label);
      const Tile<T> tile = tile_of(rows, i, left.rows, traces, k, block.rows, false, factor);
      Terms<T> of_rows;
      of_rows.count = 1;
      of_rows.coefficient[0] = term.coefficient.get() + i * rows.capacity;
      of_rows.shift[0] = shifted ? term.shift.get() + i * rows.capacity : nullptr;
      (shifted ? kernel.shifted_weights : kernel.weights)(tile, of_rows, Terms<T>(), tiles.of(worker));
      kernel.multiply_transposed(tiles.of(worker), block.rows, left.rows, rows.across(i),
                                 {sum, traces.capacity, rows.strips});
    }
    for (int r = 0; r < block.rows; ++r)
      for (int64_t c = 0; c < rows.width; ++c)
        out[trace_blocks.row(block, r) * rows.width + c] =
            sum[((c / kernel.nr) * traces.capacity + r) * kernel.nr + c % kernel.nr];
  });
}

}  // namespace

template <typename T>
void backward(const Batch& batch, const Settings& settings, const Saved<T>& saved, T* grad_embeddings) {
  const Anchors anchors(batch, settings);
  const Blocks& blocks = anchors.blocks;
  const int64_t width = batch.embeddings.cols;
  std::fill_n(grad_embeddings, batch.embeddings.rows * width, T(0));
  if (!anchors.any()) return;

  const TileKernels<T>& kernel = kernels<T>();
  const PackedRows<T> rows = pack<T>(batch.embeddings, blocks, kLeft | kRight | kAcross, settings.threads, kernel);
  const RowCoefficients<T> of(anchors, settings, saved, rows.capacity);
  const Buffer<T> pairs = filled<T>(blocks.count() * rows.across_size, T(0));
  multiply_pairs(kernel, rows, anchors, settings, of, saved, pairs.get());
  const std::vector<double> sums = label_sums<T>(batch.embeddings, blocks, nullptr, 0, settings.threads);
  const std::vector<double> weighted =
      label_sums(batch.embeddings, blocks, of.mean.get(), rows.capacity, settings.threads);
  const bool mean_form = settings.form == Form::log_mean;
  const std::vector<double> mean = mean_form ? mean_trace<T>(batch, settings) : std::vector<double>();
  const std::vector<T> trace(mean.begin(), mean.end());
  run_rows(batch, settings, blocks, [&](int64_t b) {
    const Block& block = blocks.blocks[b];
    if (!anchors.contribute[block.label] && !anchors.contribute[1 - block.label]) return;
    const int64_t positives = anchors.counts[block.label].positives;
    const double share = positives > 0 ? 1.0 / static_cast<double>(positives) : 0;
    const double* sum = sums.data() + block.label * width;
    const double* sum_weighted = weighted.data() + block.label * width;
    const double inverse = of.largest_upstream / settings.temperature;
    std::vector<T> z(width);
    for (int r = 0; r < block.rows; ++r) {
      const int64_t row = blocks.row(block, r), slot = b * rows.capacity + r;
      read_row(batch.embeddings, row, z.data());
      const double mean_weight = of.mean[slot];
      const double towards = of.traces[slot] * traces_factor(settings, block.label) * of.largest_upstream;
      const T* pull = mean_form ? trace.data() : saved.pull + row * width;
      const T* pair = pairs.get() + b * rows.across_size + r * kernel.nr;
      T* to = grad_embeddings + row * width;
      for (int64_t c = 0; c < width; ++c) {
        const double of_mean = share * (mean_weight * (sum[c] - z[c]) + (sum_weighted[c] - mean_weight * z[c]));
        const double of_pairs = pair[(c / kernel.nr) * rows.capacity * kernel.nr + c % kernel.nr];
        to[c] = static_cast<T>(inverse * (of_pairs + of_mean) + towards * pull[c]);
      }
    }
  });
}

template <typename T>
void traces_backward(const Batch& batch, const Settings& settings, const Saved<T>& saved, T* grad_traces) {
  const Anchors anchors(batch, settings);
  const Blocks& blocks = anchors.blocks;
  const int64_t width = batch.traces.cols, count = batch.traces.rows;
  std::fill_n(grad_traces, count * width, T(0));
  if (!anchors.any()) return;

  const TileKernels<T>& kernel = kernels<T>();
  const PackedRows<T> rows = pack<T>(batch.embeddings, blocks, kLeft | kAcross, settings.threads, kernel);
  const RowCoefficients<T> of(anchors, settings, saved, rows.capacity);
  const int64_t slots = blocks.count() * rows.capacity;
  Buffer<T> signed_traces = filled<T>(slots, T(0));  // c_i y_i
  for (int64_t slot = 0; slot < slots; ++slot)
    signed_traces[slot] = of.traces[slot] * (blocks.blocks[slot / rows.capacity].label == 0 ? T(1) : T(-1));
  const double scale = settings.eta / settings.temperature * of.largest_upstream;
  if (settings.form == Form::log_mean) {
    const std::vector<double> sums =
        label_sums(batch.embeddings, blocks, signed_traces.get(), rows.capacity, settings.threads);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < width; ++c)
        grad_traces[j * width + c] = static_cast<T>(scale * (sums[c] + sums[width + c]) / static_cast<double>(count));
    return;
  }
  const Blocks trace_blocks = blocks_of_traces(count);
  const PackedRows<T> traces = pack<T>(batch.traces, trace_blocks, kRight, settings.threads, kernel);
  const bool shifted = traces_need_shifts(rows, traces, settings);
  const RowTerm<T> term =
      shifted ? shifted_term<T>(slots, signed_traces,
                                sum_traces<T>(kernel, rows, anchors, traces, trace_blocks, settings, nullptr), nullptr)
              : unshifted_term(blocks, signed_traces, saved.log_traces, rows.capacity);
  multiply_traces(kernel, rows, anchors, traces, trace_blocks, settings, term, shifted, grad_traces);
  for (int64_t i = 0; i < count * width; ++i) grad_traces[i] = static_cast<T>(scale * grad_traces[i]);
}

#define NTF_INSTANTIATE(T)                                                       \
  template void backward<T>(const Batch&, const Settings&, const Saved<T>&, T*); \
  template void traces_backward<T>(const Batch&, const Settings&, const Saved<T>&, T*);
NTF_INSTANTIATE(float)
NTF_INSTANTIATE(double)
#undef NTF_INSTANTIATE

}  // namespace ntf::cpu
