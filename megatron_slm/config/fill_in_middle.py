"""Configuration of fill-in-the-middle."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_slm.config.rules import flag, require, require_given


@dataclass(frozen=True, kw_only=True)
class FillInMiddleConfig:
    """Fill-in-the-middle for corpora of code, as in Megatron-LM: documents with their middle moved to the end."""

    fim_data: bool = False
    """Turn documents of training and held-out samples into fill-in-the-middle, anew for every sample."""
    fim_rate: float = 0.5
    """Probability that a document is turned into fill-in-the-middle."""
    fim_spm_rate: float = 0.5
    """Probability that such a document has its suffix first (SPM), and not its prefix (PSM)."""
    fim_split_sample: str | None = None
    """Token that separates the fragments of a document, such as the files of a repository. --fim-rate then decides on
    the document, and --fim-fragment-rate on each of its fragments."""
    fim_fragment_rate: float | None = None
    """Probability that a fragment is turned into fill-in-the-middle. Required by --fim-split-sample."""
    fim_no_prefix: str | None = None
    """Leave documents (or fragments) alone that start with this text."""
    fim_prefix_token: str = "<fim_prefix>"
    """Token before the prefix."""
    fim_middle_token: str = "<fim_middle>"
    """Token before the middle."""
    fim_suffix_token: str = "<fim_suffix>"
    """Token before the suffix."""
    fim_pad_token: str = "<fim_pad>"
    """Token that fills a sample whose text became shorter. Its labels do not count."""
    fim_eod_token: str | None = None
    """Token that ends a document. Default: the end-of-document token of the run (--eod-token)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            is_default = getattr(self, field.name) == field.default
            rule = f"be used with {flag('fim_data')}"
            fix = f"add {flag('fim_data')}, or remove {flag(field.name)}"
            require(self.fim_data or is_default, self, field.name, rule, fix)
        for name in ("fim_rate", "fim_spm_rate", "fim_fragment_rate"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, self, name, "be in [0, 1]", "use e.g. 0.5")
        splits, rate = self.fim_split_sample is not None, self.fim_fragment_rate
        fix = "set it to the share of fragments to turn"
        require_given(rate is not None or not splits, "fim_fragment_rate", flag("fim_split_sample"), fix)
        rule = f"be used with {flag('fim_split_sample')}"
        require(rate is None or splits, self, "fim_fragment_rate", rule, f"remove {flag('fim_fragment_rate')}")
        parts = ("fim_prefix_token", "fim_middle_token", "fim_suffix_token")
        for number, name in enumerate(parts):
            others = [getattr(self, other) for other in parts[:number]]
            rule = "not be the token of another part"
            require(getattr(self, name) not in others, self, name, rule, "name a token of its own")
        rule = f"not be empty, which starts every text; leave {flag('fim_no_prefix')} out instead"
        require(self.fim_no_prefix != "", self, "fim_no_prefix", rule, f"remove {flag('fim_no_prefix')}")

    def describe(self, eod_token: str | None) -> str:
        """Describe what becomes of a document, in full: two runs of equal words turn samples alike.

        Args:
            eod_token: of the run; None: the tokenizer's own.
        """
        tokens = " ".join((self.fim_prefix_token, self.fim_middle_token, self.fim_suffix_token, self.fim_pad_token))
        words = [f"fill-in-the-middle {self.fim_rate} (suffix first {self.fim_spm_rate}) by {tokens}"]
        if self.fim_split_sample is not None:
            words.append(f"fragments between {self.fim_split_sample} {self.fim_fragment_rate}")
        if self.fim_no_prefix is not None:
            words.append(f"none that starts with {self.fim_no_prefix!r}")
        end = self.fim_eod_token or eod_token
        if end is not None:
            words.append(f"ends {end}")
        return ", ".join(words)
