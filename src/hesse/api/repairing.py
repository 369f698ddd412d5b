"""`hesse.repair`: a low rank beside the layers of any compressed checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from hesse.api.options import Data, calibration_of, find_device
from hesse.checkpoints.locate import locate
from hesse.jobs.repair import RepairRequest, repair_checkpoint
from hesse.jobs.repair_report import RepairReport
from hesse.progress import Progress, Silence
from hesse.version import __version__


def repair(
    dense: str | Path,
    compressed: str | Path,
    out: str | Path,
    *,
    rank: int = 32,
    curvature: str = "gram",
    format: str = "adapter",
    damping: float = 0.01,
    ignore: Sequence[str] = (),
    data: Data = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RepairReport:
    """Add to each layer of a compressed model the best low rank of what it lacks of the dense model, without training.

    Args:
        dense: the model that was compressed: a folder, `default`, or a hub id.
        compressed: what came of it, by Hesse or by any program that writes dense or compressed-tensors checkpoints.
        out: the folder to write; it must not exist unless `overwrite`.
        rank: of the factors, the same for each layer.
        curvature: what the low rank is best for: "gram", each layer's outputs (EoRA, Liu et al., 2024,
            arXiv:2410.21271); "kronecker", the end loss; "identity", the weights (LoRC, Yao et al., 2023,
            arXiv:2303.08302).
        format: "adapter" for a LoRA folder of PEFT, to be loaded beside `compressed`, which stays as it is; "dense" for
            an ordinary checkpoint of the sums, as large as the dense model.
        damping: share of the Gram's mean eigenvalue that is added to it.
        ignore: patterns of layer names to leave as they are.
        data: a text, JSON lines or parquet file, a datasets id, or lists of token ids; None for the shipped text.
        samples: calibration samples, which go through the compressed model.
        length: tokens a sample; None for 2048, or as many as the model has positions for.
        seed: of the choice of samples and of sampled labels.
        batch_size: samples that go through the model together.
        device: `auto`, `cpu`, or `cuda`.
        overwrite: whether an adapter or a model folder at `out` may be replaced.
        progress: told how far the run is.

    Returns:
        Losses before and after, predicted and measured, in nats per token, for the model and predicted for each layer.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing is left at `out` then.
    """
    return repair_checkpoint(
        locate(dense),
        locate(compressed),
        Path(out),
        RepairRequest(rank, curvature, format, damping, tuple(ignore)),
        calibration_of(data, samples, length, seed, batch_size),
        device=find_device(device),
        overwrite=overwrite,
        progress=progress or Silence(),
        names=(str(dense), str(compressed)),
        version=__version__,
    )
