"""Pipeline parallel: consecutive layers on each stage, micro-batches that follow one another (1F1B, PipeDream-Flush).

Schedules and messages are PyTorch's (`torch.distributed.pipelining`); here is what a GLM-5 needs beside them:

- a stage is the model without the layers of the others. The first has the embedding, the last the final norm, the head
  and the MTP modules; only the state [B, T, D] travels. Ids and segments are small: every stage is given them;
- a cut stands before a layer that selects for itself, so no selection travels (IndexShare);
- losses of layers on any stage (balance, indexer KL) start their own backward there: they ride on the state that
  leaves the stage, without changing it, and get a gradient of one when its gradient comes back;
- MTP embeds the next tokens on the last stage: it holds a copy of the embedding, both copies' gradients are summed
  after the last micro-batch, equal updates keep them equal. Norms over all weights must count the copy once (`copies`).

The loss function of a stage of training runs on every pipeline stage with what the model of that stage gives. Left out:
interleaved schedules, evaluation and samples of a cut model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor

from glm5.errors import InputError
from glm5.model import GLM5
from glm5.model.cache import Cache
from glm5.model.output import ModelOutput, Replay
from glm5.parallel.plan import stage_layers

M = TypeVar("M")
K = TypeVar("K")


class PipelinePart(GLM5):
    """The layers of one stage. Its forward pass goes on from `incoming` and leaves its state in `outgoing`.

    Only the last stage's output has logits; the others' have no columns. Router records and KL terms are of its layers.
    """

    first: bool
    last: bool
    pipeline: Pipeline
    incoming: Tensor | None
    outgoing: Tensor | None

    def _run(
        self,
        input_ids_BT: Tensor,
        positions_BT: Tensor | None,
        segment_ids_BT: Tensor | None,
        cache: Cache | None,
        sparse: bool,
        logits_to_keep: int,
        collect: frozenset[str] = frozenset(),
        replay: Replay | None = None,
    ) -> ModelOutput:
        h_BTD = self.model.embed_tokens(self.rows.part(input_ids_BT)) if self.first else self.incoming
        if h_BTD is None or cache is not None:
            raise InputError(
                "A model that is cut into pipeline stages runs inside Pipeline.step only, without a cache."
            )
        h_BTD, run, records = self.run_layers(
            h_BTD, input_ids_BT, positions_BT, segment_ids_BT, None, sparse, collect, replay
        )
        if self.last:
            return self.finish(h_BTD, input_ids_BT, run, records, logits_to_keep)
        self.outgoing = h_BTD
        return ModelOutput(
            logits=h_BTD[..., :0],
            router=tuple(record for record in records if record is not None),
            selection=run.selection,
            indexer_kl=self.mean_kl(run),
        )


def apply_pipeline_parallel(model: GLM5, group: ProcessGroup) -> None:
    """Takes from `model`, in place, what other stages of `group` hold. Before tensor parallelism and FSDP."""
    stage, stages = group.rank(), group.size()
    kept = stage_layers(model.config, stages)[stage]
    for name in list(model.model.layers._modules):
        if int(name) not in kept:  # deleted by name: the others keep their numbers, which checkpoints know
            del model.model.layers._modules[name]
    model.__class__ = PipelinePart
    assert isinstance(model, PipelinePart)
    model.first, model.last = stage == 0, stage == stages - 1
    model.incoming = model.outgoing = None
    model.pipeline = Pipeline(group)
    if not model.first and not (model.last and len(model.mtp)):
        model.model.embed_tokens = None
    if not model.last:
        model.model.norm = model.lm_head = None  # type: ignore[assignment]
        model.mtp = nn.ModuleList()


def copies(model: GLM5) -> list[nn.Parameter]:
    """Parameters that the first stage holds as well: the embedding beside the MTP modules."""
    if isinstance(model, PipelinePart) and model.last and not model.first and model.model.embed_tokens is not None:
        return [model.model.embed_tokens.weight]
    return []


class Pipeline:
    """Runs the micro-batches of a step through the stages of `group`. Its model is given with every step."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._worker: _Worker | None = None
        self._schedules: dict[tuple[object, ...], Schedule1F1B] = {}

    def step(
        self,
        model: PipelinePart,
        micro_batches: Sequence[M],
        loss: Callable[[GLM5, M], tuple[Tensor, K]],
        state_shape: tuple[int, int, int],
        dtype: torch.dtype = torch.float32,
    ) -> list[K]:
        """Forward and backward of all micro-batches; gradients are summed into the parameters.

        loss: of a stage and a micro-batch, its summand of the step's loss and whatever the caller keeps of it
        (detached; given back in order). state_shape: B, T (this rank's tokens) and D of every micro-batch; dtype: of
        the state. Raises InputError for fewer micro-batches than stages.
        """
        count = len(micro_batches)
        if count < self.group.size():
            raise InputError(
                f"{count} micro-batch(es) cannot fill {self.group.size()} pipeline stages; give at least as many "
                "(a smaller micro_rows)."
            )
        worker = self._worker = self._worker or _Worker(model)
        if worker.model is not model:
            raise InputError("A pipeline runs the model of its first step; make another Pipeline for another model.")
        key = (count, *state_shape, dtype)
        if key not in self._schedules:
            self._schedules[key] = self._schedule(worker, count, state_shape, dtype)
        worker.begin(micro_batches, loss)
        numbers = torch.arange(count, device=worker.device)
        given = (numbers,) if model.first else ()
        self._schedules[key].step(*given, number=numbers, target=numbers, return_outputs=False)
        self._sum_copies(model)
        return worker.kept

    def _schedule(
        self, worker: _Worker, count: int, state_shape: tuple[int, int, int], dtype: torch.dtype
    ) -> Schedule1F1B:
        model, device = worker.model, worker.device
        state = torch.empty(state_shape, dtype=dtype, device="meta", requires_grad=True)
        number = torch.empty(1, dtype=torch.int64, device="meta")
        total = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        stage = PipelineStage(
            worker, self.group.rank(), self.group.size(), device, group=self.group,
            input_args=number if model.first else state, output_args=total if model.last else state,
        )  # fmt: skip
        return Schedule1F1B(stage, count, loss_fn=lambda total, target: total, scale_grads=False)

    def _sum_copies(self, model: PipelinePart) -> None:
        """Adds up the gradients of the embedding and of its copy on the last stage."""
        embedding = model.model.embed_tokens
        last = self.group.size() - 1
        if embedding is None or model.config.num_nextn_predict_layers == 0 or last == 0:
            return
        if not embedding.weight.requires_grad:
            return
        if embedding.weight.grad is None:
            embedding.weight.grad = torch.zeros_like(embedding.weight)
        gradient = embedding.weight.grad
        mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        theirs = torch.empty_like(mine)
        peer = dist.get_global_rank(self.group, last if model.first else 0)
        for work in dist.batch_isend_irecv([
            dist.P2POp(dist.isend, mine.clone(), peer, self.group), dist.P2POp(dist.irecv, theirs, peer, self.group)
        ]):  # fmt: skip
            work.wait()
        mine.add_(theirs)


