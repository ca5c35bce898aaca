// Torch's own, with a guard that does nothing: the emulated device is the processor.
#pragma once

#define DeviceGuard AcceleratorGuard
#include_next <torch/csrc/stable/accelerator.h>
#undef DeviceGuard

namespace torch::stable::accelerator {

struct DeviceGuard {
  explicit DeviceGuard(DeviceIndex) {}
};

}  // namespace torch::stable::accelerator
