# SPDX-License-Identifier: Apache-2.0
"""What the examples load models with: from the hub, a folder or a GGUF file."""

from rq_hf.loading import load_model

__all__ = ["load_model"]
