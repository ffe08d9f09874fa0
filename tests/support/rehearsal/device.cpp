// A CUDA device for a torch without CUDA: its memory is the host's, its kernels are those of the CPU.
//
// What a real device refuses is refused with CUDA's words: tensors of two devices in one operation, and more memory than
// there is. What makes the host wait for a real device is counted, told, or refused (wait_mode). Speed, order of streams
// and rounding are not those of a GPU.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>

namespace {
using at::Tensor;
using c10::Device, c10::DispatchKey, c10::DispatchKeySet, c10::IValue, c10::Storage, c10::StorageImpl, c10::TensorImpl;

const Device GPU(c10::kCUDA, 0);

// ---- memory ---------------------------------------------------------------------------------------------------------

std::atomic<int64_t> held{0}, most_held{0}, capacity{0};

void take(int64_t bytes) {
  const int64_t now = held += bytes;
  const int64_t all = capacity.load();
  if (all && bytes > 0 && now > all) {
    held -= bytes;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes; ", now - bytes, " of ", all, " are in use (rehearsed)");
  }
  for (int64_t seen = most_held; now > seen && !most_held.compare_exchange_weak(seen, now);) {}
}

void* aligned(size_t bytes) {
  void* memory = nullptr;
  TORCH_CHECK(posix_memalign(&memory, 64, std::max<size_t>(bytes, 1)) == 0, "no host memory");
  return memory;
}

// What a device storage owns: memory of its own, or the host storage in which a kernel left its result.
struct Owned {
  void* memory;
  Storage result;
  int64_t bytes;
};

void give_back(void* context) {
  auto* owned = static_cast<Owned*>(context);
  held -= owned->bytes;
  free(owned->memory);
  delete owned;
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, GPU};
    take(int64_t(bytes));
    void* memory = aligned(bytes);
    return {memory, new Owned{memory, {}, int64_t(bytes)}, &give_back, GPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} device_memory;

c10::DataPtr adopt(const Storage& result) {
  const auto bytes = int64_t(result.nbytes());
  take(bytes);
  return {result.mutable_data(), new Owned{nullptr, result, bytes}, &give_back, GPU};
}

std::mutex pinned_lock;
std::unordered_set<const void*> pinned;

void unpin(void* memory) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  pinned.erase(memory);
  free(memory);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = aligned(bytes);
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.insert(memory);
    return {memory, memory, &unpin, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} pinned_memory;

bool is_pinned(const Tensor& tensor) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  return pinned.count(tensor.storage().data()) > 0;
}

// ---- waiting --------------------------------------------------------------------------------------------------------

enum WaitMode { IGNORE = 0, TELL = 1, REFUSE = 2 };
std::atomic<int> wait_mode{IGNORE};
std::atomic<void (*)(const char*)> listener{nullptr};

void host_waits(const std::string& why) {
  const int mode = wait_mode;
  if (mode == IGNORE) return;
  TORCH_CHECK(mode != REFUSE, "called a synchronizing CUDA operation: ", why, " (rehearsed)");
  if (auto tell = listener.load()) tell(why.c_str());
}

// Operations whose result has a size, or is a number, that only the device knows.
const std::unordered_set<std::string> READ_BACK{
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "unique_dim_consecutive", "bincount", "_assert_async.msg", "is_nonzero", "isin", "histc"};
// Operations that take host tensors beside device tensors: they copy the former.
const std::unordered_set<std::string> TAKE_HOST_INDICES{"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"};

// ---- from device to host and back -----------------------------------------------------------------------------------

