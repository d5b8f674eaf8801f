"""Notes of other libraries that only look like errors. These go, and nothing else does.

Importing diffusers has transformers note, for each of several classes, that torchvision is not installed, which nothing
here needs; and with torchao installed, has that note which of its libraries for certain cards this machine cannot load,
and what of it newer versions will do without. Of an int8 base bitsandbytes notes at every call of every layer that it
rounds inputs, and on processors with bfloat16 instructions that it would fetch a kernel, were `kernels` installed.
"""

import logging


class _Without(logging.Filter):
    """Leaves out what has these words in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return self.name not in record.getMessage()


for _logger, _words in (
    ("transformers.utils.import_utils", "requires torchvision"),
    ("torchao", "Failed to load"),
    ("torch.utils._pytree", "is an Enum subclass"),
    ("diffusers.quantizers.torchao.torchao_quantizer", "Unable to import `torchao` Tensor objects"),
    ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast"),
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
):
    logging.getLogger(_logger).addFilter(_Without(_words))
