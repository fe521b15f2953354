// The operators and their CPU kernels, through PyTorch's stable ABI; cpp_ext/ops.py describes arguments and results.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

#include "soft_contrastive_cpu.h"

namespace ntf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cpu::Matrix matrix_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.scalar_type(), tensor.size(0),
          tensor.size(1),          tensor.stride(0),     tensor.stride(1)};
}

cpu::Batch batch_of(const Tensor& embeddings, const Tensor& labels, const Tensor& traces) {
  STD_TORCH_CHECK(embeddings.dim() == 2 && traces.dim() == 2 && labels.dim() == 1 &&
                      labels.size(0) == embeddings.size(0) && labels.scalar_type() == ScalarType::Long &&
                      traces.size(1) == embeddings.size(1),
                  "embeddings, labels and traces must be (N, C), int64 (N,) and (J, C): call "
                  "cpp_ext.soft_contrastive_loss, which checks them");
  STD_TORCH_CHECK(embeddings.is_cpu() && labels.is_cpu() && traces.is_cpu(),
                  "embeddings, labels and traces must be on one device: move them");
  for (const Tensor* tensor : {&embeddings, &traces}) {
    const ScalarType type = tensor->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
                        type == ScalarType::Double,
                    "embeddings and traces must be float16, bfloat16, float32 or float64: convert them");
  }
  return {matrix_of(embeddings), static_cast<const int64_t*>(labels.const_data_ptr()), labels.stride(0),
          matrix_of(traces)};
}

cpu::Settings settings_of(double temperature, double eta, int64_t form, int64_t denominator) {
  STD_TORCH_CHECK(form >= 0 && form <= 2 && (denominator == 0 || denominator == 1),
                  "form must be 0 to 2 and denominator 0 or 1, got ", form, " and ", denominator,
                  ": cpp_ext/ops.py has their names");
  return {temperature, eta, static_cast<Form>(form), static_cast<Denominator>(denominator),
          static_cast<int>(torch::stable::get_num_threads())};
}

bool wide(const Tensor& embeddings) { return embeddings.scalar_type() == ScalarType::Double; }

ScalarType accumulation_type(const Tensor& embeddings) {
  return wide(embeddings) ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// What a backward pass reads: contiguous, of the accumulation type, with a number for each of `size` places.
class Contiguous {
 public:
  Contiguous(const Tensor& tensor, ScalarType type, const char* name, int64_t size)
      : tensor_(torch::stable::contiguous(tensor)) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == type && tensor.numel() == size, name,
                    " must have the accumulation type and a place for each row: pass what the forward gave");
  }
  template <typename T>
  const T* data() const {
    return static_cast<const T*>(tensor_.const_data_ptr());
  }

 private:
  Tensor tensor_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& embeddings, const Tensor& labels,
                                                           const Tensor& traces, double temperature, double eta,
                                                           int64_t form, int64_t denominator, bool save,
                                                           bool /*allow_tf32*/) {
  const cpu::Batch batch = batch_of(embeddings, labels, traces);
  const cpu::Settings settings = settings_of(temperature, eta, form, denominator);
  const ScalarType type = accumulation_type(embeddings);
  const int64_t n = embeddings.size(0), width = embeddings.size(1);
  const bool pulls = save && settings.form != Form::log_mean;
  const auto rows = [&] { return torch::stable::new_empty(embeddings, {n}, type); };
  Tensor loss = rows(), log_keys = rows(), log_positives = rows(), log_traces = rows();
  Tensor pull = torch::stable::new_empty(embeddings, {pulls ? n : 0, width}, type);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cpu::forward<T>(batch, settings,
                    {data<T>(loss), data<T>(log_keys), data<T>(log_positives), data<T>(log_traces),
                     pulls ? data<T>(pull) : nullptr});
  };
  wide(embeddings) ? run(0.0) : run(0.0f);
  return {loss, log_keys, log_positives, log_traces, pull};
}

