"""`halfulp info`: versions, kernel and machine."""

from halfulp.cli.show import print_table


def info() -> None:
    """Show versions, kernel, threads and GPUs.

    Says which kernel rounds and why.
    """
    from halfulp.environment import environment

    facts = environment()
    facts["gpu"] = ", ".join(facts["gpu"]) or "none"
    print_table(("what", "value"), [(key.replace("_", " "), v) for key, v in facts.items()])
