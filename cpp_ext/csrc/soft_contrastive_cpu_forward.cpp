// The loss of every anchor. z z^T is symmetric, so a tile of it serves its rows and its columns: N^2 C operations. The
// traces take 2 N J C for their sums and 2 N J C for `pull`. The mean over positives and the form log_mean have closed
// forms through sums of rows.
#include <algorithm>

#include "soft_contrastive_cpu_sums.h"

namespace ntf::cpu {

template <typename T>
void forward(const Batch& batch, const Settings& settings, const ForwardOutputs<T>& out) {
  const Anchors anchors(batch, settings);
  const Blocks& blocks = anchors.blocks;
  const int64_t n = batch.embeddings.rows, width = batch.embeddings.cols;
  for (T* values : {out.loss, out.log_keys, out.log_positives, out.log_traces}) std::fill_n(values, n, T(0));
  if (out.pull != nullptr) std::fill_n(out.pull, n * width, T(0));
  if (!anchors.any()) return;

  const TileKernels<T>& kernel = kernels<T>();
  const PackedRows<T> rows = pack<T>(batch.embeddings, blocks, kLeft | kRight, settings.threads, kernel);
  const PairSums<T> pairs = sum_pairs(kernel, rows, anchors, settings);
  const std::vector<double> sums = label_sums<T>(batch.embeddings, blocks, nullptr, 0, settings.threads);
  const bool mean_form = settings.form == Form::log_mean;
  std::vector<double> trace;
  Sums<T> traces;
  if (mean_form) {
    trace = mean_trace<T>(batch, settings);
  } else {
    const Blocks trace_blocks = blocks_of_traces(batch.traces.rows);
    const int layouts = kRight | (out.pull != nullptr ? kAcross : 0);
    const PackedRows<T> packed = pack<T>(batch.traces, trace_blocks, layouts, settings.threads, kernel);
    traces = sum_traces(kernel, rows, anchors, packed, trace_blocks, settings, out.pull);
  }
  run_rows(batch, settings, blocks, [&](int64_t b) {
    const Block& block = blocks.blocks[b];
    if (!anchors.contribute[block.label]) return;
    const Counts counts = anchors.counts[block.label];
    const double* sum = sums.data() + block.label * width;
    std::vector<T> z(width);
    for (int r = 0; r < block.rows; ++r) {
      const int64_t row = blocks.row(block, r), slot = b * rows.capacity + r;
      read_row(batch.embeddings, row, z.data());
      // In double: a row much longer than the others leaves little of the difference.
      double others = 0, towards = 0;
      for (int64_t c = 0; c < width; ++c) others += z[c] * (sum[c] - z[c]);
      for (int64_t c = 0; mean_form && c < width; ++c) towards += z[c] * trace[c];
      Statistics<T> of;
      of.log_positives = pairs.same.log(slot);
      of.log_negatives = pairs.other.log(slot);
      of.mean_positive = static_cast<T>(others / (settings.temperature * counts.positives));
      of.traces = mean_form ? static_cast<T>(traces_factor(settings, block.label) * towards) : traces.log(slot);
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