// The tensors of one call, each device storage once: views of one storage stay views of one storage.
class Crossing {
 public:
  Tensor host(const Tensor& device) {
    for (const auto& [known, twin] : tensors_)
      if (known.is_same(device)) return twin;
    auto* storage = device.storage().unsafeGetStorageImpl();
    auto found = hosts_.find(storage);
    if (found == hosts_.end()) {
      auto impl = c10::make_intrusive<StorageImpl>(StorageImpl::use_byte_size_t(), storage->nbytes(), c10::DataPtr(storage->mutable_data(), c10::kCPU), c10::GetCPUAllocator(), true);
      found = hosts_.emplace(storage, Storage(std::move(impl))).first;
      devices_.emplace(found->second.unsafeGetStorageImpl(), device.storage());
    }
    auto impl = c10::make_intrusive<TensorImpl>(Storage(found->second), DispatchKeySet(DispatchKey::CPU), device.dtype());
    impl->set_sizes_and_strides(device.sizes(), device.strides(), device.storage_offset());
    if (device.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    tensors_.emplace_back(device, Tensor(std::move(impl)));
    return tensors_.back().second;
  }

  Tensor device(const Tensor& result) {
    for (const auto& [known, twin] : tensors_)
      if (twin.is_same(result)) return known;
    auto* storage = result.storage().unsafeGetStorageImpl();
    auto found = devices_.find(storage);
    c10::intrusive_ptr<TensorImpl> impl;
    const Tensor* base = nullptr;
    if (found == devices_.end())
      found = devices_.emplace(storage, Storage(c10::make_intrusive<StorageImpl>(StorageImpl::use_byte_size_t(), result.storage().nbytes(), adopt(result.storage()), &device_memory, true))).first;
    else
      for (const auto& [known, twin] : tensors_)
        if (known.storage().is_alias_of(found->second)) base = &known;
    // a view has the keys of its base, so that autograd and inference mode treat it alike
    if (base) impl = c10::make_intrusive<TensorImpl>(TensorImpl::VIEW, Storage(found->second), base->key_set(), result.dtype());
    else impl = c10::make_intrusive<TensorImpl>(Storage(found->second), DispatchKeySet(DispatchKey::CUDA), result.dtype());
    impl->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
    return Tensor(std::move(impl));
  }

  // Outputs that the kernel has resized, and changed sizes and strides.
  void settle() {
    for (auto& [device, host] : tensors_) {
      auto* own = device.storage().unsafeGetStorageImpl();
      if (host.storage().data() != own->data() || host.storage().nbytes() != own->nbytes()) {
        own->set_data_ptr_noswap(adopt(host.storage()));
        own->set_nbytes(host.storage().nbytes());
      }
      if (device.sizes() != host.sizes() || device.strides() != host.strides() || device.storage_offset() != host.storage_offset())
        device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

  bool empty() const { return tensors_.empty(); }

 private:
  std::vector<std::pair<Tensor, Tensor>> tensors_;
  std::unordered_map<StorageImpl*, Storage> hosts_;
  std::unordered_map<StorageImpl*, Storage> devices_;
};

// Every tensor inside a value, changed by a function.
template <class F>
IValue changed(const IValue& value, F change) {
  if (value.isTensor()) return value.toTensor().defined() ? IValue(change(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<Tensor> all;
    for (const Tensor& one : value.toTensorVector()) all.push_back(one.defined() ? change(one) : one);
    return all;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> all;
    for (const auto& one : value.toOptionalTensorVector()) all.push_back(one && one->defined() ? std::optional<Tensor>(change(*one)) : one);
    return all;
  }
  return value;
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name().substr(schema.name().find("::") + 2);
  Crossing crossing;
  bool host_tensor = false, device_mask = false;
  const size_t first = stack->size() - schema.arguments().size();
  for (size_t i = first; i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    if (value.isDevice() && value.toDevice().is_cuda()) value = IValue(Device(c10::kCPU));
    const bool among_indices = value.isList();
    value = changed(value, [&](const Tensor& tensor) {
      if (tensor.is_cuda()) {
        device_mask |= among_indices && tensor.scalar_type() == at::kBool;
        return crossing.host(tensor);
      }
      host_tensor |= tensor.is_cpu() && tensor.dim() > 0;
      return tensor;
    });
  }
  const bool indexes = TAKE_HOST_INDICES.count(name) > 0;
  TORCH_CHECK(
      !host_tensor || crossing.empty() || indexes,
      "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (rehearsed; ", name, ")");
  if (READ_BACK.count(name) && !crossing.empty()) host_waits(name);
  if (indexes && device_mask) host_waits(name + " by a mask");
  if (indexes && host_tensor) host_waits(name + " by indices of the host");
  if (name == "repeat_interleave" && schema.overload_name() == "Tensor" && (*stack).back().isNone()) host_waits(name + " without output_size");
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  crossing.settle();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    value = changed(value, [&](const Tensor& tensor) { return tensor.is_cpu() ? crossing.device(tensor) : tensor; });
  }
}

Tensor& copy_into(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.is_cuda() != from.is_cuda()) {
    const Tensor& host = to.is_cuda() ? from : to;
    const std::string way = to.is_cuda() ? "copy to the device" : "copy to the host";
    // cudaMemcpyAsync returns at once for page-locked memory alone
    if (!is_pinned(host)) host_waits(way + ", memory not page-locked");
    else if (!non_blocking) host_waits(way + ", blocking");
  }
  Crossing crossing;
  Tensor target = to.is_cuda() ? crossing.host(to) : to;
  const Tensor source = from.is_cuda() ? crossing.host(from) : from;
  at::AutoDispatchBelowAutograd guard;
  target.copy_(source);
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  return copy_into(target, from, non_blocking);
}

using Sizes = c10::SymIntArrayRef;

Tensor empty(Sizes size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_memory, DispatchKeySet(DispatchKey::CUDA), at::dtype_or_default(dtype), format);
}

Tensor empty_strided(Sizes size, Sizes stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &device_memory, DispatchKeySet(DispatchKey::CUDA), at::dtype_or_default(dtype));
}

