// The stand-in's operators: the CPU's kernels, behind the refusals of CUDA and with its waits counted.
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <set>

namespace standin {
namespace {

using at::Tensor;
using c10::IntArrayRef;
using std::optional;

thread_local int inside = 0;  // copies that the fallback makes are not the program's
struct Inside {
  Inside() { ++inside; }
  ~Inside() { --inside; }
};

void count(const std::string& kind) {
  if (!inside) waited(kind);
}

bool here(const Tensor& t) { return t.defined() && t.device().type() == KIND; }

// ---------------------------------------------------------------------------------------------- memory and copies

c10::Device device_of(optional<at::Device> device) {
  return device && device->has_index() ? *device : c10::Device(KIND, current());
}

Tensor empty(IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device> device,
             optional<bool>, optional<at::MemoryFormat> format) {
  const c10::DeviceGuard on(device_of(device));
  return at::detail::empty_generic(size, allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                     optional<at::Device> device, optional<bool>) {
  const c10::DeviceGuard on(device_of(device));
  return at::detail::empty_strided_generic(size, stride, allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the host.
Tensor on_host(const Tensor& t) {
  if (!here(t)) return t;
  auto seen = at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU).requires_grad(false));
  if (t.is_conj()) seen = seen.conj();
  return t.is_neg() ? seen._neg_view() : seen;
}

Tensor copied_to(const Tensor& host, const Tensor& beside) {
  if (!host.defined()) return host;
  auto made = at::empty_strided(host.sizes(), host.strides(), beside.options().dtype(host.scalar_type()));
  on_host(made).copy_(host);
  return made;
}

// CUDA does not wait for an upload that is said not to block (pageable memory is staged first), nor for such a
// download into pinned memory.
Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (!here(from) && !non_blocking) count("upload");
  if (!here(to) && !(non_blocking && is_pinned(to.data_ptr()))) count("download");
  const at::NoGradGuard none;
  if (to.numel()) on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  const at::NoGradGuard none;
  if (to.numel()) on_host(to).copy_(on_host(from));
  return to;
}

at::Scalar read_value(const Tensor& t) {
  count("value");
  return on_host(t).item();
}

const Tensor& resize(const Tensor& t, c10::SymIntArrayRef size, optional<at::MemoryFormat> format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& set_storage_at(Tensor& t, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(t, std::move(storage), offset, size, stride);
}

Tensor& set_storage(Tensor& t, at::Storage storage) {
  const auto elements = static_cast<int64_t>(storage.nbytes() / t.dtype().itemsize());
  return at::native::set_storage_cpu_(t, std::move(storage), 0, {elements}, {});
}

void record_stream(Tensor&, at::Stream) {}  // memory is given back when it is done with, whoever used it

// --------------------------------------------------------------------------------------------------- what is refused

const std::set<std::string> INDEXING = {"aten::index",           "aten::index_put",     "aten::index_put_",
                                        "aten::_index_put_impl_", "aten::_unsafe_index", "aten::_unsafe_index_put"};
const std::set<std::string> NO_SCALARS = {"aten::cat", "aten::stack"};  // refuse the host's even if zero-dimensional
const std::set<std::string> SIZED_BY_VALUES = {
    "aten::nonzero", "aten::masked_select",      "aten::_unique2",  "aten::unique_dim", "aten::unique_consecutive",
    "aten::equal",   "aten::repeat_interleave", "aten::bincount", "aten::_unique",    "aten::argwhere"};

struct Given {
  size_t argument;
  Tensor tensor;
};

std::vector<Given> tensors_of(const torch::jit::Stack& stack, size_t arguments) {
  std::vector<Given> found;
  for (size_t i = 0; i < arguments; ++i) {
    const auto& value = torch::jit::peek(stack, i, arguments);
    if (value.isTensor()) {
      found.push_back({i, value.toTensor()});
    } else if (value.isTensorList()) {
      for (const Tensor& t : value.toTensorVector()) found.push_back({i, t});
    } else if (value.isOptionalTensorList()) {
      for (const optional<Tensor> t : value.toOptionalTensorList())
        if (t) found.push_back({i, *t});
    } else if (value.isGenerator()) {
      TORCH_CHECK(value.toGenerator().device().type() == KIND, "Expected a generator of the GPU but found one of ",
                  value.toGenerator().device());
    }
  }
  return found;
}

// The rules by which CUDA refuses to mix devices. The host's zero-dimensional tensors pass as numbers, and its indices
// are uploaded.
void check(const std::string& name, const std::vector<Given>& given) {
  optional<c10::Device> device;
  for (const auto& [argument, t] : given) {
    if (!here(t)) continue;
    TORCH_CHECK(!device || *device == t.device(), "Expected all tensors to be on the same device, but argument ",
                argument, " of ", name, " is on ", t.device(), " and another one on ", *device);
    device = t.device();
  }
  if (!device) return;
  for (const auto& [argument, t] : given) {
    if (!t.defined() || here(t)) continue;
    if (INDEXING.count(name) && argument == 1) continue;
    if (t.dim() == 0 && !NO_SCALARS.count(name)) continue;
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but argument ", argument, " of ", name,
                " is on the host, with shape ", t.sizes(), ", and another one on ", *device);
  }
}

void count_waits(const std::string& name, const std::vector<Given>& given) {
  if (SIZED_BY_VALUES.count(name)) count(name.substr(6));
  if (!INDEXING.count(name)) return;
  for (const auto& [argument, t] : given) {
    if (argument != 1 || !t.defined()) continue;
    if (!here(t)) count("upload of an index");
    if (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte) count("index by mask");
  }
}

void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto given = tensors_of(*stack, schema.arguments().size());
  check(schema.name(), given);
  count_waits(schema.name(), given);
  const Inside quiet;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

// ------------------------------------------------------------------- operators that the fallback would not be asked for

Tensor convolution(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                   int64_t groups) {
  check("aten::convolution", {{0, x}, {1, weight}, {2, bias.value_or(Tensor())}});
  const auto host_bias = bias && bias->defined() ? optional<Tensor>(on_host(*bias)) : std::nullopt;
  return copied_to(at::convolution(on_host(x), on_host(weight), host_bias, stride, padding, dilation, transposed,
                                   output_padding, groups),
                   x);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> mask) {
  check("aten::convolution_backward", {{0, grad}, {1, x}, {2, weight}});
  const std::vector<int64_t> bias_sizes{transposed ? weight.size(1) * groups : weight.size(0)};
  const auto [dx, dweight, dbias] =
      at::convolution_backward(on_host(grad), on_host(x), on_host(weight), at::OptionalIntArrayRef(bias_sizes), stride,
                               padding, dilation, transposed, output_padding, groups, mask);
  return {copied_to(dx, x), copied_to(dweight, x), copied_to(dbias, x)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", read_value);
  m.impl("resize_", resize);
  m.impl("record_stream", record_stream);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage_at);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view", at::native::view);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  // whole on CUDA, while torch takes them apart for a device that does not know them
  for (const auto* name : {"native_group_norm", "native_group_norm_backward", "native_layer_norm",
                           "native_layer_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
}

// Without these bitsandbytes would take its own for unknown devices, which it compiles; it has kernels for CUDA and CPUs.
TORCH_LIBRARY_IMPL(bitsandbytes, PrivateUse1, m) {
  for (const auto* name : {"int8_vectorwise_quant", "quantize_4bit", "dequantize_4bit", "quantize_blockwise",
                           "dequantize_blockwise", "optimizer_update_8bit_blockwise", "optimizer_update_32bit"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
}

TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

}  // namespace
}  // namespace standin

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("DEVICES") = static_cast<int>(standin::DEVICES);
  m.def("current", [] { return static_cast<int>(standin::current()); });
  m.def("exchange", [](int index) { return static_cast<int>(standin::exchange(static_cast<c10::DeviceIndex>(index))); });
  m.def("waits", &standin::waits);
  m.def("memory", [](int index) { return standin::memory(static_cast<c10::DeviceIndex>(index)); });
  m.def("reset_peak", [](int index) { standin::reset_peak(static_cast<c10::DeviceIndex>(index)); });
}
