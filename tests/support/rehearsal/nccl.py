"""NCCL's rules over gloo: what lies on the host, or is not contiguous, is refused; what is done is what gloo does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroupGloo, _create_work_from_future
from torch.distributed import distributed_c10d
from torch.futures import Future

from support.rehearsal import gpu

Tensor = torch.Tensor
HALF = (torch.float16, torch.bfloat16)


class RehearsedNCCL(dist.ProcessGroup):
    """Takes the place of `ProcessGroupNCCL`; `calls` says which collectives have been done."""

    class Options:
        """What torch sets of it."""

        is_high_priority_stream = False

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        super().__init__(rank, size)
        self._gloo = ProcessGroupGloo(store, rank, size, timeout=options._timeout)
        self.calls: list[str] = []

    def getBackendName(self) -> str:
        return "nccl"

    _get_backend_name = getBackendName

    def _set_sequence_number_for_group(self) -> None: ...

    def _on_host(self, what: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.calls.append(what)
        for tensor in tensors:
            if not tensor.is_cuda:
                raise RuntimeError(f"No backend type associated with device type cpu (NCCL, rehearsed; {what})")
            if not tensor.is_contiguous():
                raise ValueError(f"Tensors must be contiguous (NCCL, rehearsed; {what})")
        with gpu.inside_a_kernel():
            host = [tensor.detach().cpu() for tensor in tensors]
        return [tensor.float() if tensor.dtype in HALF else tensor for tensor in host]

    def _back(self, tensors: Sequence[Tensor], host: Sequence[Tensor]) -> Any:
        with torch.no_grad(), gpu.inside_a_kernel():
            for tensor, made in zip(tensors, host, strict=True):
                tensor.detach().copy_(made.view(tensor.shape))
        future: Any = Future()
        future.set_result(list(tensors))
        return _create_work_from_future(future)

    def _gathered(self, what: str, tensor: Tensor) -> list[Tensor]:
        (own,) = self._on_host(what, [tensor])
        parts = [torch.empty_like(own) for _ in range(self.size())]
        self._gloo.allgather([parts], [own], distributed_c10d.AllgatherOptions()).wait()
        return parts

    def barrier(self, opts: Any = None) -> Any:
        self._gloo.barrier(distributed_c10d.BarrierOptions()).wait()
        return self._back([], [])

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        host = self._on_host("allreduce", tensors)
        self._gloo.allreduce(host, opts or distributed_c10d.AllreduceOptions()).wait()
        return self._back(tensors, host)

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        host = self._on_host("broadcast", tensors)
        self._gloo.broadcast(host, opts).wait()
        return self._back(tensors, host)

    def reduce(self, tensors: Any, opts: Any = None) -> Any:
        host = self._on_host("reduce", tensors)
        self._gloo.allreduce(host, distributed_c10d.AllreduceOptions()).wait()
        mine = opts is None or opts.rootRank == self.rank()
        return self._back(tensors if mine else [], host if mine else [])

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        (output,), (tensor,) = outputs, inputs
        self._on_host("allgather", output)
        return self._back(output, self._gathered("allgather", tensor))

    def _allgather_base(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        self._on_host("allgather", [output])
        return self._back([output], [torch.cat([part.view(-1) for part in self._gathered("allgather", tensor)])])

    def _reduce_scatter_base(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        (whole,) = self._on_host("reduce_scatter", [tensor])
        self._on_host("reduce_scatter", [output])
        self._gloo.allreduce([whole], distributed_c10d.AllreduceOptions()).wait()
        own = whole.view(self.size(), -1)[self.rank()]
        averaged = opts is not None and opts.reduceOp == dist.ReduceOp.AVG
        return self._back([output], [own / self.size() if averaged else own])

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        (output,), (parts,) = outputs, inputs
        return self._reduce_scatter_base(output, torch.cat([part.reshape(-1) for part in parts]), opts)

    def gather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        parts = self._gathered("gather", inputs[0])
        return self._back(outputs[0] if outputs else [], parts if outputs else [])

    def _all(self, one: Any, outputs: Any, inputs: Any, opts: Any) -> Any:
        for output, tensor in zip(outputs, inputs, strict=True):
            one(output, tensor, opts)
        return self._back([], [])

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._all(self._allgather_base, outputs, inputs, opts)

    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._all(self._reduce_scatter_base, outputs, inputs, opts)

    # what newer versions of torch call the same
    all_gather_single, all_gather_single_coalesced = _allgather_base, allgather_into_tensor_coalesced
    reduce_scatter_single, reduce_scatter_single_coalesced = _reduce_scatter_base, reduce_scatter_tensor_coalesced


def install() -> None:
    """Make this what `init_process_group("nccl")` starts."""
    distributed_c10d._NCCL_AVAILABLE = True
    distributed_c10d.ProcessGroupNCCL = RehearsedNCCL  # type: ignore[attr-defined]
    # a group that is written in Python does not say which devices it is for
    distributed_c10d._get_object_coll_device = lambda group=None: "cuda"
    distributed_c10d._get_pg_default_device = lambda group=None: torch.device("cuda")
    init = distributed_c10d.init_process_group

    def init_process_group(*arguments: Any, device_id: Any = None, **options: Any) -> None:
        """Without binding a device, which only NCCL itself needs."""
        init(*arguments, **options)

    dist.init_process_group = distributed_c10d.init_process_group = init_process_group  # type: ignore[attr-defined]
