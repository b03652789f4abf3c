"""The quantization schemes by name. Read by our Python and the quantizer's: it must import nothing but the library."""

from __future__ import annotations

SCHEMES = ("w4a16", "fp8", "awq", "gptq", "w8a8")
CALIBRATED = frozenset({"awq", "gptq"})  # impossible without samples
# llmcompressor 0.14 pins memory in its search, which PyTorch does for a GPU only.
ON_AN_ACCELERATOR = frozenset({"awq"})
