// Gradients. A tile of z z^T is made again (N^2 C operations), turned into weights, and multiplies the rows of both its
// sides (2 N^2 C). The traces' part of the gradient of the embeddings was made in the forward pass (`pull`).
#include <algorithm>
#include <cmath>

#include "soft_contrastive_cpu_anchors.h"

namespace ntf::cpu {

namespace {

// What the backward pass needs of every row, by slot: coefficients with the upstream gradient in them.
template <typename T>
struct RowTerms {
  Buffer<T> keys, positives, mean, traces;
  Buffer<T> log_keys, log_positives;  // base 2

  RowTerms(const Anchors& anchors, const Settings& settings, const Saved<T>& saved, int64_t capacity) {
    const Blocks& blocks = anchors.blocks;
    const int64_t slots = blocks.count() * capacity;
    for (Buffer<T>* buffer : {&keys, &positives, &mean, &traces, &log_keys, &log_positives})
      *buffer = filled<T>(slots, T(0));
    for (int64_t b = 0; b < blocks.count(); ++b) {
      const Block& block = blocks.blocks[b];
      if (!anchors.contribute[block.label]) continue;
      for (int r = 0; r < block.rows; ++r) {
        const int64_t row = blocks.row(block, r), slot = b * capacity + r;
        const Coefficients<T> of = anchor_coefficients(saved.loss[row], settings.form);
        const T upstream = saved.grad_loss[row];
        keys[slot] = upstream * of.keys;
        positives[slot] = upstream * of.positives;
        mean[slot] = upstream * of.mean;
        traces[slot] = upstream * of.traces;
        if (saved.log_keys != nullptr) log_keys[slot] = saved.log_keys[row] * static_cast<T>(kLog2E);
        if (saved.log_positives != nullptr) log_positives[slot] = saved.log_positives[row] * static_cast<T>(kLog2E);
      }
    }
  }
};

// Adds to `out` (layout "across", by block) the sum over k != i of (weight of i + weight of k in their pair) z_k.
template <typename T>
void multiply_pairs(const PackedRows<T>& rows, const Anchors& anchors, const Settings& settings,
                    const RowTerms<T>& terms, T* out) {
  const Blocks& blocks = anchors.blocks;
  const TileKernels<T>& kernel = kernels<T>();
  const double factor = 1 / settings.temperature;
  const bool shifted = pairs_need_shifts(rows, settings);
  const bool same_keys = settings.denominator == Denominator::all, literal = settings.form == Form::literal;
  const int64_t capacity = rows.capacity, slots = blocks.count() * capacity;
  Buffer<T> unshifted[2];  // weights that multiply 2^s in a pair of the same and of different labels
  if (!shifted) {
    for (int other : {0, 1}) {
      unshifted[other] = Buffer<T>(slots);
      for (int64_t slot = 0; slot < slots; ++slot) {
        T weight = 0;
        if (other || same_keys) weight += terms.keys[slot] * std::exp2(-terms.log_keys[slot]);
        if (!other && literal) weight += terms.positives[slot] * std::exp2(-terms.log_positives[slot]);
        unshifted[other][slot] = weight;
      }
    }
  }
  const auto terms_of = [&](bool other, int64_t block) {
    Terms<T> found;
    const auto add = [&](const Buffer<T>& coefficient, const Buffer<T>& shift) {
      found.coefficient[found.count] = coefficient.get() + block * capacity;
      found.shift[found.count++] = shift.get() + block * capacity;
    };
    if (other || same_keys) add(terms.keys, terms.log_keys);
    if (!other && literal) add(terms.positives, terms.log_positives);
    return found;
  };
  const int64_t n = blocks.order.size();
  const int workers = workers_for(settings.threads, blocks.count(), n * n * rows.width);
  const TileMemory<T> tiles(workers);
  run_pairs(workers, blocks, needs_same_label(settings), [&](int worker, int64_t i, int64_t k) {
    const Block &left = blocks.blocks[i], &right = blocks.blocks[k];
    const bool other = left.label != right.label;
    const Tile<T> tile = tile_of(rows, i, left.rows, rows, k, right.rows, i == k, factor);
    T* weights = tiles.of(worker);
    if (shifted) {
      kernel.shifted_weights(tile, terms_of(other, i), terms_of(other, k), weights);
    } else {
      kernel.weights(tile, unshifted[other].get() + i * capacity, unshifted[other].get() + k * capacity, weights);
    }
    kernel.multiply(weights, left.rows, right.rows, rows.across(k),
                    {out + i * rows.across_size, capacity, rows.strips});
    if (i != k) {
      kernel.multiply_transposed(weights, right.rows, left.rows, rows.across(i),
                                 {out + k * rows.across_size, capacity, rows.strips});
    }
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

  const int nr = kernels<T>().nr;
  const PackedRows<T> rows =
      pack<T>(batch.embeddings, blocks, kLeft | kRight | kAcross, settings.threads, kernels<T>());
  const RowTerms<T> terms(anchors, settings, saved, rows.capacity);
  const Buffer<T> pairs = filled<T>(blocks.count() * rows.across_size, T(0));
  multiply_pairs(rows, anchors, settings, terms, pairs.get());
  const std::vector<T> sums = label_sums<T>(batch.embeddings, blocks, nullptr, 0, settings.threads);
  const std::vector<T> weighted =
      label_sums(batch.embeddings, blocks, terms.mean.get(), rows.capacity, settings.threads);
  const std::vector<T> trace = settings.form == Form::log_mean ? mean_trace<T>(batch, settings) : std::vector<T>();
  run_tasks(workers_for(settings.threads, blocks.count(), work_of_rows(batch.embeddings)), blocks.count(),
            [&](int, int64_t b) {
              const Block& block = blocks.blocks[b];
              if (!anchors.contribute[block.label] && !anchors.contribute[1 - block.label]) return;
              const int64_t positives = anchors.counts[block.label].positives;
              const T share = positives > 0 ? T(1) / static_cast<T>(positives) : T(0);
              const T* sum = sums.data() + block.label * width;
              const T* sum_weighted = weighted.data() + block.label * width;
              const T inverse = static_cast<T>(1 / settings.temperature);
              std::vector<T> z(width);
              for (int r = 0; r < block.rows; ++r) {
                const int64_t row = blocks.row(block, r), slot = b * rows.capacity + r;
                read_row(batch.embeddings, row, z.data());
                const T mean = terms.mean[slot];
                const T towards = terms.traces[slot] * static_cast<T>(traces_factor(settings, block.label));
                const T* pull = saved.pull != nullptr ? saved.pull + row * width : trace.data();
                const T* pair = pairs.get() + b * rows.across_size + r * nr;
                T* to = grad_embeddings + row * width;
                for (int64_t c = 0; c < width; ++c) {
                  const T of_mean = share * (mean * (sum[c] - z[c]) + (sum_weighted[c] - mean * z[c]));
                  const T of_pairs = pair[(c / nr) * rows.capacity * nr + c % nr];
                  to[c] = inverse * (of_pairs + of_mean) + towards * pull[c];
                }
              }
            });
}

template <typename T>
void traces_backward(const Batch& batch, const Settings& settings, const Saved<T>& saved, T* grad_traces) {
  const Anchors anchors(batch, settings);
  const Blocks& blocks = anchors.blocks;
  const TileKernels<T>& kernel = kernels<T>();
  const int64_t width = batch.traces.cols, count = batch.traces.rows;
  std::fill_n(grad_traces, count * width, T(0));
  if (!anchors.any()) return;

  const PackedRows<T> rows = pack<T>(batch.embeddings, blocks, kLeft | kAcross, settings.threads, kernel);
  RowTerms<T> terms(anchors, settings, saved, rows.capacity);
  Buffer<T> weight = filled<T>(blocks.count() * rows.capacity, T(0)),
            log_traces = filled<T>(blocks.count() * rows.capacity, T(0));
  for (int64_t b = 0; b < blocks.count(); ++b) {
    const Block& block = blocks.blocks[b];
    for (int r = 0; r < block.rows; ++r) {
      const int64_t slot = b * rows.capacity + r;
      weight[slot] = terms.traces[slot] * static_cast<T>(traces_factor(settings, block.label));
      log_traces[slot] = saved.log_traces[blocks.row(block, r)] * static_cast<T>(kLog2E);
    }
  }
  if (settings.form == Form::log_mean) {
    const std::vector<T> sums = label_sums(batch.embeddings, blocks, weight.get(), rows.capacity, settings.threads);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < width; ++c)
        grad_traces[j * width + c] = (sums[c] + sums[width + c]) / static_cast<T>(count);
    return;
  }
  const Blocks trace_blocks = blocks_of_traces(count);
  const PackedRows<T> traces = pack<T>(batch.traces, trace_blocks, kRight, settings.threads, kernel);
  const int workers = workers_for(settings.threads, trace_blocks.count(), count * batch.embeddings.rows * width);
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
      const Tile<T> tile =
          tile_of(rows, i, left.rows, traces, k, block.rows, false, traces_factor(settings, left.label));
      Terms<T> of_rows;
      of_rows.count = 1;
      of_rows.coefficient[0] = weight.get() + i * rows.capacity;
      of_rows.shift[0] = log_traces.get() + i * rows.capacity;
      kernel.shifted_weights(tile, of_rows, Terms<T>(), tiles.of(worker));
      kernel.multiply_transposed(tiles.of(worker), block.rows, left.rows, rows.across(i),
                                 {sum, traces.capacity, rows.strips});
    }
    for (int r = 0; r < block.rows; ++r)
      for (int64_t c = 0; c < width; ++c)
        grad_traces[trace_blocks.row(block, r) * width + c] =
            sum[((c / kernel.nr) * traces.capacity + r) * kernel.nr + c % kernel.nr];
  });
}

#define NTF_INSTANTIATE(T)                                                       \
  template void backward<T>(const Batch&, const Settings&, const Saved<T>&, T*); \
  template void traces_backward<T>(const Batch&, const Settings&, const Saved<T>&, T*);
NTF_INSTANTIATE(float)
NTF_INSTANTIATE(double)
#undef NTF_INSTANTIATE

}  // namespace ntf::cpu
