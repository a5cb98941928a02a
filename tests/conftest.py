"""Before anything imports Triton: without a GPU its kernels, and its own library's, are run by its interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the interpreter's arrays are small
