// Class indices out of range on a GPU. torch ends the context with a device-side assert; here the kernel leaves a
// record in host memory, gives the row a NaN loss and a zero gradient, and the host raises IndexError at the next
// chance.
#pragma once

#include "kernels/launches.h"

namespace nllx {

// The record of the current device, in pinned host memory.
BadTarget* bad_target_record();

// Raises IndexError for a target that a kernel has found on any device, without waiting for those still running.
void raise_pending_bad_target();

// After a launch: with the environment variable NLLX_SYNC_ERRORS=1 waits for the stream and raises at once.
void raise_bad_target_if_synchronous(cudaStream_t stream);

}  // namespace nllx
