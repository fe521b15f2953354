// The scalar formulas of Eq. (5) of Liang et al. 2024 (arXiv:2403.16513), for one anchor; host and device share them.
//
// With s_ik = z_i . z_k / tau and t_ij = z_i . h_j / tau, the loss of an anchor needs four statistics only:
//   log_positives   logsumexp over P(i) of s_ip, the other rows with i's label
//   log_negatives   logsumexp over the rows of the other label of s_ik
//   mean_positive   mean over P(i) of s_ip
//   traces          logsumexp over j of y_i eta t_ij, or its mean over j for log_mean
// The kernels differ in how they gather these; what follows from them is written here once.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define NTF_HOST_DEVICE __host__ __device__
#else
#define NTF_HOST_DEVICE
#endif

namespace ntf {

// The numbers are those of FORMS and DENOMINATORS in cpp_ext/ops.py.
enum class Form : int64_t { log_sum = 0, log_mean = 1, literal = 2 };
enum class Denominator : int64_t { all = 0, negatives = 1 };

// How many rows there are, seen from one anchor.
struct Counts {
  int64_t positives;  // |P(i)|
  int64_t negatives;  // rows of the other label
  int64_t traces;     // J
};

template <typename T>
struct Statistics {
  T log_positives, log_negatives, mean_positive, traces;
};

// d loss / d (each term), for an upstream gradient of 1.
template <typename T>
struct Coefficients {
  T keys;       // of L_i = logsumexp over K(i)
  T positives;  // of log_positives
  T mean;       // of mean_positive
  T traces;     // of the traces' term
};

// An anchor whose P, K or J is empty contributes 0, in value and in gradient.
NTF_HOST_DEVICE inline bool contributes(Counts counts, Denominator denominator) {
  const bool has_keys = denominator == Denominator::all || counts.negatives > 0;
  return counts.positives > 0 && has_keys && counts.traces > 0;
}

// log(exp(a) + exp(b)); either may be -infinity.
template <typename T>
NTF_HOST_DEVICE inline T log_add(T a, T b) {
  const T high = a > b ? a : b;
  const T low = a > b ? b : a;
  return low == -INFINITY ? high : high + std::log1p(std::exp(low - high));
}

// L_i, the logsumexp over K(i).
template <typename T>
NTF_HOST_DEVICE inline T log_keys(const Statistics<T>& row, Denominator denominator) {
  return denominator == Denominator::all ? log_add(row.log_positives, row.log_negatives) : row.log_negatives;
}

// The loss of an anchor that contributes.
template <typename T>
NTF_HOST_DEVICE inline T anchor_loss(const Statistics<T>& row, Counts counts, Form form, Denominator denominator) {
  const T keys = log_keys(row, denominator);
  if (form != Form::literal) {
    return keys - row.mean_positive - row.traces;
  }
  const T log_mean_positive = row.log_positives - std::log(static_cast<T>(counts.positives));
  return -std::exp(log_mean_positive + row.traces - keys) / static_cast<T>(counts.traces);
}

// Coefficients of the terms of an anchor that contributes; `loss` is its loss, which the literal form needs.
template <typename T>
NTF_HOST_DEVICE inline Coefficients<T> anchor_coefficients(T loss, Form form) {
  if (form != Form::literal) {
    return {T(1), T(0), T(-1), T(-1)};
  }
  return {-loss, loss, T(0), loss};
}

}  // namespace ntf
