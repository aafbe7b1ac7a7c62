// What the two halves of the stand-in share: its memory (device.cpp) and its kernels (kernels.cpp).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include <cstdint>
#include <map>
#include <string>

namespace standin {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex DEVICES = 2;

c10::DeviceIndex current();
c10::DeviceIndex exchange(c10::DeviceIndex index);  // returns the device that was current
c10::Allocator* allocator();                        // of the current device
bool is_pinned(const void* data);

// One event at which a host that feeds a CUDA stream would wait for it, by kind.
void waited(const std::string& kind);

std::map<std::string, int64_t> waits();
std::map<std::string, int64_t> memory(c10::DeviceIndex index);  // live and peak bytes
void reset_peak(c10::DeviceIndex index);

}  // namespace standin
