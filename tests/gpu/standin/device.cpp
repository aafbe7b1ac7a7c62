// The stand-in's devices: which is current, and memory that is the host's, metered per device.
#include "device.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

namespace standin {
namespace {

struct Meter {
  std::atomic<int64_t> live{0};
  std::atomic<int64_t> peak{0};

  void add(int64_t bytes) {
    const int64_t now = live += bytes;
    int64_t known = peak.load();
    while (now > known && !peak.compare_exchange_weak(known, now)) {
    }
  }
};

std::array<Meter, DEVICES> meters;
thread_local c10::DeviceIndex current_index = 0;

std::mutex lock;
std::map<std::string, int64_t> counted;       // waits by kind
std::map<const char*, size_t> pinned_blocks;  // start -> bytes

struct Block {
  void* data;
  size_t bytes;
  c10::DeviceIndex index;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  meters[block->index].live -= static_cast<int64_t>(block->bytes);
  c10::free_cpu(block->data);
  delete block;
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    meters[current_index].add(static_cast<int64_t>(bytes));
    return {data, new Block{data, bytes, current_index}, &release, c10::Device(KIND, current_index)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // the context is not the data
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

void unpin(void* data) {
  {
    std::lock_guard<std::mutex> held(lock);
    pinned_blocks.erase(static_cast<const char*>(data));
  }
  c10::free_cpu(data);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes ? bytes : 1);
    std::lock_guard<std::mutex> held(lock);
    pinned_blocks[static_cast<const char*>(data)] = bytes;
    return {data, data, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;
REGISTER_ALLOCATOR(KIND, &device_memory)

c10::DeviceIndex checked(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < DEVICES, "invalid device ordinal ", static_cast<int>(index));
  return index;
}

// Everything is done when it is asked for, so a stream or an event has nothing to do.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device device) const override { return {KIND, exchange(device.index())}; }
  c10::Device getDevice() const override { return {KIND, current_index}; }
  void setDevice(c10::Device device) const override { exchange(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_index = device.index(); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static int done;
    *event = &done;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { waited("synchronize"); }
  void synchronizeEvent(void*) const override { waited("synchronize"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { waited("synchronize"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(c10::DeviceIndex index) const override { exchange(index); }
  c10::DeviceIndex getCurrentDevice() const override { return current_index; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return exchange(index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchange(index); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = device_memory.allocate(bytes);
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};
const bool hooked = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

}  // namespace

c10::DeviceIndex current() { return current_index; }

c10::DeviceIndex exchange(c10::DeviceIndex index) {
  const auto before = current_index;
  if (index >= 0) current_index = checked(index);
  return before;
}

c10::Allocator* allocator() { return &device_memory; }

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> held(lock);
  const auto* at = static_cast<const char*>(data);
  auto next = pinned_blocks.upper_bound(at);
  if (next == pinned_blocks.begin()) return false;
  --next;
  return at < next->first + std::max<size_t>(next->second, 1);
}

void waited(const std::string& kind) {
  std::lock_guard<std::mutex> held(lock);
  ++counted[kind];
}

std::map<std::string, int64_t> waits() {
  std::lock_guard<std::mutex> held(lock);
  return counted;
}

std::map<std::string, int64_t> memory(c10::DeviceIndex index) {
  const auto& meter = meters[checked(index)];
  return {{"live", meter.live.load()}, {"peak", meter.peak.load()}};
}

void reset_peak(c10::DeviceIndex index) {
  auto& meter = meters[checked(index)];
  meter.peak = meter.live.load();
}

}  // namespace standin
