"""DreamBooth with OFT on a folder of pictures. All options: `python train_scripts/train_dreambooth.py --help`.

    python train_scripts/train_dreambooth.py --config train_scripts/configs/pocket.toml
    python train_scripts/train_dreambooth.py --config train_scripts/configs/sd15.toml \
        --model path/to/stable-diffusion-v1-5 --instance-dir photos --trigger sks --class-word dog --output-dir runs/dog
    accelerate launch --num_processes 2 train_scripts/train_dreambooth.py --config ...

The same as `oft-diffusion train`. In Python it is

    from oft_diffusion.training import TrainConfig, train

    with train(TrainConfig.from_toml("mug.toml")) as run:
        for step in run:
            print(step.step, step.loss)

and train_dreambooth_minimal.py, beside this file, tells the whole method in one short file.
"""

from __future__ import annotations

import sys

from oft_diffusion.pocket import pocket_path
from oft_diffusion.training.command import main

if __name__ == "__main__":
    sys.exit(main(program=f"python {sys.argv[0]}", shipped={"pocket": pocket_path}))
