"""Strategies by which whole blocks are removed, or made of blocks that stay."""

from dataclasses import dataclass, field

from hesse.errors import OptionError
from hesse.methods.strategies import STRATEGIES
from hesse.networks.block_config import fewer_blocks_config, fewer_blocks_names
from hesse.networks.network import CheckpointNetwork
from hesse.options import setting
from hesse.scores import find_score


@dataclass(frozen=True)
class BlockRanking:
    """Remove the blocks of the lowest score, until a share of the blocks or a measured loss is reached.

    With the score "loss" blocks are removed one at a time, always the one whose removal costs least by measurement
    (greedy: AxFormer, Nagarajan et al., 2020, arXiv:2010.03688); with another in the order of their scores on the whole
    model, each removal measured as well.
    """

    score: str
    keep: float | None = setting(None, "Share of the blocks that stays; or give loss.")
    loss: float | None = setting(None, "Most that the removals may cost together, measured, in nats per token.")
    rank: int | None = field(default=None, init=False)  # beside each layer of blocks that share weights

    @property
    def name(self) -> str:
        """The method's name in a report."""
        return self.score

    def check(self) -> None:
        """Check the options.

        Raises:
            OptionError: not exactly one limit is given, or a value has no meaning.
        """
        find_score(self.score, "blocks")
        if (self.keep is None) == (self.loss is None):
            raise OptionError(
                "give one limit: --keep, the share of blocks that stays, or --loss, what removals may cost"
            )
        if self.keep is not None and not 0 < self.keep < 1:
            raise OptionError(f"--keep is {self.keep}, but must be a share of the blocks between 0 and 1, such as 0.75")
        if self.loss is not None and not 0 < self.loss < float("inf"):
            raise OptionError(f"--loss is {self.loss}: give a number of nats per token above 0")

    def number(self, blocks: int) -> int:
        """Return how many of the blocks are removed at most."""
        return blocks - 1 if self.keep is None else blocks - round(self.keep * blocks)

    def check_network(self, network: CheckpointNetwork) -> None:
        """Raise a HesseError if blocks of `network` cannot be removed so."""
        blocks = len(network.blocks)
        if not 0 < self.number(blocks) < blocks:
            raise OptionError(
                f"--keep {self.keep} of {blocks} blocks leaves {blocks - self.number(blocks)}: at least one must stay, "
                "and one be removed"
            )
        if self.rank is None:
            fewer_blocks_config(network, range(blocks))
            fewer_blocks_names(network, range(blocks))


@dataclass(frozen=True)
class BlockSharing(BlockRanking):
    """Make the blocks of the lowest score of the most similar ones that stay, scaled, plus a low rank in each layer.

    The files hold the sums, in the same bytes as before; the report counts what must be stored. Source: FlexiGPT
    (Smith et al., 2025, arXiv:2501.14713).
    """

    score: str = setting("loss", "Score that chooses the blocks: loss, cosine or quadratic.")
    rank: int | None = setting(32, "Rank beside each layer.")

    @property
    def name(self) -> str:
        return "flexigpt"

    def check(self) -> None:
        super().check()
        if self.rank is None:
            raise OptionError("flexigpt needs a rank, such as --rank 32")


STRATEGIES.register("block_ranking", BlockRanking)
STRATEGIES.register("block_sharing", BlockSharing)
