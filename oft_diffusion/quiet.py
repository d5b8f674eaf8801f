"""Importing diffusers has transformers note, for each of several classes, that torchvision is not installed.

Nothing here needs torchvision, so these notes only look like errors. They go, and nothing else does.
"""

import logging

logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
