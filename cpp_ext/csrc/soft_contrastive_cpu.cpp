// The passes over the blocks of a batch: statistics forward, weights times rows backward.
//
// z z^T is symmetric, so a tile of it serves its rows and its columns: N^2 C operations forward; backward N^2 C to make
// the tiles again and 2 N^2 C to apply them. The traces take 2 N J C for their sums and 2 N J C for `pull`, both
// forward. The mean over positives and the form log_mean have closed forms through sums of rows.
//
// Where |s| is bounded (by the norms, as with unit rows and a usual temperature) 2^s is summed as it is, once for
// both sides. Elsewhere a first pass finds each row's maximum, and every row subtracts its own.
#include "soft_contrastive_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>

namespace ntf::cpu {

namespace {

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.693147180559945309417;

// Largest |s| in base 2 that needs no shift: 2^80 summed over 2^40 rows stays below the largest float, 2^700 below the
// largest double.
template <typename T>
constexpr double kUnshifted = sizeof(T) == 4 ? 80 : 700;

template <typename T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

template <typename T>
struct InstructionSet {
  const TileKernels<T>* kernels;
  bool runs;
};

template <typename T>
std::vector<InstructionSet<T>> compiled_sets() {
  const auto of = [](const TileKernels<float>& single, const TileKernels<double>& wide) -> const TileKernels<T>* {
    if constexpr (sizeof(T) == 4) {
      return &single;
    } else {
      return &wide;
    }
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  return {{of(avx512::float_kernels(), avx512::double_kernels()), has_avx512},
          {of(avx2::float_kernels(), avx2::double_kernels()), has_avx2},
          {of(sse2::float_kernels(), sse2::double_kernels()), true}};
#else
  return {{of(generic::float_kernels(), generic::double_kernels()), true}};
#endif
}

template <typename T>
const std::vector<const TileKernels<T>*>& runnable() {
  static const std::vector<const TileKernels<T>*> sets = [] {
    std::vector<const TileKernels<T>*> found;
    for (const auto& set : compiled_sets<T>())
      if (set.runs) found.push_back(set.kernels);
    return found;
  }();
  return sets;
}

std::atomic<size_t> chosen{0};

template <typename T>
const TileKernels<T>& kernels() {
  return *runnable<T>()[chosen.load()];
}

// Rows by label, the counts that an anchor of each label sees, and whether it contributes.
struct Anchors {
  Blocks blocks;
  Counts counts[2];
  bool contribute[2];

  Anchors(const Batch& batch, const Settings& settings)
      : blocks(blocks_of_batch(batch.labels, batch.labels_stride, batch.embeddings.rows, settings.threads)) {
    for (int label : {0, 1}) {
      const int64_t same = blocks.rows_of_label[label], other = blocks.rows_of_label[1 - label];
      counts[label] = {same - 1, other, batch.traces.rows};
      contribute[label] = same > 0 && contributes(counts[label], settings.denominator);
    }
  }
  bool any() const { return contribute[0] || contribute[1]; }
};

// y eta / tau: what multiplies z . h for an anchor of this label.
double traces_factor(const Settings& settings, int label) {
  return (label == 0 ? 1 : -1) * settings.eta / settings.temperature;
}

// Whether pairs of the same label need more than the closed form of their mean.
bool needs_same_label(const Settings& settings) {
  return settings.denominator == Denominator::all || settings.form == Form::literal;
}

template <typename T>
Tile<T> tile_of(const PackedRows<T>& left, int64_t i, int rows, const PackedRows<T>& right, int64_t k, int cols,
                bool diagonal, double factor) {
  return {left.left(i), right.right(k), left.width, rows, cols, diagonal, static_cast<T>(factor * kLog2E)};
}

// A tile of weights for each worker.
template <typename T>
class TileMemory {
 public:
  explicit TileMemory(int workers) : tiles_(filled<T>(static_cast<int64_t>(workers) * kSize, T(0))) {}
  T* of(int worker) const { return tiles_.get() + worker * kSize; }

 private:
  static constexpr int64_t kSize = static_cast<int64_t>(kBlock) * kTileStride;
  Buffer<T> tiles_;
};

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
  const bool shifted = rows.largest_norm * rows.largest_norm * factor * kLog2E > kUnshifted<T>;
  const int64_t slots = blocks.count() * rows.capacity;
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
    run_pairs(blocks, needs_same_label(settings), [&](int, int64_t i, int64_t k) {
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
  run_pairs(blocks, needs_same_label(settings), [&](int, int64_t i, int64_t k) {
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
  const Blocks trace_blocks = blocks_of_traces(batch.traces.rows, settings.threads);
  const PackedRows<T> traces = pack<T>(batch.traces, trace_blocks, kRight | (pull != nullptr ? kAcross : 0), kernel);
  const double bound = std::abs(traces_factor(settings, 0)) * rows.largest_norm * traces.largest_norm * kLog2E;
  const bool shifted = bound > kUnshifted<T>;
  Buffer<T> logs(blocks.count() * rows.capacity);
  const TileMemory<T> tiles(settings.threads);
  const int64_t pulled_size = pull != nullptr ? traces.strips * kernel.nr * rows.capacity : 0;
  const Buffer<T> pulled_rows(settings.threads * pulled_size);
  run_tasks(settings.threads, blocks.count(), [&](int worker, int64_t i) {
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

template <typename T>
std::vector<T> mean_trace(const Batch& batch, const Settings& settings) {
  const Blocks blocks = blocks_of_traces(batch.traces.rows, settings.threads);
  std::vector<T> mean = label_sums<T>(batch.traces, blocks, nullptr, 0);
  mean.resize(batch.traces.cols);
  for (T& value : mean) value /= static_cast<T>(batch.traces.rows);
  return mean;
}

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
  const bool shifted = rows.largest_norm * rows.largest_norm * factor * kLog2E > kUnshifted<T>;
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
  const TileMemory<T> tiles(settings.threads);
  run_pairs(blocks, needs_same_label(settings), [&](int worker, int64_t i, int64_t k) {
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
void forward(const Batch& batch, const Settings& settings, const ForwardOutputs<T>& out) {
  const Anchors anchors(batch, settings);
  const Blocks& blocks = anchors.blocks;
  const int64_t n = batch.embeddings.rows, width = batch.embeddings.cols;
  for (T* values : {out.loss, out.log_keys, out.log_positives, out.log_traces}) std::fill_n(values, n, T(0));
  if (out.pull != nullptr) std::fill_n(out.pull, n * width, T(0));
  if (!anchors.any()) return;

  const PackedRows<T> rows = pack<T>(batch.embeddings, blocks, kLeft | kRight, kernels<T>());
  const PairSums<T> pairs = sum_pairs(rows, anchors, settings);
  const bool mean_form = settings.form == Form::log_mean;
  const std::vector<T> trace = mean_form ? mean_trace<T>(batch, settings) : std::vector<T>();
  const Buffer<T> log_traces = mean_form ? Buffer<T>() : sum_traces(batch, rows, anchors, settings, out.pull);
  const std::vector<T> sums = label_sums<T>(batch.embeddings, blocks, nullptr, 0);
  run_tasks(settings.threads, blocks.count(), [&](int, int64_t b) {
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
      of.traces = mean_form ? static_cast<T>(traces_factor(settings, block.label)) * dot(z.data(), trace.data(), width)
                            : log_traces[slot];
      out.loss[row] = anchor_loss(of, counts, settings.form, settings.denominator);
      out.log_keys[row] = log_keys(of, settings.denominator);
      out.log_positives[row] = settings.form == Form::literal ? of.log_positives : T(0);
      out.log_traces[row] = of.traces;
    }
  });
}

template <typename T>
void backward(const Batch& batch, const Settings& settings, const Saved<T>& saved, T* grad_embeddings) {
  const Anchors anchors(batch, settings);
  const Blocks& blocks = anchors.blocks;
  const int64_t width = batch.embeddings.cols;
  std::fill_n(grad_embeddings, batch.embeddings.rows * width, T(0));
  if (!anchors.any()) return;

  const int nr = kernels<T>().nr;
  const PackedRows<T> rows = pack<T>(batch.embeddings, blocks, kLeft | kRight | kAcross, kernels<T>());
  const RowTerms<T> terms(anchors, settings, saved, rows.capacity);
  const Buffer<T> pairs = filled<T>(blocks.count() * rows.across_size, T(0));
  multiply_pairs(rows, anchors, settings, terms, pairs.get());
  const std::vector<T> sums = label_sums<T>(batch.embeddings, blocks, nullptr, 0);
  const std::vector<T> weighted = label_sums(batch.embeddings, blocks, terms.mean.get(), rows.capacity);
  const std::vector<T> trace = settings.form == Form::log_mean ? mean_trace<T>(batch, settings) : std::vector<T>();
  run_tasks(settings.threads, blocks.count(), [&](int, int64_t b) {
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

  const PackedRows<T> rows = pack<T>(batch.embeddings, blocks, kLeft | kAcross, kernel);
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
    const std::vector<T> sums = label_sums(batch.embeddings, blocks, weight.get(), rows.capacity);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < width; ++c)
        grad_traces[j * width + c] = (sums[c] + sums[width + c]) / static_cast<T>(count);
    return;
  }
  const Blocks trace_blocks = blocks_of_traces(count, settings.threads);
  const PackedRows<T> traces = pack<T>(batch.traces, trace_blocks, kRight, kernel);
  const TileMemory<T> tiles(settings.threads);
  const int64_t size = rows.strips * kernel.nr * traces.capacity;
  const Buffer<T> sums(settings.threads * size);
  run_tasks(settings.threads, trace_blocks.count(), [&](int worker, int64_t k) {
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

const char* instruction_sets() {
  static const std::string names = [] {
    std::string joined;
    for (const TileKernels<float>* set : runnable<float>())
      joined += (joined.empty() ? "" : ",") + std::string(set->instruction_set);
    return joined;
  }();
  return names.c_str();
}

bool use_instruction_set(const char* name) {
  const auto& sets = runnable<float>();
  for (size_t i = 0; i < sets.size(); ++i) {
    if (*name == '\0' || std::string(name) == sets[i]->instruction_set) {
      chosen = i;
      return true;
    }
  }
  return false;
}

#define NTF_INSTANTIATE(T)                                                           \
  template void forward<T>(const Batch&, const Settings&, const ForwardOutputs<T>&); \
  template void backward<T>(const Batch&, const Settings&, const Saved<T>&, T*);     \
  template void traces_backward<T>(const Batch&, const Settings&, const Saved<T>&, T*);
NTF_INSTANTIATE(float)
NTF_INSTANTIATE(double)
#undef NTF_INSTANTIATE

}  // namespace ntf::cpu
