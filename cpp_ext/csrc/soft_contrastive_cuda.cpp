// The operators on CUDA tensors, through PyTorch's stable ABI; soft_contrastive.cpp has their schemas. Everything runs
// on the current stream of the tensors' device, and nothing waits for it.
#include "soft_contrastive_cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>

namespace ntf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// The first compute capability with bfloat16 and TF32 products.
constexpr int kTensorCoreMajor = 8;

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, name, device);
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", device, " does not answer: ", cudaGetErrorString(error));
  return value;
}

cuda::Device device_of(const Tensor& tensor) {
  const int device = tensor.get_device_index();
  const int shared = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return {attribute(cudaDevAttrMultiProcessorCount, device),
          std::clamp(shared / cuda::kBlockSharedBytes, 1, cuda::kWeightedRowsBlocks),
          attribute(cudaDevAttrComputeCapabilityMajor, device) >= kTensorCoreMajor};
}

void check_same_device(std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == first.get_device_index(),
                    "all tensors of the loss must be on one CUDA device, got one on device ", first.get_device_index(),
                    " and one elsewhere: move them");
  }
}

void check_shapes(const Tensor& embeddings, const Tensor& labels, const Tensor& traces) {
  STD_TORCH_CHECK(embeddings.dim() == 2 && traces.dim() == 2 && labels.dim() == 1 &&
                      labels.size(0) == embeddings.size(0) && labels.scalar_type() == ScalarType::Long &&
                      traces.size(1) == embeddings.size(1),
                  "embeddings, labels and traces must be (N, C), int64 (N,) and (J, C): call "
                  "cpp_ext.soft_contrastive_loss, which checks them");
}

ScalarType accumulation_type(const Tensor& embeddings) {
  return embeddings.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The one type that both matrices are read in: theirs, if they agree and the device has instructions for it.
ScalarType input_type(const Tensor& embeddings, const Tensor& traces, cuda::Device device) {
  const ScalarType type = embeddings.scalar_type();
  const bool half = type == ScalarType::Half || type == ScalarType::BFloat16;
  return half && device.tensor_cores && traces.scalar_type() == type ? type : accumulation_type(embeddings);
}

Tensor contiguous_as(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

cuda::Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return cuda::Type::float16;
    case ScalarType::BFloat16:
      return cuda::Type::bfloat16;
    case ScalarType::Float:
      return cuda::Type::float32;
    default:
      STD_TORCH_CHECK(type == ScalarType::Double, "embeddings must be float16, bfloat16, float32 or float64");
      return cuda::Type::float64;
  }
}

// One call: contiguous inputs, the device they are on and its current stream.
class Call {
 public:
  Call(const Tensor& embeddings, const Tensor& labels, const Tensor& traces, double temperature, double eta,
       int64_t form, int64_t denominator, bool allow_tf32)
      : guard_(embeddings.get_device_index()),
        device_(device_of(embeddings)),
        type_(input_type(embeddings, traces, device_)),
        wide_(accumulation_type(embeddings)),
        embeddings_(contiguous_as(embeddings, type_)),
        labels_(torch::stable::contiguous(labels)),
        traces_(contiguous_as(traces, type_)) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(embeddings.get_device_index(), reinterpret_cast<void**>(&stream_)));
    batch_ = {type_of(type_),
              embeddings_.const_data_ptr(),
              static_cast<const int64_t*>(labels_.const_data_ptr()),
              traces_.const_data_ptr(),
              embeddings.size(0),
              traces.size(0),
              embeddings.size(1),
              temperature,
              eta,
              static_cast<Form>(form),
              static_cast<Denominator>(denominator),
              allow_tf32};
  }

  ScalarType type() const { return type_; }
  ScalarType wide() const { return wide_; }
  bool log_mean() const { return batch_.form == Form::log_mean; }
  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) const {
    return torch::stable::new_empty(embeddings_, shape, type);
  }

  // What an earlier call of the forward gave, as it is read here.
  Tensor saved(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.scalar_type() == wide_, name,
                    " must have the accumulation type: pass what the forward gave");
    return torch::stable::contiguous(tensor);
  }

  template <class Arrays>
  void run(const Arrays& arrays) const {
    const auto bytes = static_cast<int64_t>(cuda::workspace_bytes(batch_, arrays, device_));
    const Tensor workspace = empty({bytes}, ScalarType::Byte);
    const cudaError_t error = cuda::run(batch_, arrays, device_, workspace.mutable_data_ptr(), stream_);
    STD_TORCH_CHECK(error == cudaSuccess,
                    "a kernel of the soft contrastive loss could not start: ", cudaGetErrorString(error));
  }

 private:
  DeviceGuard guard_;
  cuda::Device device_;
  ScalarType type_, wide_;
  Tensor embeddings_, labels_, traces_;
  cudaStream_t stream_ = nullptr;
  cuda::Batch batch_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& embeddings, const Tensor& labels,
                                                           const Tensor& traces, double temperature, double eta,
                                                           int64_t form, int64_t denominator, bool save,
                                                           bool allow_tf32) {
  check_same_device({&embeddings, &labels, &traces});
  check_shapes(embeddings, labels, traces);
  const Call call(embeddings, labels, traces, temperature, eta, form, denominator, allow_tf32);
  const int64_t rows = embeddings.size(0);
  const bool pulls = save && !call.log_mean();
  Tensor loss = call.empty({rows}, call.wide()), log_keys = call.empty({rows}, call.wide());
  Tensor log_positives = call.empty({rows}, call.wide()), log_traces = call.empty({rows}, call.wide());
  Tensor pull = call.empty({pulls ? rows : 0, embeddings.size(1)}, call.wide());
  call.run(cuda::Forward{loss.mutable_data_ptr(), log_keys.mutable_data_ptr(), log_positives.mutable_data_ptr(),
                         log_traces.mutable_data_ptr(), pulls ? pull.mutable_data_ptr() : nullptr});
  return {loss, log_keys, log_positives, log_traces, pull};
}

