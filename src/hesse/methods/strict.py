"""What options in a recipe have in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Whole = Annotated[int, Field(ge=-(2**31), le=2**31)]  # what a message can print; what has a meaning is checked later


class Strict(BaseModel):
    """Options of which none is unknown, and none changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
