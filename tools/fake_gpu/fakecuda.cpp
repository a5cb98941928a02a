// A CUDA device that computes nothing: what autograd asks of a device, so that a backward pass
// runs over FakeTensors of device "cuda", in a device thread of its own as on a GPU.
//
// Loaded before torch is imported, because torch looks for its CUDA hooks once.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <memory>

namespace {

thread_local c10::DeviceIndex current = 0;

void make_current(c10::Device device) {
  current = device.index() < 0 ? 0 : device.index();
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType kType = c10::DeviceType::CUDA;

  c10::DeviceType type() const override { return kType; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return {kType, current}; }
  void setDevice(c10::Device device) const override { make_current(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { make_current(device); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before{kType, current};
    make_current(device);
    return before;
  }

  // One stream, on which everything is over at once.
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device.index() < 0 ? c10::Device(kType, current) : device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static int recorded;
    *event = &recorded;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex getCurrentDevice() const override { return current; }
  at::DeviceIndex current_device() const override { return current; }
  int getNumGPUs() const override { return 1; }
};

std::unique_ptr<at::CUDAHooksInterface> make_hooks(at::CUDAHooksArgs arguments) {
  return std::make_unique<CUDAHooks>(arguments);
}

// torch's CUDA build registers hooks of its own, with the default priority.
const bool registered = [] {
  at::CUDAHooksRegistry()->Register("CUDAHooks", make_hooks, c10::REGISTRY_PREFERRED);
  return true;
}();

}  // namespace

// Called once torch is imported, whose CUDA build registers a guard of its own.
extern "C" void install_guard() {
  static const Guard guard;
  const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
}
