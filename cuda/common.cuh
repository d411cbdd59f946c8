// common.cuh: what every CUDA file of this backend shares. Status codes come from errors.h; nothing
// here throws.
#pragma once

#include <cuda_runtime.h>

#include "dispatch.h"
