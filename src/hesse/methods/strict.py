"""Base class of the options in a recipe."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Whole = Annotated[int, Field(ge=-(2**31), le=2**31)]  # bounded so that messages can print it; checked further later


class Strict(BaseModel):
    """Immutable options that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
