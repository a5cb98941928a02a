"""The section of a run's configuration that says which corpora are read, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.config.blends import parse_blend, parse_phases
from megatron_slm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpora and the tokenizer they were made with."""

    data_path: list[str] = field(default_factory=list)
    """Training corpora, each the prefix of PREFIX.bin and PREFIX.idx: `PREFIX`, `PREFIX PREFIX ...` (drawn in
    proportion to their sizes) or `WEIGHT PREFIX WEIGHT PREFIX ...`; NAME=PREFIX gives one another name in
    the metrics."""
    split: str = "1,0,0"
    """Shares of --data-path for training, validation and test (held-out sets named valid and test), as Megatron cuts
    them (969,30,1)."""
    train_data_path: list[str] = field(default_factory=list)
    """The training corpora, as for --data-path, which is left out then; they are not split."""
    valid_data_path: list[str] = field(default_factory=list)
    """Held-out corpora, each PREFIX or NAME=PREFIX; each is evaluated whole under its name. Weights are not used."""
    test_data_path: list[str] = field(default_factory=list)
    """As --valid-data-path, but evaluated at the end of the run only."""
    data_args_path: str | None = None
    """File with the words of --data-path, for blends too long for a command line."""
    per_split_data_args_path: str | None = None
    """JSON file with the words of --train-data-path, --valid-data-path and --test-data-path under the keys train,
    valid and test."""
    data_phases: list[str] = field(default_factory=list)
    """Other blends from a step on, each `STEP: BLEND` ('2000: 0.3 web 0.7 books'). A corpus that goes on in another
    phase goes on where it was."""
    data_cache_path: str | None = None
    """Folder for the index of the samples, and for copies of corpora that are named by an address that fsspec opens
    (s3://...); shared by the ranks of a node. Default: RUN_DIR/index-cache."""
    num_workers: int = 2
    """Threads of a rank that read micro-batches ahead. Results do not depend on it; with 0 they are read when they are
    needed, and a file that cannot be read then ends the run within a step, without a checkpoint."""
    packing: Literal["concatenate", "best-fit"] = "concatenate"
    """How documents become samples. concatenate: laid end to end and cut, as Megatron does. best-fit: whole documents
    that fit together, the rest of a sample padding that is masked; only documents longer than a sample are cut."""
    reset_position_ids: bool = False
    """Positions count from the start of each document."""
    reset_attention_mask: bool = False
    """Tokens see their own document only, and the first token of a document is no label. A document ends where the
    corpus says so and after an end-of-document token."""
    eod_mask_loss: bool = False
    """Leave out the label that follows an end-of-document token."""
    tokenizer_type: str = "HuggingFaceTokenizer"
    """HuggingFaceTokenizer, SentencePieceTokenizer (GPTSentencePieceTokenizer, Llama2Tokenizer), GPT2BPETokenizer,
    TikTokenizer, NullTokenizer."""
    tokenizer_model: str | None = None
    """Tokenizer folder or file; default: the one in --init-from."""
    vocab_size: int | None = None
    """Number of tokens; for NullTokenizer, which has no table of its own, TikTokenizer, whose table may be cut, and
    plans without the tokenizer. Another tokenizer must agree with it."""
    seq_length: int = 2048
    """Tokens of a sample that the model reads."""

    def __post_init__(self) -> None:
        for name in ("seq_length", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError("--" + name.replace("_", "-"), value, "is greater than 0", "give a positive number")
        if self.num_workers < 0:
            raise ConfigError("--num-workers", self.num_workers, "is 0 or more", "give 0 to read without threads")
        self._check_one_source()
        for name in ("data_path", "train_data_path"):
            if getattr(self, name):
                parse_blend(getattr(self, name), "--" + name.replace("_", "-"))
        parse_phases(self.data_phases)

    def _check_one_source(self) -> None:
        """Training corpora come from one flag, held-out ones too."""
        ways = {
            "--data-path": self.data_path,
            "--train-data-path": self.train_data_path,
            "--data-args-path": self.data_args_path,
            "--per-split-data-args-path": self.per_split_data_args_path,
        }
        given = [flag for flag, value in ways.items() if value]
        if len(given) > 1:
            raise ConfigError(given[1], ways[given[1]], f"is left out beside {given[0]}", "keep one of them")
        for name in ("valid_data_path", "test_data_path"):
            if self.per_split_data_args_path and getattr(self, name):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(flag, getattr(self, name), "is left out beside --per-split-data-args-path", "drop it")
        if self.split != "1,0,0" and (self.train_data_path or self.per_split_data_args_path):
            raise ConfigError("--split", self.split, "is for --data-path", "leave it out beside corpora of each set")
