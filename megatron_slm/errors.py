"""The errors a user can cause, each naming the field, the value, the rule and the fix.

Every one derives from `SlmError`, so that a tool catches one class, prints one line and exits
with a code other than zero. A bug in the program is never an `SlmError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from typing_extensions import Self

EXIT_UNUSABLE = 2
"""Exit code of a run that would end in the same way if it were started again as it is."""


class SlmError(Exception):
    """Raised for an input that cannot be used; renders as `{field} is {value!r}: must {rule}. Fix: {fix}`.

    Args:
        field: name of the input as the user typed it: a flag (`--lr`), a file, a field of a file.
        value: the value found there; None renders as `{field} is missing: {rule}. Fix: {fix}`.
        rule: what a usable value must do, as a bare infinitive ("be positive"); for a missing value usually
            "required by ..." (see `missing`).
        fix: what the user can do about it, as an imperative.
    """

    exit_code: ClassVar[int] = 1
    """Exit code of a process that this error ends after its first step."""
    exit_code_at_start: ClassVar[int] = EXIT_UNUSABLE
    """Exit code of a process that this error ends before its first step."""

    def __init__(self, field: str, value: object, rule: str, fix: str) -> None:
        self.field, self.value, self.rule, self.fix = field, value, rule, fix
        found = "missing" if value is None else repr(value)
        must = rule if rule.startswith("required ") else f"must {rule.removeprefix('must ')}"
        super().__init__(f"{field} is {found}: {must}. Fix: {fix}")

    @classmethod
    def missing(cls, field: str, required_by: str, fix: str) -> Self:
        """Build the error for an input that was not given.

        Args:
            required_by: the flags or the purpose that require it, as in "--objective slm".
        """
        return cls(field, None, f"required by {required_by}", fix)

    def __reduce__(self) -> tuple[type[SlmError], tuple[str, object, str, str]]:
        return type(self), (self.field, self.value, self.rule, self.fix)


class ConfigError(SlmError):
    """A flag, a YAML field or a DeepSpeed JSON field is wrong or contradicts another."""


class LayoutError(ConfigError):
    """The model or the batch cannot be cut over the ranks as asked."""


class CorpusError(SlmError):
    """A corpus (.bin/.idx), or text on its way into one, cannot be used."""


class VocabularyError(SlmError):
    """Two parts of a run do not agree on what a token id means."""


class WeightsError(SlmError):
    """A Hugging Face folder does not hold the weights that are needed."""


class CheckpointError(SlmError):
    """A checkpoint is missing, incomplete, damaged, or of another run."""


class RunFolderError(SlmError):
    """What a run records (metrics, TensorBoard, probed texts) cannot be written."""


class PeerError(SlmError):
    """Another rank, or the way to it, is gone or silent."""

    exit_code_at_start = 1


class ServiceError(SlmError):
    """A service outside of the run (Weights & Biases, Comet) does not do as asked."""

    exit_code_at_start = 1


class PreflightError(SlmError):
    """The machines are not as the run needs them."""


class ScoreStoreError(SlmError):
    """A store of reference scores is missing, incomplete, damaged, or holds other scores than the run needs."""


class AnalysisError(SlmError):
    """Runs, checkpoints or texts cannot be looked at as asked."""


class TaskError(SlmError):
    """A file of questions, or a prompt for them, cannot be used."""


class TrainingError(SlmError):
    """Training cannot go on (for example: losses are no longer finite)."""

    exit_code = EXIT_UNUSABLE


@contextmanager
def os_errors_as(kind: type[SlmError], field: str, value: object, rule: str, fix: str) -> Iterator[None]:
    """What the operating system says inside becomes an error of this kind.

    Args:
        kind: of the error.
        field, value, rule, fix: see `SlmError`; the rule is followed by what the system said, and of which file.
    """
    try:
        yield
    except OSError as error:
        of_file = f": {error.filename}" if error.filename and str(error.filename) != str(value) else ""
        raise kind(field, value, f"{rule} ({error.strerror or error}{of_file})", fix) from error
