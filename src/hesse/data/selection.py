"""Which tokens a run looks at: to calibrate, to probe the loss, and to measure the result."""

from dataclasses import dataclass
from pathlib import Path

from hesse.data import Samples, read_samples
from hesse.errors import check_at_least
from hesse.networks.network import Network
from hesse.networks.vocabulary import check_ids

DEFAULT_LENGTH = 2048
PROBE_TOKENS = 1024  # for diagonal sensitivities, and again for the check; at least two samples each


Data = str | Path | list[list[int]] | None  # a file or a datasets id, ready token ids, or None for the shipped text


@dataclass(frozen=True)
class Calibration:
    """Which tokens a run looks at, and how many at a time.

    Raises:
        OptionError: there would be none.
    """

    data: Data = None
    samples: int = 128
    length: int | None = None  # tokens a sample; None: as many as the model has positions for, at most DEFAULT_LENGTH
    seed: int = 0  # of the choice of samples and of sampled labels
    batch_size: int | None = None  # samples that go through the model together; no result depends on it

    def __post_init__(self) -> None:
        check_at_least("--samples", self.samples, 1)
        check_at_least("--length", self.length, 2)
        check_at_least("--batch-size", self.batch_size, 1)


@dataclass(frozen=True, eq=False)
class Selection:
    """The samples of a run."""

    samples: Samples  # to calibrate on
    probes: Samples  # some of them, for the sensitivities
    check: Samples  # to measure the result with
    held_out: bool  # whether `check` is no part of `samples`
    notes: list[str]  # departures from what was asked


def select_samples(
    model: Path, calibration: Calibration, network: Network, probe_tokens: int = PROBE_TOKENS
) -> Selection:
    """Samples to calibrate on, and others to check the result with (none where the data gives ready tokens).

    The probes are the first of the samples, `probe_tokens` of them or a little more.

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
    )
    check_ids(network, samples.batches(1))
    probes, check = (samples.first(_count(tokens, len(samples.ids[0]))) for tokens in (probe_tokens, PROBE_TOKENS))
    notes, asked = [], calibration.length
    if asked is not None and asked > length and not samples.exact:
        notes.append(f"samples have {length} tokens, not {asked}: the model has positions for no more")
    return Selection(samples, probes, reserved if reserved.ids else check, bool(reserved.ids), notes)


def _count(tokens: int, length: int) -> int:
    return max(tokens // length, 2)


def sample_length(network: Network, asked: int | None) -> int:
    """Tokens a sample: as asked, but no more than the model has positions for."""
    wanted = DEFAULT_LENGTH if asked is None else asked
    return wanted if network.input_limit is None else min(wanted, network.input_limit)