Tensor backward(const Tensor& grad_loss, const Tensor& embeddings, const Tensor& labels, const Tensor& traces,
                const Tensor& loss, const Tensor& log_keys, const Tensor& log_positives, const Tensor& pull,
                double temperature, double eta, int64_t form, int64_t denominator, bool allow_tf32) {
  check_same_device({&embeddings, &labels, &traces, &grad_loss, &loss, &log_keys, &log_positives, &pull});
  check_shapes(embeddings, labels, traces);
  const Call call(embeddings, labels, traces, temperature, eta, form, denominator, allow_tf32);
  STD_TORCH_CHECK(call.log_mean() || pull.size(0) == embeddings.size(0),
                  "pull must have a row for each embedding: run the forward with save=True");
  const Tensor upstream = call.saved(grad_loss, "grad_loss"), losses = call.saved(loss, "loss");
  const Tensor keys = call.saved(log_keys, "log_keys"), positives = call.saved(log_positives, "log_positives");
  const Tensor pulled = call.saved(pull, "pull");
  Tensor grad = call.empty({embeddings.size(0), embeddings.size(1)}, call.type());
  call.run(cuda::Backward{upstream.const_data_ptr(), losses.const_data_ptr(), keys.const_data_ptr(),
                          positives.const_data_ptr(), pulled.const_data_ptr(), grad.mutable_data_ptr()});
  return contiguous_as(grad, embeddings.scalar_type());
}

Tensor traces_backward(const Tensor& grad_loss, const Tensor& embeddings, const Tensor& labels, const Tensor& traces,
                       const Tensor& loss, const Tensor& log_traces, double temperature, double eta, int64_t form,
                       int64_t denominator, bool allow_tf32) {
  check_same_device({&embeddings, &labels, &traces, &grad_loss, &loss, &log_traces});
  check_shapes(embeddings, labels, traces);
  const Call call(embeddings, labels, traces, temperature, eta, form, denominator, allow_tf32);
  const Tensor upstream = call.saved(grad_loss, "grad_loss"), losses = call.saved(loss, "loss");
  const Tensor logs = call.saved(log_traces, "log_traces");
  Tensor grad = call.empty({traces.size(0), traces.size(1)}, call.type());
  call.run(cuda::TracesBackward{upstream.const_data_ptr(), losses.const_data_ptr(), logs.const_data_ptr(),
                                grad.mutable_data_ptr()});
  return contiguous_as(grad, traces.scalar_type());
}

}  // namespace
}  // namespace ntf

STABLE_TORCH_LIBRARY_IMPL(ntf, CUDA, m) {
  m.impl("soft_contrastive_forward", TORCH_BOX(&ntf::forward));
  m.impl("soft_contrastive_backward", TORCH_BOX(&ntf::backward));
  m.impl("soft_contrastive_traces_backward", TORCH_BOX(&ntf::traces_backward));
}
