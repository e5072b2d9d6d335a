"""``python -m fxquant``, which ``torchrun -m fxquant`` and ``accelerate launch -m fxquant`` run in each process."""

from fxquant.cli.__main__ import main

if __name__ == "__main__":
    main()
