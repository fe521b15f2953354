// The soft contrastive loss, Eq. (5) of Liang et al. 2024 (arXiv:2403.16513), and its gradients on a CUDA device.
//
// A block owns a tile of rows and walks over tiles of other rows: products of the two tiles go to shared memory and are
// reduced there at once, as in flash attention, so that no array of N x N or N x J exists. Where there are too few row
// tiles to keep the device busy, `splits` blocks share the walk of one row tile; each leaves a partial result, and a
// finishing kernel adds them in a fixed order. There are no atomics.
//
// In the comments, N, J, C are rows, traces and width, b the bytes of an input number, w those of a Wide one, and
// T = kTile. Operations count a multiplication and an addition as two. Traffic is what the kernel asks of the L2 cache;
// device memory sees the matrices about once as long as they fit there.
#include <algorithm>

#include "soft_contrastive_cuda.h"
#include "soft_contrastive_pairs.cuh"
#include "soft_contrastive_rows.cuh"

namespace ntf::cuda {
namespace {

constexpr int kLargestSumBlocks = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out pieces of the workspace; without one it only adds up what they need.
class Arena {
 public:
  explicit Arena(void* workspace = nullptr) : base_(static_cast<char*>(workspace)) {}
  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (bytes + 255) / 256 * 256;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Launches on one stream until the first error.
class Queue {
 public:
  Queue(cudaStream_t stream, bool measuring) : stream_(stream), measuring_(measuring) {}
  template <auto kernel, typename Arguments>
  void add(dim3 grid, const Arguments& arguments) {
    if (!measuring_ && error_ == cudaSuccess && grid.x > 0 && grid.y > 0 && grid.z > 0) {
      error_ = launch<kernel>(grid, dim3(kThreads), 0, stream_, arguments);
    }
  }
  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  bool measuring_;
  cudaError_t error_ = cudaSuccess;
};

dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

// How the other rows are dealt out to blocks.
struct Splits {
  int64_t tiles_per_split;
  int count;
};

// The number of splits with which the device is done first: it works in waves of as many blocks as it holds, and each
// wave takes as long as the walk of a block. At most twice what fills it once, which bounds the partial results.
Splits splits_of(int64_t owner_blocks, int64_t other_tiles, Device device) {
  if (owner_blocks == 0 || other_tiles == 0) {
    return {1, 0};
  }
  const int64_t slots = static_cast<int64_t>(device.multiprocessors) * device.resident_blocks;
  const int64_t most = std::min(2 * ceil_div(slots, owner_blocks), other_tiles);
  Splits best{other_tiles, 1};
  int64_t shortest = ceil_div(owner_blocks, slots) * other_tiles;
  for (int64_t wanted = 2; wanted <= most; ++wanted) {
    const int64_t walk = ceil_div(other_tiles, wanted), count = ceil_div(other_tiles, walk);
    const int64_t time = ceil_div(owner_blocks * count, slots) * walk;
    if (time < shortest) {
      shortest = time;
      best = {walk, static_cast<int>(count)};
    }
  }
  return best;
}

// The launches of one call. A call with no workspace measures what it needs.
template <class Math>
class Launcher {
 public:
  using Input = typename Math::Input;
  using Wide = typename Math::Wide;

  Launcher(const Batch& batch, Device device, void* workspace, bool measuring, cudaStream_t stream)
      : batch_(batch),
        device_(device),
        arena_(workspace),
        queue_(stream, measuring),
        z_(matrix_of<Input>(batch.embeddings, batch.rows, batch.width)),
        h_(matrix_of<Input>(batch.traces, batch.traces_count, batch.width)),
        counts_(arena_.take<int64_t>(2)) {
    queue_.add<count_labels_kernel>(grid_of(1), CountLabels{batch.labels, batch.rows, counts_});
  }

  size_t bytes() const { return arena_.used(); }
  cudaError_t error() const { return queue_.error(); }

