"""Imported once by the forkserver, so that each rank starts in about a second instead of ten."""

import deepspeed  # noqa: F401
import torch
import torch._dynamo  # (the first optimizer would import it)

import pretrain.training.run  # noqa: F401

torch.set_num_threads(1)
