// Runs the launch interface on cases from a file: harness CASES RESULTS. The layout of both files is that of
// tests/cuda_emulated.py. Every array is a heap block of its exact size, filled with NaN before use.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "soft_contrastive_cuda.h"

namespace {

using namespace ntf::cuda;

struct Header {
  int64_t type, rows, traces, width, form, denominator, allow_tf32, save, multiprocessors, tensor_cores;
  double temperature, eta;
};

// Heap memory without any slack, so that AddressSanitizer sees the first byte beyond it.
struct Block {
  explicit Block(size_t bytes) : size(bytes), data(static_cast<char*>(std::malloc(bytes))) {
    std::memset(data, 0xff, bytes);
  }
  Block(const Block&) = delete;
  ~Block() { std::free(data); }
  size_t size;
  char* data;
};

void fill(Block& block, std::FILE* file) {
  if (std::fread(block.data, 1, block.size, file) != block.size) {
    std::fprintf(stderr, "the case file ends too early\n");
    std::exit(2);
  }
}

void write(const void* data, size_t bytes, std::FILE* file) {
  if (std::fwrite(data, 1, bytes, file) != bytes) {
    std::fprintf(stderr, "the result file cannot be written\n");
    std::exit(2);
  }
}

template <class Arrays>
int64_t run_in_workspace(const Batch& batch, const Arrays& arrays, Device device, int64_t* error) {
  const size_t bytes = workspace_bytes(batch, arrays, device);
  void* workspace = bytes ? std::aligned_alloc(256, bytes) : nullptr;
  if (workspace) {
    std::memset(workspace, 0xff, bytes);
  }
  *error = run(batch, arrays, device, workspace, nullptr);
  std::free(workspace);
  return static_cast<int64_t>(bytes);
}

void run_case(const Header& header, std::FILE* cases, std::FILE* results) {
  const size_t sizes[] = {2, 2, 4, 8};
  const size_t narrow = sizes[header.type], wide = narrow == 8 ? 8 : 4;
  const size_t rows = header.rows, traces = header.traces, width = header.width;
  Block labels(rows * 8), z(rows * width * narrow), h(traces * width * narrow), grad_loss(rows * wide);
  for (Block* block : {&labels, &z, &h, &grad_loss}) {
    fill(*block, cases);
  }
  Block loss(rows * wide), keys(rows * wide), positives(rows * wide), log_traces(rows * wide);
  Block pull(header.save && header.form != 1 ? rows * width * wide : 0);
  Block grad_z(rows * width * narrow), grad_h(traces * width * narrow);

  const Batch batch{static_cast<Type>(header.type),
                    z.data,
                    reinterpret_cast<const int64_t*>(labels.data),
                    h.data,
                    header.rows,
                    header.traces,
                    header.width,
                    header.temperature,
                    header.eta,
                    static_cast<ntf::Form>(header.form),
                    static_cast<ntf::Denominator>(header.denominator),
                    header.allow_tf32 != 0};
  const Device device{static_cast<int>(header.multiprocessors), kWeightedRowsBlocks, header.tensor_cores != 0};
  int64_t report[6] = {};
  report[0] = run_in_workspace(batch,
                               Forward{loss.data, keys.data, positives.data, log_traces.data,
                                       header.save && header.form != 1 ? pull.data : nullptr},
                               device, &report[3]);
  if (header.save) {
    report[1] =
        run_in_workspace(batch, Backward{grad_loss.data, loss.data, keys.data, positives.data, pull.data, grad_z.data},
                         device, &report[4]);
    report[2] = run_in_workspace(batch, TracesBackward{grad_loss.data, loss.data, log_traces.data, grad_h.data}, device,
                                 &report[5]);
  }
  write(report, sizeof(report), results);
  for (const Block* block : {&loss, &keys, &positives, &log_traces, &pull, &grad_z, &grad_h}) {
    write(block->data, block->size, results);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: harness CASES RESULTS\n");
    return 2;
  }
  std::FILE* cases = std::fopen(arguments[1], "rb");
  std::FILE* results = std::fopen(arguments[2], "wb");
  if (!cases || !results) {
    std::fprintf(stderr, "cannot open the case or the result file\n");
    return 2;
  }
  Header header;
  while (std::fread(&header, sizeof(header), 1, cases) == 1) {
    run_case(header, cases, results);
  }
  std::fclose(cases);
  return std::fclose(results);
}
