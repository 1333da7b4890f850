# SPDX-License-Identifier: Apache-2.0
"""What the speed is meant to be on an H100, beside which the measurements are shown."""

from __future__ import annotations

# times faster than the best bf16 attention, at 2, 3 and 4 bits
ATTENTION = {
    "llama-3-8b:1x32k": {"2": 3.5, "3": 3.0, "4": 2.5},
    "llama-3-8b:1x128k": {"2": 5.0, "3": 4.0, "4": 3.2},
    "llama-3-8b:8x32k": {"2": 5.8, "3": 4.3, "4": 3.4},
    "llama-3-8b:8x128k": {"2": 6.7, "3": 4.8, "4": 3.6},
    "llama-3-8b:32x32k": {"2": 6.7, "3": 4.8, "4": 3.6},
}
# time with Prod keys over that with MSE keys, at 3 bits
PROD_OVER_MSE = 1.10

# ms a decode step of 8 Llama-3-8B layers at 3 bits: eager, and as one CUDA graph
STEP = {
    "eager": {"1x4k": 5.8, "1x32k": 5.4, "8x32k": 5.5, "1x128k": 5.4},
    "graph": {"1x4k": 1.7, "1x32k": 1.8, "8x32k": 2.4, "1x128k": 2.0},
}
