"""Opens a run's corpora, validates them against its vocabulary, and lays out its samples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megatron_slm.checkpoint.format import Manifest
from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.blends import (
    Blend,
    NamedPrefix,
    check_names,
    parse_phases,
)
from megatron_slm.config.run import RunConfig
from megatron_slm.data.best_fit import BestFitSamples
from megatron_slm.data.blending import BlendedSamples, MakeSamples, Phase, Source, needed_samples
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.fill_in_middle import FillInMiddle
from megatron_slm.data.index_cache import IndexCache
from megatron_slm.data.interleave import normalized
from megatron_slm.data.loader import Boundaries
from megatron_slm.data.packing import PackedSamples, SequentialSamples, has_share, split_bounds
from megatron_slm.data.samples import OrderedSamples
from megatron_slm.data.samples_with_loss import SamplesWithLoss
from megatron_slm.data.texts import TextSamples, read_texts
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.errors import ConfigError, CorpusError
from megatron_slm.run.data_paths import DataPaths, read_paths
from megatron_slm.run.fill_in_middle import check_corpora, fill_in_middle
from megatron_slm.run.opened_corpora import CorpusOpener, OpenedCorpus, eod_id
from megatron_slm.run.resume import Resume, num_run_samples
from megatron_slm.run.sample_order import check_order

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The samples of a run."""

    train: BlendedSamples
    keeps_order: bool
    """The training samples continue those of the checkpoint; True without a checkpoint."""
    valid: dict[str, SequentialSamples] = field(default_factory=dict)
    """Held-out sets by name."""
    test: dict[str, SequentialSamples] = field(default_factory=dict)
    """Held-out sets for the end of the run, by name."""


class _BlendFrom(NamedTuple):
    """A blend of training corpora, in use from one of the run's samples on."""

    first_sample: int
    blend: Blend


def open_run_data(
    config: RunConfig,
    tokenizer: Tokenizer,
    num_tokens: int,
    resume: Resume | None,
    batch_sizes: BatchSizes,
    *,
    dry: bool,
    share: tuple[int, int] = (0, 1),
) -> RunData:
    """Open the data of a whole run, up to --train-iters, resumed or not (see `open_data`)."""
    return open_data(
        config,
        tokenizer,
        num_tokens,
        num_run_samples(config, resume, batch_sizes),
        batch_sizes=batch_sizes,
        manifest=resume.manifest if resume else None,
        dry=dry,
        share=share,
    )


def open_data(
    config: RunConfig,
    tokenizer: Tokenizer,
    num_tokens: int,
    num_samples: int,
    *,
    batch_sizes: BatchSizes,
    manifest: Manifest | None = None,
    dry: bool = False,
    share: tuple[int, int] = (0, 1),
) -> RunData:
    """Open the run's corpora and lay out its samples.

    Args:
        num_tokens: exclusive upper bound of the corpora's token ids.
        num_samples: training samples that the run draws.
        batch_sizes: turn the steps of --data-phases into samples.
        manifest: of the checkpoint that the run resumes from; the orders that it has begun are continued.
        dry: make indices in memory, unless --data-cache-path names a folder for them. (Remote corpora are copied all
            the same: they cannot be opened otherwise.)
        share: (i, n) reads the token ids of the i-th of n shares of the corpora, to check them.

    Raises:
        SlmError: a corpus cannot be used, two held-out sets have one name, or the samples are not the checkpoint's.
    """
    paths = read_paths(config.data)
    blends = [_BlendFrom(0, paths.train)]
    for phase in parse_phases(config.data.data_phases):
        first_sample = batch_sizes.samples_of(phase.first_step)
        if first_sample < num_samples:
            blends.append(_BlendFrom(first_sample, phase.blend))
    named = {corpus.prefix: corpus for _, blend in blends for corpus in blend.corpora}
    check_names(named.values(), "--data-phases")
    cache = cache_folder(config)
    eod = eod_id(config, tokenizer)
    ends_matter = config.data.eod_mask_loss or config.data.reset_attention_mask or config.data.reset_position_ids
    opener = CorpusOpener(
        tokenizer=tokenizer,
        num_tokens=num_tokens,
        eod_id=eod if ends_matter else None,
        cache=cache,
        columns=dict.fromkeys(named, config.selection.columns),
        share=share,
    )
    opened = {prefix: opener.open(prefix) for prefix in named}
    rewrite = fill_in_middle(config, tokenizer)
    valid = _held_out(_VALID, paths, list(named.values()), opener, config.data.seq_length, rewrite)
    test = _held_out(_TEST, paths, list(named.values()), opener, config.data.seq_length, rewrite)
    if rewrite is not None:
        check_corpora(config, tokenizer, opener.opened)
    for title in valid.keys() & test.keys():
        raise ConfigError("--valid-data-path", title, "be named unlike every test set", "write NAME=PREFIX")
    index_cache = IndexCache(None if dry and config.data.data_cache_path is None else cache)
    laid_out = {}
    if manifest is not None and not config.checkpoint.accept_new_sample_order:
        laid_out = manifest.data.get("laid_out", {})
    corpora = _TrainingCorpora(config, paths.split, named, opened, index_cache, rewrite)
    train = corpora.samples(blends, num_samples, laid_out)
    return RunData(train=train, keeps_order=check_order(config, manifest, train), valid=valid, test=test)


