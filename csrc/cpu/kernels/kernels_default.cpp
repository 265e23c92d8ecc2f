// The kernels for any CPU: 16-byte vectors, the baseline that the compiler targets by itself.
#define NLLX_CAPABILITY default_capability
#define NLLX_VECTOR_BYTES 16
#include "kernels.inl"
