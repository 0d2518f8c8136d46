"""What items of the queue need to be there."""

from typing import Literal

Need = Literal["torch", "data", "models"]
