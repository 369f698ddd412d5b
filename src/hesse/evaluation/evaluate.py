"""Evaluate a checkpoint, streamed from disk block by block, against the dense model it was made from."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.locate import locate
from hesse.data import Samples, read_samples
from hesse.data.selection import Data, sample_length
from hesse.data.standards import standard_samples
from hesse.errors import OptionError, check_at_least
from hesse.evaluation.metrics import totals_of
from hesse.evaluation.tasks import Harness, TaskScore
from hesse.formats import open_checkpoint
from hesse.formats.adapter import AdaptedCheckpoint, layer_paths
from hesse.networks.device import find_device
from hesse.networks.layout import check_ids, vocabulary
from hesse.networks.network import CheckpointNetwork, each_loaded
from hesse.passes.stream import StreamBatch, advance, evaluation_batch, finish, start
from hesse.progress import Clock, Progress, Silence
from hesse.result import LossChange, Report, Result
from hesse.version import versions

LOGITS_HELD = 6  # copies of a batch's logits that `compare` holds at most, both models' and temporaries


@dataclass(frozen=True, kw_only=True)
class _Quality:
    kind: str
    samples: int
    length: int  # tokens of the longest sample
    tokens: int
    perplexity: float | None = None
    reference_loss: float | None = None
    loss_increase: float | None = None
    kl: float | None = None  # mean KL(reference || model)
    kl_standard_error: float | None = None
    top1_agreement: float | None = None  # share of tokens whose most likely next token is the reference's
    top5_agreement: float | None = None  # mean share of the reference's 5 most likely next tokens among the model's 5
    hidden_error: float | None = None  # encoders: ½‖h - h_ref‖² per token
    hidden_relative_error: float | None = None  # encoders: ‖h - h_ref‖² / ‖h_ref‖²
    hidden_cosine: float | None = None
    parameters: int
    bytes: int
    bits_per_weight: float  # 8 · bytes of all stored tensors / parameters


@dataclass(frozen=True, kw_only=True)
class Evaluation(_Quality):
    """Quality and size of a checkpoint; fields that need a reference or a language model are None without it.

    Losses and divergences are in nats per token, over all tokens except the first of each sample.
    """

    loss: float | None = None

    @property
    def difference(self) -> float:
        """Return the divergence from the reference: `kl`, or `hidden_error` for an encoder."""
        difference = self.hidden_error if self.kl is None else self.kl
        assert difference is not None, "evaluated without a reference"
        return difference

    def difference_name(self, changed: str) -> str:
        """Return the name of `difference`, with `changed` as the model's name."""
        return "half squared error of hidden states" if self.kl is None else f"KL(dense || {changed})"

    def loss_change(self, changed: str, held_out: bool, predicted: float | None = None) -> LossChange:
        """Return `difference` as reports hold it, with `changed` as the model's name."""
        return LossChange(
            name=self.difference_name(changed),
            predicted=predicted,
            measured=self.difference,
            standard_error=self.kl_standard_error,
            samples=self.samples,
            held_out=held_out,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(_Quality, Report):
    """Quality and size of a checkpoint; fields that need a reference or a language model are None without it.

    `loss` is the divergence from the reference; `kl` and the others are as in `Evaluation`, in nats per token.
    """

    reference: str | None
    model_loss: float | None
    standard: str | None = None  # the text that papers print perplexity on, if it was measured on that
    tasks: list[TaskScore] = field(default_factory=list)  # of lm-evaluation-harness

    @classmethod
    def of(cls, evaluation: Evaluation, model: str, reference: str | None, seconds: float) -> "EvaluationReport":
        """Return the report of an evaluation of `model` against `reference`, as the user named them."""
        values = {name: value for name, value in vars(evaluation).items() if name != "loss"}
        return cls(
            verb="evaluate",
            model=model,
            reference=reference,
            model_loss=evaluation.loss,
            loss=None if reference is None else evaluation.loss_change("model", held_out=True),
            seconds={"total": seconds},
            versions=versions(),
            **values,
        )


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    merge_adapter: str | Path | None = None,
    standard: str | None = None,
    tasks: Sequence[str] = (),
    data: Data = None,
    samples: int | None = None,
    length: int | None = None,
    batch_size: int | None = None,
    bos: bool | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Result[EvaluationReport]:
    """Measure the loss, perplexity and size of a model on disk, and its divergence from a reference.

    Args:
        model: a model folder, `default`, or a hub id; dense, or compressed by Hesse or llm-compressor.
        reference: the dense model to compare with.
        merge_adapter: a LoRA folder in PEFT's layout, such as `repair` writes, to add to the model.
        standard: `wikitext` for perplexity as papers print it: the test split of wikitext-2-raw-v1 joined by empty
            lines, encoded in one call, and cut into contiguous windows of 2048 tokens. `data` is then a file of the
            split, or a datasets id in the local cache.
        tasks: names of lm-evaluation-harness's tasks, or YAML files of tasks, to run on the model and the reference in
            this process. The harness loads the whole model with transformers; the tasks' data must be on this machine.
        data: as for `compress`; None for the shipped held-out text.
        samples: number of windows, from the start of the text, or fewer if the text has fewer; None for all.
        length: tokens per window; None for 2048 or the model's positions, whichever is less.
        batch_size: number of windows per batch.
        bos: start windows of text with BOS, or not; None for what the tokenizer does.
        device: `auto`, `cpu`, or `cuda`.
        progress: receives each phase and step.

    Raises:
        HesseError: the subclass and message say what is wrong and what to do.
    """
    check_at_least("--samples", samples, 1)
    check_at_least("--length", length, 2)
    check_at_least("--batch-size", batch_size, 1)
    if tasks and merge_adapter is not None:
        raise OptionError("--tasks runs a model as its folder has it: merge the adapter first, or leave out --tasks")
    clock, place = Clock(), find_device(device)
    harness = Harness(tasks) if tasks else None
    folder = locate(model)
    checkpoint = open_checkpoint(folder)
    network = CheckpointNetwork(checkpoint, torch.float32, place)
    if merge_adapter is not None:
        checkpoint = AdaptedCheckpoint(folder, Path(merge_adapter), layer_paths(network))
    chosen, notes = _samples(standard, data, folder, network, samples, length, bos)
    batches = chosen.batches(batch_size or evaluation_batch(network, chosen.longest))
    other = None if reference is None else locate(reference)
    dense = None if other is None else open_checkpoint(other)
    evaluation = evaluate_checkpoint(checkpoint, batches, dense, place, progress or Silence())
    scores = [] if harness is None else harness.run(folder, other, place, batch_size)
    names = str(model), None if reference is None else str(reference)
    report = EvaluationReport.of(evaluation, *names, clock.total)
    return Result(replace(report, standard=standard, tasks=scores, notes=notes))


def _samples(
    standard: str | None,
    data: Data,
    folder: Path,
    network: CheckpointNetwork,
    count: int | None,
    length: int | None,
    bos: bool | None,
) -> tuple[Samples, list[str]]:
    """Return the samples to evaluate on, and notes on them."""
    limit = network.input_limit
    if standard is None:
        length = sample_length(network, length)
        chosen, _ = read_samples(
            data, folder, count=count, length=length, seed=0, purpose="evaluation", limit=limit, bos=bos
        )
        return chosen, list(chosen.notes)
    if network.kind == "encoder":
        raise OptionError(f"an encoder has no perplexity: leave out --standard {standard}, and give --data")
    if bos is not None:
        raise OptionError(f"--standard {standard} has the special tokens that papers use: leave out --bos and --no-bos")
    if data is not None and not isinstance(data, str | Path):
        raise OptionError(f"--standard {standard} takes a text, not token ids: give the file of the split")
    return standard_samples(standard, data, folder, count, length, limit)


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    batches: list[Tensor],
    reference: Checkpoint | None,
    device: torch.device,
    progress: Progress,
) -> Evaluation:
    """Evaluate `checkpoint` on batches of token ids (samples, tokens), in float32 whatever the checkpoint's type.

    Raises:
        DataError: a token is outside the vocabulary, or an encoder is evaluated without a reference.
        OptionError: model and reference are of different kinds or vocabularies.
    """
    network = CheckpointNetwork(checkpoint, torch.float32, device)
    if network.kind == "encoder" and reference is None:
        raise OptionError("an encoder has no loss of its own: give --reference, the dense model to compare with")
    other = None if reference is None else CheckpointNetwork(reference, torch.float32, device)
    if other is not None and (other.kind != network.kind or vocabulary(other.model) != vocabulary(network.model)):
        raise OptionError("model and reference have different kinds or vocabularies, so they cannot be compared")
    check_ids(network.model, batches)
    flows = pass_through(network, batches, progress, "evaluate")
    dense = None if other is None else pass_through(other, batches, progress, "evaluate reference")
    return compare(network, flows, other, dense, progress)


