# SPDX-License-Identifier: Apache-2.0
"""The quantizers by name."""

from rq_hf.quant.mse_quantizer import MSEQuantizer
from rq_hf.quant.prod_quantizer import ProdQuantizer

__all__ = ["QUANTIZERS", "MSEQuantizer", "ProdQuantizer"]

QUANTIZERS: dict[str, type[MSEQuantizer] | type[ProdQuantizer]] = {
    "mse": MSEQuantizer,
    "prod": ProdQuantizer,
}
