"""The run's corpora: opened, checked against its vocabulary, and put into the order they are read in."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megatron_slm.checkpoint.format import Manifest
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
from megatron_slm.data.corpus.sidecar import find_loss_mask, read_sidecar_of
from megatron_slm.data.corpus.staging import staged
from megatron_slm.data.index_cache import IndexCache
from megatron_slm.data.interleave import normalized
from megatron_slm.data.loader import Boundaries
from megatron_slm.data.packing import PackedSamples, SequentialSamples, has_share, split_bounds
from megatron_slm.data.samples import OrderedSamples
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.errors import ConfigError, CorpusError, VocabularyError
from megatron_slm.run.data_paths import DataPaths, read_paths

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run reads."""

    train: BlendedSamples
    valid: dict[str, SequentialSamples] = field(default_factory=dict)
    """Held-out sets by name."""
    test: dict[str, SequentialSamples] = field(default_factory=dict)
    """Held-out sets for the end of the run, by name."""


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    tokens: IndexedCorpus
    loss_mask: IndexedCorpus | None


def open_data(
    config: RunConfig,
    tokenizer: Tokenizer,
    num_tokens: int,
    num_samples: int,
    global_batch_size: int,
    manifest: Manifest | None = None,
    *,
    dry: bool = False,
) -> RunData:
    """The training samples, `num_samples` of them, and the held-out sets by name.

    Args:
        global_batch_size: turns the steps of --data-phases into samples.
        manifest: of the checkpoint that the run goes on from; its orders are kept and go on.
        dry: make indices in memory, unless --data-cache-path says where they are wanted. (Corpora that are named by an
            address are copied all the same: they cannot be opened otherwise.)

    Raises:
        SlmError: a corpus cannot be used, or two held-out sets have one name.
    """
    paths = read_paths(config.data)
    phases = [(0, paths.train)]
    for phase in parse_phases(config.data.data_phases):
        if phase.first_step * global_batch_size < num_samples:
            phases.append((phase.first_step * global_batch_size, phase.blend))
    named = {corpus.prefix: corpus for _, blend in phases for corpus in blend.corpora}
    check_names(named.values(), "--data-phases")
    cache = cache_folder(config)
    opened = {prefix: _open_with_mask(staged(prefix, cache), tokenizer, num_tokens) for prefix in named}
    cut = tuple(named.values()) if paths.split else ()
    valid = _held_out(config, paths, cut, paths.valid, opened, 1, "valid", tokenizer, num_tokens)
    test = _held_out(config, paths, cut, paths.test, opened, 2, "test", tokenizer, num_tokens)
    for title in valid.keys() & test.keys():
        raise ConfigError("--valid-data-path", title, "has a name of its own (a test set has it)", "write NAME=PREFIX")
    index_cache = IndexCache(None if dry and config.data.data_cache_path is None else cache)
    train = _train_samples(config, paths.split, phases, named, opened, num_samples, manifest, index_cache)
    return RunData(train=train, valid=valid, test=test)


def cache_folder(config: RunConfig) -> Path:
    """Where indices, and copies of corpora that lie elsewhere, are kept."""
    return Path(config.data.data_cache_path or Path(config.logging.run_dir) / "index-cache")


def _train_samples(
    config: RunConfig,
    split: str | None,
    phases: list[tuple[int, Blend]],
    named: dict[str, NamedPrefix],
    opened: dict[str, _Corpus],
    num_samples: int,
    manifest: Manifest | None,
    cache: IndexCache,
) -> BlendedSamples:
    makers: dict[str, MakeSamples] = {}
    sequences: dict[str, tuple[int, int]] = {}
    for prefix, corpus in opened.items():
        count = corpus.tokens.num_sequences
        sequences[prefix] = split_bounds(split, count)[0] if split else (0, count)
        makers[prefix] = partial(_make_samples, config, corpus, sequences[prefix], cache)
    numbers = {prefix: number for number, prefix in enumerate(opened)}
    ends = [*(first for first, _ in phases[1:]), num_samples]
    needed, weighted = dict.fromkeys(opened, 0), []
    for (first, blend), end in zip(phases, ends, strict=True):
        prefixes = [corpus.prefix for corpus in blend.corpora]
        # Megatron divides weights by their sum twice, sizes once: the last bits can decide a tie
        given = normalized(blend.weights) if blend.weights else _sizes([makers[prefix] for prefix in prefixes])
        weights = normalized(given)
        weighted.append(Phase(first, {numbers[p]: w for p, w in zip(prefixes, weights, strict=True)}))
        for prefix, weight in zip(prefixes, weights, strict=True):
            needed[prefix] += end - first if len(prefixes) == 1 else needed_samples(weight, end - first)
    laid_out = (
        _one_epoch(makers, num_samples) if len(opened) > 1 and all(blend.weights is None for _, blend in phases) else {}
    )
    if manifest is not None and not config.checkpoint.accept_new_sample_order:
        kept = manifest.data.get("laid_out", {})
        laid_out |= {prefix: kept[corpus.name] for prefix, corpus in named.items() if corpus.name in kept}
    sources = [
        Source.for_samples(
            named[prefix].name, makers[prefix], needed[prefix], laid_out.get(prefix, ()), sequences[prefix]
        )
        for prefix in opened
    ]
    return BlendedSamples(sources, weighted, num_samples, cache)


