"""Select the samples of a run: to calibrate, to probe the loss, and to measure the result."""

from dataclasses import dataclass
from pathlib import Path

from hesse.data import Samples, read_samples
from hesse.data.sources import TokenData
from hesse.errors import check_at_least
from hesse.networks.layout import check_ids
from hesse.networks.network import Network

DEFAULT_LENGTH = 2048
SAMPLES = 128  # to calibrate on, unless a command says otherwise
PROBE_TOKENS = 1024  # for the diagonals of output factors, and again for the check; at least two samples each


Data = str | Path | TokenData | None  # files or a data set id, token ids, or None for the shipped text


@dataclass(frozen=True)
class Calibration:
    """Calibration data of a run, and its batch size.

    Raises:
        OptionError: a number is too small or too large.
    """

    data: Data = None
    samples: int = SAMPLES
    length: int | None = None  # tokens per sample; None: the model's positions, at most DEFAULT_LENGTH
    seed: int = 0  # for the choice of samples and for sampled labels
    batch_size: int | None = None  # samples that go through the model together; no result depends on it
    bos: bool | None = None  # text starts with BOS, or not; None: as the tokenizer adds it

    def __post_init__(self) -> None:
        check_at_least("--samples", self.samples, 1)
        check_at_least("--length", self.length, 2)
        check_at_least("--seed", self.seed, 0)
        check_at_least("--batch-size", self.batch_size, 1)


@dataclass(frozen=True, eq=False)
class Selection:
    """Samples of a run."""

    samples: Samples  # to calibrate on
    probes: Samples  # the first of `samples`, for the backward statistics
    check: Samples  # to measure the result with
    held_out: bool  # `check` is not a part of `samples`
    notes: list[str]  # departures from the options


def select_samples(
    model: Path, calibration: Calibration, network: Network, probe_tokens: int = PROBE_TOKENS
) -> Selection:
    """Select samples to calibrate on, and held-out samples to check the result with (none for data of token ids).

    The probes are the first samples, with at least `probe_tokens` tokens.

    Raises:
        HesseError: the data or a setting cannot be used.
    """
    length = sample_length(network, calibration.length)
    samples, reserved = read_samples(
        calibration.data,
        model,
        count=calibration.samples,
        length=length,
        seed=calibration.seed,
        purpose="calibration",
        limit=network.input_limit,
        reserve=_count(PROBE_TOKENS, length),
        bos=calibration.bos,
    )
    check_ids(network.model, samples.batches(1))
    probes, check = (samples.first(_count(tokens, len(samples.ids[0]))) for tokens in (probe_tokens, PROBE_TOKENS))
    notes, asked = list(samples.notes), calibration.length
    if asked is not None and asked > length and not samples.exact:
        notes.append(f"samples have {length} tokens, not {asked}: the model has no more positions")
    return Selection(samples, probes, reserved if reserved.ids else check, bool(reserved.ids), notes)


def _count(tokens: int, length: int) -> int:
    return max(tokens // length, 2)


def sample_length(network: Network, asked: int | None) -> int:
    """Return the tokens per sample: `asked`, but at most the model's positions."""
    length = DEFAULT_LENGTH if asked is None else asked
    return length if network.input_limit is None else min(length, network.input_limit)
