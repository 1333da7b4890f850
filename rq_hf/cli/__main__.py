# SPDX-License-Identifier: Apache-2.0
"""python -m rq_hf.cli"""

from rq_hf.cli import main

main()
