"""Compiles the device's library, once for each version of torch. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("fakecuda.cpp")
_FLAGS = ("-std=c++20", "-shared", "-fPIC", "-O0")


class NoCompilerError(Exception):
    """There is no C++ compiler on this machine."""


def compiler() -> str:
    """Path of the C++ compiler: $CXX, or the first of the usual names.

    Raises:
        NoCompilerError: none is found.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise NoCompilerError("no C++ compiler (set CXX, or install g++ or clang++)")


def library() -> Path:
    """The compiled library, from the cache ($XDG_CACHE_HOME/megatron_slm, by default ~/.cache) where it is there.

    Raises:
        NoCompilerError: it has to be compiled, and there is no compiler.
        RuntimeError: the compiler fails.
    """
    key = [SOURCE.read_text(), importlib.metadata.version("torch"), *_FLAGS]
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_slm"
    path = cache / f"fakecuda-{name}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        _compile(unfinished)
        unfinished.replace(path)
    return path


def _compile(path: Path) -> None:
    spec = importlib.util.find_spec("torch")
    assert spec is not None, "torch is installed"
    assert spec.submodule_search_locations is not None, "torch is a package"
    torch = Path(spec.submodule_search_locations[0])
    headers = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    command = [compiler(), *_FLAGS, str(SOURCE), "-o", str(path), *headers, *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} fails:\n{done.stderr[-4000:]}")
