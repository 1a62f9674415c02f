"""GPUs that a run can be planned for, by NVIDIA's data sheets (TFLOP/s: hardware.py)."""

from typing import NamedTuple

from scbench.training.hardware import PEAK_TFLOPS


class Gpu(NamedTuple):
    """One GPU. Bytes are decimal, as data sheets have them."""

    name: str  # as in PEAK_TFLOPS
    memory: float  # bytes
    bandwidth: float  # bytes a second, of its memory
    link: float  # bytes a second in one direction to the other GPUs of its host: NVLink where it has it, else PCIe

    def flops(self, precision: str) -> float:
        """Peak FLOP/s of dense matrix products; fp32 without TF32, which is not used."""
        _, bf16, fp32 = next(row for row in PEAK_TFLOPS if row[0] == self.name)
        return 1e12 * (bf16 if precision == "bf16" else fp32)


GPUS = {
    "h200": Gpu("H200", 141e9, 4.8e12, 450e9),
    "h100": Gpu("H100", 80e9, 3.35e12, 450e9),
    "h100-pcie": Gpu("H100 PCIe", 80e9, 2.0e12, 64e9),
    "a100": Gpu("A100", 80e9, 2.039e12, 300e9),
    "a100-40gb": Gpu("A100", 40e9, 1.555e12, 300e9),
    "l40s": Gpu("L40S", 48e9, 0.864e12, 32e9),
    "a40": Gpu("A40", 48e9, 0.696e12, 32e9),
    "a6000": Gpu("A6000", 48e9, 0.768e12, 32e9),
    "a30": Gpu("A30", 24e9, 0.933e12, 32e9),
    "a10": Gpu("A10", 24e9, 0.6e12, 32e9),
    "l4": Gpu("L4", 24e9, 0.3e12, 32e9),
}