  void run(const Forward& out) {
    const bool log_mean = batch_.form == Form::log_mean;
    FinishForward<Input> finish{};
    finish.rows = context();
    finish.embeddings = z_;
    const Splits pairs = splits_of(tiles(batch_.rows), tiles(batch_.rows), device_);
    ScoreStatistics<Math> statistics{z_,      z_,      batch_.labels,        true, need_same(), inverse_temperature(),
                                     nullptr, nullptr, pairs.tiles_per_split};
    finish.same = statistics.same = arena_.take<Running<Wide>>(pairs.count * batch_.rows);
    finish.other = statistics.other = arena_.take<Running<Wide>>(pairs.count * batch_.rows);
    finish.pair_splits = pairs.count;
    queue_.add<statistics_kernel<Math>>(grid_of(tiles(batch_.rows), pairs.count), statistics);
    if (log_mean) {
      finish.trace_sums = column_sums(h_, nullptr, nullptr);
    } else if (out.pull) {
      const Splits splits = splits_of(tiles(batch_.rows) * chunks(), tiles(batch_.traces_count), device_);
      WeightedRows<Math, PullWeight<Wide>> pull{z_, h_, {batch_.labels, trace_scale()}, false, nullptr, nullptr, 0};
      finish.partial_pull = weighted_rows(pull, splits);
      finish.traces = pull.online;
      finish.trace_splits = splits.count;
    } else {
      const Splits splits = splits_of(tiles(batch_.rows), tiles(batch_.traces_count), device_);
      Running<Wide>* partial = arena_.take<Running<Wide>>(splits.count * batch_.rows);
      queue_.add<statistics_kernel<Math>>(grid_of(tiles(batch_.rows), splits.count),
                                          ScoreStatistics<Math>{z_, h_, batch_.labels, false, false, trace_scale(),
                                                                nullptr, partial, splits.tiles_per_split});
      finish.traces = partial;
      finish.trace_splits = splits.count;
    }
    if (batch_.form != Form::literal) {
      finish.class_sums = column_sums(z_, batch_.labels, nullptr);
    }
    finish.inverse_temperature = inverse_temperature();
    finish.eta = static_cast<Wide>(batch_.eta);
    finish.loss = static_cast<Wide*>(out.loss);
    finish.log_keys = static_cast<Wide*>(out.log_keys);
    finish.log_positives = static_cast<Wide*>(out.log_positives);
    finish.log_traces = static_cast<Wide*>(out.log_traces);
    finish.pull = log_mean ? nullptr : static_cast<Wide*>(out.pull);
    queue_.add<finish_forward_kernel<Input>>(grid_of(ceil_div(batch_.rows, kThreads / kWarp)), finish);
  }

  void run(const Backward& in) {
    RowTerms<Wide> terms = row_terms(in.grad_loss, in.loss);
    terms.log_keys = static_cast<const Wide*>(in.log_keys);
    terms.log_positives = static_cast<const Wide*>(in.log_positives);
    terms.pair_terms = arena_.take<PairTerms<Wide>>(batch_.rows);
    terms.means = arena_.take<Wide>(batch_.rows);
    queue_.add<row_terms_kernel<Wide>>(grid_of(ceil_div(batch_.rows, kThreads)), terms);

    FinishBackward<Input> finish{};
    finish.rows = context();
    finish.embeddings = z_;
    const Splits splits = splits_of(tiles(batch_.rows) * chunks(), tiles(batch_.rows), device_);
    WeightedRows<Math, PairWeight<Wide>> pairs{
        z_,   z_,      {terms.pair_terms, batch_.labels, inverse_temperature(), batch_.denominator == Denominator::all},
        true, nullptr, nullptr,
        0};
    finish.partial = weighted_rows(pairs, splits);
    finish.splits = splits.count;
    finish.means = terms.means;
    finish.traces = terms.traces;
    if (batch_.form != Form::literal) {
      finish.class_sums = column_sums(z_, batch_.labels, terms.means);
    }
    if (batch_.form == Form::log_mean) {
      finish.trace_sums = column_sums(h_, nullptr, nullptr);
    } else {
      finish.pull = static_cast<const Wide*>(in.pull);
    }
    finish.inverse_temperature = inverse_temperature();
    finish.eta = static_cast<Wide>(batch_.eta);
    finish.grad_embeddings = static_cast<Input*>(in.grad_embeddings);
    queue_.add<finish_backward_kernel<Input>>(grid_of(ceil_div(batch_.rows * batch_.width, kThreads)), finish);
  }

