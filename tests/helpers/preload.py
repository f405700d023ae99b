"""The forkserver imports this module once, so that each rank starts in about one second instead of ten."""

import warnings

import deepspeed  # noqa: F401
import torch
import torch._dynamo  # else every rank imports it with its first optimizer

import pretrain.training.run  # noqa: F401

torch.set_num_threads(1)
# A warning fails a test in a rank, too, as pyproject.toml has it for the tests themselves. DeepSpeed has deprecations.
warnings.filterwarnings("error", category=UserWarning)
warnings.filterwarnings("error", module="pretrain")
# Under autocast torch says of each RMSNorm that it is not fused, because its weight stays in fp32.
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
