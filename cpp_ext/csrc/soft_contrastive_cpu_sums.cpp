// Where |s| is bounded (by the norms, as with unit rows and a usual temperature) 2^s is summed as it is, once for both
// sides of a tile. Elsewhere a first pass finds each row's maximum, and every row subtracts its own.
#include "soft_contrastive_cpu_sums.h"

#include <algorithm>
#include <limits>

namespace ntf::cpu {

namespace {

// Largest |s| in base 2 that needs no shift: 2^80 summed over 2^40 rows stays below the largest float, 2^700 below the
// largest double.
template <typename T>
constexpr double kUnshifted = sizeof(T) == 4 ? 80 : 700;

template <typename T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

template <typename T>
Sums<T> no_sums(int64_t slots, bool shifted) {
  return {filled<T>(slots, shifted ? kLowest<T> : T(0)), filled<double>(slots, 0)};
}

template <typename T>
void raise(T* high, const T* found, int count) {
  for (int i = 0; i < count; ++i) high[i] = std::max(high[i], found[i]);
}

template <typename T>
void add(double* sum, const T* found, int count) {
  for (int i = 0; i < count; ++i) sum[i] += found[i];
}

}  // namespace

template <typename T>
bool pairs_need_shifts(const PackedRows<T>& rows, const Settings& settings) {
  return rows.largest_norm / settings.temperature * rows.largest_norm * kLog2E > kUnshifted<T>;
}

template <typename T>
bool traces_need_shifts(const PackedRows<T>& rows, const PackedRows<T>& traces, const Settings& settings) {
  return std::abs(traces_factor(settings, 0)) * rows.largest_norm * traces.largest_norm * kLog2E > kUnshifted<T>;
}

template <typename T>
PairSums<T> sum_pairs(const TileKernels<T>& kernel, const PackedRows<T>& rows, const Anchors& anchors,
                      const Settings& settings) {
  const Blocks& blocks = anchors.blocks;
  const bool shifted = pairs_need_shifts(rows, settings), same_label = needs_same_label(settings);
  const int64_t slots = blocks.count() * rows.capacity, n = blocks.order.size();
  const int workers = workers_for(settings.threads, blocks.count(), n * n * rows.width);
  PairSums<T> result{no_sums<T>(slots, shifted), no_sums<T>(slots, shifted)};
  const auto tile = [&](int64_t i, int64_t k) { return pair_tile(rows, blocks, i, k, settings); };
  const auto sums_of = [&](int64_t i, int64_t k) -> Sums<T>& {
    return blocks.blocks[i].label == blocks.blocks[k].label ? result.same : result.other;
  };
  if (shifted) {
    run_pairs(workers, blocks, same_label, [&](int, int64_t i, int64_t k) {
      T row_max[kBlock], col_max[kBlock];
      T* high = sums_of(i, k).shift.get();
      const Tile<T> pair = tile(i, k);
      kernel.maxima(pair, row_max, i == k ? nullptr : col_max);
      raise(high + i * rows.capacity, row_max, pair.rows);
      if (i != k) raise(high + k * rows.capacity, col_max, pair.cols);
    });
    for (Sums<T>* sums : {&result.same, &result.other})
      for (int64_t slot = 0; slot < slots; ++slot)
        if (sums->shift[slot] == kLowest<T>) sums->shift[slot] = 0;  // padding, or no such rows; infinity gives NaN
  }
  run_pairs(workers, blocks, same_label, [&](int, int64_t i, int64_t k) {
    T row_sum[kBlock], col_sum[kBlock];
    const Sums<T>& sums = sums_of(i, k);
    const T* shift = sums.shift.get();
    const Tile<T> pair = tile(i, k);
    kernel.sums(pair, shifted ? shift + i * rows.capacity : nullptr, shifted ? shift + k * rows.capacity : nullptr,
                row_sum, i == k ? nullptr : col_sum, nullptr);
    add(sums.sum.get() + i * rows.capacity, row_sum, pair.rows);
    if (i != k) add(sums.sum.get() + k * rows.capacity, col_sum, pair.cols);
  });
  return result;
}

template <typename T>
Sums<T> sum_traces(const TileKernels<T>& kernel, const PackedRows<T>& rows, const Anchors& anchors,
                   const PackedRows<T>& traces, const Blocks& trace_blocks, const Settings& settings, T* pull) {
  const Blocks& blocks = anchors.blocks;
  const bool shifted = traces_need_shifts(rows, traces, settings);
  const int64_t work = blocks.order.size() * trace_blocks.order.size() * rows.width;
  const int workers = workers_for(settings.threads, blocks.count(), work);
  Sums<T> result = no_sums<T>(blocks.count() * rows.capacity, shifted);
  const TileMemory<T> tiles(pull != nullptr ? workers : 0);
  const int64_t pulled_size = pull != nullptr ? traces.strips * kernel.nr * rows.capacity : 0;
  const Buffer<T> pulled_rows(workers * pulled_size);
  run_tasks(workers, blocks.count(), [&](int worker, int64_t i) {
    const Block& block = blocks.blocks[i];
    if (!anchors.contribute[block.label]) return;
    const double factor = traces_factor(settings, block.label);
    const auto tile = [&](int64_t k) {
      return tile_of(rows, i, block.rows, traces, k, trace_blocks.blocks[k].rows, false, factor);
    };
    T partial[kBlock];
    T* shift = result.shift.get() + i * rows.capacity;
    double* sum = result.sum.get() + i * rows.capacity;
    for (int64_t k = 0; shifted && k < trace_blocks.count(); ++k) {
      kernel.maxima(tile(k), partial, nullptr);
      raise(shift, partial, block.rows);
    }
    for (int64_t r = 0; r < rows.capacity; ++r)
      if (shift[r] == kLowest<T>) shift[r] = 0;  // padding; infinity gives NaN
    T* pulled = pulled_rows.get() + worker * pulled_size;
    std::fill_n(pulled, pulled_size, T(0));
    for (int64_t k = 0; k < trace_blocks.count(); ++k) {
      T* weights = pull != nullptr ? tiles.of(worker) : nullptr;
      kernel.sums(tile(k), shifted ? shift : nullptr, nullptr, partial, nullptr, weights);
      add(sum, partial, block.rows);
      if (pull != nullptr) {
        kernel.multiply(weights, block.rows, trace_blocks.blocks[k].rows, traces.across(k),
                        {pulled, rows.capacity, traces.strips});
      }
    }
    for (int r = 0; pull != nullptr && r < block.rows; ++r) {
      T* to = pull + blocks.row(block, r) * rows.width;
      const T scale = static_cast<T>(1 / sum[r]);
      for (int64_t c = 0; c < rows.width; ++c)
        to[c] = scale * pulled[((c / kernel.nr) * rows.capacity + r) * kernel.nr + c % kernel.nr];
    }
  });
  return result;
}

#define NTF_INSTANTIATE(T)                                                                                          \
  template bool pairs_need_shifts<T>(const PackedRows<T>&, const Settings&);                                        \
  template bool traces_need_shifts<T>(const PackedRows<T>&, const PackedRows<T>&, const Settings&);                 \
  template PairSums<T> sum_pairs<T>(const TileKernels<T>&, const PackedRows<T>&, const Anchors&, const Settings&);  \
  template Sums<T> sum_traces<T>(const TileKernels<T>&, const PackedRows<T>&, const Anchors&, const PackedRows<T>&, \
                                 const Blocks&, const Settings&, T*);
NTF_INSTANTIATE(float)
NTF_INSTANTIATE(double)
#undef NTF_INSTANTIATE

}  // namespace ntf::cpu
