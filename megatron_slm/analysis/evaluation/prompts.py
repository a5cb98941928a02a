"""The few-shot chain-of-thought prompts of the paper's protocol.

`gsm8k` is Wei et al.'s eight worked problems (arXiv 2201.11903, table 20), used for all word problems; `math` is the
four of Minerva (arXiv 2206.14858, appendix D.2). `choices` are Minerva's four problems with answers to choose from;
the options are ours, where the authors' harness has its own: give its text with --prompt-file to compare with the
paper's numbers on MathQA, MMLU-STEM and SAT.
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
    """Worked problems, and the form in which the next one is asked."""

    shots: tuple[str, ...]
    question: str
    """With `{question}` in it; what the model goes on from."""

    def ask(self, question: str) -> str:
        """The whole text that the model is given."""
        return "".join(f"{shot}\n\n\n" for shot in self.shots) + self.question.replace("{question}", question)

    def with_shots(self, count: int) -> Prompt:
        """The same with the first `count` shots only."""
        return Prompt(shots=self.shots[:count], question=self.question)


def prompt_named(name: PromptName) -> Prompt:
    """One of the three prompts that come with the package."""
    return _parse(files(__package__).joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8"), name)


def with_choices(problem: str, options: str) -> str:
    """A problem and its options, in the words of the authors' harness."""
    return f"{problem}\nWhat of the following is the right choice? Explain your answer.\n{options}"


def read_prompt(path: str) -> Prompt:
    """A prompt from a text file: shots with two empty lines between, the last part with `{question}` in it.

    Raises:
        TaskError: it cannot be read, or does not say where the question goes.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError("--prompt-file", path, f"is a readable text file ({error})", "check the path") from error
    return _parse(text, path)


def _parse(text: str, name: str) -> Prompt:
    *shots, question = text.strip().split("\n\n\n")
    if "{question}" not in question:
        raise TaskError(
            "--prompt-file", name, "ends in a part with {question} in it", "add e.g. 'Question: {question}\\nAnswer:'"
        )
    return Prompt(shots=tuple(shot.strip() for shot in shots), question=question)
