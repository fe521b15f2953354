// The rows of a batch as the CPU path works on them: sorted by label, cut into blocks, packed for the tiles.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "soft_contrastive_cpu_tiles.h"

namespace ntf::cpu {

// A (rows, cols) matrix of any floating type and any strides, as a tensor holds it.
struct Matrix {
  const void* data;
  torch::headeronly::ScalarType type;
  int64_t rows, cols, row_stride, col_stride;  // strides in elements
};

// One row of a matrix, converted.
template <typename T>
void read_row(const Matrix& matrix, int64_t row, T* out);

// Memory that starts at a cache line; zeroed on request only.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(sizeof(T) * size, std::align_val_t{64}))) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<T[], Free> data_;
};

template <typename T>
Buffer<T> filled(int64_t size, T value) {
  Buffer<T> buffer(size);
  for (int64_t i = 0; i < size; ++i) buffer[i] = value;
  return buffer;
}

// At most kBlock rows of one label. Row r of the batch's block b has slot b * capacity + r in every array below.
struct Block {
  int label;
  int64_t first;  // its first row, as a position in `order`
  int rows;
};

// How the rows are cut.
struct Blocks {
  std::vector<Block> blocks;
  std::vector<int64_t> order;  // row numbers of the batch, real before fake
  int64_t rows_of_label[2] = {0, 0};

  int64_t count() const { return static_cast<int64_t>(blocks.size()); }
  int64_t row(const Block& block, int64_t r) const { return order[block.first + r]; }
};

// Rows in an order that depends on the labels alone; blocks of even size, as many as keep the threads busy.
// Throws std::invalid_argument at a label other than 0 and 1.
Blocks blocks_of_batch(const int64_t* labels, int64_t stride, int64_t n, int threads);

// Rows without labels: the traces.
Blocks blocks_of_traces(int64_t n);

enum Layout : int { kLeft = 1, kRight = 2, kAcross = 4 };

// The three layouts of soft_contrastive_cpu_tiles.h; those that were not asked for are empty.
template <typename T>
struct PackedRows {
  int64_t width = 0;                                       // C
  int64_t capacity = 0;                                    // rows of a block, padding included
  int64_t left_size = 0, right_size = 0, across_size = 0;  // elements of a block
  int strips = 0;                                          // of nr columns, in the layout "across"
  T largest_norm = 0;                                      // over all rows
  Buffer<T> left_rows, right_rows, across_rows;

  const T* left(int64_t block) const { return left_rows.get() + block * left_size; }
  const T* right(int64_t block) const { return right_rows.get() + block * right_size; }
  Across<const T> across(int64_t block) const { return {across_rows.get() + block * across_size, capacity, strips}; }
};

template <typename T>
PackedRows<T> pack(const Matrix& matrix, const Blocks& blocks, int layouts, int threads, const TileKernels<T>& kernels);

// Sum over the rows of each label of weight * row, (2, C); weights by slot, or all 1 where null.
template <typename T>
std::vector<double> label_sums(const Matrix& matrix, const Blocks& blocks, const T* weights, int64_t capacity,
                               int threads);

// Multiply-adds that take about as long as one reading of the rows.
int64_t work_of_rows(const Matrix& matrix);

// Threads that `count` tasks of `work` multiply-adds in all are worth, 1 to `threads`.
int workers_for(int threads, int64_t count, int64_t work);

// Calls task(worker, i) for i in [0, count); the order of calls is not defined.
void run_tasks(int workers, int64_t count, const std::function<void(int, int64_t)>& task);

// Calls task(worker, i, k), which must not throw, once for every pair of blocks i < k and i == k; without `same_label`
// only for blocks of different labels. At any time the blocks of the running tasks differ, and each block meets the
// others in a fixed order: so a task may add to what belongs to its two blocks, and the sums come out with the same
// bits however the tasks are spread over threads.
void run_pairs(int workers, const Blocks& blocks, bool same_label,
               const std::function<void(int, int64_t, int64_t)>& task);

}  // namespace ntf::cpu
