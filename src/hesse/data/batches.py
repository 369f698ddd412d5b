"""Batches of any kind that users have, as what calibration takes: (inputs, targets) pairs, or lists of token ids."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesse.curvature import CrossEntropy, Loss, Objective
from hesse.data.sources import TokenData
from hesse.errors import DataError, OptionError

LABELS = ("labels", "label", "targets")
IGNORED = -100  # a target that is masked
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def token_ids(data: Any) -> str | Path | TokenData | None:
    """Return data that is text or token ids as `read_samples` takes it; None if it is batches of another kind.

    That is a file or a data set id, lists of token ids, and a `datasets.Dataset` with a column `input_ids` and no
    labels, whose padding is cut by its `attention_mask`.
    """
    if isinstance(data, str | Path):
        return data
    columns = getattr(data, "column_names", None)
    if columns is not None and "input_ids" in columns and not set(LABELS) & set(columns):
        return token_records(data)
    if not isinstance(data, Sequence) or not data:
        return None
    if all(isinstance(sample, Sequence) and sample and all(type(token) is int for token in sample) for sample in data):
        return [list(sample) for sample in data]
    return None


def token_records(dataset: Any) -> list[list[int] | dict[str, Any]]:
    """Return the token ids of a `datasets.Dataset`, with mask and labels where it has these columns."""
    columns = [name for name in ("input_ids", "attention_mask", "labels") if name in dataset.column_names]
    if len(columns) == 1:
        return [list(map(int, ids)) for ids in dataset["input_ids"]]
    return [{name: row[name] for name in columns} for row in dataset.select_columns(columns)]


def unpadded_ids(batches: Sequence[Any]) -> list[list[int]] | None:
    """Return the samples of {"input_ids", ...} batches of a language model; None if more than the ids matters in them.

    Padding, labels that are not the ids themselves, and other inputs matter.
    """
    samples: list[list[int]] = []
    for batch in batches:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            return None
        ids, mask = torch.as_tensor(batch["input_ids"]), batch.get("attention_mask")
        labels = next((batch[name] for name in LABELS if batch.get(name) is not None), ids)
        plain = ids.ndim == 2 and not set(batch) - {"input_ids", "attention_mask", *LABELS}
        if not plain or not torch.equal(torch.as_tensor(labels), ids):
            return None
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            return None
        samples += ids.tolist()
    return samples or None


def check_batches(data: Any) -> None:
    """Check that data can be walked.

    Raises:
        OptionError: it is text or nothing, or cannot be iterated.
    """
    if data is None or isinstance(data, str | Path):
        raise OptionError("a module needs data: give pairs (inputs, targets), such as a DataLoader or a list")
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise OptionError(
            f"data is {type(data).__name__}: give pairs (inputs, targets), such as a DataLoader or a list"
        )


@dataclass(frozen=True, eq=False)
class Pairs:
    """Batches of any kind as (inputs, targets), made anew in each walk, so that a DataLoader shuffles as ever.

    A batch is such a pair, or a dictionary whose `labels` are the targets and whose other entries are the inputs. For
    a `language_model` the targets are the tokens after each; without labels they are the ids that are not padded. For
    an encoder-decoder the targets are the labels, and `decoder_inputs` of them join the inputs where these have none.
    """

    batches: Iterable[Any]
    language_model: bool = False
    decoder_inputs: Callable[[Tensor], Tensor] | None = None

    @property
    def generator(self) -> Any:
        """Return the random numbers of a DataLoader, which a training that resumes sets back; None without."""
        return getattr(self.batches, "generator", None)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """Walk the batches.

        Raises:
            OptionError: a batch is neither a pair nor a dictionary with labels.
            DataError: a batch holds no sample.
        """
        for number, batch in enumerate(self.batches):
            inputs, targets = _pair(number, batch, self.language_model)
            if self.decoder_inputs is not None and isinstance(inputs, dict) and not set(inputs) & set(DECODER_INPUTS):
                inputs = {**inputs, DECODER_INPUTS[0]: self.decoder_inputs(targets)}
            if any(isinstance(part, Tensor) and part.numel() == 0 for part in (inputs, targets)):
                raise DataError(f"batch {number} holds no sample: leave it out")
            yield inputs, targets


def module_objective(
    model: nn.Module,
    data: Any,
    loss: Loss | nn.Module | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    names: Sequence[str] | None = None,
) -> Objective:
    """Return the loss of any module on batches of any kind, as a function of the parameters `names`.

    Without `names` these are the parameters that take a gradient, without a `loss` it is the cross-entropy, and without
    `forward` the model is called as `model(inputs)`, of a dictionary `model(**inputs)`, and gives logits.

    Raises:
        OptionError: the data cannot be walked, or walked only once, or a name is no parameter that takes a gradient.
    """
    from hesse.networks.encoder_decoder import decoder_inputs_of  # which needs transformers, and seconds
    from hesse.networks.layout import is_language_model

    check_batches(data)
    shifted = decoder_inputs_of(model)
    objective = Objective.of(model, CrossEntropy() if loss is None else loss, data, names, forward or _outputs)
    return replace(objective, data=Pairs(data, shifted is None and is_language_model(model), shifted))


def _outputs(model: nn.Module, inputs: Any) -> Tensor:
    """Return the outputs of a model that takes keyword arguments, or gives an object with logits."""
    outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    result: Tensor = getattr(outputs, "logits", outputs)
    return result


def _pair(number: int, batch: Any, language_model: bool) -> tuple[Any, Tensor]:
    if isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    if not isinstance(batch, Mapping):
        raise OptionError(
            f"batch {number} is {type(batch).__name__}, and must be a pair (inputs, targets) or a dictionary with "
            "labels: map the data to pairs"
        )
    inputs = {name: value for name, value in batch.items() if name not in LABELS and value is not None}
    labels = next((batch[name] for name in LABELS if batch.get(name) is not None), None)
    if labels is None and language_model and "input_ids" in inputs:
        labels = inputs["input_ids"]
        if (mask := inputs.get("attention_mask")) is not None:
            labels = labels.masked_fill(mask == 0, IGNORED)
    if not isinstance(labels, Tensor):
        raise OptionError(f"batch {number} has no labels: give one of {', '.join(LABELS)} in each dictionary")
    if language_model:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    return inputs, labels
