// The kernels for AVX2 with FMA and F16C: 32-byte vectors. The target is set here and not by a compiler flag,
// so that this unit alone is compiled for it; nothing of the standard library's templates may be used in it.
#if defined(__x86_64__) || defined(_M_X64)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define NLLX_CAPABILITY avx2
#define NLLX_VECTOR_BYTES 32
#include "kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
