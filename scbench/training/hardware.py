"""What a device could do at best: the ceiling that MFU is a share of."""

import torch

# Dense matrix products, TFLOP/s, from NVIDIA's data sheets: (part of the device's name, bf16, fp32 without TF32).
# The first that fits; variants of a chip come before the chip.
PEAK_TFLOPS = [
    ("H100 PCIe", 756.0, 51.0), ("H100 NVL", 835.0, 60.0), ("H100", 989.0, 67.0), ("H200", 989.0, 67.0), ("A100", 312.0, 19.5),
    ("A40", 149.7, 37.4), ("A30", 165.0, 10.3), ("A10G", 70.0, 35.0), ("A10", 125.0, 31.2), ("A6000", 154.8, 38.7),
    ("L40S", 362.0, 91.6), ("L40", 181.0, 90.5), ("L4", 121.0, 30.3),
]


def peak_flops(device: torch.device, precision: str, given_tflops: float | None) -> float | None:
    """FLOP/s of one device: `given_tflops` (--peak-tflops), else its data sheet's; None where neither is known (a CPU)."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * (bf16 if precision == "bf16" else fp32) for part, bf16, fp32 in PEAK_TFLOPS if part in name), None)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that this process has held, of the GPU where there is one, else resident; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # not getrusage: that one starts from the parent's peak
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
