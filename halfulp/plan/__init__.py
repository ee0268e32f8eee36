"""How big, how long, how precise, and what it costs: `halfulp.plan("h100", gpu_hours=1000)`.

The package is also the function `halfulp.plan.budget.plan`, so that the name that users call is the
name of the room it lives in.
"""

from halfulp.callable import make_callable

make_callable(__name__, "halfulp.plan.budget", "plan")