def cache_folder(config: RunConfig) -> Path:
    """Folder for indices and for copies of remote corpora."""
    return Path(config.data.data_cache_path or Path(config.logging.run_dir) / "index-cache")


class _TrainingCorpora:
    """The corpora that a run trains on, by prefix, and their blend."""

    def __init__(
        self,
        config: RunConfig,
        split: str | None,
        named: dict[str, NamedPrefix],
        opened: dict[str, OpenedCorpus],
        cache: IndexCache,
        rewrite: FillInMiddle | None,
    ) -> None:
        self._named, self._opened, self._cache, self._rewrite = named, opened, cache, rewrite
        self._sequences: dict[str, tuple[int, int]] = {}
        self._makers: dict[str, MakeSamples] = {}
        for prefix, corpus in opened.items():
            count = corpus.tokens.num_sequences
            self._sequences[prefix] = split_bounds(split, count)[0] if split else (0, count)
            self._makers[prefix] = partial(_make_samples, config, corpus, self._sequences[prefix], cache)

    def samples(
        self, blends: Sequence[_BlendFrom], num_samples: int, laid_out_before: Mapping[str, list[int]]
    ) -> BlendedSamples:
        """Lay out the run's samples.

        Args:
            laid_out_before: lengths of the orders that an earlier part of the run has begun, by the corpus' name.
        """
        numbers = {prefix: number for number, prefix in enumerate(self._makers)}
        needed, phases = dict.fromkeys(self._makers, 0), []
        ends = [*(first for first, _ in blends[1:]), num_samples]
        for (first, blend), end in zip(blends, ends, strict=True):
            weights = self._weights(blend)
            phases.append(Phase(first, {numbers[prefix]: weight for prefix, weight in weights.items()}))
            for prefix, weight in weights.items():
                needed[prefix] += end - first if len(weights) == 1 else needed_samples(weight, end - first)
        laid_out: dict[str, list[int]] = {}
        if len(self._makers) > 1 and all(blend.weights is None for _, blend in blends):
            laid_out = self._one_epoch(num_samples)
        laid_out |= {
            prefix: laid_out_before[corpus.name]
            for prefix, corpus in self._named.items()
            if corpus.name in laid_out_before
        }
        sources = [
            Source.for_samples(
                self._named[prefix].name, make, needed[prefix], laid_out.get(prefix, ()), self._sequences[prefix]
            )
            for prefix, make in self._makers.items()
        ]
        for source, corpus in zip(sources, self._opened.values(), strict=True):
            if corpus.loss_mask is not None:
                _report_samples_without_loss(source, corpus, self._cache)
        return BlendedSamples(sources, phases, num_samples, self._cache, self._rewrite)

    def _weights(self, blend: Blend) -> dict[str, float]:
        """Weights by prefix, with sum 1; corpora without weights weigh their samples of one epoch."""
        prefixes = [corpus.prefix for corpus in blend.corpora]
        # Megatron divides weights by their sum twice, sizes once: the last bits can decide a tie
        given: Sequence[float] = [1.0]
        if blend.weights:
            given = normalized(blend.weights)
        elif len(prefixes) > 1:
            given = [float(len(self._makers[prefix](None, 0))) for prefix in prefixes]
        return dict(zip(prefixes, normalized(given), strict=True))

    def _one_epoch(self, num_samples: int) -> dict[str, list[int]]:
        """Lengths of one epoch of each corpus, where all of them suffice: without weights Megatron lays out these."""
        lengths = {prefix: len(make(None, 0)) for prefix, make in self._makers.items()}
        return {prefix: [n] for prefix, n in lengths.items()} if num_samples <= sum(lengths.values()) else {}


