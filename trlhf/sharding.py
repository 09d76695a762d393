"""FSDP 2: every process holds a share of each weight, its gradient and its optimizer state, and no process all of them.

`fully_shard` gathers the weights of a layer just before they are needed, in the forward and the backward pass, and
drops them again. Processes must then make as many passes as each other, so those with gradients are evened out
(`passes`). What needs no gradients runs on whole weights (`whole`): batches differ in number there, and decoding would
gather every layer for every token. So the largest model is whole on every process at those times, without gradients.

Adapters are small and stay whole everywhere; of their base every process holds a share.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import hf_storage, state_dict_loader, state_dict_saver
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty
from torch.nn import Parameter

from trlhf.crew import together
from trlhf.distributed import gather, sum_gradients, sum_tensors, world
from trlhf.processes import sharding

if TYPE_CHECKING:
    from trlhf.roles import Role

log = logging.getLogger("trlhf")
T = TypeVar("T")
SHARES = "shares"  # folder of a checkpoint: one safetensors file a process, read by any number of processes
_gathered: WeakSet[nn.Module] = WeakSet()


def shard_if_asked(model: Any) -> Any:
    """Divide a model among the processes if the user's accelerate file says FSDP 2; in place, and returned."""
    if world()[1] > 1 and sharding() == "fsdp2":
        count = sum(value.numel() for value in model.parameters())
        shard(model)
        log.info("%s weights are divided among %d processes (FSDP 2)", f"{count:,}", world()[1])
    return model


def shard(model: Any) -> None:
    """Divide a model's weights among all processes, layer by layer; adapters stay as they are.

    Gradients are sums over the processes, as everywhere here, not means. Whether weights learn, and which adapters
    there are, must be settled before.

    Args:
        model: a causal language model of transformers, whole on each process.
    """
    adapters = {value for name, value in model.named_parameters() if ".lora_" in name}
    mesh = init_device_mesh(model.device.type, (world()[1],))
    kinds = model._no_split_modules or ()
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, ignored_params=adapters)
    for module in _parts(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    # The losses here call the backbone and the head one by one, so the backbone must do what the whole model's call
    # would: gather embedding, norm and head, which stay until the backward pass. On whole weights it must not: inside
    # of the model's own call it would drop them.
    backbone = model.base_model
    model.backbone_forward = plain = backbone.forward
    register_fsdp_forward_method(model, "backbone_forward")
    gathering = model.backbone_forward

    def forward(*arguments: Any, **named: Any) -> Any:
        return (plain if model in _gathered else gathering)(*arguments, **named)

    backbone.forward = forward
    with torch.no_grad():  # whatever runs first is taken for the outermost part, and on whole weights that is a layer
        backbone(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    model.reset_iter_state()


def is_sharded(model: nn.Module) -> bool:
    """Say whether a model is divided among the processes."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole(role: Role) -> Iterator[None]:
    """Let every process have all weights of a role's model while the block runs, for what needs no gradients.

    All processes enter it together, or the leader alone, for all. Blocks may lie in each other.
    """
    if not is_sharded(role.model) or role.model in _gathered:
        yield
        return
    together(_gather_role, role)
    try:
        yield
    finally:
        together(_scatter, role)


def _gather_role(role: Role) -> None:
    make_whole(role.model)


def make_whole(model: Any) -> None:
    """Give every process all weights of a model, for good; all call this together."""
    for part in _parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    _gathered.add(model)


def _scatter(role: Role) -> None:
    model: Any = role.model
    _gathered.discard(model)
    for part in _parts(model):
        part.set_reshard_after_forward(part is not model, recurse=False)
    model.reset_iter_state()  # drops weights, and what it noted of passes, by which it would gather ahead


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def passes(model: nn.Module, own: Sequence[T], filler: T) -> Iterator[tuple[T, float]]:
    """Yield this process's batches with weight 1 and, of a sharded model, fillers until all have made as many passes.

    Args:
        model: that each of them goes forward and backward through.
        own: its batches.
        filler: a small one, the gradient of which counts 0 times.
    """
    missing = max(gather(len(own))) - len(own) if is_sharded(model) else 0
    yield from ((batch, 1.0) for batch in own)
    yield from ((filler, 0.0) for _ in range(missing))


def is_share(tensor: Any) -> bool:
    """Say whether a tensor is divided among the processes."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor, as a view; all of it where it is not divided."""
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found


def sum_and_clip(parameters: Sequence[Parameter], limit: float) -> Tensor:
    """Add up the gradients of all ranks, scale them down to a norm of ``limit``, and return the norm that they had.

    Shares come added up from the backward pass.
    """
    alone = [p for p in parameters if not is_share(p)]
    sum_gradients(alone)
    if len(alone) == len(parameters):
        return torch.nn.utils.clip_grad_norm_(alone, limit)
    shares = [local(p.grad) for p in parameters if is_share(p) and p.grad is not None]
    others = [p.grad for p in alone if p.grad is not None]
    squares = torch.stack([share.float().square().sum() for share in shares]).sum()
    sum_tensors([squares])
    norm = (squares + sum(value.float().square().sum() for value in others)).sqrt()
    for value in (*shares, *others):
        value.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def put(target: Tensor, value: Tensor) -> None:
    """Copy into a tensor of which this process may hold a share only."""
    with torch.no_grad():
        target.copy_(like(value, target))


def like(value: Any, target: Tensor) -> Any:
    """Return a whole value, known to all processes, divided as the target is; numbers and shares as they are."""
    if not is_share(target) or is_share(value) or not isinstance(value, Tensor) or not value.dim():
        return value
    mesh: Any = target.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(value.to(target.device), mesh, [Shard(0)], src_data_rank=None)


# ---- checkpoints: what is divided is written by all processes, and read by any number of them ----


def hollow(state: Any) -> Any:
    """Return a nested state in which every share is a tensor without storage, of the whole's shape and type."""
    if isinstance(state, Mapping):
        return {key: hollow(value) for key, value in state.items()}
    return torch.empty(state.shape, dtype=state.dtype, device="meta") if is_share(state) else state


def write_shares(folder: Path, state: Any) -> None:
    """Write every share of a nested state, all processes together."""
    found = {name: value for name, value in _leaves(state) if is_share(value)}
    writer = hf_storage.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    state_dict_saver.save(found, storage_writer=writer)


def read_shares(folder: Path, state: Any, target: Tensor) -> Any:
    """Return a `hollow` state filled again: divided as ``target`` is, among however many processes there are now."""
    found: dict[str, Tensor] = {}

    def fill(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: fill(inner, f"{name}/{key}") for key, inner in value.items()}
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        if isinstance(target, DTensor):
            found[name] = empty(value.shape, dtype=value.dtype, device_mesh=target.device_mesh, placements=[Shard(0)])
        else:
            found[name] = torch.empty(value.shape, dtype=value.dtype)
        return found[name]

    filled = fill(state, "")
    if found:
        reader = hf_storage.HuggingFaceStorageReader(str(folder))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # one process is all right
            state_dict_loader.load(found, storage_reader=reader, no_dist=world()[1] == 1)
    return filled


def _leaves(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(state, Mapping):
        yield name, state
        return
    for key, value in state.items():
        yield from _leaves(value, f"{name}/{key}")
