// A CUDA device for a torch that is built for CPUs, so that autograd can trace tensors on it that hold nothing
// (FakeTensorMode). It has one device with one stream, and runs nothing. To be loaded before `import torch`.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;

struct OneDevice : Guard {
  const Device device{DeviceType::CUDA, 0};
  Device getDevice() const override { return device; }
  Device exchangeDevice(Device) const override { return device; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, device); }
  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};

struct NoRuntime : CUDAHooksInterface {
  explicit NoRuntime(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, NoRuntime)

}  // namespace at

static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new at::OneDevice);
