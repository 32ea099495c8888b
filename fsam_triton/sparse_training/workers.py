"""Messages between the workers of a training: collectives that give all of them the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..masks.trained import FishMask, decode_mask, encode_mask


class WorkerError(RuntimeError):
    """Another worker has died or does not answer. This worker's model is not half merged."""


class Workers:
    """The default process group, or this process alone if there is none.

    Args:
        device: the model's.
        describe: returns a description of the current operation, for the WorkerError that any method can raise.

    Attributes:
        rank, size: this worker's rank, and the number of workers.
        device: the device from which tensors are sent: gloo supports all of its functions only on the CPU.
        bytes_sent: bytes sent by `gather`, `interleave` and `reduce`: each byte counts once, however many workers it
            goes to.
    """

    def __init__(self, device: torch.device, describe: Callable[[], str]) -> None:
        started = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if started else 0
        self.size: int = dist.get_world_size() if started else 1
        self.device: torch.device = torch.device("cpu") if started and dist.get_backend() == "gloo" else device
        self.bytes_sent: int = 0
        self._describe = describe

    def _call(self, communicate: Callable[..., Any], *args: Any) -> None:
        try:
            communicate(*args)
        except RuntimeError as error:
            raise WorkerError(f"{self._describe()} [{error}]") from error

    def gather(self, own: Tensor) -> Tensor:
        """The tensors [n] of all ranks, [ranks, n]."""
        out = own.new_empty(self.size, len(own))
        self._call(dist.all_gather, list(out), own)
        self.bytes_sent += own.nbytes
        return out

    def interleave(self, numbers: Tensor) -> Tensor:
        """Numbers [n], of which every size-th, starting with the i-th, is rank i's: the order of `FishMask.split`."""
        own = numbers[self.rank :: self.size]
        padded = own.new_zeros(-(-len(numbers) // self.size))
        padded[: len(own)] = own
        return self.gather(padded).t().reshape(-1)[: len(numbers)]

    def reduce(self, own: Tensor, old: Tensor | None = None) -> Tensor:
        """The mean of all ranks' numbers [n] or, given old numbers, these plus all changes; in fp64, rounded once.

        Each rank computes its share of them, in the order of ranks, and gathers the other shares. A ring all-reduce
        takes as many bytes, but rounds every partial sum to the type that is sent.
        """
        share = -(-len(own) // self.size)
        padded = own.new_zeros(self.size, share)
        padded.view(-1)[: len(own)] = own
        parts = torch.empty_like(padded)
        self._call(dist.all_to_all_single, parts, padded)
        self.bytes_sent += (self.size - 1) * parts[0].nbytes
        total = torch.zeros(share, dtype=torch.float64, device=own.device)
        if old is None:
            for part in parts:
                total += part
            total /= self.size
        else:
            padded.view(-1)[: len(old)] = old
            before = padded[self.rank].double()
            for part in parts:
                total += part - before
            total += before
        return self.gather(total.to(own.dtype)).view(-1)[: len(own)]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor; all ranks have one of this shape and type."""
        sent = tensor.detach().to(self.device, copy=True, memory_format=torch.contiguous_format)
        if self.size > 1 and sent.numel():
            # As bytes, because not every backend knows every type.
            self._call(dist.broadcast, sent.view(-1).view(torch.uint8), 0)
        return sent

    @torch.no_grad()
    def follow_first(self, tensors: Iterable[Tensor]) -> None:
        """Copy rank 0's values into the other ranks' tensors."""
        for tensor in tensors if self.size > 1 else ():
            first = self.broadcast(tensor)
            if self.rank > 0:
                tensor.copy_(first)

    def json_of_first(self, value: Any) -> Any:
        """Rank 0's value, which JSON must be able to hold; the other ranks' values are ignored."""
        return json.loads(self._bytes_of_first(json.dumps(value).encode()))

    def mask_of_first(self, mask: FishMask | None) -> FishMask:
        """Rank 0's mask; the other ranks' masks are ignored."""
        from safetensors.torch import load, save

        tensors, meta = encode_mask(mask) if self.rank == 0 and mask is not None else ({}, None)
        meta = self.json_of_first(meta)
        return decode_mask(load(self._bytes_of_first(save(tensors))), meta)

    def _bytes_of_first(self, data: bytes) -> bytes:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        size = int(self.broadcast(torch.tensor([len(data)])))
        if self.rank > 0:
            content = torch.empty(size, dtype=torch.uint8)
        return self.broadcast(content).cpu().numpy().tobytes()

    def wait_for_all(self) -> None:
        """Return when all ranks have called this method."""
        if self.size > 1:
            self._call(dist.barrier)
