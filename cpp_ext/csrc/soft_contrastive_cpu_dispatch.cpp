// Which vector code runs: the fastest of those compiled in that the processor has.
#include <atomic>
#include <string>
#include <vector>

#include "soft_contrastive_cpu_anchors.h"

namespace ntf::cpu {

namespace {

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

}  // namespace

template <typename T>
const TileKernels<T>& kernels() {
  return *runnable<T>()[chosen.load()];
}

template const TileKernels<float>& kernels<float>();
template const TileKernels<double>& kernels<double>();

const char* instruction_sets() {
  static const std::string names = [] {
    std::string joined;
    for (const TileKernels<float>* set : runnable<float>())
      joined.append(joined.empty() ? "" : ",").append(set->instruction_set);
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

}  // namespace ntf::cpu