def _make_samples(
    config: RunConfig,
    corpus: OpenedCorpus,
    sequences: tuple[int, int],
    cache: IndexCache,
    num_samples: int | None,
    seed_offset: int,
) -> OrderedSamples:
    kind = BestFitSamples if config.data.packing == "best-fit" else PackedSamples
    order = kind(
        corpus.tokens,
        *sequences,
        sequence_length=config.data.seq_length,
        num_samples=num_samples,
        seed=(config.training.seed + seed_offset) % 2**32,
        loss_mask=corpus.loss_mask,
        columns=corpus.columns,
        cache=cache,
    )
    if corpus.loss_mask is None or config.data.samples_without_loss == "keep":
        return order
    return SamplesWithLoss(order, corpus.numbers_with_loss(order, cache), corpus.mask_fingerprint)


def _report_samples_without_loss(source: Source, corpus: OpenedCorpus, cache: IndexCache) -> None:
    """Log how many samples of a source have no trained token."""
    total = sum(len(order) + order.num_left_out for order in source.orders)
    left_out = sum(order.num_left_out for order in source.orders)
    if left_out:
        logger.info("corpus %s: left out %d of %d samples, without a trained token", source.name, left_out, total)
        return
    kept = total - sum(corpus.numbers_with_loss(order, cache)["numbers"].size for order in source.orders)
    if kept:
        logger.warning(
            "corpus %s: %d of %d samples have no trained token and are run for nothing; "
            "leave them out with --samples-without-loss drop",
            source.name, kept, total,
        )  # fmt: skip


@dataclass(frozen=True)
class _HeldOutKind:
    name: str
    part: int
    """Index of its share in --split."""

    @property
    def flag(self) -> str:
        return f"--{self.name}-data-path"

    def title(self, corpus: NamedPrefix) -> str:
        """Name of a whole corpus as a set of this kind."""
        return corpus.name if self is _VALID else f"{self.name}-{corpus.name}"


_VALID, _TEST = _HeldOutKind("valid", 1), _HeldOutKind("test", 2)


def _held_out(
    kind: _HeldOutKind,
    paths: DataPaths,
    trained: Sequence[NamedPrefix],
    opener: CorpusOpener,
    sequence_length: int,
    rewrite: FillInMiddle | None,
) -> dict[str, SequentialSamples]:
    """Open the held-out sets of a kind, by name: shares of the training corpora, and corpora of their own."""
    found = {}

    def add(title: str, corpus: OpenedCorpus, start: int, stop: int) -> None:
        found[title] = SequentialSamples(
            corpus.tokens,
            start,
            stop,
            sequence_length=sequence_length,
            loss_mask=corpus.loss_mask,
            rewrite=None if rewrite is None else rewrite.of_set(title),
        )

    if paths.split is not None and has_share(paths.split, kind.part):
        for named in trained:
            corpus = opener.open(named.prefix)
            start, stop = split_bounds(paths.split, corpus.tokens.num_sequences)[kind.part]
            if start == stop:
                raise _no_sequence(paths.split, kind, corpus.tokens)
            add(kind.name if len(trained) == 1 else f"{kind.name}-{named.name}", corpus, start, stop)
    for named in paths.valid if kind is _VALID else paths.test:
        title = kind.title(named)
        if title in found:
            rule = f"have a name of its own ({title} is another set's)"
            raise ConfigError(kind.flag, named.prefix, rule, "write NAME=PREFIX")
        corpus = opener.open(named.prefix)
        add(title, corpus, 0, corpus.tokens.num_sequences)
    return found


def _no_sequence(split: str, kind: _HeldOutKind, corpus: IndexedCorpus) -> CorpusError:
    return CorpusError(
        f"sequences of {corpus.prefix} for the set {kind.name} (--split {split})",
        0,
        f"be at least 1 of its {corpus.num_sequences}",
        f"give the set a larger share or none with --split, or name its corpora with {kind.flag}",
    )


def boundaries(config: RunConfig, tokenizer: Tokenizer) -> Boundaries:
    """Treatment of document ends in this run."""
    data = config.data
    return Boundaries(
        eod_id=eod_id(config, tokenizer),
        eod_mask_loss=data.eod_mask_loss,
        reset_attention_mask=data.reset_attention_mask,
        reset_position_ids=data.reset_position_ids,
    )


def read_probe_texts(config: RunConfig, tokenizer: Tokenizer) -> TextSamples | None:
    """Read the texts of --probe-file; None without the flag.

    Raises:
        SlmError: the file cannot be read, or a text cannot be tokenized.
    """
    path = config.logging.probe_file
    if path is None:
        return None
    return read_texts(path, tokenizer, sequence_length=config.data.seq_length, field="--probe-file")
