"""How sharp the loss is in each block, and what follows: `halfulp.sharpness(model, batches, …)`.

The package is also the function `halfulp.sharpness.measure.sharpness`, so that the name that users
call is the name of the room it lives in.
"""

from halfulp.callable import make_callable

make_callable(__name__, "halfulp.sharpness.measure", "sharpness")