def pass_through(
    network: CheckpointNetwork, batches: list[Tensor], progress: Progress, phase: str
) -> list[StreamBatch]:
    """Run all batches through all blocks.

    Raises:
        DataError: a block's output is not finite.
    """
    progress.begin(phase, len(network.blocks))
    flows = start(network, batches)
    for index, block in each_loaded(network):
        advance(flows, block.module, index, block.name)
        progress.advance()
    return flows


def compare(
    network: CheckpointNetwork,
    flows: list[StreamBatch],
    other: CheckpointNetwork | None,
    dense: list[StreamBatch] | None,
    progress: Progress,
) -> Evaluation:
    """Evaluate `flows`, which have passed all blocks of `network`, against the flows `dense` of the network `other`."""
    totals = totals_of(network)
    progress.begin("compare", len(flows))
    with network.surroundings() as model, ExitStack() as stack, torch.no_grad():
        reference_model = None if other is None else stack.enter_context(other.surroundings())
        for number, flow in enumerate(flows):
            result, expected = finish(network, model, flow), None
            if other is not None and reference_model is not None and dense is not None:
                expected = finish(other, reference_model, dense[number])
            totals.add(result, flow.targets, expected)
            progress.advance()
    parameters = sum(p.numel() for p in network.model.parameters())
    return Evaluation(
        kind=network.kind,
        samples=sum(len(flow.ids) for flow in flows),
        length=max(flow.ids.shape[1] for flow in flows),
        tokens=totals.tokens,
        parameters=parameters,
        bytes=network.checkpoint.file_bytes,
        bits_per_weight=8 * network.checkpoint.stored_bytes / parameters,
        **totals.quality(),
    )
