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
    """The flags in the source of the command that a tool runs: its parsers are not all importable."""
    command = re.search(r"from megatron_slm\.cli\.commands import (\w+)", (ROOT / script).read_text())
    assert command is not None, f"{script} runs a command"
    source = ROOT / "megatron_slm" / "cli" / f"{command[1]}.py"
    return frozenset(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source.read_text()))
