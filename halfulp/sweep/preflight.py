"""What can be known of a sweep before it has a directory: data, model and recipes fit together."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from halfulp.errors import ConfigError, require
from halfulp.sweep.design import Cell, Design
from halfulp.sweep.one_run import REFUSALS
from halfulp.sweep.store import write_policies


def preflight(design: Design, *, here: bool = True) -> dict[str, str]:
    """The digest of each data set as it is here, of a design whose runs can begin.

    The data are tokenized, so that workers find their tokens; models are built without values.
    `here`: the runs are on this machine and need its devices.

    Raises DataError, ConfigError and MissingExtraError for what no run could begin with, and
    ConfigError where the model cannot take the reference, or none of the other recipes.
    """
    _check_machine(design, here)
    vocab, digests = _read_data(design)
    with tempfile.TemporaryDirectory() as folder:
        policies = Path(folder) / "policies"
        write_policies(policies, design)
        for data in design.data:
            _build(design, data, vocab[data])
        refused = {
            (recipe, data): why
            for data in design.data
            for recipe in design.recipes
            if (why := _refusal(design, recipe, data, policies, vocab[data]))
        }
    _check_refused(design, refused)
    return digests


def cannot_compare(design: Design, data: str, why: str) -> ConfigError:
    """The error for a reference that is refused: nothing could be compared with it."""
    return ConfigError(
        f"the reference {design.reference} cannot be trained on {data}: {why} Mend that, or name "
        "another --reference in a new sweep."
    )


def _check_machine(design: Design, here: bool) -> None:
    from halfulp.train.parallel import device_of

    for name in design.config.run.trackers:
        require(name, "track")
    if here:
        device_of(design.config.train.device)


def _read_data(design: Design) -> tuple[dict[str, int], dict[str, str]]:
    """Size of the vocabulary and digest of every data set."""
    from halfulp.data import open_data
    from halfulp.numerics.kernel import cache_directory

    vocab, digests = {}, {}
    for name in design.data:
        section = design.data_of(name)
        data = open_data(section.corpus(), cache_directory() / "data")
        for split in ("train", "val"):
            data.windows(split, section.length)
        vocab[name], digests[name] = data.vocab, data.digest
    return vocab, digests


def _build(design: Design, data: str, vocab: int) -> None:
    from halfulp.train.model import outline

    length = design.data_of(data).length
    outline(design.config.model, vocab=vocab, length=length)


def _refusal(design: Design, recipe: str, data: str, policies: Path, vocab: int) -> str:
    """Why the model cannot take the recipe; "" if it can."""
    from halfulp.pieces import pieces
    from halfulp.train.blockwise import open_blockwise
    from halfulp.train.model import outline
    from halfulp.train.precision import Precision, load_policies

    cell = Cell(recipe, design.lrs[0], design.seeds[0], data)
    config = design.config_of(cell, Path(), policies)
    model = outline(config.model, vocab=vocab, length=config.data.length)
    try:
        open_blockwise(config, pieces(model, config.model.hints))
        Precision(model, config, load_policies(config.policy), config.model.hints).start(0)
    except REFUSALS as error:
        return str(error)
    return ""


def _check_refused(design: Design, refused: Mapping[tuple[str, str], str]) -> None:
    for (recipe, data), why in refused.items():
        if recipe == design.reference:
            raise cannot_compare(design, data, why)
    others = [recipe for recipe in design.recipes if recipe != design.reference]
    if all((recipe, data) in refused for recipe in others for data in design.data):
        (recipe, data), why = next(iter(refused.items()))
        raise ConfigError(
            f"the model takes none of the recipes but the reference {design.reference}. {recipe} "
            f"on {data}: {why} Give a recipe that it takes, or another model."
        )
