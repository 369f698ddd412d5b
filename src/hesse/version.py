"""The versions of the package and of the libraries that results depend on, from their metadata."""

import platform
from importlib.metadata import version

__version__ = version("hesse")


def versions() -> dict[str, str]:
    """Return the versions that the bytes of a result depend on, by package."""
    libraries = {name: version(name.replace("_", "-")) for name in ("torch", "transformers", "compressed_tensors")}
    return {"hesse": __version__, **libraries, "python": platform.python_version()}
