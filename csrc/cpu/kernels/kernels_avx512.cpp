// The kernels for AVX-512 (F, BW, DQ, VL): 64-byte vectors. The target is set here and not by a compiler flag,
// so that this unit alone is compiled for it; nothing of the standard library's templates may be used in it.
#if defined(__x86_64__) || defined(_M_X64)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#if !defined(__clang__)
// GCC's own header passes an undefined vector where every lane is written (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define NLLX_CAPABILITY avx512
#define NLLX_VECTOR_BYTES 64
#include "kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
