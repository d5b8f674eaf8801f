"""Notes of other libraries that only look like errors. These go, and nothing else does.

Importing diffusers has transformers note, for each of several classes, that torchvision is not installed, which nothing
here needs. Of an int8 base bitsandbytes notes at every call of every layer that it rounds inputs.
"""

import logging


class _Without(logging.Filter):
    """Leaves out what has these words in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return self.name not in record.getMessage()


for _logger, _words in (
    ("transformers.utils.import_utils", "requires torchvision"),
    ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast"),
):
    logging.getLogger(_logger).addFilter(_Without(_words))