def _make_samples(
    config: RunConfig,
    corpus: _Corpus,
    sequences: tuple[int, int],
    cache: IndexCache,
    num_samples: int | None,
    seed_offset: int,
) -> OrderedSamples:
    kind = BestFitSamples if config.data.packing == "best-fit" else PackedSamples
    return kind(
        corpus.tokens,
        *sequences,
        sequence_length=config.data.seq_length,
        num_samples=num_samples,
        seed=(config.training.seed + seed_offset) % 2**32,
        loss_mask=corpus.loss_mask,
        cache=cache,
    )


def _sizes(makers: list[MakeSamples]) -> Sequence[float]:
    """Samples of one epoch of each corpus, which are its weight where none is given; one corpus needs no weight."""
    return [1.0] if len(makers) == 1 else [float(len(make(None, 0))) for make in makers]


def _one_epoch(makers: dict[str, MakeSamples], num_samples: int) -> dict[str, list[int]]:
    """Without weights Megatron lays out one epoch of each corpus, and ends with the last; so here, where that lasts."""
    lengths = {prefix: len(make(None, 0)) for prefix, make in makers.items()}
    return {p: [n] for p, n in lengths.items()} if num_samples <= sum(lengths.values()) else {}


def _held_out(
    config: RunConfig,
    paths: DataPaths,
    cut: tuple[NamedPrefix, ...],
    given: Iterable[NamedPrefix],
    opened: dict[str, _Corpus],
    part: int,
    name: str,
    tokenizer: Tokenizer,
    num_tokens: int,
) -> dict[str, SequentialSamples]:
    """The held-out parts of the training corpora, and the held-out corpora, by name."""
    found = {}
    length = config.data.seq_length
    for corpus in cut:
        held = opened[corpus.prefix]
        start, stop = split_bounds(paths.split or "", held.tokens.num_sequences)[part]
        if has_share(paths.split or "", part):
            if start == stop:
                raise _no_sequence(paths.split, name, held.tokens)
            title = name if len(cut) == 1 else f"{name}-{corpus.name}"
            found[title] = SequentialSamples(held.tokens, start, stop, sequence_length=length, loss_mask=held.loss_mask)
    for corpus in given:
        title = corpus.name if name == "valid" else f"{name}-{corpus.name}"
        if title in found:
            flag = f"--{name}-data-path"
            raise ConfigError(flag, corpus.prefix, f"has a name of its own ({title} is taken)", "write NAME=PREFIX")
        held = opened.get(corpus.prefix) or _open_with_mask(
            staged(corpus.prefix, cache_folder(config)), tokenizer, num_tokens
        )
        whole = held.tokens.num_sequences
        found[title] = SequentialSamples(held.tokens, 0, whole, sequence_length=length, loss_mask=held.loss_mask)
    return found


def _no_sequence(split: str | None, name: str, corpus: IndexedCorpus) -> CorpusError:
    return CorpusError(
        f"sequences of {corpus.prefix} for the set {name} (--split {split})",
        0,
        f"must be at least 1 of its {corpus.num_sequences}",
        f"give the set a larger share or none with --split, or name its corpora with --{name}-data-path",
    )


def _open_with_mask(prefix: str, tokenizer: Tokenizer, num_tokens: int) -> _Corpus:
    tokens, mask = open_corpus(prefix, tokenizer, num_tokens), find_loss_mask(prefix)
    return _Corpus(tokens=tokens, loss_mask=None if mask is None else IndexedCorpus(mask))


def open_corpus(prefix: str, tokenizer: Tokenizer, num_tokens: int) -> IndexedCorpus:
    """Open a corpus and check that its token ids mean what the run's tokenizer says.

    Raises:
        CorpusError, VocabularyError: it is damaged, empty, of another tokenizer, or holds ids beyond the vocabulary.
    """
    corpus = IndexedCorpus(prefix)
    sidecar = read_sidecar_of(corpus)
    if sidecar is None:
        logger.warning("%s has no .meta.json, so its tokenizer cannot be checked; its token ids are", prefix)
    elif sidecar.tokenizer_fingerprint != tokenizer.fingerprint():
        raise VocabularyError(
            f"tokenizer of corpus {prefix}",
            sidecar.tokenizer_fingerprint[:12],
            f"is the run's tokenizer ({tokenizer.fingerprint()[:12]}), by token table",
            "preprocess the text with the run's tokenizer, or name the corpus' tokenizer",
        )
    if sidecar is not None and sidecar.max_token_id >= num_tokens:
        raise VocabularyError(
            f"largest token id of corpus {prefix}",
            sidecar.max_token_id,
            f"is below the models' {num_tokens} tokens",
            "use models of the corpus' vocabulary",
        )
    corpus.check_vocabulary(num_tokens)
    return corpus


def boundaries(config: RunConfig, tokenizer: Tokenizer) -> Boundaries:
    """What the ends of documents mean in this run."""
    data = config.data
    return Boundaries(
        eod_id=tokenizer.eod_id,
        eod_mask_loss=data.eod_mask_loss,
        reset_attention_mask=data.reset_attention_mask,
        reset_position_ids=data.reset_position_ids,
    )
