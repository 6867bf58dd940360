"""Pre-train a Llama from scratch on text that is already on this machine, and watch it.

    python examples/pretrain.py                                        # ours, about three minutes on two CPU cores
    python examples/pretrain.py --optimizer adamw                      # a rival; same data, same initial weights
    python examples/pretrain.py --text my_notes/ --steps 2000          # your own text
    python examples/pretrain.py --preset 60m --dataset allenai/c4:en --tokenizer t5-base
    torchrun --nproc-per-node 2 examples/pretrain.py --parallel fsdp2 --device cpu   # weights and state divided
    python examples/pretrain.py --resume                               # after Ctrl-C, a kill or a power cut

Every run leaves a log, checkpoints and a picture of all runs under ``runs/``. ``--help`` lists everything.

The optimizer itself takes three lines, in any training loop::

    from galore_kernels import GaLoreFusedAdam8bit, galore_param_groups

    groups = galore_param_groups(model, target_modules=["attn", "mlp"], rank=128, update_proj_gap=200, scale=0.25)
    optimizer = GaLoreFusedAdam8bit(groups, lr=0.01)

``galore_kernels/pretrain/train.py`` is the loop that this file runs.
"""

from galore_kernels.pretrain import main

if __name__ == "__main__":
    raise SystemExit(main())
