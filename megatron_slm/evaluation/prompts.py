"""Few-shot chain-of-thought prompts of the paper's protocol.

`gsm8k` holds Wei et al.'s eight worked problems (arXiv 2201.11903, table 20), used for all word problems; `math` the
four of Minerva (arXiv 2206.14858, appendix D.2); `choices` Minerva's four problems as multiple choice. Their options
are ours and differ from the authors' harness: pass its prompt with --prompt-file to compare with the paper's numbers
on MathQA, MMLU-STEM and SAT.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from megatron_slm.errors import TaskError

PromptName = Literal["gsm8k", "math", "choices"]
STOPS = ("\n\nQuestion:", "\n\nProblem:")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Worked problems, and the template of the next question."""

    shots: tuple[str, ...]
    question: str
    """Template with `{question}` in it, which the model continues."""

    def ask(self, question: str) -> str:
        """Return the prompt for a question."""
        return "".join(f"{shot}\n\n\n" for shot in self.shots) + self.question.replace("{question}", question)

    def with_shots(self, count: int) -> Prompt:
        """Return a copy with the first `count` shots only."""
        return Prompt(shots=self.shots[:count], question=self.question)


def prompt_named(name: PromptName) -> Prompt:
    """Load one of the package's three prompts."""
    return _parse(files(__package__).joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8"), name)


def with_choices(problem: str, options: str) -> str:
    """Return a problem with its options, worded as in the authors' harness."""
    return f"{problem}\nWhat of the following is the right choice? Explain your answer.\n{options}"


def read_prompt(path: str) -> Prompt:
    """Read a prompt from a text file: shots separated by two empty lines, then a part with `{question}` in it.

    Raises:
        TaskError: the file is unreadable, or has no `{question}` in its last part.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError("--prompt-file", path, f"be a readable text file ({error})", "check the path") from error
    return _parse(text, path)


def _parse(text: str, name: str) -> Prompt:
    *shots, question = text.strip().split("\n\n\n")
    if "{question}" not in question:
        raise TaskError(
            "--prompt-file", name, "have {question} in its last part", "add e.g. 'Question: {question}\\nAnswer:'"
        )
    return Prompt(shots=tuple(shot.strip() for shot in shots), question=question)