  void run(const TracesBackward& in) {
    RowTerms<Wide> terms = row_terms(in.grad_loss, in.loss);
    terms.log_traces = static_cast<const Wide*>(in.log_traces);
    terms.trace_scale = trace_scale();
    terms.trace_terms = arena_.take<TraceTerms<Wide>>(batch_.rows);
    queue_.add<row_terms_kernel<Wide>>(grid_of(ceil_div(batch_.rows, kThreads)), terms);

    FinishTraces<Input> finish{};
    if (batch_.form == Form::log_mean) {
      finish.sums = column_sums(z_, nullptr, terms.traces);
    } else {
      const Splits splits = splits_of(tiles(batch_.traces_count) * chunks(), tiles(batch_.rows), device_);
      WeightedRows<Math, TraceWeight<Wide>> weighted{h_, z_, {terms.trace_terms}, false, nullptr, nullptr, 0};
      finish.partial = weighted_rows(weighted, splits);
      finish.splits = splits.count;
    }
    finish.traces = batch_.traces_count;
    finish.width = batch_.width;
    finish.scale = trace_scale();
    finish.grad_traces = static_cast<Input*>(in.grad_traces);
    queue_.add<finish_traces_kernel<Input>>(grid_of(ceil_div(batch_.traces_count * batch_.width, kThreads)), finish);
  }

 private:
  int64_t tiles(int64_t rows) const { return ceil_div(rows, Math::kTile); }
  // Rows of no columns have statistics too.
  int64_t chunks() const { return batch_.width == 0 ? 1 : ceil_div(batch_.width, Math::kOut); }
  Wide inverse_temperature() const { return static_cast<Wide>(1 / batch_.temperature); }
  Wide trace_scale() const { return static_cast<Wide>(batch_.eta / batch_.temperature); }
  bool need_same() const { return batch_.denominator == Denominator::all || batch_.form == Form::literal; }
  RowContext context() const {
    return {batch_.labels, counts_, batch_.rows, batch_.traces_count, batch_.form, batch_.denominator};
  }

  RowTerms<Wide> row_terms(const void* grad_loss, const void* loss) {
    RowTerms<Wide> terms{};
    terms.rows = context();
    terms.grad_loss = static_cast<const Wide*>(grad_loss);
    terms.loss = static_cast<const Wide*>(loss);
    terms.traces = arena_.take<Wide>(batch_.rows);
    return terms;
  }

  // (kSums, width): S_0, S_1, G_0, G_1.
  const Wide* column_sums(const Matrix<Input>& matrix, const int64_t* labels, const Wide* weights) {
    const int64_t wanted = ceil_div(matrix.rows, kWarp);
    const int64_t rows_per_block = ceil_div(matrix.rows, wanted < kLargestSumBlocks ? wanted + 1 : kLargestSumBlocks);
    const int blocks = matrix.rows == 0 ? 0 : static_cast<int>(ceil_div(matrix.rows, rows_per_block));
    Wide* partial = arena_.take<Wide>(blocks * kSums * matrix.width);
    Wide* sums = arena_.take<Wide>(kSums * matrix.width);
    queue_.add<column_sums_kernel<Input>>(grid_of(ceil_div(matrix.width, kThreads), blocks),
                                          ColumnSums<Input>{matrix, labels, weights, partial, rows_per_block});
    queue_.add<add_blocks_kernel<Wide>>(grid_of(ceil_div(kSums * matrix.width, kThreads)),
                                        AddBlocks<Wide>{partial, sums, kSums * matrix.width, blocks});
    return sums;
  }

