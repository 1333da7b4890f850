# SPDX-License-Identifier: Apache-2.0
"""Triton kernels. Imported only inside the calls that need them."""
