// A CUDA device on one thread of the CPU, enough of it to run the project's kernels.
//
// Each CUDA thread is a fibre; blocks run one after the other. Fibres switch only where threads meet: at a barrier and
// at an instruction of the whole warp. The sanitizers are told of the switches: AddressSanitizer sees every access to
// device memory (exact heap blocks) and to each shared array; for ThreadSanitizer every fibre is a thread, and only
// barriers order their accesses, so that a missing barrier is a reported race whatever the order in which fibres ran.
// Races between blocks are not seen. Meeting points that only some of the threads reach end the program.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Function-local statics: one copy a kernel, which one running block after the other uses.
#define __shared__ static

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif
// The emulation's own book-keeping is not under test. noipa: the compiler must not reason about what a switch changes.
#define EMULATION __attribute__((no_sanitize("thread"), no_sanitize("address"), noipa)) inline

namespace emulation {

constexpr int kLargestBlock = 1024;
constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 256 * 1024;

enum class State { running, at_warp, at_block, finished };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* sanitizer_fiber = nullptr;  // ThreadSanitizer's
  void* fake_stack = nullptr;       // AddressSanitizer's
  State state = State::finished;
  unsigned warp_generation = 0, block_generation = 0;
  dim3 thread{0, 0, 0};
};

// What a warp's lanes lay down at an instruction of the whole warp.
struct Warp {
  int arrived = 0;
  unsigned generation = 0;
  const char* instruction = nullptr;
  const void* inputs[2][kWarpSize];
  void* outputs[kWarpSize];
};

struct Device {
  Fiber host;
  Fiber fibers[kLargestBlock];
  Warp warps[kLargestBlock / kWarpSize];
  int threads = 0, arrived = 0;
  unsigned generation = 0;
  Fiber* current = nullptr;
  void (*kernel)(const void*) = nullptr;
  const void* arguments = nullptr;
  dim3 block{0, 0, 0}, block_size{0, 0, 0}, grid{0, 0, 0};
  char barriers[2], begin, end;  // addresses that ThreadSanitizer knows the ordering by
};
inline Device device;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "EMULATION: %s\n", what);
  std::fflush(stderr);
  std::_Exit(70);
}

#if !defined(__x86_64__)
#error "the emulation switches stacks by x86-64 instructions"
#endif
// Saves the callee-saved registers on the stack, leaves the stack pointer in *from and goes on at `to`.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.weak emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

EMULATION void switch_to(Fiber* target) {
  Fiber* self = device.current;
  device.current = target;
#if defined(__SANITIZE_ADDRESS__)
  const bool last = self->state == State::finished && self != &device.host;
  __sanitizer_start_switch_fiber(last ? nullptr : &self->fake_stack, target->stack, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(target->sanitizer_fiber, 1);  // 1: the switch orders nothing
#endif
  emulation_switch(&self->stack_pointer, target->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

EMULATION void order_before(void* place) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(place);
#endif
  (void)place;
}

EMULATION void order_after(void* place) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(place);
#endif
  (void)place;
}

EMULATION void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Fiber* self = device.current;
  order_after(&device.begin);
  device.kernel(device.arguments);
  // Not the same address: a thread that starts late is not ordered after one that has finished.
  order_before(&device.end);
  self->state = State::finished;
  const int start = static_cast<int>(self - device.fibers);
  for (int step = 1; step < device.threads; ++step) {
    Fiber* next = &device.fibers[(start + step) % device.threads];
    if (next->state == State::running) {
      switch_to(next);
    }
  }
  for (int t = 0; t < device.threads; ++t) {
    if (device.fibers[t].state != State::finished) {
      fail("a thread left the block while others wait at a barrier or an instruction of the warp");
    }
  }
  switch_to(&device.host);
  fail("a finished thread ran again");
}

EMULATION void prepare(Fiber* fiber) {
  if (!fiber->stack) {
    fiber->stack = static_cast<char*>(std::aligned_alloc(64, kStackBytes));
#if defined(__SANITIZE_THREAD__)
    fiber->sanitizer_fiber = __tsan_create_fiber(0);
#endif
  }
  void** top = reinterpret_cast<void**>(fiber->stack + kStackBytes - 64);
  *--top = nullptr;  // where fiber_main would return to; also aligns the stack as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int saved = 0; saved < 6; ++saved) {
    *--top = nullptr;
  }
  fiber->stack_pointer = top;
  fiber->state = State::running;
}