Tensor& place(Tensor& self, Storage storage, at::IntArrayRef size, at::IntArrayRef stride, int64_t offset) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& set_part(Tensor& self, Storage storage, c10::SymInt offset, Sizes size, Sizes stride) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  std::vector<int64_t> strides = C10_AS_INTARRAYREF_SLOW(stride).vec();
  if (strides.size() != sizes.size()) {
    strides.assign(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  }
  return place(self, std::move(storage), sizes, strides, offset.expect_int());
}

Tensor& set_whole(Tensor& self, Storage storage) {
  const auto count = int64_t(storage.nbytes() / self.dtype().itemsize());
  return place(self, std::move(storage), {count}, {1}, 0);
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return place(self, source.storage(), source.sizes(), source.strides(), source.storage_offset());
}

Tensor& set_nothing(Tensor& self) {
  return place(self, Storage(c10::make_intrusive<StorageImpl>(StorageImpl::use_byte_size_t(), 0, &device_memory, true)), {0}, {1}, 0);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("copy_", TORCH_FN(copy_into));
  library.impl("_copy_from", TORCH_FN(copy_from));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_part));
  library.impl("set_.source_Storage", TORCH_FN(set_whole));
  library.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  library.impl("set_", TORCH_FN(set_nothing));
  library.impl("record_stream", +[](Tensor&, at::Stream) {});
}

// ---- streams and events: everything is done when it returns ----------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream only() { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return only(); }
  c10::Stream getDefaultStream(Device) const override { return only(); }
  c10::Stream getStreamFromGlobalPool(Device, bool) const override { return only(); }
  c10::Stream getNewStream(Device, int) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const override { return only(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { host_waits("stream.synchronize"); }
  void synchronizeEvent(void*) const override { host_waits("event.synchronize"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { host_waits("synchronize"); }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0; }
};

const c10::impl::DeviceGuardImplRegistrar guard(c10::kCUDA, new Guard());
const bool memory_is_set = (c10::SetAllocator(c10::kCUDA, &device_memory), true);
}  // namespace

namespace at {
struct RehearsedHooks : CUDAHooksInterface {
  explicit RehearsedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* memory) const override {
    std::lock_guard<std::mutex> guard(pinned_lock);
    return pinned.count(memory) > 0;
  }
  void deviceSynchronize(DeviceIndex) const override { host_waits("synchronize"); }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, RehearsedHooks)
}  // namespace at

extern "C" {
int64_t rehearsed_held() { return held; }
int64_t rehearsed_most_held() { return most_held; }
void rehearsed_forget_most() { most_held = held.load(); }
void rehearsed_capacity(int64_t bytes) { capacity = bytes; }
int rehearsed_waits(int mode) { return wait_mode.exchange(mode); }
void rehearsed_listener(void (*tell)(const char*)) { listener = tell; }
void rehearsed_wait(const char* why) { host_waits(why); }
}
