// The names of the CUDA runtime that host code of the kernels uses.
#pragma once

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };

cudaError_t cudaGetLastError();
