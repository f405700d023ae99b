"""The forkserver imports this module once, so that each rank starts in about one second instead of ten."""

import deepspeed  # noqa: F401
import torch
import torch._dynamo  # else every rank imports it with its first optimizer

import pretrain.training.run  # noqa: F401

torch.set_num_threads(1)
