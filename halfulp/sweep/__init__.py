"""Many runs that differ in recipe, learning rate, seed and data: `halfulp.sweep(config, …)`."""

from halfulp.callable import make_callable

make_callable(__name__, "halfulp.sweep.run", "sweep")
