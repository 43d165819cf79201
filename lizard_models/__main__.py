"""``python -m lizard_models``: the command line, as torchrun and accelerate start it."""

from lizard_models.cli.main import main

if __name__ == "__main__":
    main()
