"""Configuration of corpora, samples and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.config.blends import parse_blend, parse_phases
from megatron_slm.config.rules import flag, require, require_not_negative, require_positive

_DEFAULT_SPLIT = "1,0,0"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpora, packing of documents into samples, and the tokenizer."""

    data_path: list[str] = field(default_factory=list)
    """Training corpora, each the PREFIX of PREFIX.bin and PREFIX.idx: one PREFIX, several (sampled in proportion to
    their sizes), or WEIGHT PREFIX pairs. NAME=PREFIX sets a corpus's name in the metrics."""
    split: str = _DEFAULT_SPLIT
    """Shares of --data-path for training, validation and test, as in Megatron-LM (969,30,1). The held-out sets are
    named valid and test."""
    train_data_path: list[str] = field(default_factory=list)
    """Training corpora as for --data-path, but not split. Replaces --data-path."""
    valid_data_path: list[str] = field(default_factory=list)
    """Held-out corpora, each PREFIX or NAME=PREFIX, evaluated separately under their names. Weights are ignored."""
    test_data_path: list[str] = field(default_factory=list)
    """Like --valid-data-path, but evaluated only at the end of the run."""
    data_args_path: str | None = None
    """File with the arguments of --data-path, for long blends."""
    per_split_data_args_path: str | None = None
    """JSON file with the arguments of --train-data-path, --valid-data-path and --test-data-path under the keys train,
    valid and test."""
    data_phases: list[str] = field(default_factory=list)
    """Blends that replace the first one from a step on, each 'STEP: BLEND', such as '2000: 0.3 web 0.7 books'. A
    corpus used in several phases continues from its read position."""
    data_cache_path: str | None = None
    """Folder for sample indices and local copies of remote corpora (s3://... and other fsspec addresses), shared by
    the ranks of a node. Default: RUN_DIR/index-cache."""
    num_workers: int = 2
    """Threads per rank that prefetch micro-batches. Results do not depend on it. With 0, batches are read on demand,
    and an unreadable file ends the run in the middle of a step, without a checkpoint."""
    packing: Literal["concatenate", "best-fit"] = "concatenate"
    """Packing of documents into samples. concatenate: join documents and cut, as Megatron-LM does. best-fit: combine
    whole documents and pad the rest of a sample with masked tokens; only documents longer than a sample are cut."""
    reset_position_ids: bool = False
    """Restart positions at the start of each document."""
    reset_attention_mask: bool = False
    """Restrict attention to a token's own document, and exclude the first token of each document from the labels.
    Documents end at the corpus's document boundaries and after end-of-document tokens."""
    eod_mask_loss: bool = False
    """Mask the loss of labels that follow an end-of-document token."""
    samples_without_loss: Literal["keep", "drop"] = "keep"
    """Treatment of training samples in which a loss mask leaves no token to train on. keep: count them, warn, and run
    them for nothing. drop: leave them out of the sample order."""
    eod_token: str | None = None
    """End-of-document token, as text, where the corpora were made with another than the tokenizer's own."""
    tokenizer_type: str = "HuggingFaceTokenizer"
    """Tokenizer class: HuggingFaceTokenizer, SentencePieceTokenizer (or GPTSentencePieceTokenizer, Llama2Tokenizer),
    GPT2BPETokenizer, TikTokenizer or NullTokenizer."""
    tokenizer_model: str | None = None
    """Tokenizer folder, file, or name of the Hugging Face hub. Default: the tokenizer in --init-from."""
    vocab_size: int | None = None
    """Vocabulary size for NullTokenizer, for TikTokenizer (truncates its table), and for plans without a tokenizer.
    With any other tokenizer it must equal the tokenizer's size."""
    seq_length: int = 2048
    """Sequence length in tokens."""

    def __post_init__(self) -> None:
        require_positive(self, "seq_length", "vocab_size")
        require_not_negative(self, "num_workers")
        self._check_one_source()
        for name in ("data_path", "train_data_path"):
            if getattr(self, name):
                parse_blend(getattr(self, name), flag(name))
        parse_phases(self.data_phases)

    def _check_one_source(self) -> None:
        """Check that training corpora are named by one flag, and held-out corpora by one flag.

        Raises:
            ConfigError: they are named by two.
        """
        sources = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")
        used = [name for name in sources if getattr(self, name)]
        for name in used[1:]:
            require(False, self, name, f"not be combined with {flag(used[0])}", "keep one of the two")
        if self.per_split_data_args_path:
            for name in ("valid_data_path", "test_data_path"):
                rule = "not be combined with --per-split-data-args-path"
                require(not getattr(self, name), self, name, rule, "remove one of the two")
        for name in ("train_data_path", "per_split_data_args_path"):
            if getattr(self, name):
                rule = f"not be combined with {flag(name)}, which names the corpora of each set"
                require(self.split == _DEFAULT_SPLIT, self, "split", rule, "remove --split")
