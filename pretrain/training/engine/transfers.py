"""Copies between the memory of the host and the device, during which both go on computing.

On a CPU both are the same memory, and nothing is copied.
"""

import time

import torch
from torch import Tensor

from pretrain.objectives.batch import Batch


class Uploads:
    """Copies batches to the device, on a stream of their own: it computes meanwhile what was launched before."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch as tensors on the device. What is launched from now on finds it complete."""
        if self._stream is None:
            return batch.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copied = batch.to(self._device)
        computing.wait_stream(self._stream)
        for tensor in copied.arrays():  # its memory belongs to the stream of copies, and may be used there again only
            tensor.record_stream(computing)  # when the computation that reads it is over
        return copied

    def device_waits(self) -> bool:
        """Whether the device has computed everything that was launched."""
        return self._stream is None or torch.cuda.current_stream(self._device).query()


class Download:
    """Numbers on their way from the device to the host."""

    def __init__(self, numbers: Tensor):
        """Begin to copy `numbers`. They are copied when all that was launched before is computed."""
        self._copied = torch.cuda.Event(blocking=True) if numbers.is_cuda else None  # the thread sleeps in a wait
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._host.copy_(numbers, non_blocking=True)
        if self._copied:
            self._copied.record(torch.cuda.current_stream(numbers.device))
        self._at = time.perf_counter()

    def read(self) -> tuple[list[float], float]:
        """Wait for the numbers. Returns them, and the time at which the host knew that they were computed."""
        if self._copied:
            self._copied.synchronize()
            self._at = time.perf_counter()
        return self._host.tolist(), self._at
