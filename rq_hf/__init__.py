# SPDX-License-Identifier: Apache-2.0
"""RotorQuant: a packed 2-4 bit key-value cache for Hugging Face Transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rq_hf.cache import RotorQuantCache
    from rq_hf.config import RotorQuantConfig
    from rq_hf.graph import cuda_graph
    from rq_hf.integration import use_rotorquant
    from rq_hf.static_cache import RotorQuantStaticCache

__version__ = "0.1.0"
__all__ = [
    "RotorQuantCache",
    "RotorQuantConfig",
    "RotorQuantStaticCache",
    "__version__",
    "cuda_graph",
    "use_rotorquant",
]

_HOMES = {
    "RotorQuantCache": "rq_hf.cache",
    "RotorQuantConfig": "rq_hf.config",
    "RotorQuantStaticCache": "rq_hf.static_cache",
    "cuda_graph": "rq_hf.graph",
    "use_rotorquant": "rq_hf.integration",
}


def __getattr__(name: str) -> Any:
    # looked up late: `rq_hf.quant` and the command line do without transformers
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