EMULATION void run_block() {
  for (int t = 0; t < device.threads; ++t) {
    Fiber* fiber = &device.fibers[t];
    prepare(fiber);
    fiber->thread.x = static_cast<unsigned>(t);
  }
  for (Warp& warp : device.warps) {
    warp.arrived = 0;
  }
  device.arrived = 0;
#if defined(__SANITIZE_THREAD__)
  device.host.sanitizer_fiber = __tsan_get_current_fiber();
#endif
  device.current = &device.host;
  order_before(&device.begin);
  switch_to(&device.fibers[0]);
  order_after(&device.end);
}

EMULATION cudaError_t run(dim3 grid, dim3 block, void (*kernel)(const void*), const void* arguments) {
  const bool sound = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 &&
                     grid.z <= 65535 && block.x > 0 && block.x <= kLargestBlock && block.y == 1 && block.z == 1;
  if (!sound || block.x % kWarpSize != 0) {
    return cudaErrorInvalidConfiguration;
  }
  device.kernel = kernel;
  device.arguments = arguments;
  device.threads = static_cast<int>(block.x);
  device.grid = grid;
  device.block_size = block;
  for (device.block.z = 0; device.block.z < grid.z; ++device.block.z) {
    for (device.block.y = 0; device.block.y < grid.y; ++device.block.y) {
      for (device.block.x = 0; device.block.x < grid.x; ++device.block.x) {
        run_block();
      }
    }
  }
  return cudaSuccess;
}

EMULATION void synchronize_block() {
  Fiber* self = device.current;
  void* place = &device.barriers[self->block_generation++ % 2];
  order_before(place);
  const int start = static_cast<int>(self - device.fibers);
  for (int t = 0; t < device.threads; ++t) {
    const State state = device.fibers[t].state;
    if (state == State::finished) {
      fail("a barrier of the block after some of its threads have left");
    }
    if (state == State::at_warp && t / kWarpSize == start / kWarpSize) {
      fail("a barrier of the block while the warp's other lanes wait at an instruction of the warp");
    }
  }
  if (++device.arrived == device.threads) {
    device.arrived = 0;
    ++device.generation;
    for (int t = 0; t < device.threads; ++t) {
      device.fibers[t].state = State::running;
    }
  } else {
    self->state = State::at_block;
    const unsigned generation = device.generation;
    while (device.generation == generation) {
      int step = 1;
      while (step < device.threads && device.fibers[(start + step) % device.threads].state != State::running) {
        ++step;
      }
      if (step == device.threads) {
        fail("no thread can go on: some wait at a barrier, some at an instruction of the warp");
      }
      switch_to(&device.fibers[(start + step) % device.threads]);
    }
  }
  order_after(place);
}

// All lanes of the warp lay down their operands; the last one to come does the work for all.
EMULATION void at_warp(const char* instruction, const void* a, const void* b, void* out, void (*work)(Warp&)) {
  Fiber* self = device.current;
  const int index = static_cast<int>(self - device.fibers);
  const int lane = index % kWarpSize;
  Warp& warp = device.warps[index / kWarpSize];
  if (warp.arrived > 0 && std::strcmp(warp.instruction, instruction) != 0) {
    fail("the lanes of a warp are at different instructions of the warp");
  }
  warp.instruction = instruction;
  warp.inputs[0][lane] = a;
  warp.inputs[1][lane] = b;
  warp.outputs[lane] = out;
  Fiber* lanes = &device.fibers[index - lane];
  if (++warp.arrived == kWarpSize) {
    work(warp);
    warp.arrived = 0;
    ++warp.generation;
    for (int other = 0; other < kWarpSize; ++other) {
      lanes[other].state = State::running;
    }
    return;
  }
  self->state = State::at_warp;
  const unsigned generation = warp.generation;
  while (warp.generation == generation) {
    int step = 1;
    while (step < kWarpSize && lanes[(lane + step) % kWarpSize].state != State::running) {
      ++step;
    }
    if (step == kWarpSize) {
      fail("an instruction of the warp that some of its lanes do not reach");
    }
    switch_to(&lanes[(lane + step) % kWarpSize]);
  }
}

