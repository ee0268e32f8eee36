"""`python -m halfulp`, so that torchrun can start it: `torchrun -m halfulp train run.toml`."""

from halfulp.cli import main

if __name__ == "__main__":
    main()
