// Kernels that write codes, and on request also the values of the codes, which branches of low rank multiply.

#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace fxquant {

struct Results {
  at::Tensor result, values;  // `values` is undefined unless it was requested.
};

// The two ops of a kernel whose first argument says whether values are requested.
template <auto kKernel>
struct Op;

template <class... Arguments, Results (*kKernel)(bool, Arguments...)>
struct Op<kKernel> {
  static at::Tensor one(Arguments... arguments) { return kKernel(false, arguments...).result; }

  static std::tuple<at::Tensor, at::Tensor> both(Arguments... arguments) {
    const Results found = kKernel(true, arguments...);
    return {found.result, found.values};
  }
};

}  // namespace fxquant
