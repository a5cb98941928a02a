"""Shows a run's training samples as text, as its loader yields them, with the origin of their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.run import RunConfig
from megatron_slm.data.blending import BlendedSamples
from megatron_slm.data.corpus.inspection import render, sample_spans
from megatron_slm.data.loader import MicroBatchSource
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.errors import ConfigError
from megatron_slm.run.corpora import boundaries, open_data
from megatron_slm.run.resume import num_run_samples, open_resume
from megatron_slm.run.sample_order import describe_sources, document_treatment


@dataclass(frozen=True, kw_only=True)
class RunSamples:
    """The training samples of a run, opened as the run opens them."""

    config: RunConfig
    tokenizer: Tokenizer
    samples: BlendedSamples
    batch_sizes: BatchSizes

    @classmethod
    def open(cls, config: RunConfig, tokenizer: Tokenizer, num_samples: int | None = None) -> RunSamples:
        """Lay out the samples in the run's order, with `--load` in its checkpoint's.

        Args:
            num_samples: number of samples that the run draws; default: `--train-iters` x `--global-batch-size`.

        Raises:
            SlmError: an error of the run itself, in its corpora or its checkpoint.
        """
        batch_sizes = config.batch_sizes(default=config.training.micro_batch_size)
        # only the manifest of the checkpoint is used
        resume = open_resume(replace(config, checkpoint=replace(config.checkpoint, load_checksums="none")))
        manifest = resume.manifest if resume else None
        total = num_samples or num_run_samples(config, resume, batch_sizes)
        data = open_data(
            config,
            tokenizer,
            tokenizer.vocab_size,
            total,
            batch_sizes=batch_sizes,
            manifest=manifest,
            dry=True,
        )
        return cls(config=config, tokenizer=tokenizer, samples=data.train, batch_sizes=batch_sizes)

    def describe(self) -> str:
        """Describe the run's samples, one line a corpus."""
        length = f"a run of {len(self.samples):,} samples of {self.samples.sequence_length:,} tokens"
        return "\n".join([f"{length}, documents: {document_treatment(self.config)}", *describe_sources(self.samples)])

    def show(self, first: int, count: int) -> Iterator[str]:
        """Yield samples from number `first` on as text, each with a title.

        Raises:
            ConfigError: the run does not draw these samples.
            CorpusError: a sample cannot be read.
        """
        total = len(self.samples)
        if first < 0:
            raise ConfigError("--first-sample", first, "be at least 0", "correct it")
        if first + count > total:
            rule = f"be at most {total}, the run's number of samples"
            raise ConfigError("--first-sample plus --samples", first + count, rule, "show fewer or earlier ones")
        source = MicroBatchSource(
            self.samples,
            micro_batch_size=1,
            data_parallel_rank=0,
            data_parallel_size=1,
            vocab_size=self.tokenizer.vocab_size,
            boundaries=boundaries(self.config, self.tokenizer),
        )
        for index in range(first, first + count):
            number, sample = self.samples.locate(index)
            corpus = self.samples.sources[number]
            batch = source.micro_batch(index, 0)
            tokens = [*batch.tokens_bs[0].tolist(), int(batch.labels_bs[0, -1])]
            pieces, starts = corpus.pieces(sample), self.samples[index].starts
            spans = sample_spans(corpus.corpus, pieces, starts, tokens, batch.valid_bs[0].numpy())
            step, place = self.batch_sizes.step_of(index)
            title = f"sample {index} of {total}: place {place} of step {step + 1}, sample {sample} of {corpus.name}"
            yield f"━━ {title}{self._phase(index)}\n{render(spans, self.tokenizer)}"

    def _phase(self, index: int) -> str:
        phases = self.samples.phases
        if len(phases) == 1:
            return ""
        at = max(i for i, phase in enumerate(phases) if phase.first_sample <= index)
        return f", phase {at + 1} of {len(phases)}"
