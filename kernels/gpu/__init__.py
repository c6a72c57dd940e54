"""The expert layer on GPUs, in Triton: `backend` launches, `product_kernels` multiplies.

Knows nothing of plans, ranks or networks. Not called `triton`: a folder of that name would hide the
library from a script next to it.
"""