class _Worker(nn.Module):
    """What PyTorch's stage calls: the loss function on the part of the model that is here."""

    def __init__(self, model: PipelinePart) -> None:
        super().__init__()
        self.model = model
        self.device = next(model.parameters()).device
        self.micro_batches: Sequence[Any] = ()
        self.loss: Callable[[GLM5, Any], tuple[Tensor, Any]]
        self.kept: list[Any] = []

    def begin(self, micro_batches: Sequence[Any], loss: Callable[[GLM5, Any], tuple[Tensor, Any]]) -> None:
        self.micro_batches, self.loss, self.kept = micro_batches, loss, []

    def forward(self, incoming: Tensor, *, number: Tensor) -> Tensor:
        """State [B, T, D] for the next stage; on the last stage this micro-batch's loss."""
        model = self.model
        model.incoming = None if model.first else incoming
        total, keep = self.loss(model, self.micro_batches[int(number)])
        self.kept.append(keep)
        outgoing, model.incoming, model.outgoing = model.outgoing, None, None
        if model.last:
            return total.float()
        assert outgoing is not None
        if total.requires_grad:
            return _Ride.apply(outgoing, total)
        return outgoing if outgoing.requires_grad else outgoing.detach().requires_grad_()


class _Ride(torch.autograd.Function):
    """The state, unchanged; its backward pass also starts that of a loss."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones((), dtype=ctx.dtype)
