"""The configuration of a run: all sections.

Fields have Megatron-LM's flag names where it has the flag. `__post_init__` checks a section by itself and does no
input or output; `run/plan.py` checks what depends on files or the world, before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.backends import BackendConfig
from megatron_slm.config.backward import BackwardConfig
from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.checkpoint import CheckpointConfig
from megatron_slm.config.data import DataConfig
from megatron_slm.config.distillation import DistillationConfig
from megatron_slm.config.fill_in_middle import FillInMiddleConfig
from megatron_slm.config.health import HealthConfig
from megatron_slm.config.logging import LoggingConfig
from megatron_slm.config.loss_head import LossHeadConfig
from megatron_slm.config.model import ModelConfig
from megatron_slm.config.optimizer import OptimizerConfig, TrainingConfig
from megatron_slm.config.parallel import ParallelConfig
from megatron_slm.config.preflight import PreflightConfig
from megatron_slm.config.reference_update import ReferenceUpdateConfig
from megatron_slm.config.resilience import ResilienceConfig
from megatron_slm.config.rules import flag, require, require_given
from megatron_slm.config.selection import START_MODEL, SelectionConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The complete configuration of a run."""

    model: ModelConfig
    parallel: ParallelConfig
    data: DataConfig
    fill_in_middle: FillInMiddleConfig
    selection: SelectionConfig
    reference_update: ReferenceUpdateConfig
    distillation: DistillationConfig
    loss_head: LossHeadConfig
    backward: BackwardConfig
    backend: BackendConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    health: HealthConfig
    logging: LoggingConfig
    resilience: ResilienceConfig
    preflight: PreflightConfig

    def __post_init__(self) -> None:
        self.batch_sizes(default=1)  # parses the schedule
        self._check_distillation()
        self._check_reference()
        self._check_context()
        self._check_recomputation()
        self._check_fill_in_middle()
        if self.checkpoint.keep_best is not None:
            saves, evaluates = self.checkpoint.save_interval, self.logging.eval_interval
            require(
                saves is not None and evaluates is not None and saves % evaluates == 0,
                self.checkpoint,
                "keep_best",
                "have an evaluation at every checkpoint",
                f"make --save-interval ({saves}) a multiple of --eval-interval ({evaluates})",
            )

    def _check_distillation(self) -> None:
        selection, loss = self.selection, self.distillation
        if not loss.distills:
            return
        rule = "be ce with --objective clm, which has no reference"
        fix = f"use --objective slm (with --slm-keep-ratio 1 it keeps every token), or remove {flag('loss')}"
        require(selection.objective == "slm", loss, "loss", rule, fix)
        has_reference = selection.reference_load or selection.reference_scores or selection.reference_config
        require_given(
            bool(has_reference), "reference_load", f"--loss {loss.loss}", "set it to the folder of the reference"
        )
        if loss.tempers:
            variant = self.loss_head.loss_head_variant
            rule = "be recompute or auto with --distillation-temperature, at which a stash is of no use"
            fits = variant in ("auto", "recompute")
            require(fits, self.loss_head, "loss_head_variant", rule, f"remove {flag('loss_head_variant')}")
        rule = f"not be used with --loss {loss.loss}, which distils from one reference"
        require(selection.reference_base is None, selection, "reference_base", rule, "remove it")
        if selection.reference_scores:
            rule = "be 1 with --reference-scores, which are the reference's probabilities at that temperature"
            temperature = loss.distillation_temperature
            require(temperature == 1, loss, "distillation_temperature", rule, "remove it, or use --reference-load")
            rule = f"be one store with --loss {loss.loss}, which has one reference"
            require(len(selection.reference_scores) == 1, selection, "reference_scores", rule, "name one of them")

    def _check_recomputation(self) -> None:
        parallel, kind = self.parallel, self.backward.backward_rows
        rule = "be left out with --recompute-granularity selective, whose blocks are one function of their own"
        selects = parallel.recompute_granularity == "selective"
        fix = "leave it out, or use --recompute-granularity full"
        require(not (selects and self.backend.compile_blocks), self.backend, "compile_blocks", rule, fix)
        rule = f"be 1 with --backward-rows {kind} and --recompute-method uniform, because each block draws its own rows"
        fix = "remove it, or use --recompute-method block or --backward-rows exact"
        is_of_one = parallel.recomputation.method == "block" or parallel.recomputation.num_layers == 1
        require(self.backward.is_exact or is_of_one, parallel, "recompute_num_layers", rule, fix)
        rule = f"be left out with --backward-rows {kind}, whose blocks keep graphs of their own"
        recomputes_all = parallel.recompute_granularity is not None and parallel.recomputation.method != "block"
        is_kept = self.backward.is_exact or recomputes_all
        fix = "leave it out, or use --recompute-granularity selective, or full with --recompute-method uniform"
        require(not parallel.offload_activations or is_kept, parallel, "offload_activations", rule, fix)

    def _check_fill_in_middle(self) -> None:
        settings = self.fill_in_middle
        if not settings.fim_data:
            return
        rule = f"be a tokenizer of text with {flag('fim_data')}, which cuts documents between characters"
        is_text = self.data.tokenizer_type != "NullTokenizer"
        require(
            is_text, self.data, "tokenizer_type", rule, f"name the corpora's tokenizer, or remove {flag('fim_data')}"
        )
        names = ", ".join(self.selection.columns)
        rule = f"not be used with columns beside the corpora ({names}): their numbers belong to tokens, which it moves"
        fix = f"remove {flag('fim_data')}, or the flags that name them"
        require(not names, settings, "fim_data", rule, fix)

    def _check_reference(self) -> None:
        selection, update = self.selection, self.reference_update
        for name in ("reference_load", "reference_base"):
            if getattr(selection, name) == START_MODEL:
                fix = "set it to the folder of the model that training starts from"
                require_given(self.model.init_from is not None, "init_from", f"{flag(name)} {START_MODEL}", fix)
        same = self.reference_base_path is not None and self.reference_base_path == self.reference_path
        rule = "be another model than --reference-load: the difference would be 0"
        require(not same, selection, "reference_base", rule, "name another model")
        if not update.updates:
            return
        required_by = f"--reference-update {update.reference_update}"
        rule = f"not be used with {required_by}, which updates a single reference"
        require(selection.reference_base is None, selection, "reference_base", rule, "remove it")
        fix = f"set it to {START_MODEL}, the model of --init-from, or to a model of the same architecture"
        require_given(selection.reference_load is not None, "reference_load", required_by, fix)
        rule = f"not be used with {required_by}, whose reference runs beside the model"
        require(not selection.reference_scores, selection, "reference_scores", rule, "remove it")
        rule = f"not be used with {required_by}, whose losses of the texts would change with the reference"
        require(self.logging.probe_file is None, self.logging, "probe_file", rule, "remove it")

    def _check_context(self) -> None:
        size = self.parallel.context_parallel_size
        if size == 1:
            return
        rule = f"be off with {flag('context_parallel_size')} {size}, which is not compiled"
        require(not self.backend.compile_blocks, self.backend, "compile_blocks", rule, "leave it out")

    def batch_sizes(self, default: int) -> BatchSizes:
        """Return the samples of each step.

        Args:
            default: where the run names none.
        """
        training = self.training
        if training.step_batch_size_schedule is not None:
            return BatchSizes.parse(training.step_batch_size_schedule, sequence_length=self.data.seq_length)
        return BatchSizes.constant(training.global_batch_size or default)

    @property
    def names_batch_size(self) -> bool:
        """True where the batch sizes do not depend on the layout."""
        return self.training.global_batch_size is not None or self.training.step_batch_size_schedule is not None

    @property
    def reference_path(self) -> str | None:
        """Folder of the reference; None without one."""
        named = self.selection.reference_load
        return self.model.init_from if named == START_MODEL else named

    @property
    def reference_base_path(self) -> str | None:
        """Folder of the model that the reference is compared with; None without one."""
        named = self.selection.reference_base
        return self.model.init_from if named == START_MODEL else named

    def shares_reference(self, *, zero_stage: int, copies: int) -> bool:
        """Tell whether data-parallel ranks, `copies` of them, share the weights of the references that run."""
        return zero_stage == 3 and copies > 1 and not self.parallel.whole_reference

    @property
    def save_folder(self) -> str:
        """Folder of the run's checkpoints."""
        return self.checkpoint.save or f"{self.logging.run_dir}/checkpoints"
