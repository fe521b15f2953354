#include "soft_contrastive_cpu_rows.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>
#include <thread>

namespace ntf::cpu {

using torch::headeronly::ScalarType;

namespace {

constexpr int64_t kCut = 32;         // blocks end at multiples of this, so that few strips are padded
constexpr int64_t kSmallBlock = 64;  // smaller ones cost more in padding than a second thread brings

template <typename From, typename T>
void read_row_of(const Matrix& matrix, int64_t row, T* out) {
  const From* from = static_cast<const From*>(matrix.data) + row * matrix.row_stride;
  if (matrix.col_stride == 1) {
    for (int64_t c = 0; c < matrix.cols; ++c) out[c] = static_cast<T>(from[c]);
  } else {
    for (int64_t c = 0; c < matrix.cols; ++c) out[c] = static_cast<T>(from[c * matrix.col_stride]);
  }
}

// Multiply-adds that are worth another thread: waking it takes as long as a part of them.
constexpr int64_t kWorkForThread = int64_t{1} << 22;

// Looks at another thread's progress before this one gives up its time slice: some tens of microseconds, less than a
// tile takes.
constexpr int kSpins = 10000;

// Reading and packing an element takes about as long as this many multiply-adds.
constexpr int64_t kWorkOfElement = 16;

template <typename T>
T squared_norm(const T* row, int64_t n) {
  constexpr int64_t kParts = 16;  // independent sums, which the compiler turns into vectors
  T parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts)
    for (int64_t p = 0; p < kParts; ++p) parts[p] += row[i + p] * row[i + p];
  for (int64_t p = 0; i < n; ++i, ++p) parts[p] += row[i] * row[i];
  T total = 0;
  for (T part : parts) total += part;
  return total;
}

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t rounded_up(int64_t a, int64_t b) { return divided_up(a, b) * b; }

// Blocks in all: enough for kBlock, and a multiple of two for each thread, since every round pairs them off.
int64_t blocks_wanted(int64_t n, int threads) {
  const int64_t fewest = divided_up(n, kBlock);
  return std::max(fewest, std::min(rounded_up(fewest, 2 * threads), n / kSmallBlock));
}

void cut(Blocks& blocks, int label, int64_t first, int64_t rows, int64_t wanted) {
  if (rows == 0) return;
  const int64_t count = std::max(divided_up(rows, kBlock), std::max<int64_t>(wanted, 1));
  // Rounded up, so that no block grows beyond kBlock, itself a multiple of kCut.
  const auto bound = [&](int64_t b) { return std::min(rows, rounded_up(rows * b / count, kCut)); };
  for (int64_t b = 0; b < count; ++b) {
    const int64_t begin = bound(b), end = bound(b + 1);
    if (begin == end) continue;
    blocks.blocks.push_back({label, first + begin, static_cast<int>(end - begin)});
  }
}

}  // namespace

template <typename T>
void read_row(const Matrix& matrix, int64_t row, T* out) {
  switch (matrix.type) {
    case ScalarType::Float:
      return read_row_of<float>(matrix, row, out);
    case ScalarType::Double:
      return read_row_of<double>(matrix, row, out);
    case ScalarType::Half:
      return read_row_of<torch::headeronly::Half>(matrix, row, out);
    case ScalarType::BFloat16:
      return read_row_of<torch::headeronly::BFloat16>(matrix, row, out);
    default:
      throw std::invalid_argument("rows must be float16, bfloat16, float32 or float64: convert them");
  }
}

Blocks blocks_of_batch(const int64_t* labels, int64_t stride, int64_t n, int threads) {
  Blocks blocks;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t label = labels[i * stride];
    if (label != 0 && label != 1) {
      throw std::invalid_argument("labels must be 0 (real) or 1 (fake), got [" + std::to_string(label) +
                                  "]: map them first");
    }
    ++blocks.rows_of_label[label];
  }
  const int64_t reals = blocks.rows_of_label[0], fakes = n - reals;
  blocks.order.resize(n);
  int64_t next[2] = {0, reals};
  for (int64_t i = 0; i < n; ++i) blocks.order[next[labels[i * stride]]++] = i;
  const int64_t wanted = blocks_wanted(n, threads);
  const int64_t wanted_real = n == 0 ? 0 : (wanted * reals + n / 2) / n;
  cut(blocks, 0, 0, reals, wanted_real);
  cut(blocks, 1, reals, fakes, wanted - wanted_real);
  return blocks;
}

Blocks blocks_of_traces(int64_t n) {
  Blocks blocks;
  blocks.rows_of_label[0] = n;
  blocks.order.resize(n);
  for (int64_t i = 0; i < n; ++i) blocks.order[i] = i;
  cut(blocks, 0, 0, n, divided_up(n, kBlock));
  return blocks;
}