  // Takes the partial results from the workspace and fills `arguments`.
  template <class Weight>
  const Wide* weighted_rows(WeightedRows<Math, Weight>& arguments, Splits splits) {
    const int64_t rows = arguments.owners.rows;
    arguments.partial = arena_.take<Wide>(splits.count * rows * batch_.width);
    if (Weight::kOnline) {
      arguments.online = arena_.take<Running<Wide>>(splits.count * rows);
    }
    arguments.tiles_per_split = splits.tiles_per_split;
    queue_.add<weighted_rows_kernel<Math, Weight>>(grid_of(tiles(rows), splits.count, chunks()), arguments);
    return arguments.partial;
  }

  Batch batch_;
  Device device_;
  Arena arena_;
  Queue queue_;
  Matrix<Input> z_, h_;
  int64_t* counts_;
};

// Calls `use` with the launcher for the batch's type.
template <class Use>
cudaError_t with_launcher(const Batch& batch, Device device, void* workspace, bool measuring, cudaStream_t stream,
                          Use use) {
  const auto call = [&](auto launcher) {
    use(launcher);
    return launcher.error();
  };
  if (batch.type == Type::float64) {
    return call(Launcher<Simt<double>>(batch, device, workspace, measuring, stream));
  }
  if (batch.type == Type::float32 && !(batch.allow_tf32 && device.tensor_cores)) {
    return call(Launcher<Simt<float>>(batch, device, workspace, measuring, stream));
  }
  if (!device.tensor_cores) {
    return cudaErrorNotSupported;
  }
  if (batch.type == Type::float32) {
    return call(Launcher<TensorCore<float>>(batch, device, workspace, measuring, stream));
  }
  if (batch.type == Type::float16) {
    return call(Launcher<TensorCore<__half>>(batch, device, workspace, measuring, stream));
  }
  return call(Launcher<TensorCore<__nv_bfloat16>>(batch, device, workspace, measuring, stream));
}

template <class Arrays>
size_t measure(const Batch& batch, const Arrays& arrays, Device device) {
  size_t bytes = 0;
  with_launcher(batch, device, nullptr, true, nullptr, [&](auto& launcher) {
    launcher.run(arrays);
    bytes = launcher.bytes();
  });
  return bytes;
}

template <class Arrays>
cudaError_t enqueue(const Batch& batch, const Arrays& arrays, Device device, void* workspace, cudaStream_t stream) {
  return with_launcher(batch, device, workspace, false, stream, [&](auto& launcher) { launcher.run(arrays); });
}

}  // namespace

size_t workspace_bytes(const Batch& batch, const Forward& arrays, Device device) {
  return measure(batch, arrays, device);
}
size_t workspace_bytes(const Batch& batch, const Backward& arrays, Device device) {
  return measure(batch, arrays, device);
}
size_t workspace_bytes(const Batch& batch, const TracesBackward& arrays, Device device) {
  return measure(batch, arrays, device);
}

cudaError_t run(const Batch& batch, const Forward& arrays, Device device, void* workspace, cudaStream_t stream) {
  return enqueue(batch, arrays, device, workspace, stream);
}
cudaError_t run(const Batch& batch, const Backward& arrays, Device device, void* workspace, cudaStream_t stream) {
  return enqueue(batch, arrays, device, workspace, stream);
}
cudaError_t run(const Batch& batch, const TracesBackward& arrays, Device device, void* workspace, cudaStream_t stream) {
  return enqueue(batch, arrays, device, workspace, stream);
}

}  // namespace ntf::cuda
