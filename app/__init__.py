"""The web app: `oft-diffusion app`, or `python -m app` in a checkout."""