template <typename T>
PackedRows<T> pack(const Matrix& matrix, const Blocks& blocks, int layouts, int threads,
                   const TileKernels<T>& kernels) {
  const int64_t mr = kernels.mr, nr = kernels.nr, width = matrix.cols;
  int64_t most = 0;
  for (const Block& block : blocks.blocks) most = std::max<int64_t>(most, block.rows);
  PackedRows<T> packed;
  packed.width = width;
  packed.capacity = std::max(rounded_up(most, mr), rounded_up(most, nr));
  packed.strips = static_cast<int>(divided_up(width, nr));
  packed.left_size = rounded_up(most, mr) * width;
  packed.right_size = rounded_up(most, nr) * width;
  packed.across_size = packed.strips * nr * packed.capacity;
  if (layouts & kLeft) packed.left_rows = Buffer<T>(blocks.count() * packed.left_size);
  if (layouts & kRight) packed.right_rows = Buffer<T>(blocks.count() * packed.right_size);
  if (layouts & kAcross) packed.across_rows = Buffer<T>(blocks.count() * packed.across_size);
  std::vector<T> norms(blocks.count());
  run_tasks(workers_for(threads, blocks.count(), work_of_rows(matrix)), blocks.count(), [&](int, int64_t b) {
    const Block& block = blocks.blocks[b];
    std::vector<T> row(packed.strips * nr);
    T largest = 0;
    for (int64_t r = 0; r < packed.capacity; ++r) {
      if (r < block.rows) {
        read_row(matrix, blocks.row(block, r), row.data());
        largest = std::max(largest, squared_norm(row.data(), width));
      } else if (r == block.rows) {
        std::fill(row.begin(), row.end(), T(0));
      }
      if ((layouts & kLeft) && r * width < packed.left_size) {
        T* to = packed.left_rows.get() + b * packed.left_size + (r - r % mr) * width + r % mr;
        for (int64_t c = 0; c < width; ++c) to[c * mr] = row[c];
      }
      if ((layouts & kRight) && r * width < packed.right_size) {
        T* to = packed.right_rows.get() + b * packed.right_size + (r - r % nr) * width + r % nr;
        for (int64_t c = 0; c < width; ++c) to[c * nr] = row[c];
      }
      if (layouts & kAcross) {
        T* to = packed.across_rows.get() + b * packed.across_size + r * nr;
        for (int64_t s = 0; s < packed.strips; ++s) std::copy_n(row.data() + s * nr, nr, to + s * packed.capacity * nr);
      }
    }
    norms[b] = std::sqrt(largest);
  });
  for (T norm : norms) packed.largest_norm = std::max(packed.largest_norm, norm);
  return packed;
}

template <typename T>
std::vector<double> label_sums(const Matrix& matrix, const Blocks& blocks, const T* weights, int64_t capacity,
                               int threads) {
  const int64_t width = matrix.cols;
  std::vector<double> partial(blocks.count() * width);
  run_tasks(workers_for(threads, blocks.count(), work_of_rows(matrix)), blocks.count(), [&](int, int64_t b) {
    const Block& block = blocks.blocks[b];
    std::vector<T> row(width);
    double* sum = partial.data() + b * width;
    for (int64_t r = 0; r < block.rows; ++r) {
      read_row(matrix, blocks.row(block, r), row.data());
      const double weight = weights == nullptr ? 1.0 : weights[b * capacity + r];
      for (int64_t c = 0; c < width; ++c) sum[c] += weight * row[c];
    }
  });
  std::vector<double> total(2 * width);
  for (int64_t b = 0; b < blocks.count(); ++b)
    for (int64_t c = 0; c < width; ++c) total[blocks.blocks[b].label * width + c] += partial[b * width + c];
  return total;
}

int64_t work_of_rows(const Matrix& matrix) { return matrix.rows * matrix.cols * kWorkOfElement; }

int workers_for(int threads, int64_t count, int64_t work) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, count, 1 + work / kWorkForThread})));
}

void run_tasks(int workers, int64_t count, const std::function<void(int, int64_t)>& task) {
  if (workers == 1) {
    for (int64_t i = 0; i < count; ++i) task(0, i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(static_cast<int>(worker), i);
  });
}

void run_pairs(int workers, const Blocks& blocks, bool same_label,
               const std::function<void(int, int64_t, int64_t)>& task) {
  // A round-robin tournament: one block stays, the others go round. With an odd number one has no partner. Before it,
  // in round 0, each block meets itself. A worker takes the next game and waits until both its blocks have played the
  // rounds before; those games were taken earlier, so the first of them never waits.
  const int64_t count = blocks.count();
  const int64_t seats = count + count % 2, circle = seats - 1, games = seats / 2;
  std::vector<std::atomic<int64_t>> played(seats);
  const auto play = [&](int worker, int64_t a, int64_t b, int64_t round) {
    for (int64_t block : {a, b})
      for (int tries = 0; played[block].load(std::memory_order_acquire) != round; ++tries)
        if (tries > kSpins) std::this_thread::yield();
    const bool exist = a < count && b < count;
    if (exist && (same_label || blocks.blocks[a].label != blocks.blocks[b].label))
      task(worker, std::min(a, b), std::max(a, b));
    played[a].store(round + 1, std::memory_order_release);
    if (b != a) played[b].store(round + 1, std::memory_order_release);
  };
  if (count == 0) return;
  run_tasks(workers, seats + circle * games, [&](int worker, int64_t i) {
    if (i < seats) return play(worker, i, i, 0);
    const int64_t round = (i - seats) / games, place = (i - seats) % games;
    const int64_t a = place == 0 ? seats - 1 : (round + place) % circle;
    play(worker, a, (round - place + circle) % circle, round + 1);
  });
}

#define NTF_INSTANTIATE(T)                                                                       \
  template void read_row<T>(const Matrix&, int64_t, T*);                                         \
  template PackedRows<T> pack<T>(const Matrix&, const Blocks&, int, int, const TileKernels<T>&); \
  template std::vector<double> label_sums<T>(const Matrix&, const Blocks&, const T*, int64_t, int);
NTF_INSTANTIATE(float)
NTF_INSTANTIATE(double)
#undef NTF_INSTANTIATE

}  // namespace ntf::cpu
