"""Errors that a user can cause, each with the field, the value, the rule and the fix.

All derive from `SlmError`, so that a command catches one class, prints one line and exits with a nonzero code.
A bug in the program is never an `SlmError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from typing_extensions import Self

EXIT_UNUSABLE = 2
"""Exit code of a run that would fail again if restarted unchanged."""


class SlmError(Exception):
    """Raised for unusable input; renders as `{field} is {value!r}: must {rule}. Fix: {fix}`.

    Args:
        field: name of the input as the user typed it: a flag (`--lr`), a file, a field of a file.
        value: the value found there; None renders as `{field} is missing: {rule}. Fix: {fix}`.
        rule: the rule for a usable value, as a bare infinitive ("be positive"); for a missing value usually
            "required by ..." (`missing`).
        fix: the remedy, as an imperative.
    """

    exit_code: ClassVar[int] = 1
    """Exit code of a process that this error ends after its first step."""
    exit_code_at_start: ClassVar[int] = EXIT_UNUSABLE
    """Exit code of a process that this error ends before its first step."""

    def __init__(self, field: str, value: object, rule: str, fix: str) -> None:
        self.field, self.value, self.rule, self.fix = field, value, rule, fix
        found = "missing" if value is None or value == [] else repr(value)
        self.raised_by: int | None = None
        """Rank that has the error and prints it, where it ends all ranks; None on this rank itself."""
        must = rule if rule.startswith("required ") else f"must {rule.removeprefix('must ')}"
        super().__init__(f"{field} is {found}: {must}. Fix: {fix}")

    @classmethod
    def missing(cls, field: str, required_by: str, fix: str) -> Self:
        """Build the error for an absent input.

        Args:
            required_by: the flags or the purpose that require it, as in "--objective slm".
        """
        return cls(field, None, f"required by {required_by}", fix)

    def with_fix(self, fix: str) -> Self:
        """Return the same error with another remedy."""
        error = type(self)(self.field, self.value, self.rule, fix)
        error.raised_by = self.raised_by
        return error

    def __reduce__(self) -> tuple[type[SlmError], tuple[str, object, str, str]]:
        return type(self), (self.field, self.value, self.rule, self.fix)


class ConfigError(SlmError):
    """Raised for a flag, a YAML field or a DeepSpeed JSON field that is wrong or contradicts another."""


class LayoutError(ConfigError):
    """Raised for a model or a batch that cannot be partitioned over the ranks as configured."""


class CorpusError(SlmError):
    """Raised for an unusable corpus (.bin/.idx), or unusable text while preprocessing."""


class VocabularyError(SlmError):
    """Raised where two parts of a run disagree on the meaning of token ids."""


class WeightsError(SlmError):
    """Raised for a Hugging Face folder without the required weights."""


class CheckpointError(SlmError):
    """Raised for a checkpoint that is missing, incomplete, damaged, or of another run."""


class RunFolderError(SlmError):
    """Raised where a run's records (metrics, TensorBoard, probed texts) cannot be written."""


class PeerError(SlmError):
    """Raised for another rank, or the connection to it, that is lost or silent."""

    exit_code_at_start = 1


class ServiceError(SlmError):
    """Raised for a failure of an external service (Weights & Biases, Comet)."""

    exit_code_at_start = 1


class PreflightError(SlmError):
    """Raised for machines that fail the preflight checks."""


class ScoreStoreError(SlmError):
    """Raised for a store of reference scores that is missing, incomplete, damaged, or does not match the run."""


class AnalysisError(SlmError):
    """Raised for runs, checkpoints or texts that cannot be analyzed as requested."""


class TaskError(SlmError):
    """Raised for an unusable file of questions, or an unusable prompt."""


class TrainingError(SlmError):
    """Raised for training that cannot continue (for example: losses are no longer finite)."""

    exit_code = EXIT_UNUSABLE


@contextmanager
def os_errors_as(kind: type[SlmError], field: str, value: object, rule: str, fix: str) -> Iterator[None]:
    """Translate every `OSError` raised inside the context into an error of class `kind`.

    Args:
        kind: class of the error.
        field, value, rule, fix: arguments of `SlmError`; the operating system's message, and the file if it is
            another one than `value`, are appended to the rule.
    """
    try:
        yield
    except OSError as error:
        of_file = f": {error.filename}" if error.filename and str(error.filename) != str(value) else ""
        raise kind(field, value, f"{rule} ({error.strerror or error}{of_file})", fix) from error


def suggest_name(name: str, known: Iterable[str], otherwise: str, *, cutoff: float = 0.5) -> str:
    """Return the fix for an unknown name: the nearest known one, or `otherwise` where none is near.

    Args:
        cutoff: least similarity of a suggestion, in [0, 1] (`difflib.get_close_matches`).
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else otherwise
