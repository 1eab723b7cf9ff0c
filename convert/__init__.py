"""PyTorch layouts <-> jdit."""

import jdit  # noqa: F401  jdit's public names need this package's modules: begun from here, they would be half imported
