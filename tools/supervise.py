#!/usr/bin/env python3
"""Restart a training when it fails: `python tools/supervise.py -- deepspeed ... tools/pretrain_slm.py ...`."""

from megatron_slm.cli.commands import supervise

if __name__ == "__main__":
    supervise()
