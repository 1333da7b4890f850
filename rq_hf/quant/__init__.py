# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the method: rotations, codebooks, packing, sketches and quantizers."""
