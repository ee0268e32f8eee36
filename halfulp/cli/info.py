"""`halfulp info`: versions, kernel and machine."""

from halfulp.cli.show import print_table


def info() -> None:
    """Show versions, the rounding kernel in use and why, threads and GPUs."""
    from halfulp.run import environment

    facts = environment()
    facts["gpu"] = ", ".join(facts["gpu"]) or "none"
    print_table(("what", "value"), [(key.replace("_", " "), v) for key, v in facts.items()])
