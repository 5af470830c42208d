"""One optimizer step on one rank: forward and backward of every micro-batch, then both optimizers."""

import inspect
from bisect import bisect_right
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ..data.errors import UsageError
from . import device as devices
from .build import Parts
from .config import Config
from .groups import freeze, resting
from .ranks.distributed import World

# Each rank keeps the BatchNorm statistics of its own batches; evaluation and checkpoints take rank 0's. Newer torch
# warns about the old name of the switch, older torch does not know the new one.
_SYNC_SWITCHES = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _SYNC_SWITCHES else "broadcast_buffers": False
}


class TrainingStep:
    """What a step computes, from images to changed weights; learning rates, data and logs are the trainer's.

    Args:
        config: of the run.
        parts: what is trained.
        world: this rank's place.
        step: the number of the first step, from 0.
        skipped_steps: how many were skipped before.

    Attributes:
        backbone: the network, data-parallel; as it is where none of it is trained.
        skipped_steps: steps that changed nothing because the loss or a gradient was not finite, int64 [] on the device.
        skipped_in_a_row: the last of them without another step in between, int64 [] on the device.
        loss: of the last step, [].
    """

    def __init__(self, config: Config, parts: Parts, world: World, step: int = 0, skipped_steps: int = 0) -> None:
        self.config, self.parts, self.device = config, parts, world.device
        self.heartbeat = world.heartbeat
        self.skipped_steps = torch.tensor(skipped_steps, device=world.device)
        self.skipped_in_a_row = torch.zeros_like(self.skipped_steps)
        self._skipped_in_a_row_told = devices.host_buffer(self.skipped_in_a_row).zero_()
        self._losses: list[Tensor] = []
        self.loss = torch.zeros((), device=world.device)
        torch.backends.cudnn.benchmark = True  # images have one size: the search for the fastest convolutions pays
        self.channels_last = devices.channels_last(config.backbone.channels_last, world.device)
        self._compress = config.backbone.payload_dtype == "bf16" and world.size > 1
        self._thaws = sorted({one.frozen_until for one in parts.treatments.values()})
        self._thawed = -1  # how many of these steps are past
        self._all_used = False
        self._resting: list[nn.Module] = []
        self._parallel: DistributedDataParallel | None = None
        self.backbone: nn.Module = parts.network
        self.begin(step)
        if parts.average is not None and step == 0:  # DistributedDataParallel gave every rank the first one's weights
            parts.average.restart(parts.network)

    def begin(self, step: int) -> None:
        """Makes the network ready for the step of this number, from 0: in training mode, and what is frozen is."""
        self._step, network = step, self.parts.network
        thawed = bisect_right(self._thaws, step)
        if thawed != self._thawed:
            self._thawed = thawed
            freeze(network, self.parts.treatments, step)
            self._resting = resting(network, self.parts.treatments, step)
            self._make_parallel()
            self._all_used = False
        self.train()

    def train(self) -> None:
        """Training mode, but for what is frozen."""
        self.backbone.train()
        for module in self._resting:
            module.eval()

    def _make_parallel(self) -> None:
        """Anew whenever other parameters are trained: DistributedDataParallel exchanges those that it was made with."""
        network, section = self.parts.network, self.config.backbone
        self._parallel = None  # its hooks go first
        self.backbone = network
        if not any(parameter.requires_grad for parameter in network.parameters()):
            return
        self._parallel = DistributedDataParallel(
            network, gradient_as_bucket_view=True, static_graph=section.static_graph, **_NO_BUFFER_SYNC
        )
        if self._compress:
            try:
                self._parallel.register_comm_hook(None, bf16_compress_hook)
            except TypeError as error:
                raise UsageError(
                    f"backbone.payload_dtype: bf16 is not in this PyTorch ({error}): leave it out"
                ) from None
        # Compiled around DDP, which lets the compiler cut the graph where DDP's buckets are full and exchanged.
        self.backbone = torch.compile(self._parallel) if section.compile else self._parallel  # type: ignore

    def micro_batch(self, images: Tensor, labels: Tensor, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; returns its loss [], detached.

        Args:
            images: float32 [b, 3, H, W].
            labels: int64 [b].
            last: whether it is the step's last, after which the ranks exchange the backbone's gradients.
        """
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with nullcontext() if last or self._parallel is None else self._parallel.no_sync():
            self.heartbeat.enter("forward pass of the backbone")
            with self.autocast():
                embeddings = self.backbone(images)
            self.heartbeat.enter("head")
            loss = self.parts.head(embeddings, labels)
            self.heartbeat.enter("backward pass")
            self.parts.scaler.scale(loss / self.config.optimizer.accumulate).backward()
        if last and not self._all_used:
            self._check_that_all_are_used()
        self._losses.append(loss.detach())
        return loss.detach()

    def _check_that_all_are_used(self) -> None:
        """DistributedDataParallel waits for every parameter's gradient; in the next step it would say that one is
        missing, by a number."""
        self._all_used = True
        unused = [name for name, one in self.parts.network.named_parameters() if one.requires_grad and one.grad is None]
        if unused:
            raise UsageError(
                f"backbone: its output does not depend on {', '.join(unused[:4])}{', ...' * (len(unused) > 4)}: leave "
                "such parameters out of the network, or freeze them with optimizer.groups (frozen_until: end)"
            )

    def update(self) -> Tensor:
        """Applies the gradients, or on every rank nothing where they or the loss are not finite.

        Returns:
            the norm of the backbone's gradient, [].
        """
        self.heartbeat.enter("optimizer step")
        self.loss = torch.stack(self._losses).mean()
        self._losses.clear()
        parts, clip_norm = self.parts, self.config.optimizer.clip_norm
        parts.scaler.unscale_(parts.backbone_optimizer)
        parts.scaler.unscale_(parts.head_optimizer)
        gradients = [parameter.grad for parameter in parts.network.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).to(self.device)  # of nothing it is on the CPU
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parts.network.parameters(), clip_norm, norm)
        assert parts.head.gradient_scale.grad is not None
        broken = ~(torch.isfinite(norm) & torch.isfinite(parts.head.gradient_scale.grad) & torch.isfinite(self.loss))
        self.skipped_steps += broken
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * broken
        for optimizer in (parts.backbone_optimizer, parts.head_optimizer):
            # Read on the device: the host asks for nothing.
            optimizer.found_inf = broken.float()  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
            optimizer.zero_grad()
        if parts.scaler.is_enabled():
            parts.scaler.update()
        if parts.average is not None:
            parts.average.update(parts.network, self._step + 1)
        return norm

    def skipped_lately(self) -> int:
        """How many steps in a row were skipped; on a GPU perhaps as of the last call, as this one waits for nothing."""
        self._skipped_in_a_row_told.copy_(self.skipped_in_a_row, non_blocking=True)
        return int(self._skipped_in_a_row_told)

    def autocast(self) -> torch.autocast:
        """The precision of the run, for the backbone's forward pass."""
        return devices.autocast(self.config.precision, self.device)
