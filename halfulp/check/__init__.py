"""What every rounding of a model costs before it runs: `halfulp.check(model, batch, …)`.

The package is also the function `halfulp.check.examine.check`, so that the name that users call is
the name of the room it lives in.
"""

from halfulp.callable import make_callable

make_callable(__name__, "halfulp.check.examine", "check")
