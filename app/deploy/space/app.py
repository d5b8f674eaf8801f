"""A Hugging Face Space: the app on the pocket base. Uploads and adapters are gone when the Space restarts."""

import sys

from oft_diffusion.cli import main

# A Space listens to everyone, which the app refuses where the secret OFT_AUTH is not set to NAME:PASSWORD.
# The port is gradio's own: 7860, or what the variable GRADIO_SERVER_PORT says.
sys.exit(main(["app", "--host", "0.0.0.0", "--workspace", "oft-app"]))
