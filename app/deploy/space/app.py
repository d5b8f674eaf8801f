"""A Hugging Face Space: the app on the pocket base. Uploads and adapters are gone when the Space restarts."""

import os
import sys

from oft_diffusion.cli import main

# A Space listens to everyone. Set the secret OFT_AUTH to NAME:PASSWORD.
if "OFT_AUTH" not in os.environ:
    sys.exit("set the secret OFT_AUTH to NAME:PASSWORD")
# The port is gradio's own: 7860, or what the variable GRADIO_SERVER_PORT says.
served = ["--host", "0.0.0.0", "--workspace", "oft-app"]
sys.exit(main(["app", *served, "--auth", os.environ["OFT_AUTH"]]))
