"""The paper's recipes, as files."""

from __future__ import annotations

import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/slm.yaml"))
CONFIGS = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml"))


def name_of(path: Path) -> str:
    """The recipe and the file, for the names of tests."""
    return str(path.relative_to(EXAMPLES).with_suffix(""))


@functools.cache
def flags_of_tool(script: str) -> frozenset[str]:
    """The flags in a tool's source: its parsers are not all importable."""
    return frozenset(re.findall(r'add_argument\(\s*"(--[\w-]+)"', (ROOT / script).read_text()))
