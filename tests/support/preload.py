"""Imported once by the fork server; every test process is a copy of it, so none pays for the imports again.

What every rank imports or builds while it runs belongs here. The garbage collector leaves alone what is there at the
fork, so that its pages stay shared.
"""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

torch.set_num_threads(1)

import encodings.idna  # noqa: E402, F401

import deepspeed.comm.mori  # noqa: E402
import deepspeed.module_inject.auto_ep_layer  # noqa: E402
import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import hypothesis  # noqa: E402, F401
import pytest  # noqa: E402, F401
import rich._emoji_codes  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import torch._inductor  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402, F401

import megatron_slm.loss.torch_backend  # noqa: E402
import megatron_slm.scoring.run  # noqa: E402
import megatron_slm.training.pretrain  # noqa: E402, F401
import tests.support.kills  # noqa: E402
import tests.support.planting  # noqa: E402
import tests.support.scoring  # noqa: E402, F401
from megatron_slm.flags.load import parse  # noqa: E402

parse(["--train-iters", "1"])  # the parser is built once
gc.collect()
gc.freeze()
