// The half of tests/gpu_on_host.py that PyTorch wants in C++: a device guard and hooks for "cuda"
// in a PyTorch that is built without CUDA, and tensors that change their device where they lie.
//
// Everything executes at once and in order, so that a stream is a number and an event is nothing.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device kGpu(DeviceType::CUDA, 0);

thread_local c10::StreamId current_stream = 0;

Stream stream(c10::StreamId id) { return Stream(Stream::UNSAFE, kGpu, id); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kGpu; }
  Device getDevice() const override { return kGpu; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const override { return stream(current_stream); }
  Stream getDefaultStream(Device) const override { return stream(0); }
  Stream exchangeStream(Stream next) const override {
    const Stream last = stream(current_stream);
    current_stream = next.id();
    return last;
  }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

// Pinned memory is the host's; who asks whether it is pinned must hear so.
struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    c10::DataPtr data = c10::GetAllocator(DeviceType::CPU)->allocate(bytes);
    void* address = data.get();
    const std::lock_guard<std::mutex> lock(mutex());
    blocks()[address] = std::move(data);
    return {address, address, &release, Device(DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  static bool holds(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex());
    return blocks().count(const_cast<void*>(data)) != 0;
  }

 private:
  static std::map<void*, c10::DataPtr>& blocks() {
    static auto* blocks = new std::map<void*, c10::DataPtr>;
    return *blocks;
  }
  static std::mutex& mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
  }
  static void release(void* address) {
    const std::lock_guard<std::mutex> lock(mutex());
    blocks().erase(address);
  }
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  long versionCuDNN() const override { return 0; }
  long versionRuntimeCuDNN() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const at::Generator generator = getNewGenerator(0);
    return generator;
  }
  bool isPinnedPtr(const void* data) const override { return Pinned::holds(data); }
  at::Allocator* getPinnedMemoryAllocator() const override {
    static Pinned pinned;
    return &pinned;
  }
  // The operations that draw are executed by the CPU's kernels, which take no other.
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>();
  }
};

// The device of a tensor is a member that only classes derived from its own may touch.
struct Open : c10::TensorImpl {
  static void move(c10::TensorImpl& tensor, Device device) {
    tensor._change_backend_component_keys(device);
    tensor.*(&Open::device_opt_) = device;
  }
};

c10::TensorImpl& tensor_at(std::uintptr_t address) {
  return *reinterpret_cast<c10::TensorImpl*>(address);
}

using Storage = c10::intrusive_ptr<c10::StorageImpl>;

// The tensor is the GPU's, on memory of the GPU.
void put(c10::TensorImpl& tensor, const Storage& storage) {
  tensor.set_storage_keep_dtype(c10::Storage(storage));
  Open::move(tensor, kGpu);
}

}  // namespace

extern "C" {

// Before PyTorch asks for the first time whether there is a GPU.
void gpu_on_host_hooks() {
  at::CUDAHooksRegistry()->Register(
      "CUDAHooks",
      [](at::CUDAHooksArgs) -> std::unique_ptr<at::CUDAHooksInterface> {
        return std::make_unique<Hooks>();
      },
      "", c10::REGISTRY_PREFERRED);
}

// After all of PyTorch is loaded: the last guard that is registered is the one that counts.
void gpu_on_host_guard() {
  static Guard guard;
  const c10::impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, &guard);
}

// A tensor of the host that nobody else has becomes the GPU's, its memory too.
void gpu_on_host_move(std::uintptr_t tensor) {
  c10::TensorImpl& moved = tensor_at(tensor);
  moved.storage().unsafeGetStorageImpl()->mutable_data_ptr().unsafe_set_device(kGpu);
  Open::move(moved, kGpu);
}

// `host` becomes a tensor of the host on the memory of a tensor of the GPU, which lives as long.
void gpu_on_host_view(std::uintptr_t host, std::uintptr_t gpu) {
  const auto source = c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(&tensor_at(gpu));
  const auto storage = Storage::reclaim_copy(source->storage().unsafeGetStorageImpl());
  c10::DataPtr data(
      storage->mutable_data(), new Storage(storage),
      [](void* held) { delete static_cast<Storage*>(held); }, at::kCPU);
  c10::TensorImpl& view = tensor_at(host);
  view.shallow_copy_from(source);
  view.set_storage_keep_dtype(c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage->nbytes(), std::move(data),
      c10::GetAllocator(DeviceType::CPU), true)));
  Open::move(view, at::kCPU);
}

// A result that is a view of `view`, which is one of a tensor of the GPU, becomes a view of that.
void gpu_on_host_rebase(std::uintptr_t result, std::uintptr_t gpu) {
  put(tensor_at(result), Storage::reclaim_copy(tensor_at(gpu).storage().unsafeGetStorageImpl()));
}

// What an operation did to the shape of a view, or by resizing to its memory, is done to the tensor
// that it is a view of.
void gpu_on_host_adopt(std::uintptr_t gpu, std::uintptr_t host) {
  c10::TensorImpl& tensor = tensor_at(gpu);
  const auto view = c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(&tensor_at(host));
  const auto storage = Storage::reclaim_copy(tensor.storage().unsafeGetStorageImpl());
  c10::StorageImpl& memory = *view->storage().unsafeGetStorageImpl();
  if (memory.data() != storage->data()) {
    storage->set_nbytes(memory.nbytes());
    memory.mutable_data_ptr().unsafe_set_device(kGpu);
    storage->set_data_ptr_noswap(std::move(memory.mutable_data_ptr()));
  }
  tensor.shallow_copy_from(view);
  put(tensor, storage);
}

// A tensor of the GPU is given other memory of it.
void gpu_on_host_set(std::uintptr_t gpu, std::uintptr_t storage, std::int64_t offset,
                     std::int64_t dimensions, const std::int64_t* sizes,
                     const std::int64_t* strides) {
  put(tensor_at(gpu), Storage::reclaim_copy(reinterpret_cast<c10::StorageImpl*>(storage)));
  const auto count = static_cast<std::size_t>(dimensions);
  tensor_at(gpu).set_sizes_and_strides({sizes, count}, {strides, count}, offset);
}

std::int64_t gpu_on_host_stream() { return current_stream; }

void gpu_on_host_set_stream(std::int64_t id) { current_stream = id; }
}