// The fragments below are those of the PTX manual, "Matrix Fragments for mma.m16n8k16" and ".m16n8k8".
struct Fragments {
  float a[16][16], b[16][8];
};

EMULATION void add_product(Warp& warp, const Fragments& of, int depth) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* d = static_cast<float*>(warp.outputs[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < depth; ++k) {
        d[i] = static_cast<float>(d[i] + static_cast<double>(of.a[row][k]) * of.b[k][column]);
      }
    }
  }
}

EMULATION float to_float(__half value) { return __half2float(value); }
EMULATION float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
EMULATION void half_product(Warp& warp) {
  Fragments of;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    T a[8], b[4];
    std::memcpy(a, warp.inputs[0][lane], sizeof(a));
    std::memcpy(b, warp.inputs[1][lane], sizeof(b));
    const int group = lane / 4, quad = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = quad * 2 + i % 2 + (i >= 4 ? 8 : 0);
      of.a[row][column] = to_float(a[i]);
    }
    for (int i = 0; i < 4; ++i) {
      of.b[quad * 2 + i % 2 + (i >= 2 ? 8 : 0)][group] = to_float(b[i]);
    }
  }
  add_product(warp, of, 16);
}

EMULATION float low_bits_dropped(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits &= 0xffffe000u;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

EMULATION void tf32_product(Warp& warp) {
  Fragments of;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const float* a = static_cast<const float*>(warp.inputs[0][lane]);
    const float* b = static_cast<const float*>(warp.inputs[1][lane]);
    const int group = lane / 4, quad = lane % 4;
    for (int i = 0; i < 4; ++i) {
      of.a[i % 2 == 0 ? group : group + 8][i < 2 ? quad : quad + 4] = low_bits_dropped(a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      of.b[i == 0 ? quad : quad + 4][group] = low_bits_dropped(b[i]);
    }
  }
  add_product(warp, of, 8);
}

struct Shuffle {
  double value;
  int mask;
};
EMULATION void exchange(Warp& warp) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Shuffle* own = static_cast<const Shuffle*>(warp.inputs[0][lane]);
    *static_cast<double*>(warp.outputs[lane]) = static_cast<const Shuffle*>(warp.inputs[0][lane ^ own->mask])->value;
  }
}

}  // namespace emulation

#define threadIdx (emulation::device.current->thread)
#define blockIdx (emulation::device.block)
#define blockDim (emulation::device.block_size)
#define gridDim (emulation::device.grid)

inline void __syncthreads() { emulation::synchronize_block(); }

// The instructions that the kernels take from here, in place of their PTX.
namespace ntf::cuda {

EMULATION double shuffle_xor(double value, int mask) {
  const emulation::Shuffle shuffle{value, mask};
  double received = 0;
  emulation::at_warp("shuffle", &shuffle, nullptr, &received, emulation::exchange);
  return received;
}
EMULATION float shuffle_xor(float value, int mask) {
  return static_cast<float>(shuffle_xor(static_cast<double>(value), mask));
}

// To 10 bits after the point, ties away from zero.
inline float round_to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isfinite(value)) {
    bits += 0x1000;
  }
  std::memcpy(&value, &bits, sizeof(bits));
  return emulation::low_bits_dropped(value);
}

EMULATION void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  emulation::at_warp("mma.f16", a, b, d, emulation::half_product<__half>);
}
EMULATION void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  emulation::at_warp("mma.bf16", a, b, d, emulation::half_product<__nv_bfloat16>);
}
EMULATION void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  emulation::at_warp("mma.tf32", a, b, d, emulation::tf32_product);
}

template <auto kernel, typename Arguments>
cudaError_t launch(dim3 grid, dim3 block, size_t, cudaStream_t, Arguments arguments) {
  return emulation::run(
      grid, block, [](const void* given) { kernel(*static_cast<const Arguments*>(given)); }, &arguments);
}

}  // namespace ntf::cuda
