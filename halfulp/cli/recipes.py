"""`halfulp recipes`: the named recipes, and what one of them rounds."""

from typing import Annotated

import typer

from halfulp.cli.show import print_table


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show everything that it rounds.")] = None,
) -> None:
    """List the named recipes, or show one.

    Shows what it rounds: operands, storage, what stays high, and what is not simulated.
    """
    from halfulp.policy import FAMILY, load_recipe, recipe_names

    if name is None:
        rows = [(name, load_recipe(name).summary) for name in recipe_names()]
        family = f"A family, for example mask_e5m7: {load_recipe('mask_e5m7').summary}"
        print_table(("recipe", "what it does"), sorted([*rows, (FAMILY, family)]))
        return
    from halfulp.recipe import recipe_table

    recipe = load_recipe(name)
    print(f"{recipe.name}: {recipe.summary}\nsource: {recipe.source}\n")
    print_table(
        ("where", "gemm", "operand", "quantizer", "accumulate", "out"), recipe_table(recipe)
    )
