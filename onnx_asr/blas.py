"""How many threads numpy's matrix products use: what the environment says when numpy is imported."""

BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""The variables of OpenBLAS, MKL and Accelerate."""
