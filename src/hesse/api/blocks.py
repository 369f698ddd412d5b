"""`hesse.drop_blocks` and `hesse.narrow`: a model with fewer blocks, or narrower ones."""

from pathlib import Path

from hesse.api.options import Data, calibration_of, find_device
from hesse.checkpoints.locate import locate
from hesse.jobs.drop_blocks import DropRequest, drop_blocks_checkpoint
from hesse.jobs.drop_report import DropReport
from hesse.jobs.narrow import NarrowReport, narrow_checkpoint
from hesse.progress import Progress, Silence


def drop_blocks(
    model: str | Path,
    out: str | Path,
    *,
    blocks: int | None = None,
    loss: float | None = None,
    importance: str = "loss",
    share_rank: int | None = None,
    data: Data = None,
    samples: int = 16,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DropReport:
    """Take whole blocks out of a model on disk, or make them of blocks that stay; transformers loads what is written.

    Args:
        model: a model folder, `default`, or a hub id; dense.
        out: the folder to write; it must not exist unless `overwrite`.
        blocks: how many go; or give `loss`.
        loss: as many go as cost no more than this together, in nats per token, measured on the samples.
        importance: "loss" takes the block whose removal costs least by measurement, one at a time (AxFormer, Nagarajan
            et al., 2020, arXiv:2010.03688); "cosine" those that turn the hidden states least (ShortGPT, Men et al.,
            2024, arXiv:2403.03853); "quadratic" those whose removal the true Fisher predicts to cost least.
        share_rank: do not take blocks out, but make each of the most similar one that stays, its outputs scaled, and a
            low rank beside each layer (FlexiGPT, Smith et al., 2025, arXiv:2501.14713). The files hold the sums, in as
            many bytes as before; the report counts what has to be stored.
        data: a text, JSON lines or parquet file, a datasets id, or lists of token ids; None for the shipped text.
        samples: that blocks are judged by.
        length: tokens a sample; None for 2048, or as many as the model has positions for.
        seed: of the choice of samples and of sampled labels.
        batch_size: samples that go through the model together.
        device: `auto`, `cpu`, or `cuda`.
        overwrite: whether a model folder at `out` may be replaced.
        progress: told how far the run is.

    Returns:
        Every block's score, what each removal cost by measurement, and what the whole change costs on other samples.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing is left at `out` then.
    """
    return drop_blocks_checkpoint(
        locate(model),
        Path(out),
        DropRequest(blocks, loss, importance, share_rank),
        calibration_of(data, samples, length, seed, batch_size),
        device=find_device(device),
        overwrite=overwrite,
        progress=progress or Silence(),
        name=str(model),
    )


def narrow(
    model: str | Path,
    out: str | Path,
    *,
    keep: float = 0.75,
    data: Data = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> NarrowReport:
    """Make a model's feed-forward layers narrower; transformers loads what is written, which is smaller and faster.

    Args:
        model: a model folder, `default`, or a hub id; dense.
        out: the folder to write; it must not exist unless `overwrite`.
        keep: share of the hidden units that stay, the same for every block.
        data: a text, JSON lines or parquet file, a datasets id, or lists of token ids; None for the shipped text.
        samples: calibration samples, which go through the narrowed model.
        length: tokens a sample; None for 2048, or as many as the model has positions for.
        seed: of the choice of samples.
        batch_size: samples that go through the model together.
        device: `auto`, `cpu`, or `cuda`.
        overwrite: whether a model folder at `out` may be replaced.
        progress: told how far the run is.

    Returns:
        Each block's error, and what the change costs on samples that were held out, in nats per token.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing is left at `out` then.
    """
    return narrow_checkpoint(
        locate(model),
        Path(out),
        keep,
        calibration_of(data, samples, length, seed, batch_size),
        device=find_device(device),
        overwrite=overwrite,
        progress=progress or Silence(),
        name=str(model),
    )
