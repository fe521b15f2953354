// What the passes share: anchors by label, the tile of a pair of blocks, scratch memory.
#pragma once

#include <vector>

#include "soft_contrastive_cpu.h"

namespace ntf::cpu {

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.693147180559945309417;

// The vector code that runs on this machine. A pass asks once: another answer would have other strips.
template <typename T>
const TileKernels<T>& kernels();

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
inline double traces_factor(const Settings& settings, int label) {
  return (label == 0 ? 1 : -1) * settings.eta / settings.temperature;
}

// Whether pairs of the same label need more than the closed form of their mean.
inline bool needs_same_label(const Settings& settings) {
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

// The tile of two blocks of the batch.
template <typename T>
Tile<T> pair_tile(const PackedRows<T>& rows, const Blocks& blocks, int64_t i, int64_t k, const Settings& settings) {
  return tile_of(rows, i, blocks.blocks[i].rows, rows, k, blocks.blocks[k].rows, i == k, 1 / settings.temperature);
}

// Calls task(block) for every block of the batch, each of which reads its rows once.
template <typename Task>
void run_rows(const Batch& batch, const Settings& settings, const Blocks& blocks, Task task) {
  const int workers = workers_for(settings.threads, blocks.count(), work_of_rows(batch.embeddings));
  run_tasks(workers, blocks.count(), [&](int, int64_t block) { task(block); });
}

// mean_j h_j, (C,): all that log_mean needs of the traces.
template <typename T>
std::vector<double> mean_trace(const Batch& batch, const Settings& settings) {
  const Blocks blocks = blocks_of_traces(batch.traces.rows);
  std::vector<double> mean = label_sums<T>(batch.traces, blocks, nullptr, 0, settings.threads);
  mean.resize(batch.traces.cols);
  for (double& value : mean) value /= static_cast<double>(batch.traces.rows);
  return mean;
}

}  // namespace ntf::cpu
