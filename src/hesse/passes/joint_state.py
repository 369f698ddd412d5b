"""State of samples inside a decoder: its hidden states, and those of the encoder's tokens that it attends to."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class JointState:
    """The states of a decoder and of its encoder in one tensor, which passes the decoder's blocks.

    So the encoder's states are stored, resumed and differentiated with the decoder's. Both have the same first
    dimension, and may differ in the others.
    """

    entry: int  # number of the block that makes the joint state
    decoder: torch.Size
    encoder: torch.Size

    def join(self, decoder: Tensor, encoder: Tensor) -> Tensor:
        """Return both states as (samples, values, 1)."""
        return torch.cat([decoder.flatten(1), encoder.flatten(1)], dim=1).unsqueeze(-1)

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoder's and the encoder's part of a joint state."""
        decoder, encoder = state.squeeze(-1).tensor_split([self.decoder[1:].numel()], dim=1)
        return decoder.reshape(self.decoder), encoder.reshape(self.encoder)
