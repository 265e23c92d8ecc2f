// CUDA C++ for g++: what nvcc knows without any header, provided by cuda_emulator.h.
#pragma once

#include "cuda_emulator.h"
#include "cuda_runtime_api.h"
