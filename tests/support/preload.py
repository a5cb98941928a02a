"""Imported once by the fork server; every test process is a copy of it, so none pays for the imports again."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

torch.set_num_threads(1)

import deepspeed  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import torch._inductor  # noqa: E402
import torch.utils.tensorboard  # noqa: E402

import megatron_slm.scoring.run  # noqa: E402
import megatron_slm.training.pretrain  # noqa: E402, F401
