"""Loads the device, and torch after it; import this before torch."""

from __future__ import annotations

import ctypes
import sys

from fake_gpu.build import library

if "torch" in sys.modules:
    raise RuntimeError("fake_gpu.device is imported before torch, which looks for its CUDA hooks once")
_library = ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402, F401

_library.install_guard()
