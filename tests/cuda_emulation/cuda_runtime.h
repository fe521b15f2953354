// Stands in for CUDA's header of this name when a host compiler compiles the kernels.
#pragma once

#include "cuda_runtime_api.h"
#include "device.h"