Tensor backward(const Tensor& grad_loss, const Tensor& embeddings, const Tensor& labels, const Tensor& traces,
                const Tensor& loss, const Tensor& log_keys, const Tensor& log_positives, const Tensor& pull,
                double temperature, double eta, int64_t form, int64_t denominator, bool /*allow_tf32*/) {
  const cpu::Batch batch = batch_of(embeddings, labels, traces);
  const cpu::Settings settings = settings_of(temperature, eta, form, denominator);
  const ScalarType type = accumulation_type(embeddings);
  const int64_t n = embeddings.size(0);
  STD_TORCH_CHECK(settings.form == Form::log_mean || pull.size(0) == n,
                  "pull must have a row for each embedding: run the forward with save=True");
  const Contiguous upstream(grad_loss, type, "grad_loss", n), losses(loss, type, "loss", n),
      keys(log_keys, type, "log_keys", n), positives(log_positives, type, "log_positives", n),
      pulled(pull, type, "pull", pull.size(0) * embeddings.size(1));
  Tensor grad = torch::stable::new_empty(embeddings, {embeddings.size(0), embeddings.size(1)}, type);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* pull_rows = settings.form == Form::log_mean ? nullptr : pulled.data<T>();
    cpu::backward<T>(batch, settings,
                     {upstream.data<T>(), losses.data<T>(), keys.data<T>(), positives.data<T>(), nullptr, pull_rows},
                     data<T>(grad));
  };
  wide(embeddings) ? run(0.0) : run(0.0f);
  return embeddings.scalar_type() == type ? grad : torch::stable::to(grad, embeddings.scalar_type());
}

Tensor traces_backward(const Tensor& grad_loss, const Tensor& embeddings, const Tensor& labels, const Tensor& traces,
                       const Tensor& loss, const Tensor& log_traces, double temperature, double eta, int64_t form,
                       int64_t denominator, bool /*allow_tf32*/) {
  const cpu::Batch batch = batch_of(embeddings, labels, traces);
  const cpu::Settings settings = settings_of(temperature, eta, form, denominator);
  const ScalarType type = accumulation_type(embeddings);
  const int64_t n = embeddings.size(0);
  const Contiguous upstream(grad_loss, type, "grad_loss", n), losses(loss, type, "loss", n),
      logs(log_traces, type, "log_traces", n);
  Tensor grad = torch::stable::new_empty(traces, {traces.size(0), traces.size(1)}, type);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cpu::traces_backward<T>(batch, settings,
                            {upstream.data<T>(), losses.data<T>(), nullptr, nullptr, logs.data<T>(), nullptr},
                            data<T>(grad));
  };
  wide(embeddings) ? run(0.0) : run(0.0f);
  return traces.scalar_type() == type ? grad : torch::stable::to(grad, traces.scalar_type());
}

std::string instruction_sets() { return cpu::instruction_sets(); }

void use_instruction_set(std::string name) {
  STD_TORCH_CHECK(cpu::use_instruction_set(name.c_str()), "instruction set must be one of ", cpu::instruction_sets(),
                  ", got ", name, ": choose one of them");
}

}  // namespace
}  // namespace ntf

STABLE_TORCH_LIBRARY(ntf, m) {
  m.def(
      "soft_contrastive_forward(Tensor embeddings, Tensor labels, Tensor traces, float temperature, float eta, "
      "int form, int denominator, bool save, bool allow_tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "soft_contrastive_backward(Tensor grad_loss, Tensor embeddings, Tensor labels, Tensor traces, Tensor loss, "
      "Tensor log_keys, Tensor log_positives, Tensor pull, float temperature, float eta, int form, int denominator, "
      "bool allow_tf32) -> Tensor");
  m.def(
      "soft_contrastive_traces_backward(Tensor grad_loss, Tensor embeddings, Tensor labels, Tensor traces, "
      "Tensor loss, Tensor log_traces, float temperature, float eta, int form, int denominator, bool allow_tf32) "
      "-> Tensor");
  // Which vector code runs on the CPU; for tests and for reports.
  m.def("instruction_sets() -> str");
  m.def("use_instruction_set(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ntf, CPU, m) {
  m.impl("soft_contrastive_forward", TORCH_BOX(&ntf::forward));
  m.impl("soft_contrastive_backward", TORCH_BOX(&ntf::backward));
  m.impl("soft_contrastive_traces_backward", TORCH_BOX(&ntf::traces_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ntf, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&ntf::instruction_sets));
  m.impl("use_instruction_set", TORCH_BOX(&ntf::use_instruction_set));
}
